"""The terminal's summary."""

from __future__ import annotations

import io

from rich.console import Console

from bimos.evaluation.summary import print_summary


def printed(result, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    print_summary(result, console)
    return console.export_text()


STAGE = {"name": "distill", "tokens": 410_000, "seconds": 1620, "tokens_per_second": 255, "peak_memory_bytes": 4e9}
RESULT = {
    "model": "org/model",
    "method": "onebit",
    "seconds": 90,
    "total_bytes": 45_800_000,
    "original_bytes": 269_000_000,
    "body_bits_per_weight": 1.274,
    "bits_per_parameter": 2.724,
    "perplexity": {"wikitext2": {"value": 93.4, "stderr": 1.6, "teacher": 21.6, "text": "WikiText-2 test"}},
    "stages": [{**STAGE, "loss_first": 2.0, "loss_last": 3.0}],
    "tasks": {"piqa": {"acc": 0.63, "stderr": 0.011, "acc_norm": None, "n": 1838}},
    "samples": [{"prompt": "Hi", "teacher": "Hello [bold]there[/bold]", "student": ""}],
}


def test_it_shows_what_the_result_has():
    text = " ".join(printed(RESULT).split())
    shown = "org/model|onebit|1 min 30 s|45.8 MB|5.87|1.274|2.724|93.4 ± 1.6|WikiText-2 test|4.32|21.6|410 k|255|4.00 GB|(rose)|63.0 %"
    for words in shown.split("|"):
        assert words in text, words
    assert "Hello [bold]there[/bold]" in text and "(nothing)" in text


def test_it_survives_what_is_missing_and_narrow_terminals():
    assert "model" in printed({})
    assert "org/model" in printed(dict.fromkeys(RESULT) | {"model": "org/model"})
    assert max(map(len, printed(RESULT, width=50).splitlines())) <= 50


def test_both_bit_figures_come_together():
    text = printed({"body_bits_per_weight": 1.036})
    assert "1.036" in text and "bits per parameter" in text
