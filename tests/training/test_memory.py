"""Memory that is free is the system's again, or stays for what comes next."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import pytest
import torch

from bimos.training.memory import given_back, kept


def anonymous() -> int:
    """Bytes of this process that belong to no file."""
    (line,) = (line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


pytestmark = pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="a matter of glibc")


def test_large_tensors_go_back_at_once() -> None:
    torch.ones(4 << 20, dtype=torch.uint8).clone()  # whatever the first one needs besides
    with given_back():
        before = anonymous()
        tensors = [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(16)]
        assert anonymous() - before > 15 * (4 << 20)
        del tensors[:-1]  # what is left lies above the others
        assert anonymous() - before < 4 * (4 << 20)


def test_steps_find_their_memory_again_and_the_last_gives_it_back() -> None:
    def step() -> tuple[int, int]:
        """How many pages a step of 160 MB is given by the system, and what the process has then."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(40 << 20, dtype=torch.uint8) for _ in range(4)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, len(tensors) and anonymous()

    first, _ = step()
    second, held = step()
    with kept():
        step()
        again, _ = step()
        assert again < min(first, second) / 4
        assert anonymous() > held - (8 << 20)
    assert anonymous() < held - (120 << 20)
    assert step()[0] > 4 * max(again, 1)
