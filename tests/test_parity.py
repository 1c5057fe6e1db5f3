"""The engine on a real model: `BIMOS_PACKED` names a packed checkpoint; the text is that of `bimos eval --ppl wikitext2`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from bimos.kernels import native


@pytest.mark.slow
@pytest.mark.skipif(native.isa() is None, reason=f"no C++ kernels: {native.problem}")
@pytest.mark.skipif("BIMOS_PACKED" not in os.environ, reason="BIMOS_PACKED names no packed checkpoint")
def test_logits_and_continuations_of_a_real_model() -> None:
    spec = importlib.util.spec_from_file_location("parity", Path(__file__).parents[1] / "benchmarks" / "parity.py")
    assert spec is not None and spec.loader is not None
    parity = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parity)
    result = parity.compare(os.environ["BIMOS_PACKED"])
    assert result["relative_error"] < 5e-3 and result["kl_nats"] < 1e-3
    assert abs(result["loss_engine"] - result["loss_reference"]) < 2e-3
    assert result["equal"] >= 95
