"""Pieces of text streamed from a data set on the Hub.

A stream has no random access, so it is shuffled within blocks of consecutive rows. The state of the stream at the end
of each block is in the cursor, which lets a later process continue without reading again what came before; so is the
data set's revision, so that a data set that changes on the Hub does not change what a cache began with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from bimos.errors import BimosError
from bimos.training.documents import cut, join_lines, row_text
from bimos.training.sources import Source
from bimos.training.tokencache import Cursor, digest, random_generator

BLOCK_ROWS, BLOCK_CHARACTERS = 1024, 2**22  # a block ends with the row that reaches either


class HubPieces:
    """The pieces of a Hub data set (split `train`) in an endless order: epochs repeat the stream, shuffled anew.

    Args:
        source: of kind `hub`.
        tokenizer: its chat template renders `messages`.
        seed: of the shuffling.
    """

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.seed = seed
        self.identity = {"source": source.name, "config": source.config, "template": digest(tokenizer.chat_template)}
        self._stream: Any = None
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._at: Cursor | None = None  # the cursor at which `_rows` stands

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stream": None, "_rows": None, "_at": None}  # a worker process opens its own stream

    def texts(self, cursor: Cursor) -> tuple[list[str], Cursor]:
        """The shuffled pieces of the block at `cursor`, or of the next one that holds text."""
        start: Cursor = {"epoch": 0, "block": 0, "state": None, "any_text": False}
        cursor = start | cursor
        with hub_errors(self.source.name):
            if "revision" not in cursor:
                cursor["revision"] = _revision(self.source.name)
            while True:
                if cursor != self._at:
                    self._open(cursor)
                rows, ended = self._block()
                pieces = [piece for text in join_lines(rows) for piece in cut(text)]
                keys = random_generator(self.seed, "block", cursor["epoch"], cursor["block"]).random(len(pieces))
                cursor = cursor | {"block": cursor["block"] + 1, "state": self._stream.state_dict()}
                cursor["any_text"] |= bool(pieces)
                if ended:
                    cursor |= {"epoch": cursor["epoch"] + 1, "block": 0, "state": None}
                    if not cursor["any_text"]:
                        raise BimosError(f"Hub data set '{self.source.name}' holds no text in its split 'train'")
                self._at = None if ended else cursor
                if pieces:
                    return [pieces[index] for index in np.argsort(keys, kind="stable")], cursor

    def _open(self, cursor: Cursor) -> None:
        import datasets  # takes a second, which local files need not wait for

        name, config = self.source.name, self.source.config
        self._stream = datasets.load_dataset(name, config, revision=cursor["revision"], split="train", streaming=True)
        if cursor["state"] is not None:
            self._stream.load_state_dict(cursor["state"])
        self._rows = iter(self._stream)

    def _block(self) -> tuple[list[str], bool]:
        """The texts of the next rows, and whether the stream ended with them."""
        texts: list[str] = []
        size = 0
        for number, row in enumerate(self._rows, 1):
            text = row_text(row, self.tokenizer, f"Hub data set '{self.source.name}'")
            if text is not None:
                texts.append(text)
                size += len(text)
            if number == BLOCK_ROWS or size >= BLOCK_CHARACTERS:
                return texts, False
        return texts, True


def _revision(name: str) -> str | None:
    """The commit that the data set stands at. Fails within seconds where there is no network, unlike `load_dataset`."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name, timeout=20).sha


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns whatever a Hub data set fails with into a BimosError.

    `datasets` raises its own errors, huggingface_hub's, and those of several HTTP and file libraries, so types say little.
    """
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except BimosError:
        raise
    except GatedRepoError:
        raise BimosError(f"Hub data set '{name}' is gated: accept its terms on the Hub and log in with `hf auth login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise BimosError(f"data '{name}' is neither a file or folder here nor on the Hub (private there? `hf auth login`)") from None
    except ValueError as error:  # a config or split that does not exist: datasets names those that do
        raise BimosError(f"Hub data set '{name}': {_line(error)}; write its config as {name}:CONFIG") from None
    except Exception as error:
        raise BimosError(f"cannot reach the Hub for data '{name}' ({_line(error)}); give a local file or folder") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
