"""Products while training with signs that have a scale by group of a row.

y_i = sum_j s_ik B_ij x_j      k the group of j
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bimos.packing.groups import by_input, group_sums


def grouped_sign_linear(x: Tensor, signs: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """`x [..., in]` times `signs [out, in]`, each times the scale `[out, groups]` of its group, transposed; in the dtype of the signs.

    Scaled signs are made anew for gradients: kept, they would be as large as the latents, for every plane and batch.
    """
    y: Tensor = _GroupedProduct.apply(x.to(signs.dtype), signs, scale, group_size)
    return y


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, signs: Tensor, scale: Tensor, group_size: int) -> Tensor:
        ctx.save_for_backward(x, signs, scale)
        ctx.group_size = group_size
        return F.linear(x, signs * by_input(scale.to(signs.dtype), group_size, signs.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, signs, scale = ctx.saved_tensors
        expanded = by_input(scale.to(signs.dtype), ctx.group_size, signs.shape[1])
        of_x = grad @ (signs * expanded) if ctx.needs_input_grad[0] else None
        of_signs = of_scale = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            of_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
            if ctx.needs_input_grad[2]:
                of_scale = group_sums(of_weight.to(scale.dtype) * signs, ctx.group_size)
            of_signs = of_weight.mul_(expanded) if ctx.needs_input_grad[1] else None
        return of_x, of_signs, of_scale, None
