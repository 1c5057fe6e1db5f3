"""Tiny random models of every architecture go through all stages, are saved, loaded and generate; others are refused."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from bimos import BimosError
from bimos.config import RunConfig
from bimos.kernels import native
from bimos.methods import ste
from bimos.methods.binarymos import BinaryMoSConfig
from bimos.models import convertible_linears, decoder_blocks, load_model, load_teacher
from bimos.packing.linear import PackedLinear
from bimos.quantize import plan, quantize

SMALL = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
GATED = SMALL | TOKENS | {"num_key_value_heads": 2, "intermediate_size": 72}
KINDS: dict[str, dict[str, Any]] = {
    "llama": GATED | {"tie_word_embeddings": True},
    "mistral": GATED | {"sliding_window": 8, "tie_word_embeddings": False},
    "qwen2": GATED | {"tie_word_embeddings": True},
    "qwen3": GATED | {"head_dim": 16},
    "gemma": GATED | {"head_dim": 16},
    "gemma2": GATED | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0},
    "opt": SMALL | TOKENS | {"ffn_dim": 72, "word_embed_proj_dim": 32, "dropout": 0.5},
    "gpt_neox": SMALL | TOKENS | {"intermediate_size": 72, "tie_word_embeddings": False},
    "phi": SMALL | TOKENS | {"intermediate_size": 72},
}
LINEARS = {"opt": 6, "gpt_neox": 4, "phi": 6}  # a block; the others have 7
QUICK: dict[str, Any] = {
    "tokens": 32 * 4 * 24,
    "sequence_length": 32,
    "initialise": {"sequences": 8, "refit": False},
    "blocks": {"tokens": 512, "epochs": 4, "batch_size": 4, "lr_latent": 0.01},
    "distill": {"batch_size": 4, "lr_latent": 5e-3, "lr_scale": 3e-3},
}
METHOD = BinaryMoSConfig(num_experts=2, compensation=0)  # a start that leaves something to train


def teacher(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """With weights, norms and biases large enough that losing one of them shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(KINDS[kind] | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return model.eval().to(dtype)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the stages report, which `quantize` keeps to itself."""
    found: list[dict[str, Any]] = []
    module = sys.modules["bimos.quantize"]
    original = module.train

    def watch(*arguments: Any, **options: Any) -> Any:
        student, stages = original(*arguments, **options)
        found.extend(stages)
        return student, stages

    monkeypatch.setattr(module, "train", watch)
    return found


def assert_trained(reports: list[dict[str, Any]]) -> None:
    assert [report["name"] for report in reports] == ["blocks", "distill"]
    for report in reports:
        assert report["loss_last"] < 0.97 * report["loss_first"], report


def assert_saves_and_loads(packed: PreTrainedModel, directory: Path) -> None:
    """The same logits and the same text, and a second save has the same bytes in every tensor."""
    packed.save_pretrained(directory / "first")
    loaded = AutoModelForCausalLM.from_pretrained(directory / "first")
    ids = torch.randint(2, 320, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = packed(ids).logits
        assert torch.isfinite(logits).all() and torch.equal(loaded(ids).logits, logits)
    texts = [model.generate(ids[:, :5], max_new_tokens=6, do_sample=False) for model in (packed, loaded)]
    assert texts[0].shape[1] > 5 and torch.equal(*texts)
    loaded.save_pretrained(directory / "second")
    first, second = (safetensors.torch.load_file(directory / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("kind", list(KINDS))
def test_all_stages(kind: str, tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path, reports: list[dict[str, Any]]) -> None:
    model = teacher(kind)
    model.train()  # as it comes from training: what it says must not depend on dropout
    before = copy.deepcopy(model.state_dict())
    packed = quantize(model, METHOD, data=str(text_file), tokenizer=tokenizer, **QUICK)
    assert_trained(reports)
    layers = [name for name, module in packed.named_modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 2 * LINEARS.get(kind, 7) and layers == list(convertible_linears(model))
    assert not packed.training
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in layers)
    assert_saves_and_loads(packed, tmp_path)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_compensated_start_is_the_better_one(
    kind: str, tokenizer: PreTrainedTokenizerFast, text_file: Path, reports: list[dict[str, Any]]
) -> None:
    """The default start, on every architecture: its blocks are nearer to the teacher's, before any training."""
    off = {"tokens": None, "blocks": {"enabled": False, "batch_size": 4}, "distill": {"enabled": False}}
    for method, refit in ((METHOD, False), (BinaryMoSConfig(num_experts=2), True)):
        settings = QUICK | off | {"initialise": {"sequences": 32, "refit": refit}}
        quantize(teacher(kind), method, data=str(text_file), tokenizer=tokenizer, **settings)
    plain, compensated = (report["loss_last"] for report in reports)
    assert compensated < 0.9 * plain


def test_it_says_what_its_teacher_says(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    """Training, not only its losses: the packed model is nearer to the teacher than the start is."""
    model = teacher("llama")
    ids = torch.tensor(tokenizer(text_file.read_text())["input_ids"][:256]).view(8, 32)
    off = {"enabled": False}
    distances = []
    for settings in (QUICK | {"blocks": QUICK["blocks"] | off, "distill": off, "tokens": None}, QUICK):
        packed = quantize(model, METHOD, data=str(text_file), tokenizer=tokenizer, **settings)
        with torch.no_grad():
            ours, theirs = (m(ids).logits.log_softmax(-1) for m in (packed, model))
        distances.append(nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True).item())
    assert distances[1] < 0.8 * distances[0]


def test_each_stage_goes_on_from_the_one_before(tokenizer: PreTrainedTokenizerFast, text_file: Path, reports: list[dict[str, Any]]) -> None:
    """One step of distillation on the same windows: behind reconstructed blocks it starts from a smaller loss."""
    step = QUICK | {"tokens": 128, "initialise": {"sequences": 16, "refit": False}}
    for blocks in (QUICK["blocks"] | {"enabled": False}, QUICK["blocks"] | {"epochs": 6}):
        quantize(teacher("opt"), METHOD, data=str(text_file), tokenizer=tokenizer, **(step | {"blocks": blocks}))
    start, _, trained, first_step = (report["loss_first"] for report in reports)
    assert trained == pytest.approx(start, rel=0.2)  # of the blocks
    assert first_step < 0.9 * reports[1]["loss_first"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_teachers_of_16_bits_from_shards(
    kind: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path, reports: list[dict[str, Any]]
) -> None:
    teacher(kind, dtype).save_pretrained(tmp_path / "teacher", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "teacher")
    assert len(list((tmp_path / "teacher").glob("*.safetensors"))) > 1
    loaded, _ = load_teacher(tmp_path / "teacher")
    assert (
        loaded.dtype == native.fast_dtype(torch.bfloat16) and not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    )
    packed = quantize(tmp_path / "teacher", METHOD, data=str(text_file), **QUICK)
    assert packed.dtype == torch.bfloat16
    assert_trained(reports)
    assert_saves_and_loads(packed, tmp_path / "packed")


@pytest.mark.usefixtures("avx2_alone")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_processor_that_is_slow_in_16_bits(
    in_memory: bool,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerFast,
    text_file: Path,
    tmp_path: Path,
    reports: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert native.pays(torch.float32) and not native.pays(torch.bfloat16)
    seen: set[torch.dtype] = set()
    product = ste._TableProduct.apply
    monkeypatch.setattr(ste._TableProduct, "apply", lambda x, *tiles: seen.add(x.dtype) or product(x, *tiles))
    model: Any = teacher("llama", dtype)
    if not in_memory:
        model.save_pretrained(tmp_path / "teacher")
        tokenizer.save_pretrained(tmp_path / "teacher")
        model = tmp_path / "teacher"
    packed = quantize(model, METHOD, data=str(text_file), tokenizer=tokenizer, **QUICK)
    assert packed.dtype == (dtype if in_memory else torch.bfloat16) and seen == {torch.float32}
    assert_trained(reports)
    assert_saves_and_loads(packed, tmp_path / "packed")


def test_a_float16_teacher_in_memory(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path, reports: list[dict[str, Any]]
) -> None:
    packed = quantize(teacher("qwen2", torch.float16), METHOD, data=str(text_file), tokenizer=tokenizer, **QUICK)
    assert packed.dtype == torch.float16
    assert_trained(reports)
    assert_saves_and_loads(packed, tmp_path)


@pytest.mark.parametrize(("tied", "bits"), [(True, 8), (True, 16), (False, 8), (False, 16)])
def test_tied_and_untied_embeddings(tied: bool, bits: int, tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path) -> None:
    few = QUICK | {"tokens": 128, "blocks": {"enabled": False}, "embedding_bits": bits}
    model = teacher("llama", tie_word_embeddings=tied)
    packed = quantize(model, METHOD, data=str(text_file), tokenizer=tokenizer, **few)
    assert_saves_and_loads(packed, tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "first" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    assert (stored["model.embed_tokens.weight"].dtype == torch.int8) is (bits == 8)


def test_grouped_queries_keep_their_shapes(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    few = QUICK | {"tokens": 128, "blocks": {"enabled": False}}
    packed = quantize(teacher("llama"), METHOD, data=str(text_file), tokenizer=tokenizer, **few)
    attention = packed.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (32, 16)


def test_skipped_linears_stay(tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path) -> None:
    model = teacher("qwen2")
    packed = quantize(model, METHOD, data=str(text_file), tokenizer=tokenizer, skip=["k_proj", "layers.1.mlp.up_proj"], **QUICK)
    kept = {name for name, module in packed.named_modules() if type(module) is nn.Linear}
    assert {"model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.up_proj"} <= kept
    assert torch.equal(packed.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    assert_saves_and_loads(packed, tmp_path)


# Refused

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": GATED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": GATED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "qwen2_moe": GATED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "olmoe": GATED | {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": GATED | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def assert_refused(fragment: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text_file: Path, folder: Path) -> None:
    """By the API, by what the command line calls, and by its dry run."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    attempts = [
        lambda: quantize(model, METHOD, data=str(text_file), tokenizer=tokenizer, **QUICK),
        lambda: load_teacher(folder),
        lambda: plan(folder, RunConfig()),
    ]
    for attempt in attempts:
        with pytest.raises(BimosError, match=fragment) as caught:
            attempt()
        assert "\n" not in str(caught.value) and type(model).__name__ in str(caught.value)


@pytest.mark.parametrize("kind", list(MIXTURES))
def test_mixtures_of_experts_are_refused(kind: str, tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MIXTURES[kind]))
    assert_refused("mixture-of-experts", model, tokenizer, text_file, tmp_path)


def test_models_without_linears_are_refused(tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path) -> None:
    """GPT-2 has them as Conv1D."""
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=320, n_positions=64, **TOKENS)
    assert_refused("Conv1D.*nothing to binarize", AutoModelForCausalLM.from_config(config), tokenizer, text_file, tmp_path)


# What is converted


@pytest.mark.parametrize("kind", list(KINDS))
def test_blocks_are_found(kind: str) -> None:
    model = teacher(kind)
    name, blocks = decoder_blocks(model)
    assert len(blocks) == 2 and model.get_submodule(name) is blocks
    linears = convertible_linears(model)
    assert len(linears) == 2 * LINEARS.get(kind, 7)
    assert all(linear.weight.shape[1] % 8 == 0 for linear in linears.values())
    assert model.get_output_embeddings() not in linears.values()


def test_a_directory_of_shards_loads_as_one_model(tmp_path: Path) -> None:
    model = teacher("llama")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    loaded = load_model(tmp_path, torch.float32)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
