"""The tables of README and docs/results.md are what the JSON says."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bimos.evaluation.formatting import DASH

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str | int | None:
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        tables.main()
    return ended.value.code


def test_the_documents_are_what_the_json_says(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(tables, monkeypatch) == 0


def test_comparisons_fill_both_documents(tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("README.md", "docs", "benchmarks/results"):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    row = {
        "row": "binarymos:num_experts=2",
        "body_bits_per_weight": 1.125,
        "bits_per_parameter": 2.5,
        "total_bytes": 45_000_000,
        "perplexity": {"wikitext2": {"value": 123.25, "stderr": 1.5, "windows": 16, "context": 2048, "text": "WikiText-2"}},
        "tasks": {"boolq": {"acc": 0.5, "stderr": 0.125, "acc_norm": None, "acc_norm_stderr": None, "n": 5, "seconds": 1.0}},
        "stages": [{"name": "distill", "tokens": 4096, "seconds": 90.0, "peak_memory_bytes": 2_000_000}],
        "speed": {"decode_tokens_per_second": 512.4, "runs_in": "engine, avx512", "why": None, "threads": 2},
        "versions": {"torch": "2.13.0"},
        "machine": {"cpu": "CPU", "cores": 2},
        "commit": "0123456789abcdef",
    }
    peer = {
        "row": "hqq",
        "body_bits_per_weight": 2.5,
        "perplexity": {"wikitext2": row["perplexity"]["wikitext2"] | {"value": 456.5}},
        "tasks": {},
        "stages": [{"name": "library", "tokens": 0, "seconds": 30.0, "peak_memory_bytes": 2_000_000}],
        "peer": {"library": "hqq", "version": "0.2.8", "own_body_bits_per_weight": 2.5},
    }
    setting = {"model": "some/model", "data": "wiki.txt", "tokens": 4096, "minutes": None, "seed": 0, "embedding_bits": 8, "limit": 5}
    folder = tmp_path / "benchmarks" / "results" / "compare-small"
    folder.mkdir()
    (folder / "pareto.svg").write_text("<svg/>")
    (folder / "comparison.json").write_text(json.dumps({"setting": setting, "rows": [row, row | peer]}))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", folder.parent)
    monkeypatch.setattr(tables, "DOCUMENT", tmp_path / "docs" / "results.md")
    assert "README.md, results.md" in str(check(tables, monkeypatch))
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables.main()
    readme, document = (tmp_path / "README.md").read_text(), (tmp_path / "docs" / "results.md").read_text()
    assert "| binarymos:num_experts=2 | 1.125 | 2.500 | 45.0 MB | 123 ± 1.5 |" in document
    assert "](../benchmarks/results/compare-small/pareto.svg)" in document
    said = "A budget of 4,096 tokens distilled a row, on 2 cores of CPU (avx512)"
    assert f"{said}, seed 0" in document
    assert f"{said}, WikiText-2: `binarymos:num_experts=2` 123 ± 1.5, `hqq` 456 ± 1.5." in readme  # others are larger
    assert "[docs/results.md](docs/results.md)" in readme
    assert "50.0 ± 12.5" in document and "0123456789ab" in document and "## 4,096 tokens distilled a row" in document
    assert "| hqq | 2.500 | 2.500 | 45.0 MB | 456 ± 1.5 | – | 0.5 |" in document  # noqa: RUF001 - a dash
    assert "- hqq: rounded by hqq 0.2.8 (2.500 bits a body weight in its own format)" in document
    assert check(tables, monkeypatch) == 0
    for larger in set(folder.parent.glob("compare-*")) - {folder}:
        shutil.rmtree(larger)
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables.main()
    readme = (tmp_path / "README.md").read_text()
    assert "| binarymos:num_experts=2 | 1.125 | 2.500 | 45.0 MB | 123 ± 1.5 | 1.5 | 512 (engine) |" in readme
    assert "](benchmarks/results/compare-small/pareto.svg)" in readme
    (folder / "comparison.json").write_text(json.dumps({"setting": setting, "rows": [row | {"body_bits_per_weight": 1.5}]}))
    assert "run benchmarks/tables.py" in str(check(tables, monkeypatch))


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_what_is_there(path: Path) -> None:
    """They are run by hand, and seldom: what moves within the package must not leave them behind."""
    wanted = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    for node in wanted:
        if (node.module or "").split(".")[0] == "bimos":
            try:
                exec(ast.unparse(node), {})
            except ModuleNotFoundError as error:
                if (error.name or "").startswith("bimos"):
                    raise
                pytest.skip(f"{error.name} is not installed")


def test_claims_hold_fail_or_cannot_be_told(tables: ModuleType) -> None:
    losses = {"binarymos": [3.0, 4.0, 3.5], "onebit": [3.1, 4.12, 3.61], "billm": [3.1, 3.9, 3.5], "pbllm": [2.9, 3.88, 3.39]}
    rows = [
        {"row": name, "perplexity": {"text": {"text": "Text", "value": 10.0 * sum(found), "losses": found}}, "tasks": {}}
        | {"body_bits_per_weight": 1.25}
        for name, found in losses.items()
    ]
    rows[2]["body_bits_per_weight"] = 2.5
    head, mixed, rounded = tables.claims.lines({"rows": rows})
    assert head[1:] == ["Text, times the perplexity of the row claimed better", "comes out"]
    assert mixed[1:] == ["onebit 1.116 ± 0.006", "holds"]  # exp of the mean difference, 0.11
    assert rounded[0].endswith("; bits: binarymos 1.25, billm 2.50, pbllm 1.25")
    assert rounded[2] == "not told apart: 1 of 2, fails: 1 of 2"
    assert tables.claims.lines({"rows": rows[1:]}) == []
    rows[1]["perplexity"]["text"]["losses"] = [3.0]  # other windows
    assert tables.claims.lines({"rows": rows[:2]})[1][1:] == [f"onebit {DASH}", DASH]
