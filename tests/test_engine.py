"""The engine against transformers' own forward pass, on a tiny random model of every architecture that it covers."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from bimos import BimosError
from bimos.engine import Engine, refusal
from bimos.engine.fit import SETTINGS, SETTINGS_AT_ONE
from bimos.generation import Sampling, continue_text
from bimos.kernels import native

pytestmark = pytest.mark.skipif(native.isa() is None, reason=f"no C++ kernels: {native.problem}")

Packed = Callable[..., PreTrainedModel]
GREEDY = Sampling(max_new_tokens=20, temperature=0, repetition_penalty=1)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"planes": 2, "experts": 1, "group": 32, "intermediate_size": 96}),
    ("llama", {"planes": 2, "experts": 2, "group": 32, "num_hidden_layers": 1}),
    ("llama", {"planes": 2, "experts": 1, "group": 32, "grouped": ("scale_group_01",)}),  # 72 inputs: a last group of 8
    ("qwen2", {"planes": 2, "experts": 1, "group": 64, "grouped": ("scale_group_int", "offset_group")}),
    ("mistral", {"planes": 1, "experts": 1, "group": 32, "grouped": ("scale_group", "offset_group")}),
    ("llama", {"experts": 1, "num_key_value_heads": 4, "num_hidden_layers": 3}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    ("qwen3", {"head_dim": 72, "num_attention_heads": 6, "num_key_value_heads": 1}),  # heads of a vector and a half, six to one of keys
    ("qwen3", {"head_dim": 80, "num_attention_heads": 5, "num_key_value_heads": 5}),
    ("qwen2", {}),
    ("qwen3", {"embedding_bits": 8, "experts": 3}),
    ("llama", {"embedding_bits": 8, "dtype": torch.bfloat16}),
]
over_cases = pytest.mark.parametrize(("kind", "options"), CASES, ids=str)


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 101, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


@over_cases
@pytest.mark.parametrize("threads", [1, 3])
def test_logits_are_those_of_transformers(kind: str, options: dict[str, Any], threads: int, packed: Packed) -> None:
    model = packed(kind, **options)
    ids = text(50)
    actual = Engine(model, threads=threads).logits(ids)  # many tokens: shared out by tokens
    expected = reference_logits(torch.nn.Module.float(model), ids)
    assert actual.shape == expected.shape
    assert (actual - expected).norm() < 5e-3 * expected.norm()


@over_cases
def test_greedy_decoding_is_that_of_transformers(kind: str, options: dict[str, Any], packed: Packed) -> None:
    model = packed(kind, **options)
    engine = Engine(model, threads=2)
    prompts = [text(n, n) for n in (1, 2, 17)]
    steps = list(engine.tokens(prompts, GREEDY, stop=False))
    model = torch.nn.Module.float(model)
    for i, prompt in enumerate(prompts):
        ids = list(prompt)
        for step in steps:
            logits = reference_logits(model, ids)[-1]
            best = logits.topk(2)
            token = step[i]
            assert token is not None
            near = best.values[0] - logits[token] < 5e-3 * logits.norm()  # a tie to rounding
            assert token == best.indices[0] or near
            ids.append(token)


@pytest.mark.parametrize("options", [{}, {"embedding_bits": 8}], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.12)])
def test_head_bits(bits: int, error: float, threads: int, options: dict[str, Any], packed: Packed) -> None:
    model = packed("qwen3", **options)
    ids = text(30)
    expected = Engine(model, threads=threads).logits(ids)
    engine = Engine(model, threads=threads, head_bits=bits)
    actual = engine.logits(ids)
    assert (actual - expected).norm() < error * expected.norm()
    assert torch.equal(actual, expected) == (bits == 8 and bool(options))  # rows of 8 bits stay what they are
    sequence = torch.ops.bimos.engine_open(engine._id)
    for i, token in enumerate(ids):  # one by one, few rows a thread
        torch.testing.assert_close(torch.ops.bimos.engine_read(engine._id, [token], [sequence], 1)[0], actual[i], rtol=1e-3, atol=1e-3)


@over_cases
def test_int8_sums(kind: str, options: dict[str, Any], packed: Packed) -> None:
    model = packed(kind, **options)
    ids = text(50)
    expected = Engine(model, threads=2).logits(ids)
    actual = Engine(model, threads=2, activation="int8").logits(ids)
    assert 3e-4 * expected.norm() < (actual - expected).norm() < 0.15 * expected.norm()


@over_cases
def test_a_cache_of_8_bits(kind: str, options: dict[str, Any], packed: Packed) -> None:
    model = packed(kind, **options)
    ids = text(50)
    expected = Engine(model, threads=2).logits(ids)
    actual = Engine(model, threads=2, cache_bits=8).logits(ids)
    assert 0 < (actual - expected).norm() < 3e-2 * expected.norm()


@pytest.mark.parametrize("bits", [16, 8])
def test_a_cache_grows(bits: int, packed: Packed) -> None:
    engine = Engine(packed("llama", max_position_embeddings=300), threads=2, cache_bits=bits)
    ids = text(300)
    whole = engine.logits(ids)  # room for all at once
    sequence = torch.ops.bimos.engine_open(engine._id)
    for i in range(0, 300, 3):
        some = torch.ops.bimos.engine_read(engine._id, ids[i : i + 3], [sequence] * 3, 2)
        assert (some - whole[i : i + 3]).norm() < 3e-3 * some.norm()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("mistral", {"sliding_window": 40}), ("qwen3", {"head_dim": 72, "num_attention_heads": 6, "num_key_value_heads": 2})],
    ids=str,
)
@pytest.mark.parametrize(("bits", "threads"), [(16, 1), (16, 3), (8, 2)])
def test_prompts_of_many_blocks(kind: str, options: dict[str, Any], bits: int, threads: int, packed: Packed) -> None:
    engine = Engine(packed(kind, max_position_embeddings=300, **options), threads=threads, cache_bits=bits)
    ids, other = text(230), text(47, 1)
    error = 3e-3 if bits == 16 else 1e-2  # of what a cache rounds the other way: few tokens go by tables, many may go by matrices

    def in_parts(*sizes: int) -> torch.Tensor:
        sequence, parts, start = torch.ops.bimos.engine_open(engine._id), [], 0
        for size in sizes:
            parts.append(torch.ops.bimos.engine_read(engine._id, ids[start : start + size], [sequence] * size, 2))
            start += size
        return torch.cat(parts)

    few = in_parts(*[2] * 115)  # too few to be turned
    for sizes in ((230,), (70, 160), (1, 64, 101, 64), (150, 3, 77)):
        assert (in_parts(*sizes) - few).norm() < error * few.norm()
    first, second, third = (torch.ops.bimos.engine_open(engine._id) for _ in range(3))
    together = torch.ops.bimos.engine_read(engine._id, ids[:90] + other + ids[:5], [first] * 90 + [second] * 47 + [third] * 5, 2)
    assert (together[:90] - few[:90]).norm() < error * few[:90].norm()
    assert (together[90:137] - engine.logits(other)).norm() < error * together[90:137].norm()
    assert (together[137:] - few[:5]).norm() < error * few[:5].norm()


def test_ends_at_the_end_of_the_text(packed: Packed) -> None:
    engine = Engine(packed("llama"), threads=1)
    free = [step[0] for step in engine.tokens([text(8)], GREEDY, stop=False)]
    engine.stop = {free[5]}
    stopped = [step[0] for step in engine.tokens([text(8)], GREEDY)]
    assert stopped == free[: free.index(free[5])]


def test_sampling_follows_the_distribution(packed: Packed) -> None:
    model = packed("llama")
    engine = Engine(model, threads=1)
    prompt = text(6)
    logits = reference_logits(torch.nn.Module.float(model), prompt)[-1] / 8
    sampling = Sampling(max_new_tokens=1, temperature=8.0, top_p=1, repetition_penalty=1, seed=5)
    draws = torch.tensor([token for step in engine.tokens([prompt] * 2000, sampling, stop=False) for token in step])
    expected = torch.softmax(logits, -1)
    counts = torch.bincount(draws, minlength=101) / 2000
    assert (counts - expected).abs().max() < 5 * (expected.max() / 2000).sqrt()
    again = torch.tensor([token for step in engine.tokens([prompt] * 2000, sampling, stop=False) for token in step])
    assert torch.equal(draws, again)


@pytest.mark.parametrize(
    "limits",
    [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.4}, {"top_k": 1}, {"top_k": 7, "top_p": 0.5, "min_p": 0.01}, {"top_p": 0.6, "min_p": 0.3}],
    ids=str,
)
def test_limits_are_those_of_transformers(limits: dict[str, Any], packed: Packed) -> None:
    from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    model = packed("llama")
    prompt = text(6)
    processors = LogitsProcessorList([TemperatureLogitsWarper(4.0)])
    for name, kind in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in limits:
            processors.append(kind(limits[name]))
    kept = processors(None, reference_logits(torch.nn.Module.float(model), prompt)[-1:])
    allowed = set(kept[0].isfinite().nonzero().flatten().tolist())
    sampling = Sampling(**{"max_new_tokens": 1, "temperature": 4.0, "top_p": 1, "repetition_penalty": 1, "seed": 1} | limits)
    drawn = {token for step in Engine(model, threads=1).tokens([prompt] * 800, sampling, stop=False) for token in step}
    assert drawn == allowed


def test_repetition_penalty_is_that_of_transformers(packed: Packed) -> None:
    model = torch.nn.Module.float(packed("llama"))
    prompt = text(12)
    sampling = Sampling(max_new_tokens=15, temperature=0, repetition_penalty=1.7)
    actual = [step[0] for step in Engine(model, threads=1).tokens([prompt], sampling, stop=False)]
    arguments = {"max_new_tokens": 15, "do_sample": False, "repetition_penalty": 1.7, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(torch.tensor([prompt]), **arguments)[0, 12:].tolist()
    assert actual == expected


def test_text_in_text_out(packed: Packed, tokenizer: Any) -> None:
    model = packed("llama", vocab_size=320, bos_token_id=0, eos_token_id=1)
    engine = Engine(model, tokenizer, threads=1)
    streamed = "".join(engine.stream("The river", GREEDY))
    assert streamed and streamed == continue_text(engine, tokenizer, "The river", GREEDY)
    whole = engine.generate("The river", GREEDY)
    assert engine.generate(["The river", "A ferry"], GREEDY)[0] == whole
    assert streamed == continue_text(torch.nn.Module.float(model), tokenizer, "The river", GREEDY)
    assert whole.replace("\ufffd", "") == streamed.replace("\ufffd", "")  # bytes that form no character are shown piece by piece
    turns = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    answer = "".join(engine.chat(turns, GREEDY))
    assert answer and answer == "".join(engine.stream(tokenizer(rendered, add_special_tokens=False)["input_ids"], GREEDY))
    nameless = Engine(model, threads=1)
    for call in (lambda: list(nameless.stream([5, 6])), lambda: nameless.chat(turns), lambda: nameless.generate("The river")):
        with pytest.raises(BimosError, match="has no tokenizer"):
            call()


def test_bad_input(packed: Packed, tokenizer: Any) -> None:
    engine = Engine(packed("llama"), tokenizer, threads=1)
    with pytest.raises(BimosError, match="prompt is empty"):
        list(engine.tokens([[]], GREEDY))
    with pytest.raises(BimosError, match="the model has 64"):
        list(engine.tokens([text(50)], GREEDY))
    with pytest.raises(BimosError, match="token 101 is not in the model's vocabulary"):
        engine.logits([101])
    with pytest.raises(BimosError, match="64 positions"):
        engine.logits(text(65))
    with pytest.raises(RuntimeError, match="not in the vocabulary"):  # of the op itself
        torch.ops.bimos.engine_read(engine._id, [101], [torch.ops.bimos.engine_open(engine._id)], 2)
    with pytest.raises(BimosError, match="threads=0"):
        Engine(packed("llama"), threads=0)
    with pytest.raises(BimosError, match="--head-bits 3"):
        Engine(packed("llama"), head_bits=3)
    with pytest.raises(BimosError, match="activation 'int2'"):
        Engine(packed("llama"), activation="int2")
    with pytest.raises(BimosError, match="--cache-bits 4"):
        Engine(packed("llama"), cache_bits=4)
    with pytest.raises(BimosError, match="no tokenizer"):
        Engine(packed("llama")).generate("The river")
    with pytest.raises(BimosError, match="--top-k -1"):
        Sampling(top_k=-1)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("gemma", {}, "architecture gemma"),
        ("phi", {}, "architecture phi"),
        ("llama", {"skip": "down_proj"}, "down_proj is not packed"),
        ("llama", {"group": 8, "experts": 1}, "no multiple of 32"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}, "rotary embedding dynamic"),
    ],
    ids=str,
)
def test_what_it_does_not_cover_is_refused(kind: str, options: dict[str, Any], reason: str, packed: Packed) -> None:
    model = packed(kind, **options)
    assert reason in str(refusal(model))
    with pytest.raises(BimosError, match="transformers' generate"):
        Engine(model)


def test_damaged_weights_are_told(packed: Packed) -> None:
    model = packed("llama")
    model.model.layers[0].mlp.down_proj.scale_out[0, 0, 3] = float("nan")
    engine = Engine(model, threads=1)
    few = dataclasses.replace(GREEDY, max_new_tokens=5)
    for sampling in (few, dataclasses.replace(few, temperature=1.0), dataclasses.replace(few, temperature=1.0, top_p=0.5)):
        with pytest.raises(BimosError, match="not finite"):
            list(engine.tokens([text(5)], sampling))
    model = packed("llama")
    model.model.layers[0].self_attn.v_proj.scale_out[0, 0, 3] = float("inf")
    with pytest.raises(BimosError, match="not finite"):
        list(Engine(model, threads=1, cache_bits=8).tokens([text(5)], few))
    model = packed("mistral")
    model.lm_head.weight.data[5, 3] = float("nan")
    with pytest.raises(BimosError, match="not finite"):
        list(Engine(model, threads=1, head_bits=4).tokens([text(5)], few))


def test_generation_settings_that_it_does_not_have(packed: Packed) -> None:
    model = packed("llama")
    for setting in (*SETTINGS, *SETTINGS_AT_ONE):
        setattr(model.generation_config, setting, 3)
        assert setting in str(refusal(model))
        for neutral in (None, 1) if setting in SETTINGS_AT_ONE else (None, 0):
            setattr(model.generation_config, setting, neutral)
            assert refusal(model) is None


def test_two_engines_and_several_threads(packed: Packed) -> None:
    engines = [Engine(packed("llama", seed=seed), threads=2) for seed in (0, 1)]
    work = [(engine, text(20, i)) for i in range(6) for engine in engines]
    expected = [list(engine.tokens([prompt], GREEDY, stop=False)) for engine, prompt in work]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda item: list(item[0].tokens([item[1]], GREEDY, stop=False)), work)) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_is_told(packed: Packed) -> None:
    engine = Engine(packed("llama"), threads=2)
    engine.logits(text(5))
    pid = os.fork()
    if pid == 0:
        try:
            engine.logits(text(5))
        except RuntimeError as error:
            os._exit(7 if "forked" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert engine.logits(text(5)).isfinite().all()


def test_an_engine_is_freed_in_a_forked_process(packed: Packed) -> None:
    engine = Engine(packed("llama"), threads=4)
    pid = os.fork()
    if pid == 0:  # whose own threads take the places, and so the handles, of those that are not here
        threads = [threading.Thread(target=time.sleep, args=(0.05,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        del engine
        for thread in threads:
            thread.join()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_seeds_have_no_end(packed: Packed) -> None:
    warm = dataclasses.replace(GREEDY, temperature=1.0, seed=2**63 - 1, max_new_tokens=2)
    assert len(list(Engine(packed("llama"), threads=1).tokens([text(5), text(5)], warm, stop=False))) == 2
    with pytest.raises(BimosError, match="--seed"):
        dataclasses.replace(GREEDY, seed=2**63)


def test_every_level(level: str, packed: Packed) -> None:
    model = packed("llama", experts=4)
    ids = text(20)
    expected = reference_logits(torch.nn.Module.float(model), ids)
    assert (Engine(model, threads=1).logits(ids) - expected).norm() < 5e-3 * expected.norm()
    assert (Engine(model, threads=1, cache_bits=8).logits(ids) - expected).norm() < 2e-2 * expected.norm()
    assert (Engine(model, threads=1, head_bits=4).logits(ids) - expected).norm() < 0.15 * expected.norm()


def test_sequences_beside_each_other(level: str, packed: Packed) -> None:
    """What is read beside a token changes its logits by rounding alone; a head of bytes whose rows and inputs fill no tile."""
    model = packed("llama", experts=4, embedding_bits=8)
    engine = Engine(model, threads=2)
    ids = text(17)
    read = torch.ops.bimos.engine_read
    alone = torch.cat([read(engine._id, [token], [torch.ops.bimos.engine_open(engine._id)], 1) for token in ids])
    for count in (2, 5, 8, 9, 17):
        sequences = [torch.ops.bimos.engine_open(engine._id) for _ in range(count)]
        together = read(engine._id, ids[:count], sequences, 1)
        assert (together - alone[:count]).norm() < 5e-3 * alone[:count].norm()
