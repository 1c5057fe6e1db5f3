"""The report stands alone, escapes everything and survives whatever is missing."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bimos.evaluation import charts
from bimos.evaluation.report import render_report, write_report

VOID = {"meta", "link"}


class Page(HTMLParser):
    """Checks nesting and collects text and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture
def result():
    return {
        "model": "org/Model-1B",
        "method": "binarymos",
        "config": {"method": "binarymos", "distill": {"lr_latent": 0.002}, "note": "<b>&", "file": Path("a/b")},
        "total_bytes": 45_800_000,
        "original_bytes": 269_000_000,
        "compression": 5.873,
        "body_bits_per_weight": 1.274,
        "bits_per_parameter": 2.724,
        "components": [{"name": "planes", "tensors": 210, "bytes": 13_300_000}, {"name": "embeddings", "tensors": 2, "bytes": 32_500_000}],
        "stages": [
            {
                **{"name": "blocks", "tokens": 1000, "seconds": 61.0, "tokens_per_second": 16.4, "peak_memory_bytes": 2e9},
                **{"loss_first": 0.4, "loss_last": 0.1, "history": []},
                "blocks": [{"block": i, "loss_first": 0.5 * 2**i, "loss_last": 0.1 * 2**i} for i in range(12)],
            },
            {
                **{"name": "distill", "tokens": 500, "seconds": 10, "tokens_per_second": 50, "peak_memory_bytes": 3e9},
                **{"loss_first": 9.0, "loss_last": 2.0, "history": [[i * 50, 9.0 / i] for i in range(1, 11)]},
            },
        ],
        "perplexity": {
            "wikitext2": {"value": 93.41, "stderr": 1.6, "windows": 148, "context": 2048, "text": "WikiText-2 test", "teacher": 21.6}
        },
        "tasks": {"boolq": {"acc": 0.601, "acc_norm": None, "stderr": 0.0086, "acc_norm_stderr": None, "n": 3270}},
        "samples": [{"prompt": "Hi?", "teacher": "Hello.", "student": "<script>alert(1)</script>"}],
        "versions": {"bimos": "0.1", "torch": "2.13"},
        "commit": "abc123",
        "machine": {"cpu": "A CPU", "cores": 2, "accelerator": None},
        "seconds": 71.0,
    }


def test_everything_is_shown_and_nothing_is_fetched(result):
    html = render_report(result)
    page = Page(html)
    shown = "Model-1B|binarymos|1 min 11 s|45.8 MB|5.87×|269 MB|1.274|2.724|93.4|4.32× the teacher|21.6|148 × 2048|WikiText-2 test"  # noqa: RUF001
    more = "embeddings|29.0 %|60.1 %|blocks|distill|9.00 → 2.00|2.00 GB|Hello.|abc123|A CPU, 2 cores"
    for words in f"{shown}|{more}".split("|"):
        assert words in page.words.replace("\N{NO-BREAK SPACE}", " "), words
    assert not re.search(r"https?:|@import|url\(|<script|<iframe|<img|<object", html)
    assert all(value == "data:," for tag, name, value in page.attributes if name in ("src", "href"))
    assert "default-src 'none'" in html
    assert yaml.safe_load(re.search(r"method: binarymos\n.*?\n(?=\s*$|\s*Made)", page.text, re.S).group()) == {
        **result["config"],
        "file": "a/b",
    }


def test_text_is_escaped_everywhere(result):
    evil = "<img src=x onerror=alert(1)>\"'"
    result |= {"model": evil, "method": evil, "commit": evil, "versions": {evil: evil}, "config": {evil: evil}}
    result["samples"] = [dict.fromkeys(("prompt", "teacher", "student"), evil)]
    result["perplexity"] = {evil: {"value": 1.0, "text": evil, "note": evil}}
    result["components"] = [{"name": evil, "tensors": evil, "bytes": 10}]
    result["stages"][0]["name"] = evil
    result["stages"][0]["blocks"][0]["block"] = evil
    result["tasks"] = {evil: {"acc": 0.5, "n": evil}}
    page = Page(render_report(result))
    assert not any(tag == "img" or name == "onerror" for tag, name, _ in page.attributes)
    assert page.text.count(evil) > 10


