"""What all rows of a comparison share, kept beside them: a row of another setting is no row of the same table."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from bimos.config import RunConfig
from bimos.errors import BimosError
from bimos.evaluation.versions import write_json
from bimos.resume import same_path
from bimos.training.sources import parse_sources

FILE = "setting.json"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Of a comparison.

    Attributes:
        model: the teacher.
        data: text to train on, and `text_bytes`, the size of each of its local files by name.
        tokens, minutes: the budget, in one of them.
        windows: of each evaluation text. None: all.
        tasks: whether zero-shot tasks were ever asked for; only then is `limit` settled.
        limit: documents of each of them. None: all.
    """

    model: str
    data: str
    tokens: int | None
    minutes: float | None
    seed: int = 0
    embedding_bits: int = 8
    windows: int | None = None
    tasks: bool = False
    limit: int | None = None
    text_bytes: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, model: str, config: RunConfig, *, windows: int | None = None, tasks: bool = False, limit: int | None = None) -> Setting:
        """Raises BimosError: no training text, text that is not there, or numbers that measure nothing."""
        if not config.data:
            raise BimosError("no training text: give --data a txt, jsonl or parquet file, a Hub dataset, or 'self'")
        for name, value in (("windows", windows), ("limit", limit)):
            if value is not None and value < 1:
                raise BimosError(f"--{name} {value}: must be at least 1")
        files = [Path(file) for source in parse_sources(config.data) for file in source.files]
        return cls(
            model=model,
            data=config.data,
            tokens=config.tokens,
            minutes=config.minutes,
            seed=config.seed,
            embedding_bits=config.embedding_bits,
            windows=windows,
            tasks=tasks,
            limit=limit,
            text_bytes={file.name: file.stat().st_size for file in files},
        )

    def shared(self) -> dict[str, Any]:
        """What of it replaces a recipe's own."""
        return {key: getattr(self, key) for key in ("data", "tokens", "minutes", "seed", "embedding_bits")}

    def agreed(self, output: Path) -> Setting:
        """The setting that holds in `output`: with the limit of tasks that were asked for before, where none are now. Writes nothing.

        Raises:
            BimosError: it is another than what rows there were run with.
        """
        if not (output / FILE).exists():
            return self
        known = read_setting(output)
        if not known["tasks"]:
            known |= {"tasks": self.tasks, "limit": self.limit}
        now = self if self.tasks else dataclasses.replace(self, tasks=known["tasks"], limit=known["limit"])
        for key, value in dataclasses.asdict(now).items():
            if known[key] != value and not (key == "model" and same_path(known[key], value)):
                raise BimosError(
                    f"the rows in '{output}' were run with {key}={known[key]}, now it is {value}; give the same, or another directory"
                )
        return Setting(**known)

    def keep(self, output: Path) -> None:
        """Leave it in `output`, for `agreed` of a later run."""
        write_json(output / FILE, dataclasses.asdict(self))


def check_place(output: Path) -> None:
    """Raises BimosError: `output` is a file, or holds something that is no comparison."""
    if output.exists() and not output.is_dir():
        raise BimosError(f"output '{output}' is a file; name a directory")
    if output.is_dir() and not (output / FILE).exists() and any(entry.name not in (".lock", "work") for entry in output.iterdir()):
        raise BimosError(f"output directory '{output}' is not empty and holds no comparison; name another")


def read_setting(output: Path) -> dict[str, Any]:
    """The setting of the comparison in `output`. Raises BimosError: there is none, or it is damaged."""
    path = output / FILE
    if not path.exists():
        raise BimosError(f"'{output}' holds no comparison; name a directory that bimos compare has written")
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(known, dict) and {field.name for field in dataclasses.fields(Setting)} == known.keys():
            return known
    raise BimosError(f"'{path}' is damaged; name another output directory")
