"""Calling one decoder block outside its model: what the model passes to it, and hidden states that stream through it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bimos.lanes import Lanes
from bimos.models import decoder_blocks
from bimos.training.ondisk import give_back, like


class Stop(Exception):
    """Raised by a hook that has seen enough: what follows in the model is not run."""


@dataclasses.dataclass
class BlockCall:
    """The keyword arguments (masks, rotary embeddings, positions) that a model gives to each of its blocks.

    They depend on the shape of the batch alone, since calibration windows are full and unpadded.
    """

    args: tuple
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """`block` on hidden states `[B, T, d]`, of the batch size that was captured."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


def capture(model: nn.Module, windows: Tensor, instead: nn.Module | None = None) -> tuple[Tensor, list[BlockCall]]:
    """What enters the first block for `windows [B, T]`, and how every block is called.

    The first block's input is `[B, T, d]`: embeddings, and whatever the architecture does with them. How blocks are called depends on
    shapes alone, so the first one is run to see what a block gives back, and the others hand on what they get.

    Args:
        instead: of the first block, a copy of it that takes hidden states as they are.
    """
    _, blocks = decoder_blocks(model)
    calls: list[BlockCall] = []
    first: list[Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        first.append(hidden.detach())
        kept = {key: value for key, value in kwargs.items() if key not in ("past_key_values", "past_key_value", "layer_past")}
        kept["use_cache"] = False
        calls.append(BlockCall(tuple(args[1:]), kept))
        if len(calls) == len(blocks):
            raise Stop
        return args, kwargs if args else {"hidden_states": hidden, **kwargs}

    given: list[Any] = []

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *given[0][1:]) if isinstance(given[0], tuple) else hidden

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    hooks.append(blocks[0].register_forward_hook(lambda module, args, output: given.append(output)))
    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks[1:]:
        block.forward = hand_on
    if instead is not None:
        blocks[0].forward = instead.forward
    try:
        with torch.no_grad(), contextlib.suppress(Stop):
            model.base_model(input_ids=windows, use_cache=False)  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
        for block, forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward
    return first[0], calls


def embed(model: nn.Module, windows: Tensor) -> Tensor:
    """What enters the first block for `windows [B, T]`, without running any block."""
    _, blocks = decoder_blocks(model)
    caught: list[Tensor] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        caught.append((args[0] if args else kwargs["hidden_states"]).detach())
        raise Stop

    hook = blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            model.base_model(input_ids=windows, use_cache=False)  # type: ignore[operator]
    except Stop:
        pass
    finally:
        hook.remove()
    return caught[0]


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of `size` over `count` rows; the calibration set is a multiple of the batch."""
    for start in range(0, count, size):
        yield slice(start, start + size)


def advance(block: nn.Module, call: BlockCall, stream: Tensor, size: int, out: Tensor | None = None, lanes: Lanes | None = None) -> Tensor:
    """The stream `[n, T, d]` behind `block`, into `out` (which may be the stream itself); batches of `size` go side by side in `lanes`."""
    out = like(stream) if out is None else out

    def step(rows: slice) -> None:
        with torch.no_grad():
            out[rows] = call(block, stream[rows]).to(out.dtype)
        give_back(stream[rows])
        give_back(out[rows])

    lanes = lanes or Lanes(1, stream.device)
    lanes.map(step, batches(len(stream), size))
    return out
