"""An endless, deterministic sequence of tokens that is made on demand and kept on disk.

A producer makes tokens in order, a chunk at a time, and says with a cursor where it stands. The cache appends chunks to
`tokens.bin` (uint16, or uint32 for vocabularies above 65536) and then replaces `progress.json`, which holds the number of
valid tokens and the cursor, by renaming. A process killed in between leaves bytes behind the valid ones, which
the next extension overwrites. Because the producer is deterministic it does not matter who extends, when, or how far.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock

from bimos.errors import BimosError

CACHE_VERSION = 1  # of the files' layout and of every rule that decides which tokens come when

Cursor = dict[str, Any]


class Producer(Protocol):
    """Makes one endless sequence of tokens."""

    identity: dict[str, Any]  # JSON: everything that determines the tokens

    def produce(self, cursor: Cursor) -> tuple[Sequence[int] | np.ndarray, Cursor]:
        """The tokens at `cursor` ({}: the first), at least one, and the cursor behind them (JSON)."""
        ...


def digest(value: Any) -> str:
    """20 hex digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def random_generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """A generator that depends on its arguments alone, so that any part of a random order can be made by itself."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed % 2**64, int.from_bytes(purpose.encode()), *key])))


class TokenCache:
    """The tokens of one producer, on disk. Safe to share between processes.

    Args:
        producer: makes the tokens.
        cache_dir: holds the caches of all producers, each in a directory named by its identity.
        vocabulary: larger than any token.
    """

    def __init__(self, producer: Producer, cache_dir: Path, vocabulary: int) -> None:
        self.producer = producer
        self.fingerprint = digest([CACHE_VERSION, vocabulary > 2**16, producer.identity])
        self.directory = cache_dir / f"tokens-{self.fingerprint}"
        self.dtype = np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
        self._tokens = np.empty(0, self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokens": np.empty(0, self.dtype)}  # a worker process maps the file itself

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start:stop`, made first where they do not exist yet. A view of the file: copy before writing."""
        self.extend(stop)
        return self._tokens[start:stop]

    def extend(self, count: int, report: Callable[[int], None] | None = None) -> None:
        """Make sure that the first `count` tokens exist. `report` gets their number after every chunk.

        Raises:
            BimosError: the producer cannot read its source, or the cache cannot be written.
        """
        if count <= len(self._tokens):
            return
        valid, cursor = self._progress()
        if valid < count:
            with locked(self.directory):
                valid, cursor = self._progress()  # another process may have been faster
                while valid < count:
                    tokens, cursor = self.producer.produce(cursor)
                    valid = self._append(valid, np.asarray(tokens, self.dtype), cursor)
                    if report is not None:
                        report(valid)
        self._tokens = np.memmap(self.directory / "tokens.bin", self.dtype, mode="r", shape=(valid,))

    def round_length(self) -> float:
        """About how many tokens the source holds; infinite where it was not read to its end, or has none."""
        valid, cursor = self._progress()
        rounds = cursor.get("epoch", 0)
        return valid / rounds if rounds else math.inf

    def _progress(self) -> tuple[int, Cursor]:
        try:
            progress = json.loads((self.directory / "progress.json").read_bytes())
            valid, cursor = int(progress["tokens"]), dict(progress["cursor"])
            if (self.directory / "tokens.bin").stat().st_size >= valid * self.dtype.itemsize:
                return valid, cursor
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            pass
        return 0, {}  # nothing there, or damaged by other hands: start over

    def _append(self, valid: int, tokens: np.ndarray, cursor: Cursor) -> int:
        path = self.directory / "tokens.bin"
        with disk_errors(self.directory):
            with open(path, "r+b" if path.exists() else "w+b") as file:
                file.seek(valid * self.dtype.itemsize)
                file.write(tokens.tobytes())
                file.flush()
                os.fsync(file.fileno())
            valid += len(tokens)
            progress = {"tokens": valid, "cursor": cursor, "identity": self.producer.identity}
            with replacing(self.directory / "progress.json") as aside:
                aside.write_text(json.dumps(progress), encoding="utf-8")
        return valid


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """The directory, made where needed, for this process alone. The lock goes with the process that holds it."""
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / "lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the name `path` once it is complete and on disk. Hold the lock."""
    aside = path.with_name(path.name + ".tmp")
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """A file or folder is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turns a full disk or a directory that cannot be written into a BimosError."""
    try:
        yield
    except OSError as error:
        raise BimosError(f"cannot write the data cache '{directory}': {error.strerror or error}; make room or choose another") from None
