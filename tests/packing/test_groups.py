"""Weights with offsets by group of a row, and groups that do not divide it, against the weight written out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bimos.engine import Engine, load
from bimos.errors import BimosError
from bimos.kernels import native
from bimos.packing import integrity
from bimos.packing.checkpoint import save_packed
from bimos.packing.layout import Layout
from bimos.packing.linear import PackedLinear
from bimos.packing.sizes import size_report
from bimos.packing.unpack import unpack
from levels import LEVELS

Make = Callable[..., PreTrainedModel]
KINDS = [
    ("scale_group",),
    ("scale_group", "offset_group"),
    ("scale_group_01",),
    ("scale_group_01", "offset_group"),
    ("scale_group_int",),
    ("scale_group_int", "offset_group"),
]
over_kinds = pytest.mark.parametrize("kind", KINDS, ids="+".join)


def make(kind: tuple[str, ...], planes: int, n_in: int, n_out: int, size: int, bias: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(n_in + size)
    groups = -(-n_in // size)
    tensors = {"weight": torch.randint(0, 256, (planes, n_out, n_in // 8), dtype=torch.uint8)}
    for name in kind:
        leading = (n_out,) if name in ("scale_group_int", "offset_group") else (planes, n_out)
        tensors[name] = (torch.rand(*leading, groups) - 0.2).half()
    if bias:
        tensors["bias"] = torch.randn(n_out).half()
    return tensors


def dense(tensors: dict[str, Tensor], size: int) -> Tensor:
    """The weight, one number at a time."""
    planes, n_out, n_in = *tensors["weight"].shape[:2], 8 * tensors["weight"].shape[2]
    weight = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_out):
        for j in range(n_in):
            group = j // size
            bits = [int(tensors["weight"][p, i, j // 8]) >> (j % 8) & 1 for p in range(planes)]
            for p, bit in enumerate(bits):
                if "scale_group" in tensors:
                    weight[i, j] += float(tensors["scale_group"][p, i, group]) * (1 if bit else -1)
                if "scale_group_01" in tensors:
                    weight[i, j] += 2 * float(tensors["scale_group_01"][p, i, group]) * bit
                if "scale_group_int" in tensors:
                    weight[i, j] += float(tensors["scale_group_int"][i, group]) * 2**p * (1 if bit else -1)
            if "offset_group" in tensors:
                weight[i, j] += float(tensors["offset_group"][i, group])
    return weight


@over_kinds
@pytest.mark.parametrize("level", [*LEVELS, "reference"], indirect=True)
@pytest.mark.parametrize(("n_in", "size"), [(64, 32), (40, 40), (72, 32), (104, 64), (48, 16), (24, 5)])
def test_product_is_that_of_the_weight(kind: tuple[str, ...], level: str, n_in: int, size: int) -> None:
    tensors = make(kind, 2, n_in, 7, size, bias=True)
    layer = PackedLinear.from_tensors(tensors, size)
    weight, bias = dense(tensors, size), tensors["bias"].double()
    x = torch.randn(2, 5, n_in) + 1  # sums of groups are not near zero
    x.requires_grad_(level == "reference")  # which runs where gradients are wanted
    expected = x.double() @ weight.T + bias
    assert (layer(x).double() - expected).norm() < 1e-4 * expected.norm()
    # In 16 bits the result is rounded, the two terms of which it is the sum are not.
    half = layer(x.bfloat16())
    expected = x.bfloat16().double() @ weight.T + bias
    assert half.dtype == torch.bfloat16
    if len(kind) > 1 or kind[0] != "scale_group":
        assert (half.double() - expected).norm() < 4e-3 * expected.norm()
    assert (layer(x.double()) - (x.double() @ weight.T + bias)).norm() < 1e-6 * expected.norm()  # summed in float32


def test_offsets_follow_the_tensors() -> None:
    """What is kept for the product is made anew when a tensor is written to or loaded."""
    first, second = make(("scale_group_01", "offset_group"), 2, 64, 8, 32), make(("scale_group_01", "offset_group"), 2, 64, 8, 32)
    second["offset_group"] = second["offset_group"] + 1
    second["scale_group_01"] = second["scale_group_01"] * 2
    layer, x = PackedLinear({name: t.clone() for name, t in first.items()}), torch.randn(3, 64)
    before = layer(x)
    layer.offset_group.copy_(second["offset_group"])  # type: ignore[union-attr]
    layer.scale_group_01.copy_(second["scale_group_01"])  # type: ignore[union-attr]
    assert torch.equal(layer(x), PackedLinear(second)(x)) and not torch.equal(layer(x), before)
    layer.load_state_dict(first)
    assert torch.equal(layer(x), before)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), before)


def test_gradients_reach_the_input() -> None:
    tensors = make(("scale_group_01",), 2, 72, 8, 32)
    x = torch.randn(3, 72, requires_grad=True)
    PackedLinear(tensors, 32)(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), dense(tensors, 32).sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({}, 5, r"'scale_group' of a packed linear \[2, 7, 9\] must be \[planes, out, in/g\] with g = 5; got \[2, 7, 3\]"),
        ({}, 0, "with g = 0"),
        ({"scale_group": None}, 32, "with groups needs one of scale_group, scale_group_01, scale_group_int"),
        ({"scale_group": None, "offset_group": torch.rand(7, 3)}, None, "with groups needs one of"),
        ({"scale_group_01": torch.rand(2, 7, 3)}, 32, "one kind of group scales; got scale_group and scale_group_01"),
        ({"offset_group": torch.rand(2, 7, 3)}, 32, r"'offset_group' .* must be \[out, in/g\] with g = 32"),
        ({"offset_group": torch.rand(7, 3), "scale_out": torch.rand(2, 1, 7)}, 32, "scale_out"),
        ({"scale_group": None, "scale_group_int": torch.rand(7, 3), "scale_in": torch.rand(2, 1, 72)}, 32, "scale_in"),
        ({"scale_group": torch.rand(2, 7, 5)}, None, "'scale_group'"),
    ],
)
def test_groups_that_do_not_fit_are_refused(change: dict[str, Any], size: int | None, message: str) -> None:
    tensors = {name: t for name, t in (make(("scale_group",), 2, 72, 7, 32) | change).items() if t is not None}
    with pytest.raises(BimosError, match=message) as caught:
        PackedLinear(tensors, size)
    assert "\n" not in str(caught.value)


@over_kinds
def test_layouts(kind: tuple[str, ...]) -> None:
    tensors = make(kind, 2, 72, 7, 32, bias=True)
    layer = PackedLinear(tensors, 32)
    layout = Layout.from_dict(Layout.of(layer.tensors(), layer.group_size).to_dict())
    assert layout.shapes(72, 7) == {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    assert PackedLinear.empty(layout.shapes(72, 7), layout.group_size).group_size == 32
    with pytest.raises(BimosError, match="without group_size"):
        Layout.from_dict(layout.to_dict() | {"group_size": None})


def stored(directory: Path) -> dict[str, Tensor]:
    with safe_open(directory / "model.safetensors", framework="pt") as weights:
        return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118


@pytest.mark.usefixtures("exact_kernels")
@over_kinds
def test_checkpoints(kind: tuple[str, ...], packed: Make, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved, loaded, saved again bit for bit; counted; unpacked; in the engine; and refused by a bimos that does not know them."""
    model = packed("qwen2", planes=2, experts=1, group=32, grouped=kind)
    save_packed(model, None, tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
    save_packed(loaded, None, tmp_path / "b")
    first, second = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    up = {name.rpartition(".")[2] for name in first if ".up_proj." in name}
    assert up == {"weight", *kind, *(["scale_out"] if kind == ("scale_group",) else [])}

    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["quantization_config"]["format_version"] == 2 and config["quantization_config"]["group_size"] == 32
    report = size_report(tmp_path / "a")
    assert report["total_bytes"] == (tmp_path / "a/model.safetensors").stat().st_size == size_report(model)["total_bytes"]
    scales = sum(2 * t.numel() for name, t in first.items() if "scale_group" in name or "offset_group" in name or "scale_out" in name)
    assert next(row["bytes"] for row in report["components"] if row["name"] == "scales") == scales

    unpack(tmp_path / "a", tmp_path / "dense")
    dense_model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        assert (dense_model(ids).logits - expected).norm() < 1e-4 * expected.norm()
    if native.isa():
        for source in (loaded, load(tmp_path / "a")):
            logits = Engine(source, threads=2).logits(ids[0].tolist())
            assert (logits - expected[0]).norm() < 5e-3 * expected[0].norm()

    monkeypatch.setattr(integrity, "FORMAT_VERSION", 1)
    with pytest.raises(BimosError, match="format_version 2 and this bimos reads up to 1; upgrade bimos"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_what_the_first_version_had_still_says_so(packed: Make, tmp_path: Path) -> None:
    packed("llama", planes=2, experts=1, group=8).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format_version"] == 1
