"""The straight-through sign, and products with signs while training."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bimos.kernels import native
from bimos.methods.planes import Plane, SignPlane, decision, straight_through


class SignSTE(torch.autograd.Function):
    """The signs of a plane in +1/-1 (0 is +1), with the gradient that `straight_through` gives its latent.

    After Courbariaux et al. (1602.02830). `dtype` is that of the signs: under autocast they are made in it at once, without a float32 copy.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, dtype: torch.dtype, plane: Plane) -> Tensor:
        ctx.save_for_backward(latent)
        ctx.plane = plane
        return _signs(latent, dtype, plane)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (latent,) = ctx.saved_tensors
        return straight_through(grad.to(latent.dtype, copy=True), latent, ctx.plane), None, None


class _Unwritten(SignSTE):
    """The signs of a plane where nobody reads them: a place for their gradient, without memory."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, dtype: torch.dtype, plane: Plane) -> Tensor:
        ctx.save_for_backward(latent)
        ctx.plane = plane
        return latent.new_empty((), dtype=dtype).expand(latent.shape)


def write_signs(weight: Tensor, out: Tensor) -> Tensor:
    """The signs of `weight` in `out`, a tensor of its shape."""
    # The comparison writes 0 and 1 in the dtype of the signs: an eighth of the time of `where`, and no mask in between.
    return torch.ge(weight, 0, out=out).mul_(2).sub_(1)


def _signs(latent: Tensor, dtype: torch.dtype, plane: Plane) -> Tensor:
    return write_signs(decision(latent, plane), torch.empty(latent.shape, dtype=dtype, device=latent.device))


class SharedSigns:
    """Signs that are made once and used in several passes; their gradients go to the latents once. A context manager.

    Within it, `sign_ste` gives these signs. On leaving it, what their gradients have summed up to is added to the gradients of the latents
    by the rule of `SignSTE`, which is linear: one pass over the latents instead of one a batch.

    Args:
        planes: of any layers.
        dtype: in which the signs are to be multiplied; sums of their gradients are in it too.
    """

    def __init__(self, planes: Iterable[SignPlane], dtype: torch.dtype) -> None:
        self._planes = list(planes)
        # Kept from step to step: fresh memory of this size costs as much as what is done with it.
        self._signs = [torch.empty_like(latent, dtype=dtype, requires_grad=False) for latent, *_ in self._planes]
        trained = {id(latent): latent for latent, *_ in self._planes if latent.requires_grad and latent.dtype != dtype}
        self._grads = {key: torch.empty_like(latent, requires_grad=False) for key, latent in trained.items()}

    def __enter__(self) -> None:
        for (latent, plane, as_values), signs in zip(self._planes, self._signs, strict=True):
            leaf = signs.detach().requires_grad_(latent.requires_grad)
            tiles = None
            if not as_values and tables_pay(latent, signs.dtype):
                decided = decision(latent.detach(), plane)
                tiles = (*_tiled(decided, False), *_tiled(decided, True))
            shared = _Shared(leaf, plane, tiles)
            if tiles is None:
                shared.written(latent)
            if not hasattr(latent, "shared_signs"):
                latent.shared_signs = {}  # type: ignore[attr-defined]
            latent.shared_signs[plane] = shared  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        for latent, plane, _as_values in self._planes:
            grad = latent.shared_signs.pop(plane).leaf.grad  # type: ignore[attr-defined]
            if not latent.shared_signs:  # type: ignore[attr-defined]
                del latent.shared_signs  # type: ignore[attr-defined]
            if grad is None or not latent.requires_grad:
                continue
            if latent.grad is None:
                wide = self._grads[id(latent)].copy_(grad) if id(latent) in self._grads else grad
                latent.grad = straight_through(wide, latent.detach(), plane)
            else:
                latent.grad += straight_through(grad.to(latent.dtype), latent.detach(), plane)


class _Shared:
    """A plane's signs: what gradients are summed at, and tiles where products go by tables; values are written if anyone asks."""

    def __init__(self, leaf: Tensor, plane: Plane, tiles: tuple[Tensor | None, ...] | None) -> None:
        self.leaf, self.plane, self.tiles = leaf, plane, tiles
        self._lock, self._is_written = threading.Lock(), False

    def written(self, latent: Tensor) -> Tensor:
        with self._lock:  # lanes ask at the same time
            if not self._is_written:
                write_signs(decision(latent.detach(), self.plane), self.leaf.detach())
                self._is_written = True
        return self.leaf


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the matrix product on `x`: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def sign_ste(latent: Tensor, x: Tensor, plane: Plane = Plane.ONLY) -> Tensor:
    """The signs of a plane in the dtype in which they will be multiplied with `x`. Shared with other passes: not to be written to."""
    dtype, shared = compute_dtype(x), _shared(latent, plane)
    return shared.written(latent) if shared is not None and shared.leaf.dtype == dtype else SignSTE.apply(latent, dtype, plane)


