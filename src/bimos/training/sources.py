"""What `--data` means: a data spec parsed into weighted sources.

    spec    =  source[:weight] , source[:weight] , ...        weights: shares of the windows, on every source or on none
    source  =  file | folder | name[:config] | self

* A file is `.txt`, `.jsonl`/`.json` (one JSON object a line, field `text` or chat `messages`), either also as `.gz`, or
  `.parquet` (column `text` or `messages`). A folder stands for every such file below it.
* Paths that do not exist as given are looked up below the data folder (`bimos.datafolder.data_directory`: BIMOS_DATA).
* `name` is a data set on the Hub, streamed, split `train`: `allenai/c4:en`, `Salesforce/wikitext:wikitext-2-raw-v1:0.2`.
  What exists on disk under that name wins.
* `self` is text sampled from the teacher (see `bimos.training.selfdata`). A file of that name: `./self`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Literal

from bimos.datafolder import data_directory
from bimos.errors import BimosError

TEXT_SUFFIXES = (".txt", ".txt.gz")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_NAME = re.compile(r".*\.(txt|json|jsonl|gz|zst|xz|zip|parquet|arrow|csv|tsv|md|pdf|html|npy|bin)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Source:
    """One text source of a mix.

    Attributes:
        name: as the user wrote it, without weight and config.
        kind: `files`, `hub` or `self`.
        weight: share of the windows; the weights of a spec sum to 1.
        files: of `files`: absolute paths, sorted.
        config: of `hub`: the data set's configuration.
    """

    name: str
    kind: Literal["files", "hub", "self"]
    weight: float = 1.0
    files: tuple[Path, ...] = ()
    config: str | None = None


def parse_sources(spec: str) -> list[Source]:
    """The sources of a data spec, in its order, weights normalised.

    Raises:
        BimosError: nothing given, a missing, empty or unreadable kind of file, a malformed weight.
    """
    if not spec.strip():
        raise BimosError("no training data given; name a file, a folder, a Hub data set or 'self' with --data")
    parts = [spec] if _locate(spec) else [part.strip() for part in spec.split(",")]
    if not all(parts):
        raise BimosError(f"data '{spec}' has an empty source between its commas; write for example wiki.parquet:0.7,chat.jsonl:0.3")
    pairs = [_split_weight(part) for part in parts]
    weights = [weight for _, weight in pairs if weight is not None]
    if weights and len(weights) < len(pairs):
        bare = next(name for name, weight in pairs if weight is None)
        raise BimosError(f"data '{spec}': '{bare}' has no weight but others have; give every source a weight, or none")
    total = sum(weights) or len(pairs)
    return [_parse_source(name, (1.0 if weight is None else weight) / total) for name, weight in pairs]


def _split_weight(part: str) -> tuple[str, float | None]:
    """`wiki.parquet:0.7` as (`wiki.parquet`, 0.7); the weight is None where there is none."""
    name, colon, tail = part.rpartition(":")
    if not colon or _locate(part):
        return part, None
    try:
        weight = float(tail)
    except ValueError:
        if not tail or name == "self" or _locate(name) or _FILE_NAME.fullmatch(name):
            raise BimosError(f"data '{part}': '{tail}' is not a weight; write a number, for example {name}:0.7") from None
        return part, None  # the config of a Hub data set
    if not (math.isfinite(weight) and weight > 0):
        raise BimosError(f"data '{part}': a weight must be a positive number; leave the source out to give it none")
    return name, weight


def _parse_source(name: str, weight: float) -> Source:
    if name == "self":
        return Source(name, "self", weight)
    path = _locate(name)
    if path is not None:
        return Source(name, "files", weight, files=_data_files(path))
    hub, _, config = name.partition(":")
    if _HUB_NAME.fullmatch(hub) and not _FILE_NAME.fullmatch(hub):
        return Source(hub, "hub", weight, config=config or None)
    below = data_directory()
    where = f", neither here nor below '{below}'" if below else "; check the path, or set BIMOS_DATA to the folder it is below"
    raise BimosError(f"no such data file or folder: '{name}'{where}")


def _locate(name: str) -> Path | None:
    below = data_directory()
    for path in (Path(name).expanduser(), *([below / name] if below else [])):
        if os.path.exists(path):
            return path.resolve()
    return None


def _data_files(path: Path) -> tuple[Path, ...]:
    known = ", ".join(SUFFIXES)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if is_of(file, SUFFIXES) and file.is_file() and not file.name.startswith("."))
        if not files:
            raise BimosError(f"data folder '{path}' holds no file of a known kind ({known}); name another, or a file")
        return tuple(files)
    if not is_of(path, SUFFIXES):
        raise BimosError(f"data file '{path}' is of unknown kind '{path.suffix}'; known: {known}")
    if path.stat().st_size == 0:
        raise BimosError(f"data file '{path}' is empty; name one with text in it, or leave it out")
    return (path,)


def is_of(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether the file's name ends in one of `suffixes`, in any case."""
    return path.name.lower().endswith(suffixes)
