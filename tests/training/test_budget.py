"""Budgets, schedules, and the optimizer's groups."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from torch import nn

from bimos.methods import InputStatistics, TrainableLinear, method_config
from bimos.training.budget import Budget, schedule
from bimos.training.optimizer import build_optimizer, set_rate, trained_parameters


class Clock:
    """Time as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_token_budget() -> None:
    budget = Budget(tokens=1000)
    assert budget.progress() == 0 and budget.eta() == math.inf
    budget.spent_tokens = 250
    assert budget.progress() == 0.25
    budget.spent_tokens = 1024
    assert budget.progress() == 1


def test_time_counts_across_restarts_and_not_between() -> None:
    clock = Clock()
    budget = Budget(seconds=100, spent_seconds=40.0, clock=clock)
    clock.now += 500  # the process was dead
    budget.start()
    assert budget.progress() == pytest.approx(0.4) and budget.eta() == pytest.approx(60)
    clock.now += 30
    assert budget.elapsed == pytest.approx(70) and budget.progress() == pytest.approx(0.7)
    clock.now += 100
    assert budget.progress() == 1 and budget.eta() == 0


def test_eta_from_the_rate_so_far() -> None:
    clock = Clock()
    budget = Budget(tokens=1000, clock=clock)
    budget.start()
    clock.now += 10
    budget.spent_tokens = 200
    assert budget.eta() == pytest.approx(40)


def test_a_real_clock_moves() -> None:
    budget = Budget(seconds=1000)
    budget.start()
    time.sleep(0.01)
    assert 0 < budget.progress() < 1


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule(kind: str) -> None:
    values = [schedule(kind, 0.1, i / 100) for i in range(101)]
    assert 0 < values[0] < 0.1
    assert all(a < b for a, b in itertools.pairwise(values[1:11]))  # up
    assert values[10] == pytest.approx(1)
    rest = values[10:]
    if kind == "constant":
        assert set(rest) == {1.0}
    else:
        assert all(a > b for a, b in itertools.pairwise(rest))  # down
        assert rest[-1] == pytest.approx(0, abs=1e-9)
        assert rest[45] == pytest.approx(0.5)  # both are symmetric
    assert schedule(kind, 0.0, 0.0) == 1.0


def model() -> nn.Sequential:
    config = method_config("binarymos", {"num_experts": 2})
    layer = config.layer.from_linear(nn.Linear(16, 8), config, InputStatistics.uninformed(16), torch.Generator().manual_seed(0))
    return nn.Sequential(nn.Embedding(5, 16), nn.LayerNorm(16, dtype=torch.bfloat16), layer, nn.Linear(8, 5))


def test_roles_get_their_rates_and_the_rest_is_frozen() -> None:
    network = model()
    optimizer = build_optimizer(network, {"latent": 1e-2, "scale": 1e-3, "router": 2e-3, "norm": 1e-4}, (0.9, 0.95), 0.1)
    layer = network[2]
    assert isinstance(layer, TrainableLinear)
    facts = {group["role"]: (group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups}
    assert facts == {"latent": (1e-2, 0.1, 1), "scale": (1e-3, 0.0, 3), "router": (2e-3, 0.0, 1), "norm": (1e-4, 0.0, 2)}
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {
        "1.weight", "1.bias", "2.weight", "2.scale_in", "2.scale_out", "2.router", "2.bias",
    }  # fmt: skip
    assert network[1].weight.dtype == torch.float32  # a step in bfloat16 would round to nothing
    set_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-4, 1e-3, 5e-5]
    set_rate(optimizer, 1.0)  # of the base rate, not of the last one
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3, 2e-3, 1e-4]


def test_scales_alone() -> None:
    network = model()
    build_optimizer(network, {"scale": 1e-3}, (0.9, 0.95), 0.0)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {"2.scale_in", "2.scale_out", "2.bias"}


def test_every_trainable_parameter_has_a_group() -> None:
    groups = trained_parameters(model(), norms=True)
    assert {role: len(parameters) for role, parameters in groups.items()} == {"latent": 1, "scale": 3, "router": 1, "norm": 2}
