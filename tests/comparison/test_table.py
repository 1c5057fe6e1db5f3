"""Table, frontier, plot and page of a comparison."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bimos.comparison import paired, table
from bimos.comparison.page import write_pages
from bimos.comparison.pareto import draw, frontier, points

Compared = tuple[dict[str, Any], Path]


def row(name: str, bits: float, value: float | None, **more: Any) -> dict[str, Any]:
    measured = {"value": value, "stderr": 0.5, "windows": 3, "context": 2048, "text": "WikiText-2"}
    return {
        "row": name,
        "config": None,
        "body_bits_per_weight": bits,
        "bits_per_parameter": 2.5,
        "total_bytes": 45_000_000,
        "perplexity": {"wikitext2": measured},
        "tasks": {},
        "stages": [],
        "speed": {"decode_tokens_per_second": 512.4, "runs_in": "engine, avx512", "why": None, "threads": 2},
        "versions": {"torch": "2"},
        "machine": {"cpu": "a|b", "cores": 2},
        "commit": "c",
        **more,
    }


SETTING = {"model": "some/model", "data": "wiki.txt", "tokens": 4096, "minutes": None, "seed": 0, "embedding_bits": 8, "limit": 5}
TASKS = {
    "boolq": {"acc": 0.5, "stderr": 0.125, "acc_norm": None, "acc_norm_stderr": None, "n": 5},
    "zeroshot6": {"acc": 0.25, "stderr": 0.0625, "acc_norm": 0.375, "acc_norm_stderr": 0.1, "n": 30},
}


@pytest.fixture
def comparison() -> dict[str, Any]:
    stages = [
        {"name": "blocks", "tokens": 100, "seconds": 60.0, "peak_memory_bytes": 3_000_000},
        {"name": "distill", "tokens": 4096, "seconds": 90.0, "peak_memory_bytes": 2_000_000},
    ]
    rows = [row("bad", 1.5, 300.0), row("broken", 1.0, None), row("good", 1.25, 150.0, stages=stages, tasks=TASKS), row("fp16", 16.0, 20.0)]
    return {"setting": SETTING, "rows": rows}


def test_rows_are_in_order_and_cells_say_what_was_measured(comparison: dict[str, Any]) -> None:
    header, *lines = table.main_table(comparison)
    assert [line[0] for line in lines] == ["fp16", "good", "bad", "broken"]
    good = dict(zip(header, lines[1], strict=True))
    assert good["body bits"] == "1.250" and good["size"] == "45.0 MB" and good["WikiText-2"] == "150 ± 0.50 (7.50×)"  # noqa: RUF001
    assert (good["tokens"], good["minutes"], good["peak memory"]) == ("4,096", "2.5", "3.00 MB")
    assert good["decode, tokens/s"] == "512 (engine)"
    assert (good["acc, %"], good["acc_norm, %"]) == ("25.0 ± 6.2", "37.5 ± 10.0")
    assert lines[3][header.index("WikiText-2")].startswith("–")  # noqa: RUF001


def test_tasks_have_a_table_of_rows_that_were_measured(comparison: dict[str, Any]) -> None:
    assert table.task_table(comparison) == [["row", "boolq", "mean of six"], ["good", "50.0 ± 12.5", "25.0 ± 6.2"]]
    assert table.task_table(comparison, "acc_norm")[1] == ["good", "–", "37.5 ± 10.0"]  # noqa: RUF001
    comparison["rows"][2]["tasks"] = {}
    assert table.task_table(comparison) == []


def test_what_rows_share_is_said(comparison: dict[str, Any]) -> None:
    said = table.conditions(comparison)
    for fragment in (
        "4,096 tokens distilled",
        "threads: 2",
        "seed 0",
        "`wiki.txt`",
        "3 of WikiText-2",
        "2048",
        "first 5 documents",
        "2 cores of a|b",
    ):
        assert fragment in said


def test_rows_against_each_other_window_by_window() -> None:
    """Two rows that differ by 2 % on every window, in a text whose windows differ by far more."""
    good = [2.0, 3.0, 4.0, 5.0]
    ratio, error = paired.paired([loss + 0.02 for loss in good], good) or (0.0, 0.0)
    assert ratio == pytest.approx(math.exp(0.02)) and error < 1e-9
    apart = [0.01, 0.03, 0.02, 0.04]
    ratio, error = paired.paired([loss + d for loss, d in zip(good, apart, strict=True)], good) or (0.0, 0.0)
    assert ratio == pytest.approx(math.exp(0.025)) and error == pytest.approx(ratio * 0.0129099 / 2, rel=1e-4)
    assert paired.paired([1.0], [2.0]) is None and paired.paired([1.0, math.nan], good[:2]) is None
    assert paired.paired([900.0] * 4, good) is None


def test_rows_are_multiples_of_the_best(comparison: dict[str, Any]) -> None:
    assert paired.sentences(comparison) == []  # rows of earlier versions hold no losses
    losses = {"good": [1.0, 2.0, 3.0], "bad": [1.01, 2.02, 3.03], "broken": [9.0, 9.0, 9.0], "fp16": [0.5, 0.5, 0.5]}
    for entry in comparison["rows"]:
        entry["perplexity"]["wikitext2"]["losses"] = losses[entry["row"]]
    far = row("far", 1.0, 1e6)
    far["perplexity"]["wikitext2"]["losses"] = [9.0, 9.0, 9.0]
    fewer = row("fewer", 1.0, 400.0)
    fewer["perplexity"]["wikitext2"]["losses"] = [9.0, 9.0]
    comparison["rows"] += [far, fewer]
    said = "WikiText-2, window by window, times the perplexity of good: bad 1.020 ± 0.006, far 1,097."
    assert paired.sentences(comparison) == [said]


def test_markdown_escapes_and_aligns() -> None:
    assert table.markdown([["row", "n"], ["a|b", "1"]]) == "| row | n |\n| --- | --: |\n| a\\|b | 1 |"


def test_the_frontier_is_what_no_other_point_beats_in_both() -> None:
    given = [(2.0, 50.0), (1.0, 100.0), (1.5, 120.0), (1.5, 90.0), (3.0, 50.0), (4.0, 20.0), (1.0, 110.0)]
    expected = [p for p in given if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in given)]
    assert [given[index] for index in frontier(given)] == sorted(expected) == [(1.0, 100.0), (1.5, 90.0), (2.0, 50.0), (4.0, 20.0)]


def test_points_leave_out_the_teacher_and_what_has_no_number(comparison: dict[str, Any]) -> None:
    assert points(comparison, "wikitext2") == [("bad", 1.5, 300.0), ("good", 1.25, 150.0)]


def test_what_failed_lies_on_the_upper_edge(comparison: dict[str, Any]) -> None:
    svg = draw(comparison, "svg").decode()
    assert "good" in svg and "(above)" not in svg
    row = next(row for row in comparison["rows"] if row["row"] == "bad")
    worse = row | {"row": "worse", "perplexity": {"wikitext2": row["perplexity"]["wikitext2"] | {"value": 31 * 150.0}}}
    svg = draw({**comparison, "rows": [*comparison["rows"], worse]}, "svg").decode()
    assert "worse (above)" in svg and "bad (above)" not in svg


def test_pages_of_rows_with_and_without_numbers(comparison: dict[str, Any], tmp_path: Path) -> None:
    write_pages(tmp_path, comparison)
    page = (tmp_path / "index.html").read_text()
    assert "lowest with good, 7.50× the teacher" in page  # noqa: RUF001
    assert "both bits and perplexity: good." in page


def test_the_page_stands_alone_and_names_every_row(compared: Compared) -> None:
    result, output = compared
    page = (output / "index.html").read_text()
    assert not re.findall(r"""(?:src|href|url\()=?["']?(?!data:)(?:https?:|/|\.)""", page) and "<script" not in page
    assert all(row["row"] in page for row in result["rows"])
    assert "data:image/svg+xml;base64," in page
    ElementTree.fromstring((output / "pareto.svg").read_text())
    assert (output / "pareto.png").read_bytes().startswith(b"\x89PNG")
    svg = (output / "pareto.svg").read_text()
    assert "the teacher, 16 bits" in svg and "binarymos:num_experts=2" in svg
    kept = json.loads((output / "comparison.json").read_text())
    assert {row["row"] for row in kept["rows"]} == {row["row"] for row in result["rows"]}
    assert all("history" not in stage for row in kept["rows"] for stage in row["stages"])
    assert (output / "table.md").read_text().count("\n| ") == 6
