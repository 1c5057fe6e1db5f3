"""Task files of a local folder, as lm_eval can read them: with plain names, and with paths that do not depend on where one is.

A folder `lm_eval_tasks/` has a `local_<task>.yaml` (or `<task>.yaml`) a task, whose `data_files` are relative to the folder above it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bimos.datafolder import data_directory
from bimos.errors import BimosError


@contextmanager
def local_tasks(names: list[str], folder: str | Path | None) -> Iterator[Path | None]:
    """A temporary folder with a task file for every one of `names` that `folder` has: that one, with a plain name and absolute paths.

    Args:
        folder: None: `lm_eval_tasks` in the local data directory; where there is none, None is what the block gets.

    Raises:
        BimosError: there is no folder of that name, or a task file cannot be read.
    """
    if folder is None:
        data = data_directory()
        folder = data / "lm_eval_tasks" if data else None
    elif not Path(folder).is_dir():
        raise BimosError(f"no folder of task files at '{folder}'")
    if folder is None or not Path(folder).is_dir():
        yield None
        return
    folder = Path(folder).resolve()
    with tempfile.TemporaryDirectory(prefix="bimos-tasks-") as aside:
        for name in names:
            for path in (folder / f"local_{name}.yaml", folder / f"{name}.yaml"):
                if not path.is_file():
                    continue
                task: dict[str, Any] = {"include": str(path), "task": name}
                if options := _read_task(path).get("dataset_kwargs"):
                    task["dataset_kwargs"] = _absolute(options, folder.parent)
                (Path(aside) / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
                break
        yield Path(aside)


class _TaskLoader(yaml.SafeLoader):
    """Reads task files without importing the functions that they name."""


_TaskLoader.add_constructor("!function", lambda loader, node: str(node.value))


def _read_task(path: Path) -> dict[str, Any]:
    """A task file with what it includes, local keys winning, as lm_eval reads it."""
    try:
        task = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskLoader)
    except (OSError, yaml.YAMLError) as error:
        raise BimosError(f"cannot read task file '{path}': {' '.join(str(error).split())}") from None
    if not isinstance(task, dict):
        raise BimosError(f"task file '{path}' must be a mapping of keys to values")
    includes = task.pop("include", [])
    merged: dict[str, Any] = {}
    for include in [includes] if isinstance(includes, str) else includes:
        merged |= _read_task(path.parent / include)
    return merged | task


def _absolute(value: Any, base: Path) -> Any:
    """`value` with every path of a file that exists under `base` made absolute: lm_eval reads paths relative to the working directory."""
    if isinstance(value, dict):
        return {key: _absolute(item, base) for key, item in value.items()}
    if isinstance(value, list):
        return [_absolute(item, base) for item in value]
    return str(base / value) if isinstance(value, str) and (base / value).is_file() else value
