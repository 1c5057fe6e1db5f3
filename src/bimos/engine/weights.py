"""A model's tensors and numbers in the order in which `csrc/engine/ops.cpp` takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bimos.packing.embedding import Int8Embedding, Int8Head, TiedInt8Head, quantize_rows
from bimos.packing.groups import product_form

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def weights(model: Any, head_bits: int | None = None) -> tuple[list[Tensor], list[int]]:
    """Tensors and numbers in the order in which `csrc/engine/ops.cpp` takes them."""
    config, inner = model.config, model.model
    none = torch.empty(0)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = [config.vocab_size, config.hidden_size, config.num_attention_heads, config.num_key_value_heads, head]
    numbers += [config.intermediate_size, config.max_position_embeddings, len(inner.layers)]
    tensors: list[Tensor] = []
    for table, bits in ((model.get_input_embeddings(), None), (model.get_output_embeddings(), head_bits)):
        tensors += table_of(table, bits)
    tensors += [inner.norm.weight.detach().float(), inner.rotary_emb.inv_freq.float()]
    for block, window in zip(inner.layers, windows(config), strict=True):
        numbers.append(window)
        tensors += [block.input_layernorm.weight.detach().float(), block.post_attention_layernorm.weight.detach().float()]
        for name in ("q_norm", "k_norm"):
            norm = getattr(block.self_attn, name, None)
            tensors.append(none if norm is None else norm.weight.detach().float())
        for name in LINEARS:
            layer = block.get_submodule(name)
            numbers += [1 if layer.router is None else layer.router.shape[0], layer.group_size or 0]
            group, offset = product_form(layer.tensors())
            tensors += [layer.weight, *(none if t is None else t for t in (layer.scale_in, layer.scale_out, layer.router))]
            tensors += [none if group is None else group, none if offset is None else offset.T.contiguous()]
            tensors.append(none if layer.bias is None else layer.bias)
    return tensors, numbers


def table_of(table: Any, bits: int | None) -> tuple[Tensor, Tensor]:
    """Rows of an embedding or a head, int8 where `bits` is 8, and their scales, float32; empty where they have none."""
    weight, scale = table.weight.detach(), table.scale if isinstance(table, Int8Embedding | Int8Head | TiedInt8Head) else None
    if bits == 8 and scale is None:
        weight, scale = quantize_rows(weight)
    return weight, torch.empty(0) if scale is None else scale.flatten().float()


def windows(config: Any) -> list[int]:
    """How many positions each block sees, the token's own included; 0: all."""
    kinds = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None) or 0
    slides = [
        kinds[index] == "sliding_attention" if index < len(kinds) else config.model_type == "mistral"
        for index in range(config.num_hidden_layers)
    ]
    return [window if sliding else 0 for sliding in slides]
