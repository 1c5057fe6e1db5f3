"""Embedding and head in 8 bits: int8 `weight [vocab, hidden]`, float16 `scale [vocab, 1]`, one scale per token.

    w ~ scale * weight        scale = max |w| / 127 of the row

In a small model the embedding outweighs the binary body (DESIGN, section 3), and 8 bits a weight cost next to no
perplexity. Only the token embedding and the head are converted; learned position embeddings stay as they are.

Tied embeddings store one pair of tensors: the head reads those of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimos.errors import BimosError
from bimos.kernels import int8_linear
from bimos.packing.linear import keeping_dtype


class Int8Embedding(nn.Module):
    """A token embedding whose rows are int8.

    Attributes:
        weight: int8 `[vocab, hidden]`.
        scale: float16 `[vocab, 1]`.
        like: an empty tensor, not stored; its dtype is that of the result and follows `model.to(dtype)`.
        embed_scale: what architectures such as Gemma multiply their embeddings by; None elsewhere.
    """

    weight: Tensor
    scale: Tensor
    like: Tensor

    def __init__(
        self, weight: Tensor, scale: Tensor, dtype: torch.dtype, embed_scale: float | None = None, padding_idx: int | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.device), persistent=False)
        self.embed_scale = embed_scale
        self._factor = self._rounded()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        rows = (F.embedding(ids, self.weight).float() * F.embedding(ids, self.scale).float()).to(self.like.dtype)
        return rows if self._factor is None else rows * self._factor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        like = fn(self.like)
        super()._apply(keeping_dtype(fn), recurse)
        self.like = like
        self._factor = self._rounded()
        return self

    def give(self, dtype: torch.dtype) -> None:
        """Results in `dtype` from now on."""
        self.like = self.like.to(dtype)
        self._factor = self._rounded()

    def _rounded(self) -> float | None:
        """The factor in the dtype of the result, as a number: no CUDA graph takes a tensor that is copied to the GPU in every pass."""
        return None if self.embed_scale is None else torch.tensor(self.embed_scale, dtype=self.like.dtype, device="cpu").item()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class Int8Head(nn.Module):
    """A head whose rows are int8, with tensors of its own.

    Attributes:
        weight: int8 `[vocab, hidden]`.
        scale: float16 `[vocab, 1]`.
        bias: float16 `[vocab]` or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keeping_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class TiedInt8Head(nn.Module):
    """A head that computes with the tensors of an `Int8Embedding`. Stores nothing but its bias, if it has one."""

    bias: Tensor | None

    def __init__(self, embedding: Int8Embedding, bias: Tensor | None = None) -> None:
        super().__init__()
        self._tied = (embedding,)  # in a tuple, so that the embedding does not become a submodule
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = embedding.weight.shape

    @property
    def weight(self) -> Tensor:
        return self._tied[0].weight

    @property
    def scale(self) -> Tensor:
        return self._tied[0].scale

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keeping_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied"


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight [n, k]` as int8 `[n, k]` and float16 scales `[n, 1]`; meta tensors give meta tensors."""
    if weight.device.type == "meta":
        return torch.empty_like(weight, dtype=torch.int8), torch.empty(weight.shape[0], 1, dtype=torch.float16, device="meta")
    rows, scales = torch.empty_like(weight, dtype=torch.int8), torch.empty(weight.shape[0], 1, dtype=torch.float16, device=weight.device)
    for start in range(0, weight.shape[0], 8192):  # float32 copies of a slice, not of the table
        part = slice(start, start + 8192)
        w = weight[part].detach().float()
        exact = w.abs().amax(-1, keepdim=True) / 127
        scale = exact.half()
        # Rounded up, so that the largest weight is not clipped; the integers make up for the rest.
        scales[part] = torch.where(scale.float() < exact, (scale.view(torch.int16) + 1).view(torch.float16), scale)
        rows[part] = (w / scales[part].float().clamp_min(2**-24)).round().clamp(-127, 127).to(torch.int8)
    return rows, scales


def quantize_embeddings(model: Any) -> list[str]:
    """Replace the token embedding and the head of a transformers model in place; names of what was replaced.

    On the meta device it builds the modules that a checkpoint is loaded into.

    Raises:
        BimosError: the embedding does more than look rows up and scale them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    replaced = [names[id(embedding)]]
    tied = False
    if head is not None:
        replaced.append(names[id(head)])
        loading = embedding.weight.device.type == "meta"  # ties are declared then, and not made yet
        tied = f"{replaced[1]}.weight" in model.all_tied_weights_keys if loading else record_tie(model)
    new = _int8_embedding(embedding)
    model.set_submodule(replaced[0], new)
    if head is None:
        return replaced
    bias = None if head.bias is None else head.bias.detach().to(torch.float16)
    model.set_submodule(replaced[1], TiedInt8Head(new, bias) if tied else Int8Head(*quantize_rows(head.weight), bias))
    # What transformers ties are two parameters; here one is there only once, or both stand for themselves.
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        ties = getattr(model, attribute) or {}
        setattr(model, attribute, {target: source for target, source in ties.items() if not target.startswith(replaced[1] + ".")})
    return replaced


def record_tie(model: Any) -> bool:
    """Whether the head is the embedding, as the modules have it; the config says so from now on: a loader has nothing else to go by."""
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    if head is not None:
        model.config.get_text_config(decoder=True).tie_word_embeddings = model.config.tie_word_embeddings = tied
    return tied


def _int8_embedding(embedding: nn.Embedding) -> Int8Embedding:
    weight = embedding.weight.detach()
    return Int8Embedding(*quantize_rows(weight), weight.dtype, check_embedding(embedding), embedding.padding_idx)


def check_embedding(embedding: Any) -> float | None:
    """What an embedding multiplies its rows by; None: nothing.

    Raises:
        BimosError: it does more than look rows up and scale them.
    """
    embed_scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    if isinstance(embed_scale, Tensor):
        embed_scale = embed_scale.item()
    weight = embedding.weight.detach()
    if type(embedding) is not nn.Embedding and weight.device.type != "meta":
        ids = torch.arange(min(8, len(weight)), device=weight.device)
        expected = weight[ids] if embed_scale is None else weight[ids] * weight.new_tensor(embed_scale)
        if not torch.equal(embedding(ids), expected):
            raise BimosError(f"embeddings of type {type(embedding).__name__} cannot be stored in 8 bits; use --embedding-bits 16")
    return embed_scale
