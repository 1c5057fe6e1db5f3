"""Packed linears of one input on a GPU: their products are one launch, made when the first of them is asked for.

A model calls its projections one by one. What the others are to give waits for them, for as long as they come with the same input.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from bimos.packing.groups import GROUPED
from bimos.packing.linear import PackedLinear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # of one parent, as transformers calls them
PATIENCE = 3  # times that nobody comes for what waits, until nobody is waited for


class Together:
    """Linears of one input, which store alike. They have it, it does not hold them: each is free with its last reference."""

    def __init__(self, layers: list[PackedLinear]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._waiting: tuple[Tensor, int, list[Tensor | None]] | None = None
        self._unused = 0

    def product(self, layer: PackedLinear, x: Tensor) -> Tensor | None:
        """What `layer` makes of `x [..., in]`; None where nobody comes for the others' products, or not all are where `x` is."""
        layers = [other for reference in self._layers if (other := reference()) is not None]
        index = next((index for index, other in enumerate(layers) if other is layer), None)
        is_here = all(other._buffers["weight"].device == x.device for other in layers)  # type: ignore[union-attr]
        if index is None or len(layers) < len(self._layers) or not is_here:  # a replica; one is gone; one is offloaded, or on another GPU
            return None
        waiting, version = self._waiting, 0 if x.is_inference() else x._version
        if waiting is not None and waiting[0] is x and waiting[1] == version and (found := waiting[2][index]) is not None:
            waiting[2][index] = None
            self._unused = 0
            if not any(y is not None for y in waiting[2]):
                self._waiting = None
            return found
        if waiting is not None:
            self._unused += 1
            if self._unused >= PATIENCE:  # another module has taken a sibling's place
                self._waiting = None
                for other in layers:
                    other.together = None
                return None
        results: list[Tensor | None] = list(_products(layers, x))
        mine, results[index] = results[index], None
        self._waiting = x, version, results
        return mine


def _products(layers: list[PackedLinear], x: Tensor) -> list[Tensor]:
    columns: list[list[Any]] = [[layer._buffers[name] for layer in layers] for name in ("scale_in", "scale_out", "router")]
    groups, biases = [layer._product_form()[0] for layer in layers], [layer._buffers["bias"] for layer in layers]
    present = [[] if column[0] is None else column for column in (*columns, groups, biases)]
    products: list[Tensor] = torch.ops.bimos.packed_linears(x, [layer.weight for layer in layers], *present, layers[0].group_size or 0)
    return products


def join_siblings(model: nn.Module) -> None:
    """Let packed linears of one parent that read the same input, by their names, be multiplied together where that pays."""
    for parent in model.modules():
        for names in SIBLINGS:
            layers = [layer for name in names if isinstance(layer := getattr(parent, name, None), PackedLinear)]
            if len(layers) == len(names) and all(_are_alike(one, other) for one, other in itertools.pairwise(layers)):
                together = Together(layers)
                for layer in layers:
                    layer.together = together


def _are_alike(one: PackedLinear, other: PackedLinear) -> bool:
    """Whether both store the same kinds of tensors, of the same planes, experts, inputs and groups, and nothing beside the planes."""
    mine, theirs = one.tensors(), other.tensors()
    if mine.keys() != theirs.keys() or set(mine) & set(GROUPED[1:]) or one.has_parts or one.group_size != other.group_size:
        return False
    of_outputs = {"weight": 1, "scale_out": 2, "scale_group": 1, "bias": 0}
    for name, tensor in mine.items():
        ours, others = list(tensor.shape), list(theirs[name].shape)
        if name in of_outputs:
            del ours[of_outputs[name]], others[of_outputs[name]]
        if ours != others or tensor.dtype != theirs[name].dtype:
            return False
    return True
