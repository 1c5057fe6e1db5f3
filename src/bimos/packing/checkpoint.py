"""Saving packed models so that nothing on disk is ever half-written or lost.

A directory is written aside (`.NAME.saving`, beside it), flushed to the disk and renamed into place; one that is
replaced is swapped in a single step where the system can (Linux), so that a kill at any moment leaves the old
checkpoint or the new one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from bimos.errors import BimosError
from bimos.packing.hf import BimosConfig

_CHECKPOINT_SUFFIXES = {".safetensors", ".json", ".bin", ".model", ".jinja"}
_CHECKPOINT_NAMES = {"README.md", "merges.txt", "vocab.txt", "report.html"}  # what transformers and bimos write besides
_CHECKPOINT_FOLDERS = {"additional_chat_templates"}
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_output(directory: str | Path, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> Path:
    """The directory to write, if it may be written. Call it before work starts whose result goes there.

    Args:
        inputs: what the work reads; names that are no paths are no matter.

    Raises:
        BimosError: it is a file, it holds something and `overwrite` is false, it holds an input, or it cannot be replaced.
    """
    path = Path(directory).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise BimosError(f"output '{directory}' is a file; name a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise BimosError(f"output directory '{directory}' is not empty; use another or --overwrite")
    for entry in inputs:
        known = Path(entry).expanduser()
        if known.exists() and path in (known.resolve(), *known.resolve().parents):
            raise BimosError(f"output '{directory}' holds '{entry}', which is read, and would replace it; name another directory")
    if os.path.ismount(path):
        raise BimosError(
            f"output directory '{directory}' is a mount point, which cannot be replaced in one step; name a directory inside it"
        )
    return path


@contextmanager
def written_aside(directory: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A fresh directory to write to, which takes the place of `directory` when the block ends without an error.

    Of a directory that is replaced, entries that are no part of a checkpoint (a log, a folder) move to the new one.

    Raises:
        BimosError: see `check_output`; or no space, or no permission. What was there before is untouched.
    """
    recover(Path(directory).expanduser().resolve())
    path = check_output(directory, overwrite)
    aside = path.parent / f".{path.name}.saving"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _discard(aside, path)  # left by a save that was killed
        aside.mkdir()
        yield aside
        for file in aside.rglob("*.safetensors"):  # which its library writes for the owner alone
            file.chmod(aside.stat().st_mode & 0o666)
        _flush(aside)
        _put_in_place(aside, path)
    except BaseException as error:
        with suppress(OSError):
            _discard(aside, path)
        if isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.errno is not None):
            raise _explain(directory, error) from error
        raise


def save_packed(
    model: PreTrainedModel,
    tokenizer: Any,
    directory: str | Path,
    *,
    overwrite: bool = False,
    card: dict[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Save a packed model as a transformers directory: weights, configs, tokenizer and a model card.

    Args:
        model: as `pack_model` or `from_pretrained` gives it.
        tokenizer: None leaves tokenizer files out.
        directory: written as a whole or not at all.
        overwrite: replace a directory that is not empty.
        card: facts for the model card (see `bimos.packing.card`), added to those that the model already carries.
        max_shard_size: of one safetensors file.

    Raises:
        BimosError: the model is not packed, or `directory` cannot be written.
    """
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, BimosConfig):
        raise BimosError(f"{type(model).__name__} is not a packed model; pack it first")
    config.card = {**config.card, **(card or {})}
    with written_aside(directory, overwrite) as aside:
        model.save_pretrained(aside, max_shard_size=max_shard_size)  # with a card
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
    return Path(directory)


def _flush(directory: Path) -> None:
    """Everything below `directory` is on the disk when this returns."""
    for root, _, files in os.walk(directory):
        for name in [*files, "."]:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _put_in_place(aside: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        os.rename(aside, path)  # an empty directory is replaced too
    elif _exchange(aside, path):
        _discard(aside, path)
    else:
        # Two steps: a kill between them leaves the old checkpoint complete under this name, until `recover`.
        old = _replaced(path)
        os.rename(path, old)
        os.rename(aside, path)
        _discard(old, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def recover(path: Path) -> None:
    """Finish what a kill left undone where a checkpoint is replaced in two steps: the old one is in its place again, or gone."""
    old = _replaced(path)
    if old.is_dir():
        if path.exists() and any(path.iterdir()):
            _discard(old, path)
        else:
            os.rename(old, path)  # an empty directory is replaced too


def _replaced(path: Path) -> Path:
    return path.parent / f".{path.name}.replaced"


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    return renameat2 is not None and renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0


def _discard(directory: Path, heir: Path) -> None:
    """Delete a checkpoint directory; what in it is no part of a checkpoint moves to `heir`, if that exists."""
    if not directory.exists():
        return
    if heir.is_dir():
        for entry in directory.iterdir():
            known = entry.name in (_CHECKPOINT_FOLDERS if entry.is_dir() else _CHECKPOINT_NAMES) or (
                entry.is_file() and entry.suffix in _CHECKPOINT_SUFFIXES
            )
            if not known and not (heir / entry.name).exists():
                os.rename(entry, heir / entry.name)
    shutil.rmtree(directory)


def _explain(directory: str | Path, error: Exception) -> BimosError:
    number = getattr(error, "errno", None)
    text = os.strerror(number) if number is not None else " ".join(str(error).split())
    if number in _FULL_DISK or any(f"os error {code}" in text or os.strerror(code) in text for code in _FULL_DISK):
        return BimosError(f"no space left on the disk while saving '{directory}'; free some and save again (nothing there was changed)")
    return BimosError(f"cannot save '{directory}': {text}; nothing there was changed")
