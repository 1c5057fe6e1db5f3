"""Causal attention while training on a CPU: transformers' `sdpa` with another kernel behind it where that is the faster way.

    out = softmax(scale q k^T, j <= i) v

The C++ (`csrc/flash.cpp`) reads keys and values of grouped heads as they are and sums in float32. It does no masks, no dropout and no
cache: whatever asks for those goes to `sdpa` itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bimos.kernels import native
from bimos.kernels.native import attention_pays

NAME = "bimos_sdpa"
PLAIN = {"sliding_window", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}


@contextmanager
def fast_attention(*models: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within it, those of `models` that attend by `sdpa` do so by `attend`, if this processor has the instructions that make it pay."""
    parts: list[Any] = [m for model in models for m in model.modules() if hasattr(m, "config")]
    configs = {id(m.config): m.config for m in parts if attention_pays(dtype if dtype is not None else getattr(m, "dtype", torch.float64))}
    # Not by `_attn_implementation`, which sets that of configs within a config too.
    changed = [config for config in configs.values() if getattr(config, "_attn_implementation", None) == "sdpa"]
    for config in changed:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation_internal = "sdpa"


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`[B, T, heads, n]` of query `[B, heads, T, n]`, key and value `[B, key heads, T, n]`; float32 or bfloat16."""
    out: Tensor = _Attention.apply(query, key, value, scale)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, lse = torch.ops.bimos.causal_attention(query, key, value, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*torch.ops.bimos.causal_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    is_covered = (
        causal
        and attention_mask is None
        and dropout == 0
        and native.covers(query, key, value)
        and query.shape[2] == key.shape[2]
        and query.shape[3] == key.shape[3] == value.shape[3]
        and query.shape[1] % key.shape[1] == 0
        and all(value is None or name in PLAIN for name, value in kwargs.items())
    )
    if not is_covered:
        out, weights = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return out, weights
    return attend(query, key, value, query.shape[3] ** -0.5 if scaling is None else scaling), None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
