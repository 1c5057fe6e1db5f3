"""Gradients of scaling experts: what they have in common whole, what sets them apart in part. Moments that are not in memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bimos.methods import InputStatistics, method_config
from bimos.methods.base import TrainableLinear
from bimos.training import optimizer as optimizers
from bimos.training.optimizer import build_optimizer, experts_together, moments_to_disk, step_in_turn


def layer(method: str, **options: object) -> TrainableLinear:
    torch.manual_seed(0)
    config = method_config(method, options)
    return config.layer.from_linear(nn.Linear(16, 24), config, InputStatistics.uninformed(16), torch.Generator().manual_seed(1))


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    module(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("options", "scales"), [({"num_experts": 4}, 2), ({"num_experts": 3, "planes": 2}, 4)], ids=["one", "two"])
def test_experts_differ_by_a_share(options: dict[str, object], scales: int, share: float) -> None:
    module = nn.Sequential(layer("binarymos", **options))
    with torch.no_grad():
        for scale in module[0].experts():
            scale.mul_(1 + 0.3 * torch.rand(scale.shape))
    x = torch.randn(2, 5, 16)
    plain = gradients(module, x)
    with experts_together(module, share):
        held = gradients(module, x)
    names = [name for name, parameter in module.named_parameters() if any(parameter is scale for scale in module[0].experts())]
    assert len(names) == scales
    for name, gradient in plain.items():
        mean = gradient.mean(0)
        expected = mean + share * (gradient - mean) if name in names else gradient
        assert torch.allclose(held[name], expected, rtol=1e-5, atol=1e-5), name
    assert all(torch.equal(gradient, plain[name]) for name, gradient in gradients(module, x).items())


@pytest.mark.parametrize("method", ["onebit", "sign", "dbllm"])
def test_scales_without_a_router_are_left_alone(method: str) -> None:
    module = nn.Sequential(layer(method))
    x = torch.randn(4, 16)
    plain = gradients(module, x)
    assert module[0].experts() == []
    with experts_together(module, 0.0):
        assert all(torch.equal(gradient, plain[name]) for name, gradient in gradients(module, x).items())


def test_frozen_experts_are_no_obstacle() -> None:
    module = nn.Sequential(layer("binarymos"))
    module.requires_grad_(False)
    with experts_together(module, 0.1):
        assert not module(torch.randn(2, 16)).requires_grad


def test_steps_in_turn_with_moments_on_disk_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "LARGE", 16 * 24)
    rates = {"latent": 1e-2, "scale": 1e-3, "router": 1e-3}
    module = nn.Sequential(layer("binarymos"), nn.ReLU(), nn.Linear(24, 16), layer("binarymos"))
    other = copy.deepcopy(module)
    one, two = (build_optimizer(m, rates, (0.9, 0.95), 0.1) for m in (module, other))
    moments_to_disk(two, tmp_path)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        gradients(module, x)
        gradients(other, x)
        other[3].bias.grad = module[3].bias.grad = None  # as of a linear that saw no token
        one.step()
        step_in_turn(two)
        assert all(parameter.grad is None for parameter in other.parameters() if parameter.requires_grad)
        assert all(map(torch.equal, module.parameters(), other.parameters()))
    files = {tuple(p.shape): two.state[p]["exp_avg"].untyped_storage().filename for p in other.parameters() if p in two.state}
    assert {shape for shape, name in files.items() if name is not None} == {(24, 16)} < set(files)
