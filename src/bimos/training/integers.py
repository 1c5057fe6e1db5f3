"""The teacher's products while distilling on a CPU, in whole numbers where those are faster than what torch has.

In bfloat16, with AVX-512 and without a matrix unit: weights in 8 bits by row, inputs in 8 bits by groups of 64,

    y = scale_row * sum_g step_g * (q_g . w_g) + bias,   q_g = round(x_g / step_g),   step_g = max |x_g| / 127

Such a product of bytes (`csrc/group8.h`) takes 0.6 of the time of one of bfloat16 pairs, for a KL divergence of 0.01 from what the
teacher would have said (docs/experiments.md).

In float32, with AVX2 alone: weights and inputs in 13 bits by groups of up to 128 (`csrc/int16.h`), 0.6 to 0.8 of the time, at a
relative error of 3e-4.

A teacher is read, never trained. The student's head, as frozen, goes the same way; gradients of inputs are torch's. Weights that want
gradients go the old way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bimos.kernels.native import pays

Tiles = tuple[Tensor, ...]  # as `_packed` makes them


@contextmanager
def integer_products(*models: nn.Module) -> Iterator[None]:
    """Within it, the linears of `models` (a teacher, its head included; a student's head) multiply in whole numbers where that pays.

    They keep their weights, which others may share; the tiles beside them take a byte a weight of bfloat16, two of float32.
    """
    changed: list[IntegerLinear] = []
    made: dict[tuple[Any, ...], Tiles] = {}  # heads of teacher and student are one
    try:
        for module in (part for model in models for part in model.modules()):
            if type(module) is nn.Linear and _is_covered(module):  # adapters and quantized layers are classes of their own
                key = module.weight.data_ptr(), module.weight.shape, module.weight.stride()
                tiles = made.get(key) or _packed(module.weight.detach())
                made[key] = tiles
                module.__dict__["tiles"] = tiles, None if module.bias is None else module.bias.detach().float()  # no state of the module's
                module.__class__ = IntegerLinear
                changed.append(module)  # type: ignore[arg-type]
        yield
    finally:
        for linear in changed:
            linear.__class__ = nn.Linear  # type: ignore[assignment]
            del linear.__dict__["tiles"]


def _is_covered(module: nn.Linear) -> bool:
    weight = module.weight
    return weight.dtype in (torch.bfloat16, torch.float32) and weight.device.type == "cpu" and weight.numel() > 0 and pays(weight.dtype)


def _packed(weight: Tensor) -> Tiles:
    """Tiles and scales of rows for bfloat16, panels for float32."""
    if weight.dtype == torch.float32:
        return (torch.ops.bimos.int16_pack(weight),)
    tiles: Tiles = torch.ops.bimos.group8_pack(weight)
    return tiles


class IntegerLinear(nn.Linear):
    """A linear for as long as `integer_products` lasts."""

    tiles: tuple[Tiles, Tensor | None]  # and the bias in float32

    def forward(self, x: Tensor) -> Tensor:
        """`[..., out]` of `x [..., in]`, in the weight's dtype."""
        is_trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        if x.dtype != self.weight.dtype or x.shape[-1] != self.in_features or is_trained:
            return super().forward(x)
        tiles, bias = self.tiles
        y: Tensor = _Product.apply(x, self.weight, bias, *tiles)
        return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *tiles: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        if x.dtype == torch.float32:
            y: Tensor = torch.ops.bimos.int16_linear(x, *tiles, len(weight), bias)
        else:
            y = torch.ops.bimos.group8_linear(x, *tiles, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return grad @ weight, *[None] * (len(ctx.needs_input_grad) - 1)
