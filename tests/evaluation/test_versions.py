"""Provenance, and results that are on disk whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess

import pytest
import torch

from bimos.evaluation.versions import commit, provenance, write_json, write_text


def test_provenance_names_what_ran():
    origin = provenance()
    assert set(origin) == {"versions", "commit", "machine"}
    assert origin["versions"]["torch"] == torch.__version__ and origin["versions"]["python"] == platform.python_version()
    assert set(origin["versions"]) == {"bimos", "torch", "transformers", "python"}
    assert origin["machine"]["cpu"] and 1 <= origin["machine"]["cores"] <= os.cpu_count()
    json.dumps(origin)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_says_when_files_differ_from_it(tmp_path):
    assert commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("a")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "c"], check=True)
    (tmp_path / "untracked").write_text("results do not make a checkout dirty")
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert commit(tmp_path) == head
    (tmp_path / "file").write_text("b")
    assert commit(tmp_path) == f"{head}+dirty"


def test_json_has_only_what_json_has(tmp_path):
    path = tmp_path / "new" / "result.json"
    numbers = {"a": float("nan"), "b": [float("inf"), 1.5], "c": torch.tensor([1.0, 2.0])}
    write_json(path, {**numbers, "d": path, 5: torch.float16, "é": True, "n": None})
    text = path.read_text(encoding="utf-8")
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read == {"a": None, "b": [None, 1.5], "c": [1.0, 2.0], "d": str(path), "5": "torch.float16", "é": True, "n": None}


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
