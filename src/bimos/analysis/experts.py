"""Perplexity against the number of scaling experts, from the rows of a comparison.

What experts change is less than what windows differ by, so the error is that of the difference to the row with the fewest experts,
window by window (`bimos.comparison.paired`); the error of a perplexity itself would hide it.
"""

from __future__ import annotations

import re
from typing import Any

from bimos.comparison.paired import paired
from bimos.comparison.table import texts
from bimos.errors import BimosError
from bimos.evaluation.formatting import is_number

Point = tuple[int, float, float | None]  # experts, perplexity, standard error of what it differs by from that of the fewest experts


def by_experts(comparison: dict[str, Any], source: str) -> dict[str, dict[str, list[Point]]]:
    """For every text, by its label: the series of rows that differ in `num_experts` alone, named by what they share.

    `onebit` is `binarymos` with one expert by definition, and is taken for it where that row is missing.

    Raises:
        BimosError: there are no two such rows; `source` names the comparison.
    """
    found: dict[str, dict[str, list[Point]]] = {}
    for name, label in texts(comparison).items():
        series: dict[str, dict[int, dict[str, Any]]] = {}
        for row in sorted(comparison["rows"], key=lambda row: row["row"].startswith("onebit")):
            measured = row["perplexity"].get(name, {})
            if is_number(row.get("experts")) and is_number(measured.get("value")):
                shared = re.sub(r"^onebit(?=:|$)", "binarymos", re.sub(r":num_experts=\d+(?=:|$)", "", row["row"]))
                series.setdefault(shared, {}).setdefault(row["experts"], measured)
        several = {shared: _points(dict(sorted(rows.items()))) for shared, rows in series.items() if len(rows) > 1}
        if several:
            found[label] = several
    if not found:
        wanted = "binarymos:num_experts=1,binarymos:num_experts=2,binarymos"
        raise BimosError(f"'{source}' has no two rows that differ in num_experts alone; run bimos compare with --methods {wanted}")
    return found


def _points(rows: dict[int, dict[str, Any]]) -> list[Point]:
    first, *others = rows.items()
    points: list[Point] = [(first[0], first[1]["value"], None)]
    for experts, measured in others:
        losses, fewest = measured.get("losses") or [], first[1].get("losses") or []
        ratio = paired(losses, fewest) if len(losses) == len(fewest) else None
        points.append((experts, measured["value"], None if ratio is None else first[1]["value"] * ratio[1]))
    return points
