"""The teacher's side of distillation: its hidden states live, or its largest logits from a cache on disk."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bimos.errors import BimosError
from bimos.training.losses import chunk_rows


def hidden_states(model: nn.Module, input_ids: Tensor, every: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Last hidden state behind the final norm `[B, T, d]`, and with `every` the states behind each block (`hidden_states[1:]`)."""
    output = model.base_model(input_ids=input_ids, use_cache=False, output_hidden_states=every)  # type: ignore[operator]
    return output.last_hidden_state, tuple(output.hidden_states[1:]) if every else ()


def logit_head(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """From last hidden states `[n, d]` to logits `[n, V]`, with what the architecture does to them (Gemma 2, Cohere, Granite)."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()  # type: ignore[operator, union-attr]
    cap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)

    def logits(hidden: Tensor) -> Tensor:
        values = head(hidden.to(head.weight.dtype))
        if factor != 1:
            values = values * factor
        return cap * torch.tanh(values / cap) if cap else values

    return logits


@dataclasses.dataclass
class TopKCache:
    """The teacher's `k` largest log-probabilities per token, float16, and their indices, uint16 or uint32, by window.

    Two memory-mapped files and a bitmap of the windows that are filled; a window is marked only after its values are written, so a
    killed run leaves nothing half-filled that counts.
    """

    directory: Path
    windows: int
    length: int
    k: int
    vocabulary: int

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        facts = {"windows": self.windows, "length": self.length, "k": self.k, "vocabulary": self.vocabulary}
        about = self.directory / "cache.json"
        if _read(about) not in (None, facts):
            raise BimosError(f"the logit cache in '{self.directory}' was made for another run; delete it")
        index_dtype = np.dtype(np.uint16 if self.vocabulary <= 65_536 else np.uint32)
        shape = (self.windows, self.length, self.k)
        needed = self.windows * self.length * self.k * (2 + index_dtype.itemsize)
        disk = os.statvfs(self.directory)
        available = disk.f_bavail * disk.f_frsize + sum(512 * file.stat().st_blocks for file in self.directory.glob("*.bin"))
        if _read(about) is None and needed > available:
            raise BimosError(
                f"the logit cache needs {needed / 2**30:.1f} GiB in '{self.directory}', which has less; "
                "lower distill.top_k or distill.distinct_tokens, or use distill.teacher=live"
            )
        self._value = self._open("values.bin", np.dtype(np.float16), shape)
        self._index = self._open("indices.bin", index_dtype, shape)
        self._filled = self._open("filled.bin", np.dtype(np.uint8), (self.windows,))
        if _read(about) is None:  # last, and in one step: a cache that says what it is has all its files
            aside = about.with_suffix(".partial")
            aside.write_text(json.dumps(facts))
            aside.replace(about)

    def _open(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
        path, size = self.directory / name, math.prod(shape) * dtype.itemsize
        if hasattr(os, "posix_fallocate"):  # now, and with an error: a page that finds no room later ends the process by a signal
            is_new = not path.exists()
            path.touch()
            try:
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if is_new:
                    path.unlink()  # with what room it got
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot
                    raise OSError(error.errno, error.strerror, str(path)) from None
        return np.memmap(path, dtype, "r+" if path.exists() else "w+", shape=shape)

    def close(self) -> None:
        """The files are on disk; the cache is not used any more."""
        for file in (self._value, self._index, self._filled):
            file.flush()

    def get(self, window: int) -> tuple[Tensor, Tensor] | None:
        """Log-probabilities and indices `[T, k]` of a window, or None if it was never put."""
        if not self._filled[window]:
            return None
        return torch.from_numpy(self._value[window].astype(np.float32)), torch.from_numpy(self._index[window].astype(np.int64))

    def put(self, window: int, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Fill a window from the teacher's last hidden states `[T, d]`; returns what `get` will."""
        tops, indices = [], []
        for rows in hidden.split(chunk_rows(self.vocabulary)):
            with torch.no_grad():
                top = torch.log_softmax(head(rows).float(), dim=-1).topk(self.k, dim=-1)
            tops.append(top.values)
            indices.append(top.indices)
        value, index = torch.cat(tops), torch.cat(indices)
        self._value[window] = value.clamp_min(-60_000).to(torch.float16).cpu().numpy()
        self._index[window] = index.cpu().numpy()
        self._value.flush()
        self._index.flush()
        self._filled[window] = 1
        found = self.get(window)
        assert found is not None
        return found


def discard_other(directory: Path, wanted: dict[str, int] | None) -> None:
    """Delete the cache in `directory`, if there is one, unless it is as wanted (None: no cache is)."""
    if directory.exists() and (wanted is None or _read(directory / "cache.json") != wanted):
        shutil.rmtree(directory)


def _read(path: Path) -> object:
    """What a JSON file holds; None if there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
