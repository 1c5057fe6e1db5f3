"""Salient columns and sparse weights beside the planes: values, refusals, and that nothing on disk is lost."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bimos.engine import Engine, refusal
from bimos.errors import BimosError
from bimos.kernels import native
from bimos.packing import mapped
from bimos.packing.checkpoint import save_packed
from bimos.packing.format import pack_signs, unpack_signs
from bimos.packing.layout import Layout
from bimos.packing.linear import PackedLinear
from bimos.packing.pack import pack_model
from bimos.packing.sizes import size_report
from bimos.packing.unpack import unpack


def salient_tensors(n_in: int = 40, n_out: int = 9, group: int = 16, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    groups = -(-n_in // group)
    return {
        "weight": torch.randint(0, 256, (2, n_out, n_in // 8), dtype=torch.uint8),
        "scale_group": (torch.rand(2, n_out, groups) / n_in**0.5).half(),
        "salient": torch.randint(0, 256, (n_in // 8,), dtype=torch.uint8),
        "scale_salient": (3 * torch.rand(2, n_out, groups) / n_in**0.5).half(),
    }


def sparse_tensors(n_in: int = 40, n_out: int = 9, share: int = 10, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    count = n_in * n_out // share
    mask = torch.zeros(n_in * n_out)
    mask[torch.randperm(len(mask))[:count]] = 1
    return {
        "weight": torch.randint(0, 256, (1, n_out, n_in // 8), dtype=torch.uint8),
        "scale_out": (torch.rand(1, 1, n_out) / n_in**0.5).half(),
        "sparse_mask": pack_signs(mask.view(n_out, n_in) - 0.5),
        "sparse_code": torch.randint(-127, 128, (count,), dtype=torch.int8),
        "sparse_scale": (torch.rand(n_out) / 127).half(),
    }


def dense_weight(tensors: dict[str, Tensor], group: int = 16) -> Tensor:
    """Weight by weight."""
    planes, n_out, n_in = tensors["weight"].shape[0], tensors["weight"].shape[1], 8 * tensors["weight"].shape[2]
    signs, result = unpack_signs(tensors["weight"]), torch.zeros(n_out, n_in)
    codes = iter(tensors["sparse_code"].tolist()) if "sparse_code" in tensors else None
    columns = unpack_signs(tensors["salient"]) > 0 if "salient" in tensors else torch.zeros(n_in)
    chosen = unpack_signs(tensors["sparse_mask"]) > 0 if codes else torch.zeros(n_out, n_in)
    for i, j in itertools.product(range(n_out), range(n_in)):
        for p in range(planes):
            if "scale_group" in tensors:
                scale = tensors["scale_salient" if columns[j] else "scale_group"][p, i, j // group].item()
            else:
                scale = tensors["scale_out"][p, 0, i].item()
            result[i, j] += signs[p, i, j] * scale
        if codes and chosen[i, j]:
            result[i, j] += next(codes) * tensors["sparse_scale"][i].item()
    return result


def both() -> dict[str, Tensor]:
    return salient_tensors() | {name: t for name, t in sparse_tensors().items() if name.startswith("sparse")}


CASES = [pytest.param(salient_tensors, id="salient"), pytest.param(sparse_tensors, id="sparse"), pytest.param(both, id="both")]
over_cases = pytest.mark.parametrize("make", CASES)


@over_cases
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (50,)], ids=str)
def test_product_is_that_of_the_dense_weight(make: Any, shape: tuple[int, ...], exact_kernels: None) -> None:
    tensors = make()
    layer = PackedLinear.from_tensors(tensors, 16 if "scale_group" in tensors else None)
    x = torch.randn(*shape, 40)
    expected = x @ dense_weight(tensors).T
    for _ in range(2):  # what is made at the first call serves the second
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x.bfloat16()).float(), expected, rtol=0.02, atol=0.05)
    asked = x.clone().requires_grad_()
    layer(asked).sum().backward()
    torch.testing.assert_close(asked.grad, dense_weight(tensors).sum(0).expand_as(x), rtol=1e-5, atol=1e-5)


@over_cases
def test_what_is_written_later_counts(make: Any, exact_kernels: None) -> None:
    first, second = make(), make(seed=1) if make is not both else both()
    layer = PackedLinear.from_tensors({name: t.clone() for name, t in first.items()}, 16 if "scale_group" in first else None)
    x = torch.randn(3, 40)
    layer(x)
    if make is both:
        second["sparse_code"] = second["sparse_code"].flip(0)
        second["scale_salient"] = second["scale_salient"] * 2
    layer.load_state_dict(second)
    torch.testing.assert_close(layer(x), x @ dense_weight(second).T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(layer)(x), x @ dense_weight(second).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"salient": None}, "all of salient, scale_salient or none"),
        ({"scale_salient": None}, "all of salient, scale_salient or none"),
        ({"sparse_code": None}, "all of sparse_mask, sparse_code, sparse_scale or none"),
        ({"salient": torch.zeros(4, dtype=torch.uint8)}, "'salient'.*uint8"),
        ({"salient": torch.zeros(5)}, "'salient'.*uint8"),
        ({"scale_salient": torch.zeros(2, 9, 2).half()}, "'scale_salient'"),
        ({"sparse_mask": torch.zeros(9, 4, dtype=torch.uint8)}, "'sparse_mask'"),
        ({"sparse_code": torch.zeros(36, dtype=torch.int16)}, "'sparse_code'.*int8"),
        ({"sparse_scale": torch.zeros(8).half()}, "'sparse_scale'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    tensors = {name: t for name, t in (both() | change).items() if t is not None}
    with pytest.raises(BimosError, match=message) as caught:
        PackedLinear.from_tensors(tensors, 16)
    assert "\n" not in str(caught.value)


def test_salient_columns_need_scales_by_group() -> None:
    tensors = sparse_tensors() | {name: salient_tensors()[name] for name in ("salient", "scale_salient")}
    with pytest.raises(BimosError, match="'salient' of a packed linear goes with scale_group"):
        PackedLinear.from_tensors(tensors)


def test_codes_for_other_bits_are_refused() -> None:
    tensors = sparse_tensors()
    tensors["sparse_code"] = tensors["sparse_code"][1:]
    with pytest.raises(BimosError, match="36 bits for 35 codes"):
        PackedLinear.from_tensors(tensors)(torch.ones(40))


@pytest.mark.parametrize(("n_in", "n_out", "per_10000"), [(576, 192, 1000), (576, 1536, 1), (40, 9, 777), (8, 1, 1000), (1536, 576, 9999)])
def test_layout_knows_how_many_codes(n_in: int, n_out: int, per_10000: int) -> None:
    count = n_in * n_out * per_10000 // 10_000
    tensors = sparse_tensors(n_in, n_out)
    tensors["sparse_code"] = torch.zeros(count, dtype=torch.int8)
    layout = Layout.of(tensors)
    assert layout.shapes(n_in, n_out)["sparse_code"] == ((count,), torch.int8)
    assert Layout.from_dict(layout.to_dict()) == layout
    assert layout.sparse == per_10000 or n_in * n_out < 10_000


class Trained(nn.Module):
    """Stands for a method's layer."""

    def __init__(self, linear: nn.Linear, make: Any) -> None:
        super().__init__()
        self.make, self.shape = make, (linear.in_features, linear.out_features)
        self.group_size = 32 if make is salient_tensors else None

    def pack(self) -> dict[str, Tensor]:
        return self.make(*self.shape, 32) if self.group_size else self.make(*self.shape)


