"""What a decoder does beside its products, in fewer passes: norms, gates and attention of a model in training on a CPU.

    norm   x / sqrt(mean x^2 + epsilon) * weight
    gate   down(silu(gate(x)) * up(x))

Modules are known by what they compute, not by their names: each is asked, and is left alone if it answers something else. A trained
norm's weight is float32, and `transformers` then answers in float32, which every linear behind it casts for itself; here the answer has
the dtype of `x`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bimos.kernels import native
from bimos.training.attention import fast_attention

PREFIX = "Fused"


@contextmanager
def fused(*models: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within it, norms, gates and attention of `models` that can be are done in C++, where that is built.

    Args:
        dtype: of hidden states. None: that of each model.
    """
    changed: list[nn.Module] = []
    if native.isa() is not None:
        for module in (module for model in models for module in model.modules()):
            forward = norm_forward if _is_norm(module) else gate_forward if _is_gate(module) else None
            if forward is not None:
                module.__class__ = _subclass(type(module), forward)  # type: ignore[arg-type]
                changed.append(module)
    try:
        with fast_attention(*models, dtype=dtype):
            yield
    finally:
        for module in changed:
            module.__class__ = type(module).__mro__[1]


@functools.cache
def _subclass(kind: type[nn.Module], forward: Any) -> type[nn.Module]:
    def fused_forward(self: Any, x: Tensor) -> Tensor:
        answer: Tensor = forward(self, x) if native.covers(x) else kind.forward(self, x)
        return answer

    return type(PREFIX + kind.__name__, (kind,), {"forward": fused_forward})


def _answers(module: nn.Module, probe: Tensor, expected: Callable[[Tensor], Tensor]) -> bool:
    try:
        with torch.no_grad():
            answer, wanted = module(probe), expected(probe)
    except Exception:  # wants something else, and says so in its own way
        return False
    return (
        isinstance(answer, Tensor) and answer.shape == wanted.shape and torch.allclose(answer.float(), wanted.float(), rtol=2e-2, atol=1e-6)
    )


def _is_norm(module: nn.Module) -> bool:
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if [name for name, _ in module.named_parameters()] != ["weight"] or not isinstance(epsilon, float) or _is_fused(module):
        return False
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not native.covers(weight):
        return False
    probe = torch.linspace(-1.5, 2.5, len(weight), dtype=weight.dtype)[None]
    return _answers(module, probe, lambda x: F.rms_norm(x.float(), x.shape[-1:], weight.float(), epsilon))


def _is_gate(module: nn.Module) -> bool:
    if {name for name, _ in module.named_children()} != {"gate_proj", "up_proj", "down_proj", "act_fn"} or _is_fused(module):
        return False
    first = next(module.parameters(), None)
    width = getattr(module.gate_proj, "in_features", None)
    if first is None or width is None or not native.covers(first):
        return False
    probe = torch.linspace(-1.5, 2.5, width, dtype=first.dtype)[None]
    return _answers(module, probe, lambda x: module.down_proj(F.silu(module.gate_proj(x)) * module.up_proj(x)))  # type: ignore[operator]


def _is_fused(module: nn.Module) -> bool:
    return type(module).__name__.startswith(PREFIX)


def _epsilon(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def norm_forward(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, _epsilon(module))


def gate_forward(module: Any, x: Tensor) -> Tensor:
    answer: Tensor = module.down_proj(gated_silu(module.gate_proj(x), module.up_proj(x)))
    return answer


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x / sqrt(mean x^2 + epsilon) * weight` for `x [..., n]`, float32 or bfloat16, and `weight [n]`; in the dtype of `x`."""
    y: Tensor = _RMSNorm.apply(x, weight.float(), epsilon)
    return y


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, of one shape; float32 or bfloat16."""
    y: Tensor = _GatedSiLU.apply(gate, up)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y, inverse = torch.ops.bimos.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*torch.ops.bimos.rms_norm_backward(grad, *ctx.saved_tensors), None)


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y: Tensor = torch.ops.bimos.gated_silu(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        of_gate, of_up = torch.ops.bimos.gated_silu_backward(grad, *ctx.saved_tensors)
        return of_gate, of_up
