"""The config of a model of the Llama family out of `config.json`, without `transformers`, whose import takes seconds.

`save_pretrained` writes every value that an architecture has, so nothing here has a default of its own: a file that leaves one
out, or has it in an older form, is left to `transformers` (`Unknown`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_MOST = 2**31


class Unknown(Exception):
    """What `transformers` may know better: why a checkpoint is not read here."""


@dataclasses.dataclass(frozen=True)
class FamilyConfig:
    """What a forward pass needs; names are those of the configs of `transformers`."""

    model_type: str
    hidden_act: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope_parameters: Mapping[str, Any]
    sliding_window: int | None
    layer_types: tuple[str, ...]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Raises Unknown: another architecture, or values that are absent or none that an architecture of the family has."""
        kind = values.get("model_type")
        if kind not in MODEL_TYPES:
            raise Unknown(f"architecture {kind}")
        sizes = {name: _size(values, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
        sizes |= {name: _size(values, name) for name in ("num_hidden_layers", "num_key_value_heads", "max_position_embeddings")}
        if values.get("head_dim") is None and (kind == "qwen3" or sizes["hidden_size"] % sizes["num_attention_heads"]):
            raise Unknown("no head_dim")
        has_head = values.get("head_dim") is not None
        sizes["head_dim"] = _size(values, "head_dim") if has_head else sizes["hidden_size"] // sizes["num_attention_heads"]
        if sizes["num_attention_heads"] % sizes["num_key_value_heads"] or sizes["head_dim"] % 2:
            raise Unknown("heads that do not divide")
        windows = _windows(kind, values)
        return cls(
            model_type=kind,
            hidden_act=str(values.get("hidden_act")),
            **sizes,
            rms_norm_eps=_number(values, "rms_norm_eps"),
            tie_word_embeddings=_flag(values, "tie_word_embeddings"),
            attention_bias=kind == "qwen2" or (kind in ("llama", "qwen3") and _flag(values, "attention_bias")),
            mlp_bias=kind == "llama" and _flag(values, "mlp_bias"),
            rope_parameters=_rope(values),
            sliding_window=windows[0],
            layer_types=windows[1],
        )

    def has_bias(self, linear: str) -> bool:
        """Whether a linear of a block, such as `mlp.up_proj`, has a bias in the original model."""
        if linear.startswith("mlp."):
            return self.mlp_bias
        return self.attention_bias and not (self.model_type == "qwen2" and linear.endswith("o_proj"))

    def get_text_config(self, decoder: bool = True) -> Self:
        """As configs of models with several parts have it."""
        return self


def _size(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _MOST:
        raise Unknown(f"{name} {value!r}")
    return value


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise Unknown(f"{name} {value!r}")
    return float(value)


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name)
    if not isinstance(value, bool):
        raise Unknown(f"{name} {value!r}")
    return value


def _rope(values: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_type" not in rope or "rope_scaling" in values or "rope_theta" in values:
        raise Unknown("no rope_parameters")
    if "partial_rotary_factor" in rope or "partial_rotary_factor" in values:
        raise Unknown("partial rotary embedding")
    return rope


def _windows(kind: str, values: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    """The sliding window, and which blocks have one; Mistral's all have, Llama's none."""
    layers = _size(values, "num_hidden_layers")
    if layers > 65536:
        raise Unknown(f"num_hidden_layers {layers}")
    if kind == "llama":
        return None, ("full_attention",) * layers
    if "sliding_window" not in values:
        raise Unknown("no sliding_window")
    window = None if values["sliding_window"] is None else _size(values, "sliding_window")
    if kind == "mistral":
        return window, ("full_attention" if window is None else "sliding_attention",) * layers
    kinds = values.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in ("sliding_attention", "full_attention") for k in kinds):
        raise Unknown("no layer_types")
    if not _flag(values, "use_sliding_window"):
        window = None
    if window is None and "sliding_attention" in kinds:
        raise Unknown("sliding_attention without a window")
    return window, tuple(kinds)