def sign_linear(x: Tensor, latent: Tensor, plane: Plane = Plane.ONLY) -> Tensor:
    """`x [..., in]` times the signs of a plane `[out, in]`, transposed; straight through, in the dtype of autocast or `x`.

    With shared signs or within `by_tables`, by the tables of packed linears where those are the faster way (`tables_pay`), forward and for
    the gradient of `x`; sums of four inputs are rounded to 8 bits then. The gradient of the signs is a product of whole numbers too: in
    bfloat16 of 8 bits, both sides rounded by columns of 64 tokens (`csrc/group8.h`), in float32 of 13, by columns of 128 (`csrc/int16.h`).
    """
    dtype, shared = compute_dtype(x), _shared(latent, plane)
    if x.dtype == dtype and shared is not None and shared.tiles is not None and shared.leaf.dtype == dtype:
        return _TableProduct.apply(x, shared.leaf, *shared.tiles)
    if x.dtype == dtype and shared is None and _tables_are_asked_for.get() and tables_pay(latent, dtype):
        decided = decision(latent.detach(), plane)
        return _TableProduct.apply(x, _Unwritten.apply(latent, dtype, plane), *_tiled(decided, False), *_tiled(decided, True))
    if shared is None:
        y: Tensor = _RemadeProduct.apply(x.to(dtype), latent, plane)
        return y
    return F.linear(x, sign_ste(latent, x, plane))


@contextmanager
def by_tables() -> Iterator[None]:
    """Within it, in this thread, `sign_linear` goes by tables where they pay: for one pass a step, which has nothing to share."""
    token = _tables_are_asked_for.set(True)
    try:
        yield
    finally:
        _tables_are_asked_for.reset(token)


_tables_are_asked_for = ContextVar("tables_are_asked_for", default=False)


def _shared(latent: Tensor, plane: Plane) -> _Shared | None:
    found: _Shared | None = getattr(latent, "shared_signs", {}).get(plane)
    return found


def tables_pay(latent: Tensor, dtype: torch.dtype) -> bool:
    """Whether products in `dtype` with the signs of `latent [out, in]` are faster by tables than by torch."""
    is_covered = (
        latent.device.type == "cpu" and latent.dtype == torch.float32 and latent.dim() == 2 and all(n % 8 == 0 for n in latent.shape)
    )
    return is_covered and native.pays(dtype)


def _tiled(latent: Tensor, transposed: bool) -> tuple[Tensor, Tensor | None]:
    """Bits of the signs and their tiles."""
    bits = torch.ops.bimos.sign_bits(latent.detach(), transposed)
    return bits, native.tile(bits)


class _RemadeProduct(torch.autograd.Function):
    """The product with signs that nobody shares, made anew for gradients.

    Kept, those of all layers would be a second copy of the weights: on a GPU, and undivided where processes divide the latents.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, latent: Tensor, plane: Plane) -> Tensor:
        ctx.save_for_backward(x, latent)
        ctx.plane = plane
        return F.linear(x, _signs(latent, x.dtype, plane))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, latent = ctx.saved_tensors
        of_x = grad @ _signs(latent, x.dtype, ctx.plane) if ctx.needs_input_grad[0] else None
        of_latent = None
        if ctx.needs_input_grad[1]:
            of_signs = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            of_latent = straight_through(of_signs.to(latent.dtype), latent, ctx.plane)
        return of_x, of_latent, None


class _TableProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, signs: Tensor, *tiles: Tensor) -> Tensor:
        bits, tiled, ctx.bits, ctx.tiled = tiles
        ctx.save_for_backward(x)
        y: Tensor = torch.ops.bimos.packed_linear(x, bits, None, None, None, None, None, tiled, True)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        of_x = torch.ops.bimos.packed_linear(grad, ctx.bits, None, None, None, None, None, ctx.tiled, True)
        return of_x, _outer(grad.flatten(0, -2), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None, None, None, None, None


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """`left^T right` of `[tokens, out]` and `[tokens, in]`."""
    outer = torch.ops.bimos.group8_outer if left.dtype == torch.bfloat16 else torch.ops.bimos.int16_outer
    product: Tensor = outer(left, right)
    return product
