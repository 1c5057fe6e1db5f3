"""The levels of the kernels that this processor has, for what is tested at each."""

from __future__ import annotations

from bimos.kernels import native

_HIGHEST = native.isa()
LEVELS = native.LEVELS[: native.LEVELS.index(_HIGHEST) + 1] if _HIGHEST else ()  # none where they are not built
