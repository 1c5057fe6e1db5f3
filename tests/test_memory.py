"""Memory that is free is the system's again, or stays for what comes next."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="a matter of glibc")

HEAP = """
import torch
from pathlib import Path
from bimos.memory import given_back, kept

def anonymous():  # bytes of this process that belong to no file
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])
"""


def numbers(program: str) -> list[int]:
    """What a program prints in a process of its own: the heap of the tests holds what earlier ones left, and threads of theirs go on."""
    done = subprocess.run([sys.executable, "-c", HEAP + program], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return [*map(int, done.stdout.split())]


def test_large_tensors_go_back_at_once() -> None:
    held, left = numbers("""
torch.ones(4 << 20, dtype=torch.uint8).clone()  # whatever the first one needs besides
with given_back():
    before = anonymous()
    tensors = [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(16)]
    held = anonymous() - before
    del tensors[:-1]  # what is left lies above the others
    print(held, anonymous() - before)
""")
    assert held > 15 * (4 << 20)
    assert left < 4 * (4 << 20)


def test_steps_find_their_memory_again_and_the_last_gives_it_back() -> None:
    first, last, held, left = numbers("""
import resource

def step():  # how many pages a step of 160 MB is given by the system
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(16 << 20, dtype=torch.uint8) for _ in range(10)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before + 0 * len(tensors)

torch.ones(40 << 20, dtype=torch.uint8).clone()
free = anonymous()
def work():
    lasting = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(20)]
    return [step() for _ in range(12)], anonymous(), len(lasting)
with kept():
    pages, held, _ = work()
print(pages[0], pages[-1], held - free, anonymous() - free)
""")
    assert last < first / 4
    assert held > 100 << 20
    assert left < 40 << 20


def test_a_peak_is_of_the_process_alone_not_of_the_one_that_started_it() -> None:
    program = "from bimos.memory import peak_resident_bytes; print(peak_resident_bytes())"
    parent = f"import subprocess, sys; b'x' * (1 << 30); subprocess.run([sys.executable, '-c', {program!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 100e6 < int(done.stdout) < 1e9
