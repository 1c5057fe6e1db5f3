"""What tests of the command line share: calling it, what a refusal looks like, and a packed model that it has made."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bimos.cli import app


def run(*arguments: object, input: bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)


def assert_refused(result: Result, *fragments: str) -> None:
    """Exit code 2 and exactly one line on stderr, `error: ...`, with every fragment in it."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.output
    for fragment in fragments:
        assert fragment in result.stderr, result.stderr


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory, teacher_directory: Path, text_file: Path) -> Path:
    """A packed model by `bimos quantize`, with two experts and int8 embeddings. Tests leave it as it is."""
    output = tmp_path_factory.mktemp("packed") / "model"
    result = run(*quantize(teacher_directory, output, text_file))
    assert result.exit_code == 0, (result.output, result.exception)
    return output


def quantize(model: object, output: object, data: object, *more: object) -> list[object]:
    """A run of seconds."""
    quick = ["sequence_length=32", "initialise.sequences=4", "blocks.tokens=256", "blocks.epochs=1", "options={num_experts: 2}"]
    settings = [part for assignment in quick for part in ("--set", assignment)]
    budget = [] if {"--tokens", "--minutes"} & set(map(str, more)) else ["--tokens", "256"]
    return ["quantize", model, "-o", output, "--data", data, *settings, *budget, *more]