@pytest.fixture(params=[salient_tensors, sparse_tensors], ids=["salient", "sparse"])
def model(request: pytest.FixtureRequest, dense: Any) -> PreTrainedModel:
    model = dense("llama")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            model.set_submodule(name, Trained(module, request.param))
    return pack_model(model, method="any", options={})


def test_a_checkpoint_with_parts(model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    save_packed(model, None, tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(again(ids).logits, expected)
    state = model.state_dict()
    assert all(torch.equal(t, state[name]) and t.dtype == state[name].dtype for name, t in again.state_dict().items())
    report = size_report(tmp_path / "packed")
    body = sum(t.nbytes for name, t in state.items() if ".layers." in name and "norm" not in name)
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear))
    assert report["body_bits_per_weight"] == pytest.approx(8 * body / weights)
    assert {"bitmaps"} <= {row["name"] for row in report["components"]}
    plain = unpack(tmp_path / "packed", tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_the_engine_leaves_parts_to_transformers(model: PreTrainedModel, tmp_path: Path) -> None:
    if native.isa() is None:
        pytest.skip("no C++ kernels")
    save_packed(model, None, tmp_path / "packed")
    for known in (model, mapped.load(tmp_path / "packed")):
        assert "salient weights beside the planes" in str(refusal(known))
        with pytest.raises(BimosError, match="salient weights beside the planes"):
            Engine(known)
