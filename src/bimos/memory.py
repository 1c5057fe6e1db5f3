"""Peak memory of a stage: resident memory on the CPU, allocated memory on a GPU; and giving back to the system what is free."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's `mallopt`
_OWN_MAPPING, _LARGEST = 1 << 20, 32 << 20  # bytes from which an allocation is mapped by itself; what glibc's own rule may raise that to


def reset_peak() -> None:
    """Begin to measure anew. Where the kernel does not allow it, the peak of the whole process remains."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """The most bytes in use since `reset_peak`."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most memory that this process had, on Linux since `reset_peak`.

    `getrusage` is for other systems alone: on Linux a process starts with the peak of the one that started it.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trim() -> None:
    """Give back to the system what is free, holes between what is in use too (glibc; elsewhere nothing happens)."""
    gc.collect()
    _call("malloc_trim", 0)


@contextmanager
def given_back() -> Iterator[None]:
    """Within it, tensors of a megabyte and more go back to the system when they are freed; so does, at first, what is free by then.

    glibc keeps up to 32 MB of an allocation's size for later ones, in each thread's own heap, and what lies below something in use is not
    given back: of matrices of many sizes as much again was held as was in use. Other libraries are left to do as they do.
    """
    trim()
    _call("mallopt", _MMAP_THRESHOLD, _OWN_MAPPING)
    _call("mallopt", _TRIM_THRESHOLD, _OWN_MAPPING)
    try:
        yield
    finally:
        _call("mallopt", _MMAP_THRESHOLD, _LARGEST)
        _call("mallopt", _TRIM_THRESHOLD, 2 * _LARGEST)


@contextmanager
def kept() -> Iterator[None]:
    """Within it, the top of the heap stays with the process when it is free, for what is made next; on leaving, it goes back to the system.

    For steps that are all alike: a step takes and frees gigabytes, and the system clears every page of them anew. Tensors of more than
    64 MB (a chunk of logits has 48) have mappings of their own all the same.
    """
    _call("mallopt", _MMAP_THRESHOLD, 2 * _LARGEST)
    _call("mallopt", _TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        _call("mallopt", _MMAP_THRESHOLD, _LARGEST)
        _call("mallopt", _TRIM_THRESHOLD, 2 * _LARGEST)
        trim()


def _call(name: str, *arguments: int) -> None:
    """A function of glibc, if that is what this process runs on."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        getattr(ctypes.CDLL(None), name)(*(ctypes.c_int(argument) for argument in arguments))
