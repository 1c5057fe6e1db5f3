"""Frequencies of rotary embeddings, for who does not want to import `transformers` for them (seconds).

The four kinds do not depend on the length of the text. Tests hold them to be those of `transformers`, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def frequencies(parameters: Mapping[str, Any], head: int) -> tuple[Tensor, float]:
    """Frequencies float32 `[head / 2]`, and what cosine and sine are multiplied by.

    Args:
        parameters: `rope_parameters` of config.json.
        head: values of one head.

    Raises:
        KeyError, TypeError, ValueError, ArithmeticError: not parameters of a kind that is known here.
    """
    kind, base = parameters["rope_type"], float(parameters["rope_theta"])
    plain = 1.0 / (base ** (torch.arange(0, head, 2, dtype=torch.float) / head))
    if kind == "default":
        return plain, 1.0
    factor = float(parameters["factor"])
    if kind == "linear":
        return plain / factor, 1.0
    original = float(parameters["original_max_position_embeddings"])
    if kind == "llama3":
        return _llama3(plain, factor, original, float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])), 1.0
    if kind == "yarn":
        return _yarn(parameters, head, base, factor, original), _attention_scale(parameters, factor)
    raise ValueError(f"rotary embedding {kind}")


def _llama3(plain: Tensor, factor: float, original: float, low: float, high: float) -> Tensor:
    """Llama 3.1: long waves are stretched, short ones are not, between the two goes a ramp."""
    length = 2 * math.pi / plain
    stretched = torch.where(length > original / low, plain / factor, plain)
    smooth = (original / length - low) / (high - low)
    between = ~(length < original / high) * ~(length > original / low)
    return torch.where(between, (1 - smooth) * stretched / factor + smooth * stretched, stretched)


def _yarn(parameters: Mapping[str, Any], head: int, base: float, factor: float, original: float) -> Tensor:
    """YaRN (arXiv 2309.00071): a ramp from `beta_fast` to `beta_slow` turns within the original length."""

    def dimension(turns: float) -> float:
        return (head * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(base))

    low, high = dimension(float(parameters.get("beta_fast") or 32)), dimension(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head - 1)
    powers = base ** (torch.arange(0, head, 2).to(torch.float) / head)
    ramp = torch.clamp((torch.arange(head // 2, dtype=torch.float) - low) / ((high + 0.001 if low == high else high) - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept


def _attention_scale(parameters: Mapping[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def scale(by: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    one, all_ = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(float(one)) / scale(float(all_)) if one and all_ else scale()
