"""Flexible Dual Binarization of DB-LLM, arXiv 2402.11960 (ACL Findings 2024), section 3.2.

    Y = X (a1 * b1 + a2 * b2)^T + bias        b1 = [w - (a1 + a2)/2 >= 0],  b2 = [-(w - a1 b1 - a2/2) >= 0]

Planes of zeros and ones with two trained scales for every group of a row; started from a1 = 2s, a2 = -s their levels are -s, 0, s and 2s.
Straight through, dL/da_p = sum g b_p over the group, dL/dw = g between the outer levels and 0 beyond. Stored: two planes and
float16 `[2, out, groups]`, 2 + 32/group bits a weight (`scale_group_01`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimos.errors import BimosError
from bimos.kernels import native
from bimos.methods.base import InputStatistics, MethodConfig, StoredTensor, TrainableLinear, bias_layout, plane_layout, register
from bimos.methods.lattice import dual_bits, dual_fit, into_cells
from bimos.methods.ste import compute_dtype
from bimos.packing.format import pack_signs
from bimos.packing.groups import by_input, count_groups


class DualBinary(torch.autograd.Function):
    """`a1 b1 + a2 b2` of latents `[out, in]` and scales `[2, out, groups]`, with the gradients of the straight-through rule.

    Latents are weights, or weights in steps of their group (`step_of`): steps are no part of the gradient of the scales. On a CPU one pass
    over the latents makes the weights, and one more all gradients (`csrc/dual.cpp`).
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, group_size: int, in_steps: bool, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(latent, scale)
        ctx.options = group_size, in_steps
        if _is_covered(latent, scale) and dtype in native.TRAINED:
            made: Tensor = torch.ops.bimos.dual_weight(latent, scale, group_size, in_steps, dtype == torch.bfloat16)
            return made
        weight = torch.empty(latent.shape, dtype=dtype, device=latent.device)
        for columns, groups in _parts(latent.shape[1], group_size):
            first, second = scale[:, :, groups, None]
            one, two = dual_bits(_weights(latent[:, columns], scale[:, :, groups], in_steps), first, second)
            weight[:, columns].copy_((first * one).add_(second * two).flatten(1))
        return weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latent, scale = ctx.saved_tensors
        group_size, in_steps = ctx.options
        if _is_covered(latent, scale) and native.covers(grad):
            return (*torch.ops.bimos.dual_weight_backward(grad, latent, scale, group_size, in_steps), None, None, None)
        of_latent, of_scale = torch.empty_like(latent), torch.empty_like(scale)
        for columns, groups in _parts(latent.shape[1], group_size):
            first, second = scale[:, :, groups, None]
            weight = _weights(latent[:, columns], scale[:, :, groups], in_steps)
            g = grad[:, columns].to(scale.dtype).view(weight.shape)
            for plane, bits in enumerate(dual_bits(weight, first, second)):
                of_scale[plane, :, groups] = (g * bits).sum(-1)
            lowest, highest = first.clamp_max(0) + second.clamp_max(0), first.clamp_min(0) + second.clamp_min(0)
            g = g * ((weight >= lowest) & (weight <= highest))
            of_latent[:, columns] = (g * step_of(scale[:, :, groups])[..., None] if in_steps else g).flatten(1)
        return of_latent, of_scale, None, None, None


def _is_covered(latent: Tensor, scale: Tensor) -> bool:
    return native.covers(latent, scale) and latent.dtype == torch.float32 and not torch.compiler.is_compiling()


def step_of(scale: Tensor) -> Tensor:
    """From one level to the next, `[...]` of scales `[2, ...]`: s where they are 2s and -s."""
    return ((scale[0] - scale[1]).abs() / 3).clamp_min(1e-12)


def _parts(in_features: int, group_size: int) -> Iterator[tuple[slice, slice]]:
    """Inputs and groups of the groups that are whole, and of the one that is not."""
    whole = in_features // group_size
    if whole:
        yield slice(0, whole * group_size), slice(0, whole)
    if whole * group_size < in_features:
        yield slice(whole * group_size, in_features), slice(whole, whole + 1)


