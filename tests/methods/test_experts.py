"""How scales are tuned at the start, and experts set apart, by gradient steps on the error of their linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bimos.errors import BimosError
from bimos.methods.base import InputStatistics
from bimos.methods.binarymos import BinaryMoSConfig, BinaryMoSLinear

N_IN, N_OUT = 48, 64


def vectors(count: int, seed: int) -> Tensor:
    """Of four kinds, with noise."""
    kinds = torch.randn(4, N_IN, generator=torch.Generator().manual_seed(0)) * 2
    generator = torch.Generator().manual_seed(seed)
    return kinds[torch.randint(0, 4, (count,), generator=generator)] + torch.randn(count, N_IN, generator=generator)


def linear(bias: float = 0.0) -> nn.Linear:
    torch.manual_seed(1)
    made = nn.Linear(N_IN, N_OUT)
    nn.init.constant_(made.bias, bias)
    return made


def start(of: nn.Linear, **options: Any) -> BinaryMoSLinear:
    sample = vectors(512, seed=1)
    gram = sample.T @ sample / len(sample)
    statistics = InputStatistics(gram.diagonal().clone(), sample, gram)
    return BinaryMoSLinear.from_linear(of, BinaryMoSConfig(**options), statistics, torch.Generator().manual_seed(0))


def error(layer: nn.Module, of: nn.Linear, x: Tensor) -> float:
    with torch.no_grad():
        return ((layer(x) - of(x)).square().sum() / of(x).square().sum()).item()


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_experts_gain_on_vectors_that_they_have_not_seen(planes: int, bias: float) -> None:
    of, unseen = linear(bias), vectors(512, seed=2)
    alike, apart = start(of, planes=planes, scale_steps=0), start(of, planes=planes)
    assert error(apart, of, unseen) < 0.97 * error(alike, of, unseen)
    assert apart.bias is not None and torch.equal(apart.bias, of.bias)
    for scales in apart.roles()["scale"]:
        assert all((scales[a] - scales[b]).norm() > 1e-2 * scales[a].norm() for a in range(4) for b in range(a))


def test_one_pair_of_scales_is_tuned_too() -> None:
    of, unseen = linear(), vectors(512, seed=2)
    plain, tuned = start(of, num_experts=1, scale_steps=0), start(of, num_experts=1)
    assert not torch.equal(tuned.scale_out, plain.scale_out) and tuned.router is None
    assert error(tuned, of, unseen) < 1.02 * error(plain, of, unseen)  # least squares had the best for what both have seen


def test_signs_stay_and_nothing_is_left_behind() -> None:
    of = linear()
    alike, apart = start(of, scale_steps=0), start(of)
    assert torch.equal(apart.weight, alike.weight)
    assert all(p.requires_grad and p.grad is None and p.isfinite().all() for p in apart.parameters())
    assert not hasattr(apart.weight, "shared_signs")


def test_it_follows_the_generator_alone() -> None:
    first, second = start(linear()).state_dict(), start(linear()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_steps_experts_start_alike() -> None:
    layer = start(linear(), scale_steps=0)
    assert all(torch.equal(row, layer.scale_in[0]) for row in layer.scale_in)
    with pytest.raises(BimosError, match="scale_steps=-1"):
        BinaryMoSConfig(scale_steps=-1)
