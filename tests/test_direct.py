"""Checkpoints mapped by the engine itself: the same model as the one that transformers loads, and started without it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bimos import BimosError
from bimos.engine import Engine, load
from bimos.engine.weights import weights
from bimos.generation import Sampling, continue_text
from bimos.kernels import native
from bimos.packing import mapped
from bimos.packing.family import FamilyConfig, Unknown
from bimos.packing.rotary import frequencies
from bimos.tokens import FileTokenizer, load_tokenizer

Packed = Callable[..., PreTrainedModel]
needs_kernels = pytest.mark.skipif(native.isa() is None, reason=f"no C++ kernels: {native.problem}")

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"embedding_bits": 8, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": False, "embedding_bits": 8, "experts": 1}),
    ("llama", {"planes": 2, "experts": 1, "group": 32, "intermediate_size": 96, "dtype": torch.bfloat16}),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 10000.0}}),
    ("llama", {"rope_parameters": YARN | {"rope_theta": 10000.0}, "dtype": torch.float16}),
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    ("qwen2", {"embedding_bits": 8}),
    ("qwen2", WINDOW),
    ("qwen3", {"tie_word_embeddings": False}),
    ("qwen3", {"embedding_bits": 8, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}} | WINDOW),
]
over_cases = pytest.mark.parametrize(("kind", "options"), CASES, ids=str)


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 101, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@over_cases
def test_what_is_mapped_is_what_is_loaded(kind: str, options: dict[str, Any], packed: Packed, tmp_path: Path) -> None:
    packed(kind, **options).save_pretrained(tmp_path, max_shard_size="20KB")
    quick, loaded = mapped.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    (tensors, numbers), (others, other_numbers) = weights(quick), weights(loaded)
    assert numbers == other_numbers and len(tensors) == len(others)
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(tensors, others, strict=True))
    assert quick.model.rotary_emb.attention_scaling == loaded.model.rotary_emb.attention_scaling
    assert quick.generation_config.eos_token_id == loaded.generation_config.eos_token_id
    assert quick.config.rms_norm_eps == loaded.config.rms_norm_eps


@over_cases
@needs_kernels
def test_logits_and_continuations_are_those_of_transformers(kind: str, options: dict[str, Any], packed: Packed, tmp_path: Path) -> None:
    packed(kind, **options).save_pretrained(tmp_path)
    model = torch.nn.Module.float(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"))
    engine = Engine(load(tmp_path), threads=1)
    for seed in range(4):  # 240 tokens, teacher-forced
        ids = text(60, seed)
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits[0].float()
        assert (engine.logits(ids) - expected).norm() < 1e-2 * expected.norm()
    greedy, equal = Sampling(max_new_tokens=12, temperature=0, repetition_penalty=1), 0
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for seed in range(20):
        prompt = text(20, 100 + seed)
        expected_ids = model.generate(torch.tensor([prompt]), **arguments)[0, 20:].tolist()
        equal += [step[0] for step in engine.tokens([prompt], greedy, stop=False)] == expected_ids
    assert equal >= 18  # logits of random models tie to rounding now and then


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("head", [8, 64, 128])
def test_frequencies_are_those_of_transformers(kind: str, head: int) -> None:
    variants: list[dict[str, Any]] = [{}]
    if kind == "yarn":
        variants += [
            {"attention_factor": 1.5},
            {"beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
            {"mscale": 0.7, "mscale_all_dim": 1.2},
        ]
    sizes = {"default": {}, "linear": {"factor": 3.0}, "llama3": LLAMA3, "yarn": YARN}[kind]
    if kind in ("llama3", "yarn"):
        sizes = sizes | {"original_max_position_embeddings": 4096}
    for theta in (10000.0, 5e5):
        for more in variants:
            rope = {"rope_type": kind, "rope_theta": theta} | sizes | more
            config = AutoConfig.for_model("llama", hidden_size=4 * head, num_attention_heads=4, rope_parameters=rope)
            if kind == "default":
                from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

                expected, scaling = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
            else:
                expected, scaling = ROPE_INIT_FUNCTIONS[kind](config)
            actual, factor = frequencies(rope, head)
            assert torch.equal(actual, expected) and factor == scaling


def test_the_planes_are_views_of_the_file(packed: Packed, tmp_path: Path) -> None:
    packed("llama", embedding_bits=8).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    model = mapped.load(tmp_path)
    names = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else str(file.resolve())
    assert str(file.resolve()) in names
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gemma"}, "architecture gemma"),
        ({"num_key_value_heads": None}, "num_key_value_heads"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"rope_parameters": None, "rope_theta": 10000.0}, "no rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"attention_bias": None}, "attention_bias"),
    ],
    ids=str,
)
def test_what_only_transformers_knows_is_left_to_it(change: dict[str, Any], reason: str, packed: Packed, tmp_path: Path) -> None:
    packed("llama").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | change
    with pytest.raises(Unknown, match=reason):
        FamilyConfig.from_json(values)


@needs_kernels
def test_older_configs_are_loaded_by_transformers(packed: Packed, tmp_path: Path) -> None:
    packed("llama").save_pretrained(tmp_path)
    expected = Engine(load(tmp_path), threads=1).logits(text(9))
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    path.write_text(json.dumps(values))
    with pytest.raises(Unknown):
        mapped.load(tmp_path)
    assert torch.equal(Engine(load(tmp_path), threads=1).logits(text(9)), expected)


def test_damage_is_told_as_by_the_ordinary_loader(packed: Packed, tmp_path: Path) -> None:
    good = tmp_path / "good"
    packed("llama", embedding_bits=8).save_pretrained(good, max_shard_size="5KB")
    shards = sorted(good.glob("*.safetensors"))

    def flip(directory: Path) -> None:
        data = bytearray((directory / shards[1].name).read_bytes())
        data[-1] ^= 4
        (directory / shards[1].name).write_bytes(data)

    def newer(directory: Path) -> None:
        change(directory, format_version=3)

    def planes(directory: Path) -> None:
        change(directory, planes=2)

    def bits(directory: Path) -> None:
        change(directory, embedding_bits=4)

    def change(directory: Path, **values: Any) -> None:
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] |= values
        (directory / "config.json").write_text(json.dumps(config))

    def missing(directory: Path) -> None:
        (directory / shards[0].name).unlink()

    def short(directory: Path) -> None:
        (directory / shards[0].name).write_bytes((directory / shards[0].name).read_bytes()[:-1])

    for number, damage in enumerate((flip, newer, planes, bits, missing, short)):
        directory = Path(shutil.copytree(good, tmp_path / str(number)))
        damage(directory)
        messages = []
        for way in (load, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(BimosError) as error:
                way(directory)
            messages.append(str(error.value))
        assert messages[0] == messages[1] and "\n" not in messages[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, packed: Packed, tokenizer: Any) -> Path:
    directory = tmp_path_factory.mktemp("direct") / "model"
    packed("llama", vocab_size=320, bos_token_id=0, eos_token_id=1, embedding_bits=8).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_texts_are_those_of_the_auto_tokenizer(checkpoint: Path) -> None:
    quick, full = FileTokenizer.of(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    assert quick is not None
    for sample in ("The river is wide.", "", "  two  spaces\n\n", "</s><s>inside</s>", "naïve 東京 🚣"):
        for add in (True, False):
            assert quick(sample, add_special_tokens=add)["input_ids"] == full(sample, add_special_tokens=add)["input_ids"]
        ids = full(sample)["input_ids"]
        for skip in (True, False):
            assert quick.decode(ids, skip_special_tokens=skip) == full.decode(ids, skip_special_tokens=skip)
        turns = [{"role": "user", "content": sample}, {"role": "assistant", "content": "Yes."}]
        for more in (True, False):
            expected = full.apply_chat_template(turns, tokenize=False, add_generation_prompt=more)
            assert quick.apply_chat_template(turns, tokenize=False, add_generation_prompt=more) == expected
    assert (quick.eos_token_id, quick.pad_token_id, quick.bos_token_id) == (full.eos_token_id, full.pad_token_id, full.bos_token_id)


@pytest.mark.parametrize(
    "change",
    [{"tokenizer_class": "Qwen2Tokenizer"}, {"add_bos_token": True}, {"clean_up_tokenization_spaces": True}, {"unk_token": "<unk>"}],
)
def test_other_tokenizers_are_left_to_transformers(change: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert FileTokenizer.of(directory) is None


def test_damaged_tokenizers_are_told(checkpoint: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(BimosError, match="cannot load"):
        load_tokenizer(directory)


@needs_kernels
def test_generation_starts_without_transformers(checkpoint: Path) -> None:
    program = (
        "import sys; from bimos.cli import main\n"
        f"sys.argv = ['bimos', 'generate', {str(checkpoint)!r}, '--prompt', 'The river', '--max-new-tokens', '5', '--temperature', '0']\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "assert 'transformers' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    engine = Engine.from_pretrained(checkpoint, threads=1)
    sampling = Sampling(max_new_tokens=5, temperature=0)
    expected = continue_text(engine, AutoTokenizer.from_pretrained(checkpoint), "The river", sampling)
    assert result.stdout == f"The river{expected}\n"
