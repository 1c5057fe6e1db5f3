"""rtn2 and gptq2: the papers' equations once more, and what compensation is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bimos import BimosError
from bimos.methods import InputStatistics, method_config
from bimos.packing.linear import PackedLinear
from bimos.packing.unpack import dense_weight
from correlated import correlated_inputs, linear, relative_output_error, statistics_of


def quantizer(group: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the rows of a group, as the authors of GPTQ find them."""
    low, high = group.amin(1).clamp_max(0), group.amax(1).clamp_min(0)
    scale = (high - low) / 3
    return scale, (-low / scale).round()


def rounded(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return scale * (((w / scale).round() + zero).clamp(0, 3) - zero)


def packed_weight(method: str, original: Any, statistics: InputStatistics, **options: Any) -> Tensor:
    config = method_config(method, options)
    layer = config.layer.from_linear(original, config, statistics, torch.Generator())
    return dense_weight(PackedLinear.from_tensors(layer.pack(), layer.group_size))


@pytest.mark.parametrize(("n_in", "group"), [(32, 16), (40, 16), (24, 64)])  # whole groups, a short last one, one only
def test_rtn2_is_the_equation(n_in: int, group: int) -> None:
    original = linear(n_in, 6)
    w = original.weight.detach()
    expected = torch.cat([rounded(columns, *(t[:, None] for t in quantizer(columns))) for columns in w.split(group, 1)], 1)
    actual = packed_weight("rtn2", original, InputStatistics.uninformed(n_in), group_size=group)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3 * w.abs().max().item())  # scales and offsets in float16


def gptq(w: Tensor, gram: Tensor, group: int, order: list[int] | None) -> Tensor:
    """By the inverse of H itself, updated column by column (2210.17323, equations 2 and 3), not by its Cholesky factor."""
    w, original = w.double().clone(), w.double().clone()
    hessian = gram.double() / gram.diagonal().mean() + 0.01 * torch.eye(len(gram))
    inverse = hessian.inverse()
    result = torch.zeros_like(w)
    for j in order or range(w.shape[1]):
        start = j // group * group
        if order is not None:
            lattice = quantizer(original[:, start : start + group])
        elif j == start:
            lattice = quantizer(w[:, start : start + group])
        result[:, j] = rounded(w[:, j], *lattice)
        error = (w[:, j] - result[:, j]) / inverse[j, j]
        w = w - error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j : j + 1] / inverse[j, j]
    return result.float()


@pytest.mark.parametrize("order", ["columns", "activation"])
@pytest.mark.parametrize(("n_in", "group"), [(32, 16), (40, 16)])
def test_gptq2_is_the_equation(order: str, n_in: int, group: int) -> None:
    original, x = linear(n_in, 12), correlated_inputs(n_in, 6)
    statistics = statistics_of(x)
    columns = statistics.second_moment.argsort(descending=True).tolist() if order == "activation" else None
    assert statistics.gram is not None
    expected = gptq(original.weight.detach(), statistics.gram, group, columns)
    actual = packed_weight("gptq2", original, statistics, group_size=group, order=order)
    # A weight that is nearly half-way falls either way by the rounding of scales to float16, and those behind it after it.
    agree = (actual - expected).abs() < 5e-3 * expected.abs().max()
    assert agree.float().mean() > 0.9
    assert agree[:, :group].float().mean() > 0.95 or order == "activation"


@pytest.mark.parametrize("order", ["columns", "activation"])
def test_compensation_pays_on_correlated_inputs(order: str) -> None:
    for seed in range(3):
        original, x = linear(96, 64, seed), correlated_inputs(96, 24, seed=seed)
        plain = relative_output_error(method_config("rtn2", {"group_size": 32}), original, x)
        compensated = relative_output_error(method_config("gptq2", {"group_size": 32, "order": order}), original, x)
        assert compensated < 0.5 * plain


def test_without_correlations_gptq2_is_rtn2() -> None:
    original = linear(40, 12)
    two = [packed_weight(method, original, InputStatistics.uninformed(40), group_size=16) for method in ("rtn2", "gptq2")]
    assert torch.equal(*two)


def test_bits_are_two_and_a_scale_and_an_offset_a_group() -> None:
    for name in ("rtn2", "gptq2"):
        layout = method_config(name, {"group_size": 64}).packed_layout(576, 192, False)
        assert sum(stored.bits for stored in layout.values()) / (576 * 192) == 2 + 32 / 64
        layout = method_config(name, {"group_size": 128}).packed_layout(576, 192, False)  # 5 groups, the last of 64
        assert sum(stored.bits for stored in layout.values()) / (576 * 192) == 2 + 32 * 5 / 576


def test_dead_weights_and_inputs() -> None:
    original = linear(32, 8)
    with torch.no_grad():
        original.weight[0] = 0
        original.weight[1] *= 1e-9
        original.weight[2, :16] = 0.5
    x = correlated_inputs(32, 6)
    x[:, 3] = 0
    for name in ("rtn2", "gptq2"):
        weight = packed_weight(name, original, statistics_of(x), group_size=16)
        assert torch.isfinite(weight).all()
        assert weight[0].abs().max() < 1e-3 and weight[1].abs().max() < 1e-3
    assert (packed_weight("rtn2", original, statistics_of(x), group_size=16)[2, :16] - 0.5).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "options", "fragment"),
    [
        ("rtn2", {"group_size": 0}, "group_size=0"),
        ("rtn2", {"group_size": 12}, "group_size=12"),
        ("gptq2", {"group_size": -8}, "group_size=-8"),
        ("gptq2", {"damping": 0}, "damping=0"),
        ("gptq2", {"order": "rows"}, "order='rows'.*columns, activation"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(BimosError, match=fragment):
        method_config(name, options)