def test_parts_without_numbers_are_left_out(result):
    whole = Page(render_report(result)).words
    titles = {"components": "Part", "perplexity": "Perplexity on", "tasks": "Zero-shot", "stages": "Training", "samples": "Samples"}
    for key, title in {**titles, "config": "Configuration"}.items():
        assert title in whole
        assert title not in Page(render_report({name: value for name, value in result.items() if name != key})).words, key
        Page(render_report({**result, key: None}))
    assert "model" in Page(render_report({})).words
    Page(render_report(dict.fromkeys(result)))


def test_missing_numbers_are_dashes_and_broken_points_are_skipped(result):
    history = [[0, None], [1, math.inf], [2, 3.0], [3, 2.0]]
    result["stages"] = [{"name": "distill", "loss_first": None, "loss_last": math.nan, "history": history, "blocks": [{"block": 0}, None]}]
    result["perplexity"]["broken"] = {"value": None}
    page = Page(render_report(result))
    assert "None" not in page.words and "nan" not in page.words and "inf " not in page.words
    lines = [value for tag, name, value in page.attributes if tag == "polyline" and name == "points"]
    assert [len(points.split()) for points in lines] == [2]


def test_a_loss_that_rose_is_pointed_out(result):
    assert "rose" not in Page(render_report(result)).words
    result["stages"][1] |= {"loss_first": 2.0, "loss_last": 3.0}
    assert "loss of distill rose" in Page(render_report(result)).words


def test_one_file_is_written_whole(result, tmp_path):
    path = tmp_path / "out" / "report.html"
    write_report(path, result)
    assert path.read_text(encoding="utf-8") == render_report(result)
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_bars_are_on_one_scale(result):
    page = Page(render_report(result))
    widths = [float(value.rstrip("%")) for tag, name, value in page.attributes if tag == "rect" and name == "width"][:3]
    assert widths == pytest.approx([100.0, 100 * 32.5 / 269, 100 * 13.3 / 269], abs=2e-3)


finite = st.floats(1e-6, 1e6) | st.floats(-1e3, 1e3)


@given(st.lists(finite, min_size=1, max_size=30))
def test_an_axis_holds_its_values(values):
    axis = charts.Axis.of(values)
    assert axis.low < axis.high and 2 <= len(axis.ticks) <= 14
    assert axis.ticks == sorted(axis.ticks)
    assert all(-1e-6 <= axis.percent(value) <= 100 + 1e-6 for value in values)
    assert axis.percent(axis.low) == pytest.approx(100) and axis.percent(axis.high) == pytest.approx(0, abs=1e-9)


def test_an_axis_is_logarithmic_only_where_values_span_much():
    assert charts.Axis.of([0.001, 0.5]).log and not charts.Axis.of([2.0, 9.0]).log and not charts.Axis.of([-1.0, 500.0]).log


def drawn_lines(points):
    page = Page(str(charts.line_chart(points, "tokens", "loss")))
    lines = [value for tag, name, value in page.attributes if tag == "polyline" and name == "points"]
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**9), finite), min_size=2, max_size=200))
def test_line_charts_stay_inside(points):
    for line in drawn_lines(points):
        assert all(-0.01 <= x <= 100.01 and -0.01 <= y <= 100.01 for x, y in line)
        assert [x for x, _ in line] == sorted(x for x, _ in line)


def test_a_long_history_is_thinned_to_means():
    raw, smooth = drawn_lines([(step, 2.0 + (-1) ** step) for step in range(1000)])
    assert 60 < len(raw) <= charts.MAX_POINTS and len(smooth) <= 61
    # values 1 and 3 on an axis from 0: their mean lies at a third from the top, the raw line from end to end
    assert [y for _, y in smooth[1:-1]] == pytest.approx([100 / 3] * len(smooth[1:-1]), abs=5)
    assert drawn_lines([(0, 1.0), (10, 3.0)]) == [[(0.0, 66.67), (100.0, 0.0)]]
