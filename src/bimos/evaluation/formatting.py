"""Numbers as people read them, the same in the terminal and in the report. A missing or non-finite number is a dash."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

DASH = "–"  # noqa: RUF001, an en dash is what typographers put for 'none'
_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def significant(value: Any, digits: int = 3) -> str:
    """`21.6`, `0.00312`, `1,234`, `1.2e+08`: so many significant digits, but every digit before the point."""
    if not is_number(value):
        return DASH
    rounded = f"{value:.{digits - 1}e}"
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return rounded
    decimals = digits - 1 - int(rounded.partition("e")[2])
    return f"{value:,.{max(0, decimals)}f}"


def bits(value: Any) -> str:
    """Bits a weight, `1.274`."""
    return f"{value:.3f}" if is_number(value) else DASH


def count(value: Any) -> str:
    """`410 k`, `1.23 M`."""
    return _scaled(value, "")


def size(value: Any) -> str:
    """Decimal bytes, as files are sold: `45.8 MB`."""
    return _scaled(value, "B") if not is_number(value) or abs(value) >= 1000 else f"{value:.0f} B"


def duration(seconds: Any) -> str:
    """`3.2 s`, `24 min 10 s`, `2 h 05 min`."""
    if not is_number(seconds):
        return DASH
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def factor(value: Any) -> str:
    """A ratio, `3.76×`."""  # noqa: RUF002
    return f"{significant(value)}×" if is_number(value) else DASH  # noqa: RUF001


def embedding_change(found: dict[str, Any]) -> str:
    """What the key `embedding` of a result says of its bits, `perplexity 212.78 to 212.66 (-0.06 %), first 4 windows`."""
    before, after = found.get("perplexity_16_bits"), found.get("perplexity")
    change = ratio(after, before)
    share = f" ({100 * (change - 1):+.2f} %)" if change else ""
    return f"perplexity {significant(before, 5)} to {significant(after, 5)}{share}, first {found.get('windows')} windows"


def ratio(numerator: Any, denominator: Any) -> float | None:
    """None where there is none."""
    return numerator / denominator if is_number(numerator) and is_number(denominator) and denominator else None


def _scaled(value: Any, unit: str) -> str:
    if not is_number(value):
        return DASH
    for scale, prefix in _DECIMAL:
        if abs(value) >= 0.9995 * scale:
            return f"{significant(value / scale)} {prefix}{unit}"
    return f"{value:.0f}{' ' + unit if unit else ''}"
