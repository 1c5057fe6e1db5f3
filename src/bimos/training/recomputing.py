"""Gradient checkpointing (1604.06174): a block keeps what enters it, and runs again when gradients ask for what was inside."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint

from bimos.models import decoder_blocks


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Within it, the decoder blocks of `model` run again in the backward pass.

    transformers' own switch works in training mode alone, in which a student that drops units would not say what its teacher says.
    """
    blocks = decoder_blocks(model)[1]
    for block in blocks:
        # On the instance: hooks, those that put a sharded block together among them, are called around it as before.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
