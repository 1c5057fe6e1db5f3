"""Whoever has a compiler has the kernels."""

from __future__ import annotations

import os
import platform
import shutil

import pytest

from bimos.kernels import native


@pytest.mark.skipif(platform.system() != "Linux" or not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler here")
@pytest.mark.skipif("BIMOS_ISA" in os.environ, reason="BIMOS_ISA is set")
def test_the_library_is_built() -> None:
    assert native.isa() in native.LEVELS, native.problem
