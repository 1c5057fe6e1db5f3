"""Tensors on disk: values that stay, files that do not, and memory that is given back."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from bimos import BimosError
from bimos.training.ondisk import give_back, like, on_disk


def mapped_kilobytes(directory: Path) -> int:
    """Of files in `directory`, what is in memory."""
    total, is_one = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split(" ")[0]:
            is_one = str(directory) in line
        elif is_one and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_stay_and_files_do_not(dtype: torch.dtype, tmp_path: Path) -> None:
    stream = on_disk((6, 5, 3), dtype, tmp_path)
    assert not stream.any()
    values = torch.randn(6, 5, 3).to(dtype)
    for rows in range(6):
        stream[rows : rows + 1] = values[rows : rows + 1]
        give_back(stream[rows : rows + 1])
    assert torch.equal(stream, values)
    assert os.name == "nt" or not list(tmp_path.iterdir())


def test_memory_is_given_back(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells what is mapped")
    stream = on_disk((8, 1024, 512), torch.float32, tmp_path)
    stream.fill_(2)
    assert mapped_kilobytes(tmp_path) == 16384
    give_back(stream[2:4])
    assert mapped_kilobytes(tmp_path) == 12288
    give_back(stream)
    assert mapped_kilobytes(tmp_path) == 0
    assert (stream == 2).all()


def test_like_what_it_is_like(tmp_path: Path) -> None:
    stream = on_disk((4, 2, 3), torch.bfloat16, tmp_path)
    wide = like(stream[1:], 7)
    assert wide.shape == (3, 2, 7) and wide.dtype == torch.bfloat16
    assert Path(wide.untyped_storage().filename).parent == tmp_path
    plain = torch.randn(4, 2, 3)
    assert like(plain).shape == plain.shape and like(plain, 5).shape == (4, 2, 5) and like(plain).untyped_storage().filename is None
    give_back(plain)
    assert plain.any()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no room")
def test_no_room(tmp_path: Path) -> None:
    with pytest.raises(BimosError, match="no room for"):
        on_disk((1 << 30, 1 << 30), torch.float32, tmp_path)
    assert not list(tmp_path.iterdir())
