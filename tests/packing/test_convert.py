"""The authors' layout in, dense weights out; compared with the equations written out here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bimos.errors import BimosError
from bimos.packing.checkpoint import save_packed
from bimos.packing.convert import convert
from bimos.packing.integrity import verify
from bimos.packing.unpack import unpack

Make = Callable[..., PreTrainedModel]


class AuthorsLinear(nn.Module):
    """Y = ((X * s_in) sign(W)^T) * s_out + bias, s = softmax(X Wr) S: DESIGN section 3, and the names of the release."""

    def __init__(self, linear: nn.Linear, experts: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.gate_linear = nn.Linear(linear.in_features, experts, bias=False)
        self.gate_linear.weight.data = torch.randn(experts, linear.in_features)
        self.in_channel_scale = nn.Parameter(torch.rand(experts, linear.in_features) + 0.5)
        self.out_channel_scale = nn.Parameter((torch.rand(experts, linear.out_features) + 0.5) / linear.in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.softmax(self.gate_linear(x).float(), dim=-1)
        y = F.linear(x * (gate @ self.in_channel_scale), self.weight.sign()) * (gate @ self.out_channel_scale)
        return y if self.bias is None else y + self.bias


@pytest.fixture
def release(dense: Make, tmp_path: Path, tokenizer: Any) -> Callable[..., tuple[Path, PreTrainedModel]]:
    """`release(kind, experts, binary=)`: a checkpoint as the authors save them, and the model that it holds, in float32."""

    def make(kind: str, experts: int, binary: bool = False, **changes: Any) -> tuple[Path, PreTrainedModel]:
        model = dense(kind, **changes)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and module is not model.get_output_embeddings():
                model.set_submodule(name, AuthorsLinear(module, experts))
        model = model.half().float()  # what float16 holds, computed in float32
        directory = tmp_path / "release"
        model.config.num_expert = experts
        model.config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        state = {name: tensor.half() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        if binary:
            torch.save(state, directory / "pytorch_model.bin")
        else:
            save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return directory, model

    return make


@pytest.mark.parametrize(("kind", "experts", "binary"), [("llama", 4, False), ("opt", 2, True), ("mistral", 1, False)])
def test_released_checkpoints(kind: str, experts: int, binary: bool, release: Any, ids: Tensor, tmp_path: Path) -> None:
    source, model = release(kind, experts, binary)
    convert(source, tmp_path / "out")
    verify(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "num_expert" not in config
    assert config["quantization_config"]["method"] == "binarymos"
    assert config["quantization_config"]["options"] == {"num_experts": experts}
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert "authors' layout" in (tmp_path / "out/README.md").read_text()


def test_int8_embeddings_on_the_way(release: Any, ids: Tensor, tmp_path: Path) -> None:
    source, model = release("llama", 2)
    packed = convert(source, tmp_path / "out", embedding_bits=8)
    assert packed.model.embed_tokens.weight.dtype == torch.int8
    with torch.no_grad():
        assert (packed(ids).logits.float() - model(ids).logits).std() < 0.05 * model(ids).logits.std()


def test_zero_latents_are_reported(release: Any, tmp_path: Path) -> None:
    source, _ = release("mistral", 2)
    from safetensors.torch import load_file

    state = load_file(source / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][:2, :3] = 0
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="6 of .* latents"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.pop("num_expert"), "no num_expert"),
        (lambda c, t: c.update(num_expert=3), "of 3 experts"),
        (lambda c, t: t.pop("model.layers.1.mlp.up_proj.gate_linear.weight"), r"'model\.layers\.1\.mlp\.up_proj' has not"),
        (lambda c, t: t.pop("model.layers.1.mlp.up_proj.weight"), r"'model\.layers\.1\.mlp\.up_proj' has not"),
        (
            lambda c, t: t.update({k.replace("layers.1", "layers.7"): v.clone() for k, v in t.items()}),
            r"'model\.layers\.7\..*' has not|which the model",
        ),
        (lambda c, t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")), r"'model\.layers\.1\.mlp\.up_proj'"),
        (lambda c, t: t.update({"model.embed_tokens.weight": torch.zeros(7, 64)}), "disagree"),
        (lambda c, t: c.update(hidden_size="abc"), "cannot read the config"),
        (lambda c, t: t.pop("model.norm.weight"), r"lacks 1 tensors of the model, such as 'model\.norm\.weight'"),
        (lambda c, t: [t.pop(k) for k in list(t) if "channel_scale" in k], "no in_channel_scale"),
    ],
)
def test_other_checkpoints_are_refused(change: Any, message: str, release: Any, tmp_path: Path) -> None:
    source, _ = release("mistral", 2)
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    change(config, tensors)
    (source / "config.json").write_text(json.dumps(config))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BimosError, match=message) as error:
        convert(source, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_unreadable_sources(tmp_path: Path, release: Any) -> None:
    source, _ = release("mistral", 2)
    with pytest.raises(BimosError, match="is not empty"):
        convert(source, source)
    for output in (source, source.parent):
        with pytest.raises(BimosError, match="which is read"):
            convert(source, output, overwrite=True)
    tensors = load_file(source / "model.safetensors")
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # as torch before 1.6 wrote them
    (source / "model.safetensors").rename(source / "aside")
    convert(source, tmp_path / "old")
    for content in ([1, 2], {"a": 1}, {"a": Path("x")}):
        torch.save(content, source / "pytorch_model.bin")
        with pytest.raises(BimosError, match=r"pytorch_model\.bin' is missing, truncated or corrupt") as error:
            convert(source, tmp_path / "out")
        assert "\n" not in str(error.value)
    (source / "pytorch_model.bin").unlink()
    (source / "model.safetensors.index.json").write_text("{")
    with pytest.raises(BimosError, match=r"index\.json' is corrupt"):
        convert(source, tmp_path / "out")
    (source / "model.safetensors.index.json").unlink()
    (source / "model.safetensors").write_bytes(b"short")
    with pytest.raises(BimosError, match="truncated or corrupt"):
        convert(source, tmp_path / "out")
    (source / "model.safetensors").unlink()
    with pytest.raises(BimosError, match="has no weights"):
        convert(source, tmp_path / "out")
    with pytest.raises(BimosError, match="no such model directory"):
        convert(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize("kind", ["llama", "gemma", "opt", "gpt_neox", "phi"])
@pytest.mark.parametrize(("planes", "group", "bits"), [(1, None, 16), (2, None, 8), (2, 8, 8)])
def test_static_scales_unpack_exactly(
    kind: str, planes: int, group: int | None, bits: int, packed: Make, ids: Tensor, tmp_path: Path
) -> None:
    model = packed(kind, planes=planes, group=group, experts=1, embedding_bits=bits)
    save_packed(model, None, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.dtype == torch.float32 and not hasattr(dense.config, "quantization_config")
    assert not any("scale" in name or "router" in name for name in dense.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    up = model.get_submodule(next(name for name, m in model.named_modules() if name.endswith(("up_proj", "fc1", "h_to_4h"))))
    weight = dense.get_submodule(next(name for name, _ in dense.named_modules() if name.endswith(("up_proj", "fc1", "h_to_4h")))).weight
    x = torch.eye(up.in_features)
    torch.testing.assert_close(up(x).T if up.bias is None else (up(x) - up.bias.float()).T, weight, rtol=1e-5, atol=1e-5)
    assert "exact" in (tmp_path / "dense/README.md").read_text()


def test_experts_unpack_only_on_request(packed: Make, tokenizer: Any, tmp_path: Path) -> None:
    model = packed("llama", experts=2)
    save_packed(model, tokenizer, tmp_path / "packed")
    with pytest.raises(BimosError, match="--approximate"):
        unpack(tmp_path / "packed", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    unpack(tmp_path / "packed", tmp_path / "dense", approximate=True, dtype=torch.bfloat16)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.dtype == torch.bfloat16 and (tmp_path / "dense/tokenizer.json").exists()
    up = model.model.layers[0].mlp.up_proj
    up.router.zero_()  # a router without preferences
    torch.testing.assert_close(dense.model.layers[0].mlp.up_proj.weight.float(), up(torch.eye(32)).T, rtol=1e-2, atol=1e-3)
    assert "approximation" in (tmp_path / "dense/README.md").read_text()
    with pytest.raises(BimosError, match="nothing to unpack"):
        unpack(tmp_path / "dense", tmp_path / "again")
