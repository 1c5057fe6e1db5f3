"""Training data as an endless, deterministic stream of token windows.

Each source of the spec (syntax: `bimos.training.sources`) is one endless sequence of tokens: its documents in a shuffled
order, each (a long one in pieces) with BOS before it if the tokenizer uses one and EOS behind it, begun anew in another order when
all were seen.
Windows of exactly `sequence_length` tokens are cut from it without a gap. For window i of a mix, a seeded draw by weight
says which source gives its next one. So window i depends on the spec, the tokenizer, the seed and the length alone: not on
the process, nor on what was read before.

Tokens are made when first asked for and kept on disk (`bimos.training.tokencache`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bimos.errors import BimosError
from bimos.training.documents import FilePieces
from bimos.training.hubdata import HubPieces
from bimos.training.selfdata import SelfSamples
from bimos.training.sources import Source, parse_sources
from bimos.training.tokencache import Cursor, Producer, TokenCache, digest, random_generator

__all__ = ["Source", "TokenStream", "WindowDataset", "parse_sources"]

DRAWS = 4096  # windows whose sources are drawn at once


class TokenStream:
    """Windows of tokens by index, from 0 without end.

    Args:
        spec: what to read, see `bimos.training.sources`.
        tokenizer: the teacher's.
        sequence_length: tokens of a window.
        seed: of every order and draw.
        cache_dir: where tokens are kept; may be shared by any number of runs and processes.
        teacher: needed by the source `self` alone.

    Raises:
        BimosError: the spec is malformed or names what does not exist; later, when windows are read: files without
            text, a Hub that cannot be reached, a cache that cannot be written.
    """

    def __init__(
        self,
        spec: str,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        seed: int,
        cache_dir: str | Path,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        self.spec = spec
        self.sequence_length = sequence_length
        self.seed = seed
        self.sources = parse_sources(spec)
        self.cache_dir = Path(cache_dir).expanduser().absolute()
        vocabulary = 1 + max([*tokenizer.get_vocab().values(), tokenizer.eos_token_id or 0, tokenizer.bos_token_id or 0])
        producers = [self._producer(source, tokenizer, vocabulary, teacher) for source in self.sources]
        self._caches = [TokenCache(producer, self.cache_dir, vocabulary) for producer in producers]
        self._bounds = np.cumsum([source.weight for source in self.sources])
        self._bounds[-1] = 1.0
        self._before = [np.zeros(len(self.sources), np.int64)]  # windows of each source before each block of draws
        self._drawn: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def fingerprint(self) -> str:
        """The same for two streams only if they give the same windows: keep it with a run to be resumed."""
        return digest([[cache.fingerprint for cache in self._caches], self._bounds.tolist(), self.sequence_length, self.seed])

    def window(self, index: int) -> Tensor:
        """Window `index`: int64 `[sequence_length]`."""
        source, position = self._locate(index)
        start = position * self.sequence_length
        return torch.from_numpy(self._caches[source].read(start, start + self.sequence_length).astype(np.int64))

    def batch(self, start: int, count: int) -> Tensor:
        """Windows `start` to `start + count - 1`: int64 `[count, sequence_length]`."""
        return torch.stack([self.window(index) for index in range(start, start + count)])

    def as_dataset(self, start: int, length: int) -> WindowDataset:
        """Windows `start` to `start + length - 1` for a DataLoader or a Trainer."""
        return WindowDataset(self, start, length)

    def prepare(self, windows: int, report: Callable[[int, int], None] | None = None) -> None:
        """Make the first `windows` windows now. `report(done, total)` gets token counts, after every chunk."""
        wanted = self._counts(windows) * self.sequence_length
        done = np.zeros_like(wanted)
        for source, cache in enumerate(self._caches):

            def made(valid: int, source: int = source) -> None:
                done[source] = min(valid, wanted[source])
                if report is not None:
                    report(int(done.sum()), int(wanted.sum()))

            cache.extend(int(wanted[source]), made)
            done[source] = wanted[source]
        if report is not None:
            report(int(wanted.sum()), int(wanted.sum()))

    def rounds(self, windows: int) -> dict[str, float]:
        """About how often the first `windows` windows, once made, repeat each source, by its name; 0 where it is longer than they are."""
        wanted = self._counts(windows) * self.sequence_length
        lengths = [cache.round_length() for cache in self._caches]
        found = dict.fromkeys((source.name for source in self.sources), 0.0)
        for source, count, length in zip(self.sources, wanted, lengths, strict=True):
            found[source.name] += int(count) / length  # one given twice is read twice
        return found

    def _producer(self, source: Source, tokenizer: PreTrainedTokenizerBase, vocabulary: int, teacher: PreTrainedModel | None) -> Producer:
        if source.kind == "files":
            return DocumentTokens(FilePieces(source, tokenizer, self.seed, self.cache_dir), tokenizer, self.seed)
        if source.kind == "hub":
            return DocumentTokens(HubPieces(source, tokenizer, self.seed), tokenizer, self.seed)
        if teacher is None:
            raise BimosError("data 'self' is sampled from the teacher, and none is loaded; name a file or a Hub data set")
        return SelfSamples(teacher, tokenizer, self.sequence_length, self.seed, vocabulary)

    def _locate(self, index: int) -> tuple[int, int]:
        """The source of a window and the window's number within it."""
        if index < 0:
            raise IndexError(f"window {index}: windows count from 0")
        block, offset = divmod(index, DRAWS)
        source = int(self._draws(block)[offset])
        return source, int(self._counts(index)[source])

    def _counts(self, windows: int) -> np.ndarray:
        """How many of the first `windows` windows each source gives: int64 `[sources]`."""
        block, offset = divmod(windows, DRAWS)
        while len(self._before) <= block:
            self._before.append(self._before[-1] + np.bincount(self._draws(len(self._before) - 1), minlength=len(self.sources)))
        return self._before[block] + np.bincount(self._draws(block)[:offset], minlength=len(self.sources))

    def _draws(self, block: int) -> np.ndarray:
        """The sources of windows `DRAWS * block` and on: int64 `[DRAWS]`."""
        if self._drawn[0] != block:
            self._drawn = block, np.searchsorted(self._bounds, random_generator(self.seed, "mix", block).random(DRAWS), side="right")
        return self._drawn[1]


