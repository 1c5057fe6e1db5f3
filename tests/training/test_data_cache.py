"""The token cache: a process killed at any point of an extension leaves a cache that goes on where it was."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bimos.errors import BimosError
from bimos.training.tokencache import TokenCache

CHUNK = 1000


class Counter:
    """Produces the squares modulo 50,000, a chunk at a time; its cursor is the number of chunks made."""

    def __init__(self, pause: float = 0.0) -> None:
        self.identity = {"source": "squares"}
        self.pause = pause
        self.chunks = 0

    def produce(self, cursor: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        time.sleep(self.pause)
        self.chunks += 1
        chunk = cursor.get("chunk", 0)
        return squares((chunk + 1) * CHUNK)[chunk * CHUNK :], {"chunk": chunk + 1}


def squares(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64) ** 2 % 50_000


def cache_in(directory: Path, pause: float = 0.0) -> tuple[TokenCache, Counter]:
    producer = Counter(pause)
    return TokenCache(producer, directory, 50_000), producer


def in_child(work: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_tokens_are_made_once_and_only_as_far_as_asked(tmp_path: Path) -> None:
    cache, producer = cache_in(tmp_path)
    assert producer.chunks == 0 and np.array_equal(cache.read(1500, 2500), squares(2500)[1500:])
    assert producer.chunks == 3 and np.array_equal(cache.read(0, 3000), squares(3000)) and producer.chunks == 3
    again, producer = cache_in(tmp_path)
    assert np.array_equal(again.read(0, 4000), squares(4000)) and producer.chunks == 1
    assert (cache.directory / "tokens.bin").stat().st_size == 2 * 4000


def test_killed_while_extending(tmp_path: Path) -> None:
    """SIGKILL from outside, wherever the child is, five times over."""
    rng = random.Random(0)
    cache, _ = cache_in(tmp_path)
    tokens = cache.directory / "tokens.bin"
    for _ in range(5):
        before = tokens.stat().st_size if tokens.exists() else 0
        child = in_child(lambda: cache_in(tmp_path, pause=0.001)[0].extend(10**9))
        deadline = time.monotonic() + 30
        while (not tokens.exists() or tokens.stat().st_size < before + 4 * CHUNK) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.01)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        valid = json.loads((cache.directory / "progress.json").read_text())["tokens"]
        assert valid >= before // 2
        assert np.array_equal(cache_in(tmp_path)[0].read(0, valid), squares(valid))
    reader, producer = cache_in(tmp_path)
    assert np.array_equal(reader.read(0, valid + 5 * CHUNK), squares(valid + 5 * CHUNK)) and producer.chunks == 5


@pytest.mark.parametrize("call", [1, 3])
def test_killed_between_tokens_and_progress(call: int, tmp_path: Path) -> None:
    """The worst moment: a chunk is on disk, and nothing says so."""

    def work() -> None:
        calls = 0

        def replace(source: str, target: str) -> None:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        real, os.replace = os.replace, replace
        cache_in(tmp_path)[0].extend(10 * CHUNK)

    child = in_child(work)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    cache, producer = cache_in(tmp_path)
    assert (cache.directory / "tokens.bin").stat().st_size == 2 * CHUNK * call
    assert np.array_equal(cache.read(0, 6 * CHUNK), squares(6 * CHUNK)) and producer.chunks == 6 - (call - 1)
    assert not list(cache.directory.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["truncated tokens", "no tokens", "progress no JSON", "progress without keys", "bytes behind"])
def test_a_damaged_cache_is_made_anew(damage: str, tmp_path: Path) -> None:
    cache, _ = cache_in(tmp_path)
    cache.extend(3 * CHUNK)
    tokens, progress = cache.directory / "tokens.bin", cache.directory / "progress.json"
    if damage == "truncated tokens":
        os.truncate(tokens, 2 * CHUNK)
    elif damage == "no tokens":
        tokens.unlink()
    elif damage == "progress no JSON":
        progress.write_text('{"tokens": 30')
    elif damage == "progress without keys":
        progress.write_text("{}")
    else:
        tokens.write_bytes(tokens.read_bytes() + b"\xff" * 777)
    assert np.array_equal(cache_in(tmp_path)[0].read(0, 5 * CHUNK), squares(5 * CHUNK))


def test_processes_extend_one_cache_together(tmp_path: Path) -> None:
    children = [in_child(lambda: [cache_in(tmp_path, pause=0.002)[0].extend(count * CHUNK) for count in range(1, 20)]) for _ in range(3)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    cache, producer = cache_in(tmp_path)
    assert np.array_equal(cache.read(0, 19 * CHUNK), squares(19 * CHUNK)) and producer.chunks == 0


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _ = cache_in(tmp_path)
    cache.extend(2 * CHUNK)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BimosError, match=r"^cannot write the data cache '.*': No space left on device; make room[^\n]*$"):
            cache.extend(4 * CHUNK)
    assert np.array_equal(cache.read(0, 2 * CHUNK), squares(2 * CHUNK))
    assert np.array_equal(cache.read(0, 4 * CHUNK), squares(4 * CHUNK))


def test_a_cache_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BimosError, match="cannot write the data cache"):
        cache_in(tmp_path / "file")[0].extend(1)


def test_progress_is_reported(tmp_path: Path) -> None:
    calls: list[int] = []
    cache_in(tmp_path)[0].extend(2500, calls.append)
    assert calls == [1000, 2000, 3000]
