"""Memory that is free is the system's again, or stays for what comes next."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bimos.memory import given_back


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


STEPS = """
import resource, torch
from pathlib import Path
from bimos.memory import kept

def resident():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

def step():  # how many pages a step of 160 MB is given by the system
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(16 << 20, dtype=torch.uint8) for _ in range(10)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before + 0 * len(tensors)

torch.ones(40 << 20, dtype=torch.uint8).clone()
free = resident()
def work():
    lasting = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(20)]
    return [step() for _ in range(12)], resident(), len(lasting)
with kept():
    pages, held, _ = work()
print(pages[0], pages[-1], held - free, resident() - free)
"""


def test_steps_find_their_memory_again_and_the_last_gives_it_back() -> None:
    printed = subprocess.run([sys.executable, "-c", STEPS], check=True, capture_output=True, text=True).stdout  # whose heap is its own
    first, last, held, left = map(int, printed.split())
    assert last < first / 4
    assert held > 100 << 20
    assert left < 40 << 20


def test_a_peak_is_of_the_process_alone_not_of_the_one_that_started_it() -> None:
    program = "from bimos.memory import peak_resident_bytes; print(peak_resident_bytes())"
    parent = f"import subprocess, sys; b'x' * (1 << 30); subprocess.run([sys.executable, '-c', {program!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 100e6 < int(done.stdout) < 1e9
