"""Scales mixed per token, in training.

    gate = softmax(x R^T)                      x [..., in], router R [e, in], in float32
    y    = x * (gate S)                        experts S [e, in]; without a gate their only row

On a CPU one pass over the rows makes all of it, and one more all gradients (`csrc/mixing.cpp`); elsewhere, and for what that does not
cover, torch does. Gates and mixes are float32 in both, whatever the dtype of `x`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bimos.kernels import native

EXPERTS = (1, 2, 4, 8)  # that the C++ has


def route_and_mix(x: Tensor, router: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The gates `[..., e]`, float32, of a router `[e, in]`, and `x [..., in]` scaled by their mix of `scales [e, in]`."""
    if _is_covered(x, scales) and router.dtype == torch.float32:
        scaled, gate = _RouteAndMix.apply(x, router, scales)
        return scaled, gate.view(*x.shape[:-1], len(router))
    wide = torch.promote_types(x.dtype, torch.float32)
    gate = F.softmax(F.linear(x.to(wide), router.to(wide)).float(), dim=-1).to(wide)
    return mix(x, gate, scales), gate


def mix(x: Tensor, gate: Tensor | None, scales: Tensor) -> Tensor:
    """`x [..., n]` scaled by the mix of `scales [e, n]` under `gate [..., e]`, or by their only row; in the dtype of `x`."""
    if _is_covered(x, scales):
        return _Mix.apply(x, gate, scales)
    wide = torch.promote_types(x.dtype, torch.float32)
    mixed = scales.to(wide).squeeze(0) if gate is None else gate @ scales.to(wide)
    return (x.to(wide) * mixed).to(x.dtype)


def _is_covered(x: Tensor, scales: Tensor) -> bool:
    return native.covers(x) and scales.dtype == torch.float32 and len(scales) in EXPERTS and not torch.compiler.is_compiling()


class _RouteAndMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        scaled, gate = torch.ops.bimos.route_and_mix(x, router, scales)
        ctx.save_for_backward(x, gate, router, scales)
        return scaled, gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, gate, router, scales = ctx.saved_tensors
        of_x, of_router, of_scales = torch.ops.bimos.mix_backward(grad, grad_gate, x, gate, router, scales)
        return of_x, of_router, of_scales


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, scales: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate, scales)
        y: Tensor = torch.ops.bimos.mix(x, gate, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        x, gate, scales = ctx.saved_tensors
        of_x, of_gate, of_scales = torch.ops.bimos.mix_backward(grad, None, x, gate, None, scales)
        return of_x, None if gate is None else of_gate.view_as(gate), of_scales
