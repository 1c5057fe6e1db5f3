"""GPTQ in 2 bits: the integers of `rtn2`, each column's rounding error made good by the columns behind it; no training.

    E_j = (w_j - w_hat_j) / U_jj,   W_k -= E_j U_jk for k > j        U: upper Cholesky factor of (H + damping)^-1, H = E[x x^T]

arXiv 2210.17323, section 3.3 and algorithm 1. `order="columns"` takes a group's scale and zero point from its weights as they are
when its turn comes. `order="activation"` begins with the inputs that have most energy (the authors' later `act_order`); groups remain
groups of neighbours, so that no order need be stored, and their lattices are those of the original weights (`static_groups`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bimos.errors import BimosError
from bimos.methods.base import InputStatistics, TrainableLinear, register
from bimos.methods.compensation import statistics_factor, sweep
from bimos.methods.rtn2 import Integer2Linear, RTN2Config, Start, lattice, odd_numbers


class GPTQ2Linear(Integer2Linear):
    """The same layer from another start: its latents are the weights as the sweep rounded them, errors carried over included."""

    @classmethod
    def start(cls, weight: Tensor, config: Any, statistics: InputStatistics) -> Start:
        size = config.group_size
        scale, offset = lattice(weight, size)
        order = torch.arange(weight.shape[1], device=weight.device)
        if config.order == "activation":
            order = statistics.second_moment.argsort(descending=True, stable=True)
        factor = statistics_factor(statistics, config.damping, order)

        def settle(start: int, columns: Tensor) -> None:
            scale[:, start // size, None], offset[:, start // size, None] = lattice(columns, size)

        def rounded(j: int, value: Tensor) -> Tensor:
            group = int(order[j]) // size
            return scale[:, group] * odd_numbers(value, scale[:, group], offset[:, group]) + offset[:, group]

        latent = sweep(weight, factor, rounded, panel=size, begin=settle if config.order == "columns" else None, order=order)
        return Start(latent, scale, offset)


@register
@dataclasses.dataclass(frozen=True)
class GPTQ2Config(RTN2Config):
    """Options of `gptq2`: those of `rtn2`, the order of the columns, and `damping`, a share of the mean of H's diagonal."""

    name: ClassVar[str] = "gptq2"
    summary: ClassVar[str] = "2-bit integers by group, errors compensated (2210.17323); not trained"
    layer: ClassVar[type[TrainableLinear]] = GPTQ2Linear
    uses_inputs: ClassVar[bool] = True

    order: Literal["columns", "activation"] = "columns"
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping < float("inf"):
            raise BimosError(f"damping={self.damping}: must be positive")
