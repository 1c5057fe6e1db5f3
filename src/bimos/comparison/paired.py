"""Rows against each other window by window: what makes one window hard makes it hard for all, and falls out of the difference.

    ratio of perplexities = exp(mean d),  se(log ratio) = std(d) / sqrt(windows)      d: differences of the windows' losses, nats a token

Where two rows lie within each other's standard errors, this often tells them apart. It says nothing of what another seed would give.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from bimos.comparison import TEACHER, table
from bimos.evaluation.formatting import is_number, significant


def paired(losses: list[float], others: list[float]) -> tuple[float, float] | None:
    """The ratio of two perplexities on the same windows and its standard error; None where there are not two, or one has no loss."""
    differences = [a - b for a, b in zip(losses, others, strict=True)]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    return (math.exp(mean), math.exp(mean) * error) if mean < 700 else None


def sentences(comparison: dict[str, Any]) -> list[str]:
    """For every text: all rows that were trained or rounded, as multiples of the best of them."""
    said = []
    for name, label in table.texts(comparison).items():
        known = {row["row"]: row["perplexity"].get(name, {}) for row in table.ordered(comparison) if row["row"] != TEACHER}
        measured = {row: entry for row, entry in known.items() if is_number(entry.get("value")) and entry.get("losses")}
        if len(measured) < 2:
            continue
        best = min(measured, key=lambda row: measured[row]["value"])
        alike = {row: entry for row, entry in measured.items() if len(entry["losses"]) == len(measured[best]["losses"])}
        found = {row: paired(entry["losses"], measured[best]["losses"]) for row, entry in alike.items() if row != best}
        multiples = [f"{row} {times(*ratio)}" for row, ratio in found.items() if ratio is not None]
        if multiples:
            said.append(f"{label}, window by window, times the perplexity of {best}: {', '.join(multiples)}.")
    return said


def times(ratio: float, error: float) -> str:
    """`1.024 ± 0.006`; a hundred and more without the error."""
    return significant(ratio) if ratio >= 100 else f"{ratio:.3f} ± {error:.3f}"
