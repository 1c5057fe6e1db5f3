"""Bits against perplexity: which rows no other row beats in both."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from bimos.comparison import TEACHER
from bimos.comparison.table import texts
from bimos.errors import BimosError
from bimos.evaluation.formatting import is_number

MARKERS = "osD^vP*X<>ph"
SHOWN = 30.0  # times the lowest perplexity: what is above that says no more than that it failed, and would press the rest together
FRONTIER = "none has fewer bits at as low a perplexity"
WIDEST = 34  # characters of a name in the legend


def require_matplotlib() -> None:
    """Raises BimosError: it is not installed. Asked before the work, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BimosError(f"pictures need matplotlib ({error}); install it with: pip install 'bimos[eval]'") from None


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points `(bits, perplexity)` that no other has fewer bits and lower perplexity than, by bits."""
    best, found = float("inf"), []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if points[index][1] < best:
            best = points[index][1]
            found.append(index)
    return found


def points(comparison: dict[str, Any], text: str) -> list[tuple[str, float, float]]:
    """`(row, bits per body weight, perplexity on text)` of every row that has both but the teacher."""
    found = []
    for row in comparison["rows"]:
        value = row["perplexity"].get(text, {}).get("value")
        if row["row"] != TEACHER and is_number(value) and is_number(row["body_bits_per_weight"]):
            found.append((row["row"], row["body_bits_per_weight"], value))
    return found


def _broken(name: str) -> str:
    """A long row's name on several lines, broken before its options."""
    lines = [""]
    for part in re.split(r"(?=:)", name):
        if lines[-1] and len(lines[-1]) + len(part) > WIDEST:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def draw(comparison: dict[str, Any], form: str) -> bytes:
    """The picture, a panel for every text, as `svg` or `png`: rows as marks, the frontier as steps, the teacher as a line.

    Rows of more than `SHOWN` times the lowest perplexity lie on the upper edge.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, StrMethodFormatter

    named = {name: label for name, label in texts(comparison).items() if points(comparison, name)}
    names = sorted({name for text in named for name, _, _ in points(comparison, text)})
    styles = {name: (MARKERS[index % len(MARKERS)], f"C{index % 10}") for index, name in enumerate(names)}
    figure = Figure(figsize=(5.2 * max(1, len(named)) + 2.2, 4.4), layout="constrained")
    axes = figure.subplots(1, max(1, len(named)), squeeze=False)[0]
    teacher = next((row for row in comparison["rows"] if row["row"] == TEACHER), None)
    handles: dict[str, Any] = {}
    failed: set[str] = set()
    for axis, (text, label) in zip(axes, named.items(), strict=False):
        rows = points(comparison, text)
        front = [rows[index][1:] for index in frontier([row[1:] for row in rows])]
        if len(front) > 1:
            (handles[FRONTIER],) = axis.step(*zip(*front, strict=True), where="post", color="0.75", zorder=1)
        top = SHOWN * min(value for *_, value in rows)
        for name, bits, value in rows:
            marker, colour = styles[name]
            if value > top:
                failed.add(name)
            # Open: of two that lie on each other both are seen.
            handles[name] = axis.scatter(
                [bits],
                [min(value, top)],
                marker=marker,
                facecolors="none",
                edgecolors=colour,
                linewidths=1.6,
                s=46,
                zorder=2,
                clip_on=False,
            )
        if teacher is not None and is_number(teacher["perplexity"].get(text, {}).get("value")):
            level = teacher["perplexity"][text]["value"]
            handles["the teacher, 16 bits"] = axis.axhline(level, color="0.3", linestyle="--", linewidth=1, zorder=1)
        axis.set_yscale("log")
        if any(value > top for *_, value in rows):
            axis.set_ylim(top=top)
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
        axis.set(title=label, xlabel="bits per body weight", ylabel="perplexity")
        axis.grid(True, which="both", color="0.93", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.1)
    shown = [name for name in ("the teacher, 16 bits", FRONTIER, *names) if name in handles]
    if shown:
        labels = [_broken(name) + (" (above)" if name in failed else "") for name in shown]
        figure.legend([handles[name] for name in shown], labels, loc="outside right upper", frameon=False, fontsize=8)
    target = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "bimos", "svg.fonttype": "none"}):  # the same figures give the same file
        figure.savefig(target, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return target.getvalue()
