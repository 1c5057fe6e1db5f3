"""Methods are compared with what they pack to float32 rounding."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _exact(exact_kernels: None) -> None:
    pass
