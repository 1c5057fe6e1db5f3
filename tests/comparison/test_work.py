"""A row in a process of its own: it ends with the one that started it, leaves its work to the next, and says what was wrong."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import bimos.comparison.__main__ as process_of_a_row
from bimos.comparison.rows import parse_rows
from bimos.comparison.run import _in_a_process
from bimos.comparison.work import Job, work
from bimos.errors import BimosError
from bimos.evaluation.versions import write_json


def job(folder: Path, model: Path, text: Path, row: str, base: dict[str, Any], **changes: Any) -> Job:
    shared = {"data": str(text), "tokens": 4096, "minutes": None, "seed": 0, "embedding_bits": 8}
    (parsed,) = parse_rows([row], base, shared)
    config = None if parsed.config is None else parsed.config.to_dict()
    values = {
        "texts": {text.name: str(text)},
        "tasks": [],
        "windows": 1,
        "limit": None,
        "folder": str(folder),
        "cache": str(folder.parent / "cache"),
    }
    found = Job(str(model), row, config, **(values | changes))
    write_json(folder / "job.json", dataclasses.asdict(found))
    return found


def test_it_ends_with_its_starter_and_another_goes_on(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    base = {
        "sequence_length": 32,
        "initialise": {"sequences": 4},
        "blocks": {"tokens": 256, "epochs": 200, "batch_size": 4},
        "distill": {"batch_size": 4},
    }
    folder = tmp_path / "row"
    asked = job(folder, teacher_directory, text_file, "onebit", base)
    command = [sys.executable, "-m", "bimos.comparison", str(folder / "job.json"), "make", "evaluate"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stdin is not None
    begun = folder / "model" / "work" / "run.json"
    deadline = time.monotonic() + 120
    while not begun.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert begun.exists()
    process.stdin.close()  # as when the starter is killed
    assert process.wait(timeout=30) == 1
    assert not (folder / "made.json").exists()
    work(asked, ["make", "evaluate"])
    made = json.loads((folder / "made.json").read_text())
    assert [stage["tokens"] for stage in made["stages"] if stage["name"] == "distill"] == [4096]
    assert list(json.loads((folder / "evaluation.json").read_text())["perplexity"]) == [text_file.name]


def test_what_is_wrong_comes_back_as_one_line(teacher_directory: Path, text_file: Path, tmp_path: Path, capfd: Any) -> None:
    asked = job(tmp_path / "row", tmp_path / "no-such-model", text_file, "fp16", {})
    with pytest.raises(BimosError, match="no-such-model"):
        _in_a_process(asked, ["make"])
    assert "Traceback" not in capfd.readouterr().err


def test_ctrl_c_is_no_traceback(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    base = {"sequence_length": 32, "initialise": {"sequences": 4}, "blocks": {"tokens": 256, "epochs": 200, "batch_size": 4}}
    folder = tmp_path / "row"
    job(folder, teacher_directory, text_file, "onebit", base)
    command = [sys.executable, "-m", "bimos.comparison", str(folder / "job.json"), "make"]
    reading, writing = os.pipe()  # that somebody could write to, as long as the test lasts
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where this is a job in the background
    process = subprocess.Popen(command, stdin=reading, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    deadline = time.monotonic() + 120
    while not (folder / "model" / "work" / "run.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    os.close(reading)
    os.close(writing)
    assert process.returncode == 130 and "Traceback" not in said, said


def test_a_full_disk_is_one_line(teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(process_of_a_row, "_work", full)
    with pytest.raises(SystemExit) as ended:
        process_of_a_row.main()
    assert ended.value.code == errno.ENOSPC
    asked = job(tmp_path / "row", teacher_directory, text_file, "onebit", {})
    monkeypatch.setattr(subprocess, "run", lambda command, stdin: subprocess.CompletedProcess(command, errno.ENOSPC))
    with pytest.raises(BimosError, match="no space left on the device"):
        _in_a_process(asked, ["make"])
