"""The teacher's products while distilling on a CPU: weights in 8 bits by row, inputs in 8 bits by groups of 64.

    y = scale_row * sum_g step_g * (q_g . w_g) + bias,   q_g = round(x_g / step_g),   step_g = max |x_g| / 127

A teacher in bfloat16 is read, never trained: a product of bytes (`csrc/group8.h`) takes 0.6 of the time of one of bfloat16 pairs,
for a KL divergence of 0.01 from what the teacher would have said (docs/experiments.md). The student's head, as frozen, goes the same
way; gradients of inputs are bfloat16's. Weights that want gradients go the old way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bimos.kernels.native import pays


@contextmanager
def int8_products(*models: nn.Module) -> Iterator[None]:
    """Within it, the bfloat16 linears of `models` (a teacher, its head included; a student's head) multiply in int8 where that pays.

    They keep their weights, which others may share; the tiles beside them take half as many bytes again.
    """
    changed: list[Int8Linear] = []
    made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # heads of teacher and student are one
    try:
        for module in (part for model in models for part in model.modules()) if pays(torch.bfloat16) else ():
            if type(module) is nn.Linear and _is_covered(module):  # adapters and quantized layers are classes of their own
                key = module.weight.data_ptr(), module.weight.shape, module.weight.stride()
                tiles = made.get(key) or torch.ops.bimos.group8_pack(module.weight.detach())
                made[key] = tiles
                module.__dict__["tiles"] = tiles, None if module.bias is None else module.bias.detach().float()  # no state of the module's
                module.__class__ = Int8Linear
                changed.append(module)  # type: ignore[arg-type]
        yield
    finally:
        for linear in changed:
            linear.__class__ = nn.Linear  # type: ignore[assignment]
            del linear.__dict__["tiles"]


def _is_covered(module: nn.Linear) -> bool:
    weight = module.weight
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.numel() > 0


class Int8Linear(nn.Linear):
    """A linear for as long as `int8_products` lasts."""

    tiles: tuple[tuple[Tensor, Tensor], Tensor | None]  # (tiles, scales of rows), bias in float32

    def forward(self, x: Tensor) -> Tensor:
        """`[..., out]` of `x [..., in]`, in bfloat16."""
        is_trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        if x.dtype != torch.bfloat16 or x.shape[-1] != self.in_features or is_trained:
            return super().forward(x)
        (tiles, scale), bias = self.tiles
        y: Tensor = _Product.apply(x, self.weight, tiles, scale, bias)
        return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        y: Tensor = torch.ops.bimos.group8_linear(x, tiles, scale, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return grad @ weight, None, None, None, None
