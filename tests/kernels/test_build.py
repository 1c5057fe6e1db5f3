"""Whoever has a compiler has the kernels."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from bimos.kernels import native

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.mark.skipif(platform.system() != "Linux" or not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler here")
@pytest.mark.skipif("BIMOS_ISA" in os.environ, reason="BIMOS_ISA is set")
def test_the_library_is_built() -> None:
    assert native.isa() in native.LEVELS, native.problem


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here")
def test_a_thread_that_throws_ends_nothing_but_its_task(tmp_path: Path) -> None:
    sources = [CSRC / "test" / "team.cpp", CSRC / "engine" / "team.cpp"]
    subprocess.run(["c++", "-std=c++20", "-O1", "-pthread", *map(str, sources), "-o", str(tmp_path / "team")], check=True, timeout=240)
    result = subprocess.run([str(tmp_path / "team")], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout == "good\n", result.stdout + result.stderr
