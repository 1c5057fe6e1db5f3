"""Where stage 2 leaves its blocks: a file for each, which a run that was killed does not make again."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bimos.methods.base import TrainableLinear
from bimos.models import decoder_blocks
from bimos.training.student import load_tensors, load_trained


def block_file(directory: Path, index: int) -> Path:
    """Where a finished block's trained tensors lie."""
    return directory / f"block-{index:03d}.safetensors"


def load_blocks(student: nn.Module, directory: Path) -> None:
    """Put what stage 2 left in `directory` into a student."""
    _, blocks = decoder_blocks(student)
    for index, block in enumerate(blocks):
        tensors, _ = load_tensors(block_file(directory, index))
        load_trained(block, tensors)


def finished(path: Path) -> tuple[dict[str, Tensor], dict[str, float]] | None:
    """What a finished block's file holds; None if there is none that is whole."""
    entry = recorded(path)
    return None if entry is None else (load_tensors(path)[0], entry)


def recorded(path: Path) -> dict[str, float] | None:
    """What a finished block's file says of its training; None if there is none that is whole."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:  # whose header must fit the file's length
            metadata = file.metadata() or {}
        return {key: float(metadata[key]) for key in ("loss_first", "loss_last", "seconds", "tokens", "next_sequences")}
    except (SafetensorError, KeyError, ValueError):
        return None  # damaged: the block is done again


def is_own(block: nn.Module, name: str) -> bool:
    """Whether a tensor is the student's own: all of a trainable layer, and norms that training has taken to float32."""
    parameter = dict(block.named_parameters()).get(name)
    is_trained = parameter is not None and parameter.dtype == torch.float32
    return is_trained or isinstance(block.get_submodule(name.rpartition(".")[0]), TrainableLinear)
