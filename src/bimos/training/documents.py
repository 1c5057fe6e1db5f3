"""From files to shuffled pieces of text.

A document is a row of a JSON-lines or parquet file, or a whole text file. Documents are cut into pieces of at most 20,000
characters before they are shuffled, so that a few long books mix as well as many short pages. The pieces of all files of a
source are written once, untokenised, to an Arrow file in the cache, which is mapped into memory: then any order
of them can be read at little cost in memory, and only what a run asks for is ever tokenised.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from bimos.datafolder import whole_characters
from bimos.errors import BimosError
from bimos.training.sources import JSON_SUFFIXES, PARQUET_SUFFIXES, Source, is_of
from bimos.training.tokencache import Cursor, digest, disk_errors, locked, random_generator, replacing

PIECE_CHARACTERS = 20_000
READ_CHARACTERS = 2**18  # of text handed to the tokenizer at once
LINEWISE_ROWS, LINEWISE_BLANK = 200, 20  # rows are lines where so many of the first so many are blank

_PIECES = pa.schema([("text", pa.large_string())])


class FilePieces:
    """The pieces of a source's files in an endless order: every epoch is another permutation.

    Args:
        source: of kind `files`.
        tokenizer: its chat template renders `messages`.
        seed: of the order.
        cache_dir: where the Arrow file goes.
    """

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerBase, seed: int, cache_dir: Path) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.seed = seed
        with file_errors(source.name):
            stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
        self.identity = {"source": source.name, "files": digest(stats), "template": digest(tokenizer.chat_template)}
        self.directory = cache_dir / f"text-{digest([self.identity['files'], self.identity['template'], PIECE_CHARACTERS])}"
        self._order: tuple[int, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_pieces"}  # a worker process maps the file itself

    def texts(self, cursor: Cursor) -> tuple[list[str], Cursor]:
        """The pieces at `cursor`, about READ_CHARACTERS of them and never beyond the epoch's end."""
        epoch, position = cursor.get("epoch", 0), cursor.get("piece", 0)
        if self._order is None or self._order[0] != epoch:
            keys = random_generator(self.seed, "pieces", epoch).random(len(self._pieces))
            self._order = epoch, np.argsort(keys, kind="stable")
        texts: list[str] = []
        size = 0
        for index in self._order[1][position:]:
            texts.append(self._pieces[int(index)].as_py())
            size += len(texts[-1])
            if size >= READ_CHARACTERS:
                break
        position += len(texts)
        return texts, {"epoch": epoch, "piece": position} if position < len(self._pieces) else {"epoch": epoch + 1, "piece": 0}

    @cached_property
    def _pieces(self) -> pa.ChunkedArray:
        path = self.directory / "pieces.arrow"
        if not path.exists():
            with locked(self.directory):
                if not path.exists():
                    self._write(path)
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all().column("text")

    def _write(self, path: Path) -> None:
        pieces = (piece for file in self.source.files for text in _file_texts(file, self.tokenizer) for piece in cut(text))
        batch = list(itertools.islice(pieces, 1024))
        if not batch:
            raise BimosError(f"data '{self.source.name}' holds no text, only blanks; name files with text in them")
        with (
            disk_errors(self.directory),
            replacing(path) as aside,
            pa.OSFile(str(aside), "wb") as sink,
            pa.ipc.new_file(sink, _PIECES) as writer,
        ):
            while batch:
                writer.write_batch(pa.record_batch([batch], schema=_PIECES))
                batch = list(itertools.islice(pieces, 1024))


def join_lines(texts: Iterable[str]) -> Iterator[str]:
    """Documents as they are; but lines, as in WikiText's rows, joined to running text.

    Blank rows give it away: only a text that is stored line by line has many.
    """
    rows = iter(texts)
    head = list(itertools.islice(rows, LINEWISE_ROWS))
    rows = itertools.chain(head, rows)
    if sum(not row.strip() for row in head) < LINEWISE_BLANK:
        yield from rows
        return
    lines: list[str] = []
    size = 0
    for row in rows:
        if size + len(row) > PIECE_CHARACTERS:
            yield "".join(lines)
            lines, size = [], 0
        lines.append(row if row.endswith("\n") else row + "\n")
        size += len(lines[-1])
    yield "".join(lines)


