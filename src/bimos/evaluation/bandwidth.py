"""How fast this machine reads memory: what decoding, which reads every weight for every token, is measured against.

One buffer that no cache holds, and one that the last cache does, read from end to end by all threads and nothing done with them but
a sum (`csrc/read.cpp`; without the C++ kernels torch's own sum, which from a cache is slower than the cache).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from bimos.kernels import native

_CPUS = Path("/sys/devices/system/cpu")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
SMALLEST = 256 * 2**20  # bytes of the buffer that no cache holds


class Bandwidth:
    """Measures when `sample` is called, so that it can take turns with what it is compared to; threads are torch's.

    Attributes:
        cold_bytes: of the buffer in memory: four times all last caches, at most a quarter of the memory that is free.
        hot_bytes: of the one in the last cache, half of it; None where the system does not tell its size.
    """

    def __init__(self) -> None:
        sizes = last_caches()
        wanted = max(SMALLEST, 4 * sum(sizes))
        self.cold_bytes = min(wanted, psutil.virtual_memory().available // 4) // 2**21 * 2**21
        self.hot_bytes = min(sizes) // 2 if sizes else None
        self._cold = _buffer(self.cold_bytes)
        self._hot = self._cold[: self.hot_bytes // 8] if self.hot_bytes else None
        self._samples: dict[str, list[float]] = {"memory": [], "cache": []}

    def sample(self) -> None:
        """Read both once more."""
        self._samples["memory"].append(_rate(self._cold, 1))
        if self._hot is not None:
            _read(self._hot, 1)  # into the cache
            self._samples["cache"].append(_rate(self._hot, max(1, self.cold_bytes // self._hot.nbytes)))

    def result(self) -> dict[str, Any]:
        """`{by, memory: {bytes, bytes_per_second, samples}, cache: the same or None}`; medians of the samples."""
        sizes = {"memory": self.cold_bytes, "cache": self.hot_bytes}
        measured = {
            name: {"bytes": sizes[name], "bytes_per_second": statistics.median(rates), "samples": len(rates)} if rates else None
            for name, rates in self._samples.items()
        }
        return {"by": "bimos::read_memory" if native.isa() else "torch.sum", **measured}


def last_caches() -> list[int]:
    """Bytes of every last-level cache that this process's cores have; empty where the system does not say (only Linux does)."""
    found: dict[tuple[str, str], int] = {}
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        try:
            levels = [(int((index / "level").read_text()), index) for index in (_CPUS / f"cpu{cpu}" / "cache").glob("index*")]
            level, last = max(levels)
            text = (last / "size").read_text().strip()
            found[str(level), (last / "shared_cpu_list").read_text()] = int(text[:-1]) * _UNITS[text[-1]]
        except (OSError, ValueError, KeyError):
            continue
    return list(found.values())


def _buffer(size: int) -> Tensor:
    """int64, written once so that it has memory of its own, in large pages where they are to be had."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int64).fill_(1)


def _rate(buffer: Tensor, passes: int) -> float:
    """Bytes a second."""
    start = time.perf_counter()
    _read(buffer, passes)
    return buffer.nbytes * passes / (time.perf_counter() - start)


def _read(buffer: Tensor, passes: int) -> int:
    """Sum of all words, `passes` times."""
    if native.isa():
        total: int = torch.ops.bimos.read_memory(buffer, passes)
        return total
    return sum(int(buffer.sum()) for _ in range(passes))
