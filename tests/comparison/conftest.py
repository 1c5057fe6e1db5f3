"""A comparison of four rows that takes seconds, and what starts others like it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bimos.comparison.work as module
from bimos.comparison.rows import parse_rows
from bimos.comparison.run import compare
from bimos.comparison.setting import Setting
from bimos.comparison.work import Job
from bimos.config import RunConfig
from bimos.evaluation.speed import Runs

QUICK: dict[str, Any] = {
    "sequence_length": 32,
    "initialise": {"sequences": 4},
    "blocks": {"tokens": 256, "epochs": 1, "batch_size": 4},
    "distill": {"batch_size": 4},
}
SHARED = {"data", "tokens", "minutes", "seed"}
Compare = Callable[..., dict[str, Any]]


def here(job: Job, steps: list[str]) -> None:
    """The steps of a row in this process."""
    module.work(job, steps)


@pytest.fixture(scope="session")
def compare_tiny(teacher_directory: Path, text_file: Path) -> Compare:
    """`compare_tiny(output, *rows, spawn=, texts=, tasks=, base=, work=, **setting)`."""

    def run(
        output: Path,
        *specifications: str,
        spawn: Any = here,
        texts: Any = None,
        tasks: Any = (),
        base: Any = None,
        work: Any = None,
        **changes: Any,
    ) -> dict[str, Any]:
        config = RunConfig(**({"data": str(text_file), "tokens": 512} | {key: changes.pop(key) for key in SHARED & changes.keys()}))
        values = {"windows": 2, "tasks": bool(tasks)} | changes
        setting = Setting.of(str(teacher_directory), config, **values)
        rows = parse_rows(specifications, QUICK | (base or {}), setting.shared())
        patch = pytest.MonkeyPatch()
        with patch.context() as patched:
            patched.setattr(module, "SPEED", Runs(prompts=(4,), batches=(1,), tokens=4, repeats=1))
            return compare(rows, setting, output, texts=texts or [str(text_file)], tasks=tasks, work=work, spawn=spawn)

    return run


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory, compare_tiny: Compare) -> tuple[dict[str, Any], Path]:
    """Rows and directory of a finished comparison. Tests leave it as it is."""
    output = tmp_path_factory.mktemp("compared") / "out"
    return compare_tiny(output, "fp16", "sign:untrained", "binarymos:num_experts=1", "binarymos:num_experts=2"), output
