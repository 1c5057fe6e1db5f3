"""The texts that perplexity is measured on: named benchmarks, from a local folder or the Hub, and any local file.

The local folder is `$BIMOS_DATA`, or `../shared/data` beside the repository's checkout when that exists. It wins over
the Hub, so that a machine without network can evaluate.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bimos.datafolder import data_directory, whole_characters
from bimos.errors import BimosError

C4_DOCUMENTS = 1_100
C4_TOKENS = 256 * 2048


@dataclasses.dataclass(frozen=True)
class EvaluationText:
    """A text to evaluate on.

    Attributes:
        name: key of the result, as in `perplexity.<name>`.
        label: what readers call it; two texts with one label give comparable numbers.
        text: all of it, unprocessed.
        max_tokens: only that many tokens count, by the benchmark's own convention. None: all.
    """

    name: str
    label: str
    text: str
    max_tokens: int | None = None

    @property
    def digest(self) -> str:
        """Of what is measured: two texts of one name are told apart by it."""
        return hashlib.sha256(f"{self.max_tokens}\n{self.text}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


def load_text(name: str) -> EvaluationText:
    """The evaluation text `name`: one of `available_texts()`, or a path to a .txt, .md, .jsonl(.gz) or .parquet file.

    Raises:
        BimosError: unknown name, no such file, a file without text, or a benchmark that is neither local nor reachable.
    """
    if name in _BENCHMARKS:
        return _BENCHMARKS[name]()
    if is_file(name):
        path = Path(name).expanduser()
        return EvaluationText(path.name, path.name, _require_text("\n\n".join(read_documents(path)), name))
    known = f"{', '.join(available_texts())}, or a path to a .txt, .jsonl or .parquet file"
    if Path(name).suffix or "/" in name:
        raise BimosError(f"evaluation text '{name}' is not a file; known: {known}")
    raise BimosError(f"unknown evaluation text '{name}'; known: {known}")


def is_file(name: str) -> bool:
    """Whether any string, of whatever length and characters, is the path of a file."""
    try:
        return Path(name).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # too long for a name, no such home, a null character
        return False


def available_texts() -> list[str]:
    """Names that `load_text` knows without a path."""
    return list(_BENCHMARKS)


def read_documents(path: Path) -> list[str]:
    """The documents of a local file: the whole of a text file, else the rows of its `text` column (or its only column of strings).

    Raises:
        BimosError: unreadable, of an unknown kind, or without such a column.
    """
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    try:
        if kind == "parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
            strings = [field.name for field in table.schema if str(field.type) in ("string", "large_string")]
            return [value or "" for value in table[_text_column(strings, path)].to_pylist()]
        raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        content = raw.decode("utf-8")
        if kind in ("jsonl", "ndjson"):
            rows = [json.loads(line) for line in content.split("\n") if line.strip()]
            if not rows or not all(isinstance(row, dict) for row in rows):
                raise BimosError(f"'{path}' holds no JSON objects; write one object with a 'text' field a line")
            column = _text_column([key for key, value in rows[0].items() if isinstance(value, str)], path)
            return [whole_characters(str(row.get(column) or "")) for row in rows]
    except OSError as error:
        raise BimosError(f"cannot read '{path}': {error.strerror or error}") from None
    except RecursionError:
        raise BimosError(f"'{path}' is not a readable {kind} file: its objects are nested too deep") from None
    except (ValueError, EOFError, zlib.error) as error:  # not UTF-8, not JSON, not parquet, not a whole gzip file
        raise BimosError(f"'{path}' is not a readable {kind} file: {' '.join(str(error).split())}") from None
    if kind in ("txt", "md", "text", "raw"):
        return [content]
    raise BimosError(f"'{path}': cannot read files of this kind; give .txt, .jsonl or .parquet")


def _text_column(strings: list[str], path: Path) -> str:
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise BimosError(f"'{path}' has no column 'text' (columns of strings: {', '.join(strings) or 'none'}); rename the one to evaluate on")


def _require_text(text: str, name: str) -> str:
    if not text.strip():
        raise BimosError(f"evaluation text '{name}' is empty; give a file with text in it")
    return text


def _local(relative: str) -> list[str] | None:
    folder = data_directory()
    return read_documents(folder / relative) if folder and (folder / relative).is_file() else None


def _hub(name: str, fetch: Callable[[], list[str]]) -> list[str]:
    """`fetch()` with whatever the Hub's client raises turned into one line: it has no common base class for 'not reachable'."""
    try:
        return fetch()
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        mend = "set BIMOS_DATA to a folder that holds it, or give a local file"
        raise BimosError(f"cannot get evaluation text '{name}' from the Hub ({first_line}); {mend}") from None


def _hub_rows(*arguments: str, **options: Any) -> list[str]:
    import datasets

    return list(datasets.load_dataset(*arguments, **options)["text"])


def _wikitext2(name: str, split: str) -> EvaluationText:
    rows = _local(f"wikitext2/wikitext-2-raw-v1.{split}.parquet")
    if rows is None:
        rows = _hub(name, lambda: _hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split=split))
    return EvaluationText(name, f"WikiText-2 {split}", "\n\n".join(rows))


def _c4() -> EvaluationText:
    """As GPTQ's `c4_new`: the first 1100 documents joined with one space, 256 windows of 2048 tokens."""
    label = "C4 (train sample b)"
    rows = _local("c4/c4_en_train_sample_b.parquet")
    if rows is None:
        label = "C4 (validation, first 1100 documents)"
        shard = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
        rows = _hub("c4", lambda: _hub_rows("allenai/c4", data_files=shard, split=f"validation[:{C4_DOCUMENTS}]"))
    return EvaluationText("c4", label, " ".join(rows[:C4_DOCUMENTS]), C4_TOKENS)


_BENCHMARKS: dict[str, Callable[[], EvaluationText]] = {
    "wikitext2": lambda: _wikitext2("wikitext2", "test"),
    "wikitext2-validation": lambda: _wikitext2("wikitext2-validation", "validation"),
    "c4": _c4,
}
