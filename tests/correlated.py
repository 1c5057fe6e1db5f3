"""Inputs that are correlated, as those of a language model are, and what a layer loses on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bimos.methods import InputStatistics, MethodConfig


def correlated_inputs(width: int, rank: int, count: int = 1024, seed: int = 0) -> Tensor:
    """`[count, width]`: `rank` directions of uneven strength and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.linspace(2.0, 0.2, rank)
    mixing = torch.randn(rank, width, generator=generator)
    return (torch.randn(count, rank, generator=generator) * strength) @ mixing + 0.3 * torch.randn(count, width, generator=generator)


def statistics_of(x: Tensor) -> InputStatistics:
    return InputStatistics(x.square().mean(0), x[:64], x.T @ x / len(x))


def linear(n_in: int, n_out: int, seed: int = 0, bias: bool = False) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(n_in, n_out, bias=bias)
    nn.init.normal_(layer.weight, std=n_in**-0.5)
    return layer


def relative_output_error(config: MethodConfig, original: nn.Linear, x: Tensor, seed: int = 0) -> float:
    """Squared error of the outputs on `x` of what the method makes of `original`, relative to their size."""
    layer = config.layer.from_linear(original, config, statistics_of(x), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return ((layer(x) - original(x)).square().sum() / original(x).square().sum()).item()
