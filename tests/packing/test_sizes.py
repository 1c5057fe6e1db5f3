from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from bimos.errors import BimosError
from bimos.packing.pack import skeleton
from bimos.packing.sizes import size_report

Make = Callable[..., PreTrainedModel]


def mixture(experts: int) -> Callable[[int, int, bool], dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    def layout(name: str, n_in: int, n_out: int, bias: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        tensors = {
            "weight": ((1, n_out, n_in // 8), torch.uint8),
            "scale_in": ((1, experts, n_in), torch.float16),
            "scale_out": ((1, experts, n_out), torch.float16),
            "router": ((experts, n_in), torch.float16),
        }
        return tensors | ({"bias": ((n_out,), torch.float16)} if bias else {})

    return layout


def linears(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]


@pytest.mark.parametrize(
    ("shape", "total", "compression", "body"),
    [((4096, 11008, 32, 32), 1.36e9, 9.9, 1.036), ((5120, 13824, 40, 40), 2.29e9, 11.4, 1.029)],
    ids=["7b", "13b"],
)
def test_llama_2_from_its_config(shape: tuple[int, int, int, int], total: float, compression: float, body: float) -> None:
    hidden, ffn, layers, heads = shape
    config = LlamaConfig(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=32000)
    model = skeleton(config)
    report = size_report(model, layout=mixture(4), converted=linears(model), embedding_bits=16)
    assert report["total_bytes"] == pytest.approx(total, rel=0.01)
    assert report["compression"] == pytest.approx(compression, rel=0.01)
    assert report["body_bits_per_weight"] == pytest.approx(body, abs=0.0005)
    assert report["bits_per_parameter"] == pytest.approx(16 / compression, rel=0.01)
    assert report["original_bytes"] == 2 * report["parameters"]
    assert report["total_bytes"] == sum(row["bytes"] for row in report["components"])


def test_smollm2_135m_with_int8_embeddings() -> None:
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    model = skeleton(config)
    report = size_report(model, layout=mixture(4), converted=linears(model), embedding_bits=8)
    assert len(linears(model)) == 210 and report["original_bytes"] == 2 * 134_515_008
    assert 45e6 < report["total_bytes"] <= 46e6
    assert report["body_bits_per_weight"] == pytest.approx(1.274, abs=0.001)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "opt", "gpt_neox", "phi"])
def test_plan_memory_and_disk_agree(kind: str, bits: int, dense: Make, packed: Make, tmp_path: Path) -> None:
    original = dense(kind)
    plan = size_report(original, layout=mixture(2), converted=linears(original), embedding_bits=bits)
    model = packed(kind, experts=2, embedding_bits=bits, dtype=torch.bfloat16)
    memory = size_report(model)
    model.save_pretrained(tmp_path)
    disk = size_report(tmp_path)
    assert disk["total_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert plan["total_bytes"] == memory["total_bytes"] == disk["total_bytes"]  # to the byte, headers included
    for key in ("original_bytes", "body_bits_per_weight", "parameters"):
        assert plan[key] == memory[key] == disk[key], key
    assert plan["components"] == memory["components"] == disk["components"]
    assert plan["original_bytes"] == 2 * sum(p.numel() for p in original.parameters())


def test_shards_and_dense_models(packed: Make, dense: Make, tmp_path: Path) -> None:
    packed("llama").save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    report = size_report(tmp_path / "shards")
    assert report["total_bytes"] == sum(file.stat().st_size for file in (tmp_path / "shards").glob("*.safetensors"))
    dense("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    report = size_report(tmp_path / "dense")
    assert report["body_bits_per_weight"] is None and report["bits_per_parameter"] == pytest.approx(16, rel=0.25)
    assert {row["name"] for row in report["components"]} == {"unconverted linears", "embedding", "norms and others", "file headers"}


def test_two_planes_are_counted_once_as_weights(packed: Make) -> None:
    report = size_report(packed("llama", planes=2, experts=1))
    planes = next(row for row in report["components"] if row["name"] == "planes")
    assert 2 < report["body_bits_per_weight"] < 5
    assert planes["bytes"] * 8 == 2 * 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 72)


def test_a_linear_that_cannot_be_stored_is_named(dense: Make, tmp_path: Path) -> None:
    def refuse(name: str, n_in: int, n_out: int, bias: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        raise BimosError("too odd")

    with pytest.raises(BimosError, match=r"'model\.layers\.0\.self_attn\.q_proj': too odd"):
        size_report(dense("llama"), layout=refuse, converted=["model.layers.0.self_attn.q_proj"])
    with pytest.raises(BimosError, match=r"no model\.safetensors"):
        size_report(tmp_path)
