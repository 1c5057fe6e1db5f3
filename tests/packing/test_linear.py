from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from bimos.errors import BimosError
from bimos.packing.layout import Layout, common_layout
from bimos.packing.linear import PackedLinear


def tensors(n_in: int = 16, n_out: int = 5, experts: int = 2, planes: int = 1) -> dict[str, Tensor]:
    return {
        "weight": torch.randint(0, 256, (planes, n_out, n_in // 8), dtype=torch.uint8),
        "scale_in": torch.rand(planes, experts, n_in).half(),
        "scale_out": torch.rand(planes, experts, n_out).half(),
        "router": torch.randn(experts, n_in).half(),
        "bias": torch.randn(n_out).half(),
    }


def test_holds_the_tensors_and_computes_with_them() -> None:
    given = tensors()
    layer = PackedLinear.from_tensors(given)
    assert (layer.in_features, layer.out_features) == (16, 5)
    assert layer.tensors().keys() == given.keys() and layer.scale_group is None
    assert set(layer.state_dict()) == set(given) and not list(layer.parameters())
    x = torch.randn(2, 3, 16)
    expected = torch.ops.bimos.packed_linear(
        x, *(given.get(name) for name in ("weight", "scale_in", "scale_out", "router", "scale_group", "bias"))
    )
    assert torch.equal(layer(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.float(), lambda m: m.half(), lambda m: m.double()])
def test_stored_precision_survives_casts(cast) -> None:
    given = tensors()
    given["scale_in"] = given["scale_in"] + 2**-11  # not representable in bfloat16
    layer = PackedLinear.from_tensors({name: t.clone() for name, t in given.items()})
    cast(torch.nn.Sequential(layer))
    assert all(torch.equal(layer.tensors()[name], t) and layer.tensors()[name].dtype == t.dtype for name, t in given.items())


def test_empty_from_layout() -> None:
    given = tensors(planes=2)
    layer = PackedLinear.empty({name: (tuple(t.shape), t.dtype) for name, t in given.items()}, device="meta")
    assert all(t.device.type == "meta" for t in layer.tensors().values())
    layer.load_state_dict(given, assign=True)
    assert torch.equal(layer(torch.ones(16)), PackedLinear(given)(torch.ones(16)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_in": torch.rand(1, 3, 16).half()}, "'scale_in'"),
        ({"scale_out": torch.rand(1, 2, 16).half()}, "'scale_out'"),
        ({"router": torch.rand(2, 8).half()}, "'router'"),
        ({"weight": torch.zeros(5, 16)}, "uint8"),
        ({"scale_group": torch.rand(1, 5, 3).half()}, "'scale_group'"),
        ({"gate": torch.rand(3)}, "stores weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(BimosError, match=message):
        PackedLinear.from_tensors(tensors() | change)
    with pytest.raises(BimosError, match="stores weight"):
        PackedLinear.from_tensors({"bias": torch.rand(3)})


def test_layouts_describe_any_subset() -> None:
    for planes, experts in ((1, 1), (2, 4)):
        given = tensors(experts=experts, planes=planes)
        given["scale_group"] = torch.rand(planes, 5, 2).half()
        for missing in ("scale_in", "scale_out", "router", "scale_group", "bias"):
            some = {name: t for name, t in given.items() if name != missing}
            layout = Layout.from_dict(Layout.of(some).to_dict())
            assert layout.shapes(16, 5) == {name: (tuple(t.shape), t.dtype) for name, t in some.items()}


def test_common_layout_names_only_exceptions() -> None:
    plain, biased = tensors(), tensors()
    del plain["bias"]
    layouts = {
        "a": Layout.of(plain),
        "b": Layout.of(biased),
        "c": Layout.of(plain),
        "d": Layout.of(tensors(planes=2)),
        "e": Layout.of(biased),
    }
    common, others = common_layout(layouts, {"b", "d"})
    assert dict(common.tensors)["bias"] == "float16" and common.planes == 1
    assert others.keys() == {"d", "e"}  # two planes; a bias that the original has not
