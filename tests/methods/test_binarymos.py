"""BinaryMoS against its equations: forward, straight-through gradients, and the ways to start."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bimos import BimosError
from bimos.methods import InputStatistics
from bimos.methods.binarymos import BinaryMoSConfig, BinaryMoSLinear
from bimos.methods.onebit import OneBitConfig
from bimos.methods.rank_one import rank_one_svd, weighted_rank_one


def definition(x: Tensor, latent: Tensor, scale_in: Tensor, scale_out: Tensor, router: Tensor | None, bias: Tensor | None) -> Tensor:
    """Section 3 of the design, written from its equations: autograd goes through the clipped latent, the value is its sign."""
    signs = torch.where(latent >= 0, 1.0, -1.0).to(latent)
    straight_through = signs.detach() + latent.clamp(-1, 1) - latent.clamp(-1, 1).detach()
    if router is None:
        mixed_in, mixed_out = scale_in[0], scale_out[0]
    else:
        gate = torch.softmax((x @ router.t()).float(), dim=-1).to(x)  # in float32 whatever the rest is in
        mixed_in, mixed_out = gate @ scale_in, gate @ scale_out
    y = ((x * mixed_in) @ straight_through.t()) * mixed_out
    return y if bias is None else y + bias


def random_layer(experts: int, bias: bool, n_in: int = 48, n_out: int = 29, dtype: torch.dtype = torch.float32) -> BinaryMoSLinear:
    """Parameters of no particular origin; a third of the latents beyond +-1, one of them zero."""
    generator = torch.Generator().manual_seed(experts)
    layer = BinaryMoSLinear(n_in, n_out, bias, BinaryMoSConfig(num_experts=experts)).to(dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            parameter.copy_(1 + noise / 4 if "scale" in name else noise)
        layer.weight[0, 0] = 0.0
    return layer


def gradients(output: Tensor, towards: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((output * towards).sum(), tensors))


@pytest.mark.parametrize("experts", [1, 2, 4, 5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-12)])
def test_forward_and_gradients_are_the_authors_definition(experts: int, bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    layer = random_layer(experts, bias, dtype=dtype)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(3, 7, 48, generator=generator, dtype=dtype, requires_grad=True)
    towards = torch.randn(3, 7, 29, generator=generator, dtype=dtype)
    actual = layer(x)
    expected = definition(x, layer.weight, layer.scale_in, layer.scale_out, layer.router, layer.bias)
    tensors = [x, *layer.parameters()]
    pairs = zip([actual, *gradients(actual, towards, tensors)], [expected, *gradients(expected, towards, tensors)], strict=True)
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def test_gradient_stops_where_the_latent_leaves_its_interval() -> None:
    layer = random_layer(2, False)
    with torch.no_grad():
        layer.weight[1, :4] = torch.tensor([1.0, -1.0, 0.999, -0.999])
    layer(torch.randn(16, 48)).square().sum().backward()
    assert layer.weight.grad is not None
    outside = layer.weight.abs() >= 1
    assert 0.2 < outside.float().mean() < 0.5  # or the test would show nothing
    assert torch.equal(layer.weight.grad == 0, outside)


def test_onebit_is_binarymos_with_one_expert() -> None:
    linear = nn.Linear(40, 24)
    statistics = correlated_inputs(40)
    one, moe = (
        config.layer.from_linear(linear, config, statistics, torch.Generator().manual_seed(0))
        for config in (OneBitConfig(), BinaryMoSConfig(num_experts=1))
    )
    assert one.state_dict().keys() == moe.state_dict().keys() == {"weight", "scale_in", "scale_out", "bias"}
    assert all(torch.equal(tensor, moe.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert OneBitConfig().packed_layout(40, 24, True) == BinaryMoSConfig(num_experts=1).packed_layout(40, 24, True)


# The start


def correlated_inputs(n_in: int, tokens: int = 512) -> InputStatistics:
    """Tokens of four kinds, whose large components differ."""
    generator = torch.Generator().manual_seed(4)
    kinds = torch.randn(4, n_in, generator=generator) * 2
    sample = kinds[torch.randint(0, 4, (tokens,), generator=generator)] + torch.randn(tokens, n_in, generator=generator)
    return InputStatistics(sample.square().mean(0), sample)


def start(linear: nn.Linear, statistics: InputStatistics, **options: Any) -> BinaryMoSLinear:
    return BinaryMoSLinear.from_linear(linear, BinaryMoSConfig(**options), statistics, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(29, 48), (64, 8), (1, 16), (7, 7)])
def test_rank_one_is_that_of_the_svd(shape: tuple[int, int]) -> None:
    magnitude = torch.randn(shape, generator=torch.Generator().manual_seed(1)).abs()
    u, s, vh = torch.linalg.svd(magnitude)
    r, c = rank_one_svd(magnitude)
    torch.testing.assert_close(r, s[0].sqrt() * u[:, 0].abs(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(c, s[0].sqrt() * vh[0].abs(), rtol=1e-4, atol=1e-6)


def weighted_error(magnitude: Tensor, weight: Tensor, r: Tensor, c: Tensor) -> float:
    return ((magnitude - r[:, None] * c).double().square() * weight.double()).sum().item()


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_alternating_least_squares_never_gets_worse(spread: float) -> None:
    generator = torch.Generator().manual_seed(2)
    magnitude = (torch.randn(33, 56, generator=generator) * torch.randn(33, 1, generator=generator).exp()).abs()
    weight = (spread * torch.randn(56, generator=generator)).exp()
    errors = [weighted_error(magnitude, weight, *weighted_rank_one(magnitude, weight, n)) for n in range(9)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors)), errors
    if spread:
        assert errors[8] < 0.999 * errors[0]
    again = weighted_rank_one(magnitude, 7 * weight, 8)  # what counts is the ratio of the weights
    torch.testing.assert_close(again, weighted_rank_one(magnitude, weight, 8))


def test_a_column_that_is_never_used_does_no_harm() -> None:
    linear = nn.Linear(16, 8)
    with torch.no_grad():
        linear.weight[:, 3] = 0
        linear.weight[2] = 0
    moment = torch.ones(16)
    moment[:4] = 0
    layer = start(linear, InputStatistics(moment, torch.zeros(0, 16)))
    assert all(torch.isfinite(parameter).all() for parameter in layer.parameters())
    packed = layer.pack()
    assert all(torch.isfinite(packed[name]).all() for name in ("scale_in", "scale_out", "router"))


def test_authors_start() -> None:
    linear, statistics = nn.Linear(48, 29), correlated_inputs(48)
    layer = start(linear, statistics, num_experts=4, iterations=0, distinct_experts=False, latent_magnitude=None)
    assert torch.equal(layer.weight, linear.weight)
    assert layer.bias is not None and torch.equal(layer.bias, linear.bias)
    r, c = rank_one_svd(linear.weight.detach().abs())
    assert all(torch.equal(row, r) for row in layer.scale_out)
    assert all(torch.equal(row, c) for row in layer.scale_in)
    assert layer.router is not None and len(layer.router.unique()) > 100  # it alone breaks the symmetry
    assert layer.router.abs().max() <= 48**-0.5


def test_experts_start_distinct() -> None:
    layer = start(nn.Linear(48, 29), correlated_inputs(48), num_experts=4)
    for scales in (layer.scale_in, layer.scale_out):
        for a in range(4):
            for b in range(a):
                assert (scales[a] - scales[b]).norm() > 1e-3 * scales[a].norm(), (a, b)


def test_router_spreads_tokens() -> None:
    statistics = correlated_inputs(48)
    layer = start(nn.Linear(48, 29), statistics, num_experts=4)
    assert layer.router is not None
    gate = torch.softmax(statistics.sample @ layer.router.t(), dim=-1)
    usage = gate.mean(0)
    entropy = -(usage * usage.log()).sum().item()
    assert entropy > 0.9 * math.log(4)  # over all tokens every expert is used
    per_token = -(gate * gate.clamp_min(1e-9).log()).sum(-1).mean().item()
    assert per_token < 0.9 * math.log(4)  # and tokens differ in which


def test_distinct_experts_fit_their_tokens_better() -> None:
    linear, statistics = nn.Linear(48, 64), correlated_inputs(48)
    errors = {}
    for distinct in (False, True):
        layer = start(linear, statistics, num_experts=4, distinct_experts=distinct)
        errors[distinct] = (layer(statistics.sample) - linear(statistics.sample)).square().mean().item()
    assert errors[True] < errors[False]


@pytest.mark.parametrize("magnitude", [0.1, 0.25, 1.0])
def test_latents_start_at_the_magnitude_asked_for(magnitude: float) -> None:
    linear = nn.Linear(64, 64)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-2, 2, 64)[:, None])  # rows of very different size
    layer = start(linear, correlated_inputs(64), latent_magnitude=magnitude)
    assert torch.equal(layer.weight >= 0, linear.weight >= 0)
    assert layer.weight.abs().mean().item() == pytest.approx(magnitude, rel=0.2)
    rows = layer.weight.abs().mean(1)
    assert rows.max() < 2 * rows.min()  # every row is as likely to flip


def test_few_samples_are_no_clusters() -> None:
    sample = torch.randn(3, 48)
    layer = start(nn.Linear(48, 29), InputStatistics(sample.square().mean(0), sample), num_experts=4)
    assert all(torch.equal(row, layer.scale_in[0]) for row in layer.scale_in)


def test_equal_tokens_are_no_trouble() -> None:
    """Clusters that would stay empty."""
    sample = torch.ones(64, 48)
    layer = start(nn.Linear(48, 29), InputStatistics(sample.square().mean(0), sample), num_experts=4)
    assert all(torch.isfinite(parameter).all() for parameter in layer.parameters())
    assert torch.isfinite(layer(sample)).all()


def with_gram(statistics: InputStatistics) -> InputStatistics:
    sample = statistics.sample
    return InputStatistics(statistics.second_moment, sample, sample.T @ sample / len(sample))


@pytest.mark.parametrize("experts", [1, 4])
def test_known_correlations_make_a_better_start(experts: int) -> None:
    linear, statistics = nn.Linear(48, 64), correlated_inputs(48)
    expected = linear(statistics.sample)
    plain = start(linear, statistics, num_experts=experts)
    informed = start(linear, with_gram(statistics), num_experts=experts)
    off = start(linear, with_gram(statistics), num_experts=experts, compensation=0)
    errors = [(layer(statistics.sample) - expected).square().mean().item() for layer in (plain, informed, off)]
    assert errors[1] < 0.5 * errors[0] and errors[2] == errors[0]
    assert informed.weight.abs().mean().item() == pytest.approx(0.25, rel=0.01)
    assert informed.weight.abs().max() < 20 * informed.weight.abs().mean()


def test_experts_fit_their_tokens_better_than_one_pair_of_scales() -> None:
    linear, statistics = nn.Linear(48, 64), with_gram(correlated_inputs(48))
    one, four = (start(linear, statistics, num_experts=experts) for experts in (1, 4))
    errors = [(layer(statistics.sample) - linear(statistics.sample)).square().mean().item() for layer in (one, four)]
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("experts", [0, 257])
def test_how_many_experts_there_may_be(experts: int) -> None:
    with pytest.raises(BimosError, match="from 1 to 256"):
        BinaryMoSConfig(num_experts=experts)


def test_a_huge_token_that_counts_little_does_not_decide_for_experts() -> None:
    """Massive activations: relative to its own size such a token is one of many (see `relative_error`)."""
    linear, statistics = nn.Linear(48, 64), correlated_inputs(48)
    sample = statistics.sample.clone()
    sample[0] *= 1000
    importance = 1 / sample.square().sum(1)
    gram = (sample * importance[:, None]).T @ sample / importance.sum()
    huge = InputStatistics(gram.diagonal().clone(), sample, gram, importance)
    expected = linear(sample)
    errors = []
    for known in (huge, dataclasses.replace(huge, importance=None)):
        layer = start(linear, known, num_experts=4)
        errors.append(((layer(sample) - expected).square().sum(1) / expected.square().sum(1)).mean().item())
    one = start(linear, huge, num_experts=1)
    alone = ((one(sample) - expected).square().sum(1) / expected.square().sum(1)).mean().item()
    assert errors[0] < alone < errors[1]
