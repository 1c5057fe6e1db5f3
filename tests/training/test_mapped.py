"""Teachers whose weights stay in their files: the same result as with all of them in memory, and pages that are given back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from bimos import BimosError
from bimos.config import RunConfig
from bimos.methods import method_config
from bimos.models import decoder_blocks, load_teacher
from bimos.quantize import plan, quantize, run
from bimos.training import blockwise, optimizer
from bimos.training.mapped import mapped_ranges, release

TEACHERS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0, "activation_dropout": 0.0},
    "gpt_neox": {"intermediate_size": 96},
}


def saved(kind: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, directory: Path, **more: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | ids | TEACHERS[kind] | more)), dtype=dtype)
    model.save_pretrained(directory, max_shard_size="60KB")
    tokenizer.save_pretrained(directory)
    return directory


def options(text: Path, **more: Any) -> RunConfig:
    blocks = {"tokens": 256, "batch_size": 2, "epochs": 2}
    values = {"data": str(text), "sequence_length": 32, "blocks": blocks, "initialise": {"sequences": 4}}
    return RunConfig.from_dict(values | more)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= safetensors.torch.load_file(path)
    return found


@pytest.mark.parametrize("kind", list(TEACHERS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("processor", ["multiplies_bfloat16", "avx2_alone"])
def test_the_same_model(
    kind: str,
    dtype: torch.dtype,
    processor: str,
    tokenizer: PreTrainedTokenizerFast,
    text_file: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request.getfixturevalue(processor)
    given: list[int] = []
    monkeypatch.setattr(blockwise, "release", lambda module: given.append(release(module)) or given[-1])
    model = saved(kind, dtype, tokenizer, tmp_path / "teacher")
    run(model, tmp_path / "whole", options(text_file, distill={"enabled": False}))
    result = run(model, tmp_path / "mapped", options(text_file, low_memory=True))
    assert [stage["name"] for stage in result["stages"]] == ["blocks"]
    # All blocks at first, the whole model when the embedding has been read, then block by block.
    assert len(given) == 4 and (given[1] > given[0] == given[2] + given[3] > 0 or sys.platform != "linux")
    whole, mapped = tensors(tmp_path / "whole"), tensors(tmp_path / "mapped")
    assert whole.keys() == mapped.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, mapped[name]), name


def test_large_blocks_in_turn(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, avx2_alone: None
) -> None:
    """Halves of a batch in turn, moments on disk: what a large block does, on a small one. Signs near zero may turn with the last bits."""
    model = saved("llama", torch.bfloat16, tokenizer, tmp_path / "teacher")
    results = []
    for name, large in (("small", 1 << 30), ("large", 0)):
        monkeypatch.setattr(blockwise, "LARGE", large)
        monkeypatch.setattr(optimizer, "LARGE", max(1, large))
        results.append(run(model, tmp_path / name, options(text_file, low_memory=True))["stages"][0])
    for name, share in (("loss_first", 0.05), ("loss_last", 0.1)):  # training carries what turned further
        assert results[1][name] == pytest.approx(results[0][name], rel=share)
    assert tensors(tmp_path / "large").keys() == tensors(tmp_path / "small").keys()
    assert not list((tmp_path / "large").glob("**/hidden-*"))


def test_pages_are_given_back_and_read_again(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells what is mapped")
    directory = saved("llama", torch.bfloat16, tokenizer, tmp_path, hidden_size=512, intermediate_size=1024)
    teacher, _ = load_teacher(directory, "auto")
    _, blocks = decoder_blocks(teacher)
    before = [parameter.clone() for parameter in blocks[0].parameters()]
    resident = mapped_bytes(directory)
    given = release(blocks[0])
    assert given == sum(parameter.nbytes for parameter in before)
    assert resident - mapped_bytes(directory) > 0.9 * given
    assert all(map(torch.equal, blocks[0].parameters(), before))


def mapped_bytes(directory: Path) -> int:
    """Of files in `directory`, what is in memory."""
    total, is_one = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split(" ")[0]:
            is_one = str(directory) in line
        elif is_one and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_what_is_not_mapped_stays() -> None:
    linear = nn.Linear(512, 512)
    before = linear.weight.detach().clone()
    assert release(linear) == 0 and torch.equal(linear.weight, before)
    assert all(first < last for first, last in mapped_ranges())


def test_it_takes_less(tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path) -> None:
    directory = saved("llama", torch.bfloat16, tokenizer, tmp_path, hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    whole, mapped = (plan(directory, options(text_file, **of)) for of in ({}, {"low_memory": True}))
    assert list(mapped["peak_memory_bytes"]) == ["blocks"]
    assert mapped["peak_memory_bytes"]["blocks"] < whole["peak_memory_bytes"]["blocks"]


@pytest.mark.parametrize(
    ("more", "fragment"),
    [({"tokens": 64}, "leave out tokens"), ({"distill": {"enabled": True}}, "distillation trains the whole model")],
)
def test_no_distillation(more: dict[str, Any], fragment: str, text_file: Path) -> None:
    with pytest.raises(BimosError, match=fragment):
        options(text_file, low_memory=True, **more)


@pytest.mark.parametrize("method", ["gptq2", "sign"])
def test_links_and_other_methods(method: str, tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path) -> None:
    """As in the Hub's cache, where names of files are links to blobs without a suffix; a float16 model of one block."""
    directory = saved("llama", torch.float16, tokenizer, tmp_path / "teacher", num_hidden_layers=1)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(directory.glob("*.safetensors"))):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(tmp_path / "blobs" / str(number))
    teacher, _ = load_teacher(directory, "auto")
    assert release(teacher) > 0 or sys.platform != "linux"
    run(directory, tmp_path / "out", options(text_file, method=method, low_memory=True))
    assert tensors(tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "evaluate", "fragment"), [({}, True, "bimos eval afterwards"), ({"data": "self"}, False, "give other --data")]
)
def test_nothing_that_needs_all_of_it(more: dict[str, Any], evaluate: bool, fragment: str, text_file: Path, tmp_path: Path) -> None:
    texts = [str(text_file)] if evaluate else []
    with pytest.raises(BimosError, match=fragment):
        run(tmp_path / "model", tmp_path / "out", options(text_file, low_memory=True, **more), evaluate=texts)


def test_no_loaded_model(tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path) -> None:
    model, _ = load_teacher(saved("llama", torch.bfloat16, tokenizer, tmp_path))
    with pytest.raises(BimosError, match="not a model that is loaded"):
        quantize(model, method_config("sign"), data=str(text_file), tokenizer=tokenizer, low_memory=True)


def test_no_gguf(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(BimosError, match="dequantised as a whole"):
        run(tmp_path / "model.gguf", tmp_path / "out", options(text_file, low_memory=True))
