"""Signs with one scale per row, or per group of a row: XNOR-Net's rule (1603.05279, equation 6), the floor of every table.

    Y = X (a * sign(W))^T + bias                 a_i = mean_j |W_ij|, over the row or each group of it

Without training this is round-to-nearest at one bit. The latents and scales can be trained like any other method's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimos.errors import BimosError
from bimos.methods.base import InputStatistics, MethodConfig, StoredTensor, TrainableLinear, bias_layout, plane_layout, register
from bimos.methods.planes import SignPlane
from bimos.methods.ste import compute_dtype, sign_linear, sign_ste
from bimos.packing.format import pack_signs


class SignLinear(TrainableLinear):
    """Trainable sign linear.

    Parameters:
        weight: latent, float32 `[out, in]`.
        scale: `[out]`, or `[out, in/group]`.
        bias: `[out]` or None.
    """

    config: SignConfig

    def __init__(self, in_features: int, out_features: int, bias: bool, config: SignConfig) -> None:
        super().__init__(in_features, out_features, bias, config)
        shape = (out_features,) if config.group_size is None else (out_features, in_features // config.group_size)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.scale = nn.Parameter(torch.ones(shape))

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: Any, statistics: InputStatistics, generator: torch.Generator) -> Self:
        layer = cls.shaped_like(linear, config)
        weight = linear.weight.detach().float()
        with torch.no_grad():
            layer.scale.copy_(
                weight.abs().mean(1) if config.group_size is None else weight.abs().unflatten(1, (-1, config.group_size)).mean(-1)
            )
            layer.weight.copy_(weight)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(compute_dtype(x))
        if self.config.group_size is None:
            y = sign_linear(x, self.weight)
            return self.plus_bias(y * self.scale.to(y.dtype))
        signs = sign_ste(self.weight, x).unflatten(1, (-1, self.config.group_size))
        y = F.linear(x, (signs * self.scale[..., None].to(signs.dtype)).flatten(1))
        return self.plus_bias(y)

    def pack(self) -> dict[str, Tensor]:
        tensors = {"weight": pack_signs(self.weight.detach())[None]}
        scale = self.scale.detach().half()
        if self.config.group_size is None:
            tensors["scale_out"] = scale[None, None]
        else:
            tensors["scale_group"] = scale[None]
        return tensors | self.packed_bias()

    def sign_planes(self) -> list[SignPlane]:
        return [SignPlane(self.weight, as_values=self.config.group_size is not None)]

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return self.by_role(latent=[self.weight], scale=[self.scale])


@register
@dataclasses.dataclass(frozen=True)
class SignConfig(MethodConfig):
    """Options of `sign`: `group_size` inputs share a scale; None means the whole row."""

    name: ClassVar[str] = "sign"
    summary: ClassVar[str] = "one sign plane, one scale per row or group (1603.05279)"
    layer: ClassVar[type[TrainableLinear]] = SignLinear

    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise BimosError(f"group_size={self.group_size}: must be positive, or null for the whole row")

    def packed_layout(self, in_features: int, out_features: int, bias: bool) -> dict[str, StoredTensor]:
        layout = plane_layout(1, in_features, out_features)
        if self.group_size is None:
            layout["scale_out"] = StoredTensor((1, 1, out_features), torch.float16)
        else:
            if in_features % self.group_size:
                raise BimosError(f"group_size={self.group_size} does not divide in_features={in_features}; choose a divisor of it")
            layout["scale_group"] = StoredTensor((1, out_features, in_features // self.group_size), torch.float16)
        return layout | bias_layout(out_features, bias)
