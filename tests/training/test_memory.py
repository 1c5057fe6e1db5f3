"""Memory that is free is the system's again."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from bimos.training.memory import given_back


def anonymous() -> int:
    """Bytes of this process that belong to no file."""
    (line,) = (line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def test_large_tensors_go_back_at_once() -> None:
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("a matter of glibc")
    torch.ones(4 << 20, dtype=torch.uint8).clone()  # whatever the first one needs besides
    with given_back():
        before = anonymous()
        tensors = [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(16)]
        assert anonymous() - before > 15 * (4 << 20)
        del tensors[:-1]  # what is left lies above the others
        assert anonymous() - before < 4 * (4 << 20)
