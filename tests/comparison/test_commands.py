"""`bimos compare` and `bimos inspect` as commands: results, and one line for what is wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import bimos.comparison.run as runner
from bimos.cli import app

Compared = tuple[dict[str, Any], Path]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *fragments: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for fragment in fragments:
        assert fragment in result.stderr, result.stderr


def test_a_comparison_goes_on_and_is_shown(
    compared: Compared, teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    shutil.copytree(compared[1], output)
    monkeypatch.setattr(runner, "_in_a_process", lambda job, steps: pytest.fail(f"{job.name} again"))
    quick = ["sequence_length=32", "initialise={sequences: 4}", "blocks={tokens: 256, epochs: 1, batch_size: 4}", "distill={batch_size: 4}"]
    result = run(
        *("compare", teacher_directory, "-o", output, "--methods", "binarymos:num_experts=2, fp16", "--data", text_file, "--tokens", 512),
        *("--ppl", text_file, "--windows", 2, "--json", "-", *(part for key in quick for part in ("--set", key))),
    )
    assert result.exit_code == 0, (result.output, result.exception)
    assert [row["row"] for row in json.loads(result.stdout)["rows"]] == [row["row"] for row in compared[0]["rows"]]
    for fragment in ("sign:untrained", "body bits", "index.html"):
        assert fragment in result.stderr
    looked = run(
        "inspect", output / "work" / "binarymos-num_experts=2" / "model", "--text", text_file, "--compare", output, "-o", tmp_path / "i"
    )
    assert looked.exit_code == 0, (looked.output, looked.exception)
    assert "entropy" in looked.stdout and (tmp_path / "i" / "experts.png").exists()


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--methods", "binarymos,binarymoss"], ["unknown method 'binarymoss'", "onebit"]),
        (["--methods", "binarymos:experts=2"], ["no option 'experts'"]),
        (["--methods", "sign,sign"], ["'sign' is given twice"]),
        ([], ["no rows", "--methods"]),
        (["--methods", "sign", "--minutes", "2"], ["--tokens or in --minutes"]),
        (["--methods", "sign", "--windows", "0"], ["--windows 0"]),
        (["--methods", "sign", "--limit", "3"], ["--limit", "--tasks"]),
        (["--methods", "sign", "--ppl", "wikitext3"], ["wikitext3"]),
        (["--methods", "sign", "--data", "no-such.txt"], ["no-such.txt"]),
    ],
)
def test_bad_input(teacher_directory: Path, text_file: Path, tmp_path: Path, options: list[str], fragments: list[str]) -> None:
    given = ["compare", teacher_directory, "-o", tmp_path / "out", "--data", text_file, "--ppl", text_file, "--tokens", 512, *options]
    refused(run(*given), *fragments)
    assert not (tmp_path / "out").exists()


def test_models_and_texts_that_are_not_there(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    rest = ["-o", tmp_path / "out", "--methods", "sign", "--ppl", text_file]
    refused(run("compare", "./no-such-model", "--data", text_file, *rest), "./no-such-model")
    refused(run("compare", teacher_directory, *rest, "--data", ""), "no training text", "--data")
    refused(run("inspect", "./no-such-model", "--text", "a b"), "./no-such-model")
    refused(run("inspect", teacher_directory, "--text", "a b", "-o", tmp_path / "i"), "no routers")


def test_without_matplotlib_the_mend_is_named(
    teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(run("compare", teacher_directory, "-o", tmp_path / "o", "--methods", "sign", "--data", text_file), "pip install", "bimos[eval]")
    refused(run("inspect", teacher_directory, "--text", "a b"), "pip install", "bimos[eval]")
