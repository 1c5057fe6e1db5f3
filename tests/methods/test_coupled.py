"""Two coupled planes: their start against planes fitted one after the other, and the layer against its equation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bimos.methods import InputStatistics, method_config
from bimos.methods.binarymos import BinaryMoSLinear
from bimos.methods.compensation import Fit, compensated_fit, turned
from bimos.methods.coupled import _error, _refit, coupled_fit, matrix


def correlated(n: int, seed: int) -> Tensor:
    x = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(seed))
    x = x @ torch.randn(n, n, generator=torch.Generator().manual_seed(seed + 1))
    return x.T @ x / len(x)


def test_together_is_better_than_one_after_the_other() -> None:
    gains = []
    for seed in range(4):
        weight, gram = torch.randn(48, 40, generator=torch.Generator().manual_seed(seed)), correlated(40, 10 * seed)
        moments = gram.diagonal()
        first = compensated_fit(weight, gram, 4, 8)
        second = compensated_fit(weight - matrix(first), gram, 4, 8)
        apart = _error(weight, [first, second], gram)
        together = _error(weight, coupled_fit(weight, moments, gram, 4, 8), gram)
        plain = _error(weight, coupled_fit(weight, moments, gram, 0, 8), gram)
        assert together <= apart + 1e-4 and together < 0.7 * plain
        gains.append(together / apart)
    assert sum(gains) / len(gains) < 0.9, gains


def test_two_planes_without_known_inputs() -> None:
    """Gaussian weights: planes fitted one after the other leave .132 of the variance, the best two .1175 (1 - 2/pi = .363 with one)."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    first, second = coupled_fit(weight, torch.ones(1024), None, 3, 8)
    assert (weight - matrix(first) - matrix(second)).square().mean() < 0.145


def test_scales_are_refit_to_the_joint_error() -> None:
    weight, gram = torch.randn(20, 24, generator=torch.Generator().manual_seed(1)), correlated(24, 3)
    pair = coupled_fit(weight, gram.diagonal(), None, 0, 2)
    before = _error(weight, pair, gram)
    after = _refit(weight, gram, pair)
    assert _error(weight, after, gram) < 0.9 * before
    assert all((fit.row >= 0).all() and (fit.column >= 0).all() for fit in after)


def test_signs_turn_where_one_scale_is_negative() -> None:
    decision = torch.tensor([[2.0, -3.0, 0.0], [0.0, -0.5, 4.0]])
    after = turned(decision, torch.tensor([1.0, -1.0]), torch.tensor([-2.0, 2.0, -0.0]))
    assert torch.equal(after >= 0, torch.tensor([[False, False, True], [True, True, False]]))
    assert torch.allclose(after.abs(), decision.abs())


def test_decisions_of_zero_turn_with_their_scale() -> None:
    weight, gram = -torch.ones(8, 16), torch.eye(16)
    small = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    pair = [Fit(torch.ones(8), torch.ones(16), torch.zeros(8, 16)), Fit(torch.full((8,), 0.1), torch.ones(16), small)]
    after = _refit(weight, gram, pair)
    assert (after[0].decision < 0).all()
    assert _error(weight, after, gram) < 0.01 * _error(weight, pair, gram)


@pytest.mark.parametrize("gram", [torch.zeros(16, 16), torch.eye(16), None])
def test_weights_that_say_nothing(gram: Tensor | None) -> None:
    for weight in (torch.zeros(8, 16), torch.ones(8, 16)):
        pair = coupled_fit(weight, torch.ones(16), gram, 2, 4)
        assert all(torch.isfinite(part).all() for fit in pair for part in fit)


@pytest.mark.parametrize("experts", [1, 3])
def test_layer_is_the_sum_of_both_planes(experts: int) -> None:
    torch.manual_seed(2)
    linear, sample = nn.Linear(40, 16), torch.randn(256, 40)
    gram = sample.T @ sample / len(sample)
    statistics = InputStatistics(gram.diagonal(), sample, gram)
    config = method_config("binarymos", {"planes": 2, "num_experts": experts})
    layer = BinaryMoSLinear.from_linear(linear, config, statistics, torch.Generator().manual_seed(0))
    x = torch.randn(5, 40)
    gate = torch.ones(5, 1) if layer.router is None else torch.softmax(x @ layer.router.T, -1)
    expected = linear.bias.expand(5, -1)
    assert layer.scale_in_2 is not None and layer.scale_out_2 is not None
    first = torch.where(layer.weight >= 0, 1.0, -1.0)
    second = torch.where(layer.weight.abs() >= 0.5, first, -first)
    planes = [(first, layer.scale_in, layer.scale_out), (second, layer.scale_in_2, layer.scale_out_2)]
    for signs, scale_in, scale_out in planes:
        expected = expected + (x * (gate @ scale_in)) @ signs.T * (gate @ scale_out)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    one = BinaryMoSLinear.from_linear(
        linear, method_config("binarymos", {"num_experts": experts}), statistics, torch.Generator().manual_seed(0)
    )
    errors = [(model(sample) - linear(sample)).square().mean() for model in (layer, one)]
    assert errors[0] < 0.4 * errors[1]