class WindowDataset(Dataset[dict[str, Tensor]]):
    """A stretch of a TokenStream as a map-style data set of `{"input_ids": int64 [sequence_length]}`."""

    def __init__(self, stream: TokenStream, start: int, length: int) -> None:
        self.stream = stream
        self.start = start
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"window {index} of {self.length}")
        return {"input_ids": self.stream.window(self.start + index)}


class Pieces(Protocol):
    """Pieces of text in an endless order."""

    source: Source
    identity: dict[str, Any]

    def texts(self, cursor: Cursor) -> tuple[list[str], Cursor]: ...


class DocumentTokens:
    """The token producer of text: each piece between BOS (where the tokenizer uses one) and EOS."""

    def __init__(self, pieces: Pieces, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.pieces = pieces
        self.tokenizer = tokenizer
        self.eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.bos = bos if bos is not None and tokenizer("a").input_ids[:1] == [bos] else None
        self.identity = pieces.identity | {"tokenizer": tokenizer_digest(tokenizer), "seed": seed}

    def produce(self, cursor: Cursor) -> tuple[Sequence[int], Cursor]:
        texts, cursor = self.pieces.texts(cursor)
        # Fast tokenizers spread a list over the cores; `verbose` would warn of texts longer than the model's context.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        tokens: list[int] = []
        for ids in encoded:
            if self.bos is not None and ids[:1] != [self.bos]:  # a chat template may have written it
                tokens.append(self.bos)
            tokens.extend(ids)
            if self.eos is not None and self.eos not in ids[-2:]:  # as may be EOS, with a line's end behind
                tokens.append(self.eos)
        if not tokens:
            name = self.pieces.source.name
            raise BimosError(f"the tokenizer makes no tokens of data '{name}'; do the text and the model belong together?")
        return tokens, cursor


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Stands for everything that decides how a text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = [type(tokenizer).__name__, tokenizer.get_vocab()]
    else:  # the last call's truncation and padding are state, not rules
        rules = {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}
    return digest([rules, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer("a").input_ids])
