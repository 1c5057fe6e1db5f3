"""Tensors on disk (hidden states, moments of an optimizer): in files that nobody else sees, and in memory while they are worked on."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from bimos.errors import BimosError
from bimos.training.mapped import give_back_pages


def on_disk(shape: tuple[int, ...], dtype: torch.dtype, directory: Path) -> Tensor:
    """A tensor of zeros in a file in `directory`. The file has no name: it ends with the tensor, or with the process.

    Raises:
        BimosError: the disk has no room.
    """
    count = math.prod(shape)
    handle, name = tempfile.mkstemp(prefix="hidden-", dir=directory)
    try:
        if hasattr(os, "posix_fallocate"):  # now, and with an error that can be told: later it would be a signal
            os.posix_fallocate(handle, 0, max(1, count * dtype.itemsize))
        tensor = torch.from_file(name, shared=True, size=count, dtype=dtype).view(shape)
    except OSError as error:
        size = f"{count * dtype.itemsize / 1e9:.1f} GB"
        raise BimosError(f"no room for {size} of what --low-memory leaves on disk in {directory}: {error.strerror}") from None
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # a system that keeps a file in use: it goes with its folder
            Path(name).unlink()
    return tensor


def like(stream: Tensor, width: int | None = None) -> Tensor:
    """Room for hidden states of the shape of `stream [..., d]`, or with another last dimension; on disk where `stream` is."""
    shape = (*stream.shape[:-1], stream.shape[-1] if width is None else width)
    path = stream.untyped_storage().filename
    return stream.new_empty(shape) if path is None else on_disk(shape, stream.dtype, Path(path).parent)


def give_back(rows: Tensor) -> None:
    """What was on disk need not be in memory any longer; `rows` has to be contiguous, and may be used again."""
    if rows.untyped_storage().filename is not None:
        give_back_pages(rows.data_ptr(), rows.data_ptr() + rows.nbytes)