def cut(text: str) -> Iterator[str]:
    """Pieces of at most PIECE_CHARACTERS, cut at a line's end or a space if one is near. Nothing for blank text."""
    start = 0
    while start < len(text):
        stop = start + PIECE_CHARACTERS
        if stop < len(text):
            near = stop - PIECE_CHARACTERS // 10
            for separator in ("\n", " "):
                found = text.rfind(separator, near, stop)
                if found >= 0:
                    stop = found + 1
                    break
        piece = text[start:stop]
        if piece.strip():
            yield piece
        start = stop


def row_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> str | None:
    """The text of one row: its field `text`, or its chat `messages` through the tokenizer's template. None: they are null.

    Raises:
        BimosError: neither field, wrong types, or the template is missing or refuses the messages.
    """
    text, messages = row.get("text"), row.get("messages")
    if isinstance(text, str):
        return whole_characters(text)
    if text is not None:
        raise BimosError(f"{where}: field 'text' holds {type(text).__name__}, not a string")
    if not messages and ("text" in row or "messages" in row):
        return None
    if messages is None:
        raise BimosError(f"{where} has neither a field 'text' nor 'messages'; its fields: {', '.join(map(str, row)) or 'none'}")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise BimosError(f"{where}: 'messages' must be a list of {{role, content}}, both strings")
    if tokenizer.chat_template is None:
        raise BimosError(f"{where} holds chat messages, but the model's tokenizer has no chat template; give data with a field 'text'")
    try:
        return whole_characters(str(tokenizer.apply_chat_template(messages, tokenize=False)))
    except Exception as error:  # templates raise what they like: jinja2's errors, KeyError, TypeError
        raise BimosError(f"{where}: the tokenizer's chat template refuses the messages: {' '.join(str(error).split())}") from None


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def _file_texts(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    with file_errors(str(path)):
        if is_of(path, PARQUET_SUFFIXES):
            yield from join_lines(_parquet_texts(path, tokenizer))
        else:
            with _open(path) as file:
                yield from join_lines(_json_texts(file, path, tokenizer)) if is_of(path, JSON_SUFFIXES) else _chunks(file)


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8-sig") if is_of(path, (".gz",)) else open(path, encoding="utf-8-sig")


def _chunks(file: IO[str]) -> Iterator[str]:
    """A text file a megabyte at a time, in whole lines where they are not too long."""
    while chunk := file.read(2**20):
        yield chunk + file.readline(PIECE_CHARACTERS)


def _json_texts(file: IO[str], path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BimosError(f"'{path}' line {number} is not JSON: {error.msg}; give one JSON object a line") from None
        except RecursionError:
            raise BimosError(f"'{path}' line {number} is nested too deep; give an object with a field 'text' or 'messages'") from None
        if not isinstance(row, dict):
            raise BimosError(f"'{path}' line {number} is not a JSON object; give one object with a field 'text' or 'messages' a line")
        if (text := row_text(row, tokenizer, f"'{path}' line {number}")) is not None:
            yield text


def _parquet_texts(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        column = next((name for name in ("text", "messages") if name in columns), None)
        if column is None:
            raise BimosError(f"'{path}' has neither a column 'text' nor 'messages'; its columns: {', '.join(columns)}")
        rows = (row for batch in file.iter_batches(batch_size=256, columns=[column]) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            if (text := row_text(row, tokenizer, f"'{path}' row {number}")) is not None:
                yield text


@contextlib.contextmanager
def file_errors(name: str) -> Iterator[None]:
    """Turns what readers raise on missing, damaged or foreign files into a BimosError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise BimosError(f"data file '{name}' is not UTF-8 text (byte {error.start}); convert it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise BimosError(f"data file '{name}' is not a complete gzip file; fetch it again") from None
    except pa.ArrowException:
        raise BimosError(f"data file '{name}' is not a complete parquet file; fetch it again") from None
    except OSError as error:
        raise BimosError(f"cannot read data file '{name}': {error.strerror or error}") from None