def _weights(latent: Tensor, scale: Tensor, in_steps: bool) -> Tensor:
    """Weights `[out, groups, g]` of latents `[out, in]` and their scales `[2, out, groups]`."""
    grouped = latent.unflatten(1, (scale.shape[2], -1))
    return grouped * step_of(scale)[..., None] if in_steps else grouped


class DualBinaryLinear(TrainableLinear):
    """Trainable dual binary linear.

    Parameters:
        weight: latent, float32 `[out, in]`.
        scale: a1 and a2 `[2, out, groups]`.
        bias: `[out]` or None.
    """

    config: DBLLMConfig
    uses_signs = False

    def __init__(self, in_features: int, out_features: int, bias: bool, config: DBLLMConfig) -> None:
        super().__init__(in_features, out_features, bias, config)
        groups = count_groups(in_features, self.group_size)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.scale = nn.Parameter(torch.ones(2, out_features, groups))

    @property
    def group_size(self) -> int:
        return self.config.group_size or self.in_features

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: Any, statistics: InputStatistics, generator: torch.Generator) -> Self:
        layer = cls.shaped_like(linear, config)
        weight, size = linear.weight.detach().float(), layer.group_size
        fit = dual_fit(weight, statistics.second_moment, statistics.gram, size, config.compensation, config.iterations)
        as_they_are = not config.relative_latents and (statistics.gram is None or config.compensation == 0)
        decision = fit.decision if as_they_are else into_cells(fit, size)
        if config.relative_latents:
            decision = decision / by_input(step_of(fit.scale), size, linear.in_features)
        with torch.no_grad():
            layer.weight.copy_(decision)
            layer.scale.copy_(fit.scale)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(compute_dtype(x))
        weight = DualBinary.apply(self.weight, self.scale, self.group_size, self.config.relative_latents, x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def pack(self) -> dict[str, Tensor]:
        latent, scale, size = self.weight.detach(), self.scale.detach(), self.group_size
        first, second = by_input(scale, size, self.in_features)
        weight = latent * by_input(step_of(scale), size, self.in_features) if self.config.relative_latents else latent
        if weight.isnan().any():
            raise BimosError("weights with NaN cannot be packed; check the model or lower the learning rate")
        planes = torch.stack(dual_bits(weight, first, second))
        return {"weight": pack_signs(planes.float() - 0.5), "scale_group_01": (scale / 2).half()} | self.packed_bias()

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return self.by_role(latent=[self.weight], scale=[self.scale])


@register
@dataclasses.dataclass(frozen=True)
class DBLLMConfig(MethodConfig):
    """Options of DB-LLM. The authors' start is `iterations=0, compensation=0, relative_latents=False`."""

    name: ClassVar[str] = "dbllm"
    summary: ClassVar[str] = "two planes of zeros and ones, two scales per group (2402.11960)"
    layer: ClassVar[type[TrainableLinear]] = DualBinaryLinear

    group_size: int | None = 64  # inputs that share two scales, the last ones of a row maybe fewer; None: the whole row
    compensation: int = 3  # rounds in which bits make good each other's errors, where inputs are known
    iterations: int = 4  # of bits and free scales in turns; 0: a1 = 2s, a2 = -s at the best s
    relative_latents: bool = True  # latents in steps of their group's levels; False: the weights themselves

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise BimosError(f"group_size={self.group_size}: must be positive, or null for the whole row")
        for name in ("iterations", "compensation"):
            if getattr(self, name) < 0:
                raise BimosError(f"{name}={getattr(self, name)}: must be 0 or more")

    def packed_layout(self, in_features: int, out_features: int, bias: bool) -> dict[str, StoredTensor]:
        layout = plane_layout(2, in_features, out_features)
        groups = count_groups(in_features, self.group_size or in_features)
        layout["scale_group_01"] = StoredTensor((2, out_features, groups), torch.float16)
        return layout | bias_layout(out_features, bias)
