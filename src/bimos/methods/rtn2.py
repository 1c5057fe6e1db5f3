"""Round to nearest in 2 bits: integers from 0 to 3 with a scale and a zero point for every group of a row, no training.

    w_hat = s (q - z),  q = clamp(round(w / s) + z, 0, 3)        s = (max - min) / 3,  z = round(-min / s), 0 within [min, max]

Stored as two sign planes: with `q = 2 b1 + b0` and `B = 2 b - 1`,

    w_hat = s/2 (B0 + 2 B1) + s (3/2 - z)        weight [2, out, in/8], scale_group_int s/2 and offset_group, float16 [out, groups]

so bits are 2 + 32/group. Zero points as integers of 2 bits, as the GPTQ authors count them, would take 2 + 18/group.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimos.errors import BimosError
from bimos.methods.base import InputStatistics, MethodConfig, StoredTensor, TrainableLinear, bias_layout, plane_layout, register
from bimos.methods.ste import compute_dtype
from bimos.packing.format import pack_signs
from bimos.packing.groups import by_input, count_groups

ROWS = 256  # of a weight that are rounded at once
LEAST_SCALE = 2.0**-14  # the smallest normal float16


class Start(NamedTuple):
    """Weights as they are rounded `[out, in]`, and the lattices that they are rounded to `[out, groups]`."""

    weight: Tensor
    scale: Tensor
    offset: Tensor


class Integer2Linear(TrainableLinear):
    """A linear of 2-bit integers. Gradients go straight through the rounding of weights that are within half a step of their lattice.

    Parameters:
        weight: latent, float32 `[out, in]`.
        scale: half a step, `[out, groups]`.
        offset: the middle of the lattice, `[out, groups]`.
        bias: `[out]` or None.
    """

    uses_signs = False
    config: RTN2Config

    def __init__(self, in_features: int, out_features: int, bias: bool, config: RTN2Config) -> None:
        super().__init__(in_features, out_features, bias, config)
        groups = count_groups(in_features, config.group_size)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.scale = nn.Parameter(torch.ones(out_features, groups))
        self.offset = nn.Parameter(torch.zeros(out_features, groups))

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: Any, statistics: InputStatistics, generator: torch.Generator) -> Self:
        layer = cls.shaped_like(linear, config)
        start = cls.start(linear.weight.detach().float(), config, statistics)
        with torch.no_grad():
            layer.weight.copy_(start.weight)
            layer.scale.copy_(start.scale)
            layer.offset.copy_(start.offset)
        return layer

    @classmethod
    def start(cls, weight: Tensor, config: Any, statistics: InputStatistics) -> Start:
        """Where training would begin, and where the method ends without it."""
        return Start(weight, *lattice(weight, config.group_size))

    @property
    def group_size(self) -> int:
        return self.config.group_size

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(compute_dtype(x))
        if not torch.is_grad_enabled():
            return self.plus_bias(F.linear(x, self._rounded(x.dtype)))
        scale, offset = (by_input(t, self.group_size, self.in_features) for t in (self.scale, self.offset))
        odd = odd_numbers(self.weight.detach(), scale.detach(), offset.detach())
        within = (self.weight.detach() - offset.detach()).abs() < 4 * scale.detach()
        straight = (self.weight - self.weight.detach()) * within
        y = F.linear(x, (scale * odd + offset + straight).to(x.dtype))
        return self.plus_bias(y)

    def _rounded(self, dtype: torch.dtype) -> Tensor:
        """The weights as they are stored `[out, in]`; made of some rows at a time, so that little else is in memory."""
        result = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        for start in range(0, self.out_features, ROWS):
            part = slice(start, start + ROWS)
            scale, offset = (by_input(t[part], self.group_size, self.in_features) for t in (self.scale, self.offset))
            result[part] = scale * odd_numbers(self.weight[part], scale, offset) + offset
        return result

    def pack(self) -> dict[str, Tensor]:
        scale, offset = (by_input(t.detach(), self.group_size, self.in_features) for t in (self.scale, self.offset))
        odd = odd_numbers(self.weight.detach(), scale, offset)
        high = torch.where(odd > 0, 2.0, -2.0)
        return {
            "weight": pack_signs(torch.stack([odd - high, odd])),
            "scale_group_int": self.scale.detach().half(),
            "offset_group": self.offset.detach().half(),
        } | self.packed_bias()

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return self.by_role(latent=[self.weight], scale=[self.scale, self.offset])


@register
@dataclasses.dataclass(frozen=True)
class RTN2Config(MethodConfig):
    """Options of `rtn2`: `group_size` inputs share a scale and a zero point; the last group of a row may be shorter."""

    name: ClassVar[str] = "rtn2"
    summary: ClassVar[str] = "2-bit integers, rounded to nearest by group; not trained"
    layer: ClassVar[type[TrainableLinear]] = Integer2Linear
    trained: ClassVar[bool] = False
    uses_inputs: ClassVar[bool] = False

    group_size: int = 64

    def __post_init__(self) -> None:
        if self.group_size < 8 or self.group_size % 8:
            raise BimosError(f"group_size={self.group_size}: must be a positive multiple of 8")

    def packed_layout(self, in_features: int, out_features: int, bias: bool) -> dict[str, StoredTensor]:
        by_group = StoredTensor((out_features, count_groups(in_features, self.group_size)), torch.float16)
        layout = plane_layout(2, in_features, out_features) | {"scale_group_int": by_group, "offset_group": by_group}
        return layout | bias_layout(out_features, bias)


def odd_numbers(weight: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """-3, -1, 1 or 3, whichever times `scale` plus `offset` is nearest to each weight."""
    return 2 * ((weight - offset) / (2 * scale) + 1.5).round().clamp(0, 3) - 3


def lattice(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Half a step and the middle of each group's lattice, `[out, groups]`, as float16 holds them.

    Args:
        weight: float32 `[out, in]`.
    """
    group_size = min(group_size, weight.shape[1])
    missing = -weight.shape[1] % group_size
    groups = F.pad(weight, (0, missing)).unflatten(1, (-1, group_size))  # 0 is within every group's range
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    step = (high - low) / 3
    scale = (step / 2).clamp_min(LEAST_SCALE).half().float()
    zero = (-low / (2 * scale)).round()
    return scale, (scale * (3 - 2 * zero)).half().float()
