"""What the papers claim of their methods, and we of ours, held against the rows of a comparison: for `tables.py`.

A claim holds on a text where the other row's perplexity is higher, window by window, by more than two standard errors.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from bimos.comparison import paired, table
from bimos.evaluation.formatting import DASH

TWO_BITS = ("rtn2", "gptq2", "hqq", "auto-round:iters=50")
LEVEL = "not told apart"


@dataclasses.dataclass(frozen=True)
class Claim:
    """`better` is said to be better than every one of `others`; names of rows."""

    said: str
    better: str
    others: tuple[str, ...]


CLAIMS = (
    Claim("Scales mixed per token are better than static ones (BinaryMoS)", "binarymos", ("onebit",)),
    Claim("Four experts are better than two (BinaryMoS)", "binarymos", ("binarymos:num_experts=2",)),
    Claim("Eight experts are better than four (BinaryMoS)", "binarymos:num_experts=8", ("binarymos",)),
    Claim("Distilled with mixed scales is better than rounding with some weights kept wider (BinaryMoS)", "binarymos", ("billm", "pbllm")),
    Claim("1.3 bits are better than 2-bit rounding (BinaryMoS)", "binarymos", TWO_BITS),
    Claim("Two planes are better than 2-bit rounding at equal bits (DB-LLM)", "dbllm", TWO_BITS),
    Claim("The same in groups of 128 (DB-LLM)", "dbllm:group_size=128", ("rtn2:group_size=128", "gptq2:group_size=128")),
    Claim("Errors made good by later columns are better than rounding to the nearest (GPTQ)", "gptq2", ("rtn2",)),
    Claim("The same in groups of 128 (GPTQ)", "gptq2:group_size=128", ("rtn2:group_size=128",)),
    Claim("Residual planes and salient columns are better than signs refit to calibration text (BiLLM)", "billm", ("sign:untrained",)),
    Claim("Two planes with mixed scales are better than `dbllm` (ours)", "binarymos:planes=2", ("dbllm",)),
    Claim(
        "The same with scales of groups, at equal bits (ours)",
        "binarymos:planes=2:num_experts=2:group_size=128:blocks.lr_scale=4e-3",
        ("dbllm",),
    ),
)


def lines(comparison: dict[str, Any]) -> list[list[str]]:
    """Header and a row for every claim whose rows are there; none where no claim can be checked."""
    rows = {row["row"]: row for row in comparison["rows"]}
    texts = table.texts(comparison)
    found = [["claim", *(f"{label}, times the perplexity of the row claimed better" for label in texts.values()), "comes out"]]
    for claim in CLAIMS:
        others = [other for other in claim.others if other in rows]
        if claim.better in rows and others:
            said = {name: {other: _times(rows[other], rows[claim.better], name) for other in others} for name in texts}
            cells = [", ".join(f"{other} {times}" for other, (times, _) in of.items()) for of in said.values()]
            verdicts = [verdict for of in said.values() for _, verdict in of.values() if verdict]
            bits = ", ".join(f"{name} {rows[name]['body_bits_per_weight']:.2f}" for name in (claim.better, *others))
            found.append([f"{claim.said}; bits: {bits}", *cells, _verdict(verdicts)])
    return found if len(found) > 1 else []


def _times(row: dict[str, Any], better: dict[str, Any], text: str) -> tuple[str, str]:
    """How many times as high the perplexity of `row` is, in words, and what becomes of the claim; "" where it was not measured."""
    first, second = (entry["perplexity"].get(text, {}) for entry in (row, better))
    losses = [entry.get("losses") or [] for entry in (first, second)]
    if not losses[0] or len(losses[0]) != len(losses[1]):
        return DASH, ""
    ratio = paired.paired(*losses)
    if ratio is None:
        return DASH, LEVEL  # of one window, or one row has no finite perplexity
    value, error = ratio
    if abs(math.log(value)) <= 2 * error / value:
        return paired.times(value, error), LEVEL
    return paired.times(value, error), "holds" if value > 1 else "fails"


def _verdict(verdicts: list[str]) -> str:
    """One for all rows and texts: what they agree on, or how many say what."""
    kinds = {kind: verdicts.count(kind) for kind in ("holds", LEVEL, "fails") if kind in verdicts}
    if len(kinds) <= 1:
        return next(iter(kinds), DASH)
    return ", ".join(f"{kind}: {count} of {len(verdicts)}" for kind, count in kinds.items())
