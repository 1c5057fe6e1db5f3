"""PB-LLM: its equations once more, its bits, and what it is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bimos import BimosError
from bimos.methods import InputStatistics, method_config
from bimos.methods.pbllm import PBLLMLinear
from bimos.packing.linear import PackedLinear
from bimos.packing.unpack import dense_weight
from correlated import correlated_inputs, linear, relative_output_error, statistics_of


def started(original: Any, statistics: InputStatistics, **options: Any) -> PBLLMLinear:
    config = method_config("pbllm", options)
    layer = config.layer.from_linear(original, config, statistics, torch.Generator())
    assert isinstance(layer, PBLLMLinear)
    return layer


def test_without_correlations_it_is_the_equations() -> None:
    original = linear(64, 16)
    w = original.weight.detach()
    weight = dense_weight(PackedLinear.from_tensors(started(original, InputStatistics.uninformed(64)).pack()))
    salient = torch.zeros(16 * 64, dtype=torch.bool)
    salient[w.abs().flatten().topk(102).indices] = True  # a tenth of 1,024, whatever their rows
    salient = salient.view(16, 64)
    assert (weight - w)[salient].abs().max() < w.abs().max() / 250  # half a step of 8 bits
    for i in range(16):
        expected = w[i, ~salient[i]].abs().mean() * w[i, ~salient[i]].sign()
        torch.testing.assert_close(weight[i, ~salient[i]], expected, rtol=1e-3, atol=0)


def test_each_column_makes_good_those_before_it() -> None:
    """GPTQ's sweep by the inverse of H itself, with the layer's own scales and salient weights."""
    original, x = linear(32, 8), correlated_inputs(32, 7)
    statistics = statistics_of(x)
    assert statistics.gram is not None
    layer = started(original, statistics)
    alpha, step, salient = layer.scale.detach().double(), layer.scale_salient.detach().double(), layer.salient
    inverse = (statistics.gram.double() / statistics.gram.diagonal().mean() + 0.01 * torch.eye(32)).inverse()
    w = original.weight.detach().double().clone()
    result = torch.zeros_like(w)
    for j in range(32):
        sign = alpha * torch.where(w[:, j] >= 0, 1.0, -1.0)
        code = ((w[:, j] - sign) / step).round().clamp(-127, 127)
        result[:, j] = torch.where(salient[:, j], sign + step * code, sign)
        w = w - ((w[:, j] - result[:, j]) / inverse[j, j])[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j : j + 1] / inverse[j, j]
    actual = dense_weight(PackedLinear.from_tensors(layer.pack()))
    assert ((actual - result).abs() < 1e-3).float().mean() > 0.95  # a sign that was a near thing


def test_saliency_is_of_the_hessian() -> None:
    original, x = linear(64, 16), correlated_inputs(64, 10)
    x[:, 5] *= 20
    salient = started(original, statistics_of(x)).salient
    assert salient.sum() == 102 and salient[:, 5].float().mean() > 0.5 > 2 * salient.float().mean()


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25])
def test_bits(share: float) -> None:
    layout = method_config("pbllm", {"salient": share}).packed_layout(576, 1536, False)
    bits = sum(stored.bits for stored in layout.values()) / (576 * 1536)
    assert bits == pytest.approx(2 + 8 * share + 32 / 576, abs=1e-5)


def test_better_than_signs_on_correlated_inputs() -> None:
    for seed in range(3):
        original, x = linear(96, 48, seed), correlated_inputs(96, 24, seed=seed)
        signs = relative_output_error(method_config("sign"), original, x)
        few, many = (relative_output_error(method_config("pbllm", {"salient": share}), original, x) for share in (0.1, 0.3))
        assert many < few < 0.6 * signs


def test_weights_that_are_no_numbers_are_not_packed() -> None:
    layer = started(linear(32, 8), InputStatistics.uninformed(32))
    with torch.no_grad():
        layer.residual[3] = float("nan")
    with pytest.raises(BimosError, match="NaN"):
        layer.pack()


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"salient": 0}, "salient=0"),
        ({"salient": 1.0}, "salient=1"),
        ({"salient": 0.12345}, "salient=0.12345"),
        ({"damping": 0}, "damping=0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(BimosError, match=fragment):
        method_config("pbllm", options)
