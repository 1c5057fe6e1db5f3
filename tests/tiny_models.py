"""Tiny random models of every tested architecture, whose linears `pack()` to random tensors of any layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 101  # a multiple of nothing
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
_GATED = _SMALL | {"num_key_value_heads": 2, "intermediate_size": 72, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GATED | {"tie_word_embeddings": True},
    "mistral": _GATED,
    "qwen2": _GATED | {"tie_word_embeddings": True},
    "qwen3": _GATED | {"head_dim": 8},
    "gemma": _GATED | {"head_dim": 8, "tie_word_embeddings": True},
    "opt": _SMALL | {"ffn_dim": 56, "word_embed_proj_dim": 32, "tie_word_embeddings": True, "pad_token_id": 1},
    "gpt_neox": _SMALL | {"intermediate_size": 72, "tie_word_embeddings": False},
    "phi": _SMALL | {"intermediate_size": 72, "pad_token_id": 0},
}
IDS = torch.tensor([[5, 17, 99, 3, 42, 100, 7, 64], [8, 8, 1, 77, 30, 2, 96, 11]])


class Trained(nn.Module):
    """Stands for a method's trained layer: it packs to tensors drawn at random."""

    def __init__(self, linear: nn.Linear, planes: int, experts: int, group: int | None, grouped: tuple[str, ...]) -> None:
        super().__init__()
        n_in, n_out = linear.in_features, linear.out_features
        self.tensors: dict[str, Tensor] = {"weight": torch.randint(0, 256, (planes, n_out, n_in // 8), dtype=torch.uint8)}
        self.group_size = group
        if group is None or experts > 1:
            self.tensors["scale_in"] = (torch.rand(planes, experts, n_in) + 0.5).half()
        for name in grouped if group else ():
            leading = (n_out,) if name in ("scale_group_int", "offset_group") else (planes, n_out)
            values = torch.rand(*leading, -(-n_in // group)) + (0.5 if name != "offset_group" else -0.5)
            self.tensors[name] = (values / (1 if grouped == ("scale_group",) else 2 * n_in**0.5)).half()
        if not group or grouped == ("scale_group",):
            self.tensors["scale_out"] = (torch.rand(planes, experts, n_out) / n_in**0.5).half()
        if experts > 1:
            self.tensors["router"] = torch.randn(experts, n_in).half()
        if linear.bias is not None:
            self.tensors["bias"] = (linear.bias.detach() + torch.randn(n_out)).half()

    def pack(self) -> dict[str, Tensor]:
        return self.tensors


@pytest.fixture(scope="session")
def ids() -> Tensor:
    return IDS


@pytest.fixture(scope="session")
def kinds() -> list[str]:
    return list(CONFIGS)


@pytest.fixture(scope="session")
def dense() -> Callable[..., PreTrainedModel]:
    """`dense(kind, **config)`: a random dense model in float32."""

    def make(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(CONFIGS[kind] | changes)))
        for name, parameter in model.named_parameters():  # random norms and biases, so that a lost one shows
            if parameter.dim() == 1:
                parameter.data += torch.randn_like(parameter) / 4
            elif "embed" in name:
                parameter.data *= 5
        return model.eval()

    return make


@pytest.fixture(scope="session")
def student(dense: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """`student(kind, planes=, experts=, group=, grouped=, skip=, **config)`: the same with `Trained` linears, but for the head."""

    def make(
        kind: str,
        *,
        seed: int = 0,
        planes: int = 1,
        experts: int = 2,
        group: int | None = None,
        grouped: tuple[str, ...] = ("scale_group",),
        skip: str = "",
        **changes: Any,
    ) -> PreTrainedModel:
        model = dense(kind, seed, **changes)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and module is not model.get_output_embeddings() and not (skip and name.endswith(skip)):
                model.set_submodule(name, Trained(module, planes, experts, group, grouped))
        return model

    return make


@pytest.fixture(scope="session")
def packed(student: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """`packed(kind, embedding_bits=, dtype=, ...)`: a packed model in memory."""
    from bimos.packing.pack import pack_model

    def make(
        kind: str = "llama",
        *,
        embedding_bits: int = 16,
        dtype: torch.dtype | None = None,
        card: dict[str, Any] | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        return pack_model(student(kind, **options), method="any", options={"x": 1}, embedding_bits=embedding_bits, dtype=dtype, card=card)

    return make
