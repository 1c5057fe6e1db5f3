"""The op that reads memory: all of it, as often as it is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bimos.kernels import native

pytestmark = pytest.mark.skipif(native.isa() is None, reason=f"no C++ kernels: {native.problem}")


@pytest.fixture(autouse=True)
def _one_thread_afterwards() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("count", [0, 1, 7, 63, 64, 65, 128, 1001])
@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("passes", [1, 2, 5])
def test_every_word_counts_in_every_pass(count: int, threads: int, passes: int) -> None:
    torch.set_num_threads(threads)
    words = torch.randint(-(2**62), 2**62, (count + 1,), generator=torch.Generator().manual_seed(count))[1:]  # not aligned to a vector
    assert (torch.ops.bimos.read_memory(words, passes) - passes * sum(words.tolist())) % 2**64 == 0


def test_what_it_refuses() -> None:
    for buffer in (torch.zeros(8), torch.zeros(8, dtype=torch.int64)[::2]):
        with pytest.raises(RuntimeError, match="contiguous int64"):
            torch.ops.bimos.read_memory(buffer, 1)
    with pytest.raises(RuntimeError, match="0 passes"):
        torch.ops.bimos.read_memory(torch.zeros(8, dtype=torch.int64), 0)
