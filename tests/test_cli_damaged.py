"""Checkpoints that are damaged, or closed to who reads them: one line that names the file, exit code 2, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import assert_refused, quantize, run


def test_files_that_others_may_not_read(
    quantized: Path, teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for, not tried: root reads everything."""
    closed: list[str] = []
    monkeypatch.setattr("bimos.packing.integrity.os.access", lambda path, mode: Path(path).name not in closed)
    commands = {
        "generate": ["--prompt", "x"],
        "info": [],
        "eval": ["--ppl", text_file],
        "unpack": ["-o", tmp_path / "dense", "--approximate"],
    }
    for closed[:] in (["config.json"], ["model.safetensors"], [quantized.name]):
        for command, more in commands.items():
            assert_refused(run(command, quantized, *more), closed[0], "read")  # in typer's words where that asks first
    closed[:] = ["model.safetensors"]
    assert_refused(run(*quantize(teacher_directory, tmp_path / "out", text_file)), "cannot read", "permission denied")
    assert not (tmp_path / "out").exists() and not (tmp_path / "dense").exists()


def test_weights_are_for_whom_the_config_is_for(quantized: Path) -> None:
    assert (quantized / "model.safetensors").stat().st_mode == (quantized / "config.json").stat().st_mode


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(directory: Path) -> None:
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def forget(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def renew(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (directory / "config.json").write_text(json.dumps(config))


def garble(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def changed(**values: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        for key, value in values.items():
            where = config if key in config else config["quantization_config"]
            assert where[key] != value
            where[key] = value
        (directory / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return change


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (truncate, "model.safetensors"),
        (flip, "corrupt"),
        (forget, "model.safetensors"),
        (renew, "format_version 99"),
        (garble, "config.json"),
        (changed(quantization_config=None), "are packed, which config.json does not say"),
        (changed(vocab_size=64), "disagree on 'model.embed_tokens"),
        (changed(num_hidden_layers=1), "has no place for"),
        (changed(experts=1), "config.json"),
        (changed(embedding_bits=16), "config.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_checkpoints_are_refused(damage: Callable[[Path], None], fragment: str, quantized: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(quantized, broken)
    damage(broken)
    assert_refused(run("generate", broken, "--prompt", "The river"), fragment)
    if damage is not flip:  # info reads no weights
        assert_refused(run("info", broken), fragment)
