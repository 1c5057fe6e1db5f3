"""Perplexity against the number of scaling experts, from the rows of a comparison."""

from __future__ import annotations

import re
from typing import Any

from bimos.comparison.table import texts
from bimos.errors import BimosError
from bimos.evaluation.formatting import is_number

Point = tuple[int, float, float | None]  # experts, perplexity, its standard error


def by_experts(comparison: dict[str, Any], source: str) -> dict[str, dict[str, list[Point]]]:
    """For every text, by its label: the series of rows that differ in `num_experts` alone, named by what they share.

    Raises:
        BimosError: there are no two such rows; `source` names the comparison.
    """
    found: dict[str, dict[str, list[Point]]] = {}
    for name, label in texts(comparison).items():
        series: dict[str, list[Point]] = {}
        for row in comparison["rows"]:
            measured = row["perplexity"].get(name, {})
            if "experts" in row and is_number(measured.get("value")):
                shared = re.sub(r":num_experts=\d+(?=:|$)", "", row["row"])
                series.setdefault(shared, []).append((row["experts"], measured["value"], measured.get("stderr")))
        several = {shared: sorted(points) for shared, points in series.items() if len({experts for experts, *_ in points}) > 1}
        if several:
            found[label] = several
    if not found:
        wanted = "binarymos:num_experts=1,binarymos:num_experts=2,binarymos"
        raise BimosError(f"'{source}' has no two rows that differ in num_experts alone; run bimos compare with --methods {wanted}")
    return found
