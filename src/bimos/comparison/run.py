"""A comparison from its first row to its page, and from wherever it was interrupted.

DIR/setting.json       what all rows share
DIR/rows/ROW.json      a finished row
DIR/work/ROW/          its checkpoint, and what its steps have left so far; beside it setting.json again: the folder may be shared
DIR/comparison.json    all finished rows, DIR/pareto.svg and .png, DIR/index.html
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from bimos.comparison.page import write_pages
from bimos.comparison.peers import Peer, row_config
from bimos.comparison.rows import Row
from bimos.comparison.setting import Setting, check_place, read_setting
from bimos.comparison.work import Job
from bimos.errors import BimosError
from bimos.evaluation.texts import EvaluationText, load_text
from bimos.evaluation.versions import write_json
from bimos.evaluation.zeroshot import check_tasks, expand
from bimos.models import convertible_linears, empty_model, load_config, refuse_quantized
from bimos.resume import flat
from bimos.settling import check_fit

ROW = frozenset({"row", "config", "perplexity", "tasks", "stages", "speed"})  # what is read of a finished one without asking

Spawn = Callable[[Job, list[str]], None]


def compare(
    rows: Sequence[Row],
    setting: Setting,
    output: str | Path,
    *,
    texts: Sequence[str] = (),
    tasks: Sequence[str] = (),
    work: str | Path | None = None,
    console: Console | None = None,
    spawn: Spawn | None = None,
) -> dict[str, Any]:
    """Run the rows that are not finished yet, one after another; the work behind `bimos compare`.

    Texts and tasks may be added later: rows that are finished but for them are then measured, not made again.

    Args:
        texts: names of evaluation texts (`bimos.evaluation.texts`).
        tasks: names of zero-shot tasks or groups.
        work: where checkpoints and unfinished work are kept. None: the folder `work` of `output`.
        spawn: does steps of a row and raises BimosError; by default in a process of their own.

    Returns:
        What `comparison.json` holds: `setting`, and `rows`, every finished one in `output`.

    Raises:
        BimosError: bad input, another run at work in `output`, rows of another setting there; or rows that failed, the others finished.
    """
    output = Path(output).expanduser()
    folder = Path(work).expanduser() if work else output / "work"
    check_place(output)
    loaded = [load_text(text) for text in texts]
    given = {text.name: source for text, source in zip(loaded, texts, strict=True)}
    if len(given) < len(texts):
        raise BimosError(f"two of the texts {', '.join(texts)} have one name; rename a file")
    names = expand(tasks) if tasks else []
    if names:
        check_tasks(names)
    _check_fit(rows, setting.model, output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BimosError(f"cannot write to '{error.filename}': {error.strerror}; name another output directory") from None
    try:
        lock = FileLock(output / ".lock", timeout=0).acquire()
    except Timeout:
        if not (output / ".lock").exists():  # the library also waits for a place where there is no writing
            raise BimosError(f"cannot write to '{output}'; name another output directory") from None
        raise BimosError(f"'{output}' is in use by another run of bimos compare; let it finish, or name another directory") from None
    except OSError as error:
        raise BimosError(f"cannot write to '{output}': {error.strerror}; name another output directory") from None
    failed: dict[str, str] = {}
    with lock:
        setting = setting.agreed(output).agreed(folder)
        for row in rows:
            _check_same(output, folder, row)
        for text in loaded:
            _check_text(output, folder, text)
        for place in (output, folder):
            setting.keep(place)
        for row in rows:
            job = Job(
                *(setting.model, row.name, None if row.config is None else row.config.to_dict(), given, names),
                *(setting.windows, setting.limit, str((folder / row.slug).resolve()), str((folder / "cache").resolve())),
            )
            try:
                _finish(output, row, job, console, spawn or _in_a_process)
            except BimosError as error:
                failed[row.name] = str(error)
                if console is not None:
                    console.print(f"{row.name} failed: {error}", markup=False)
            write_pages(output, read(output))
        result = read(output)
    if failed:
        name, reason = next(iter(failed.items()))
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise BimosError(f"row '{name}'{others} failed: {reason}; {len(result['rows'])} rows are finished, run again for the others")
    return result


def read(output: Path) -> dict[str, Any]:
    """Setting and finished rows of a comparison. Raises BimosError: there is none."""
    setting = read_setting(output)
    rows = [_load(file) for file in sorted((output / "rows").glob("*.json"))]
    return {"setting": setting, "rows": rows}


def _finish(output: Path, row: Row, job: Job, console: Console | None, spawn: Spawn) -> None:
    path, folder = _row_file(output, row), Path(job.folder)
    known = _load(path) if path.exists() else None
    if known is not None:
        wanted = {"perplexity": set(job.texts), "tasks": set(job.tasks)}
        if all(names <= known[key].keys() for key, names in wanted.items()):
            if console is not None:
                console.print(f"{row.name}: finished", markup=False)
            return
        if not (folder / "made.json").exists():
            raise BimosError(f"there is more to measure, and '{folder}' has no model of it any more; take the row out of '{output}'")
    if console is not None:
        console.rule(row.name)
    write_json(folder / "job.json", dataclasses.asdict(job))
    spawn(job, ["make", "evaluate"])
    spawn(job, ["speed"])  # by itself: peak memory is that of a process
    parts = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("made", "evaluation", "speed")}
    config = parts["made"].get("config", job.config)  # what was begun before an option existed went on without it
    write_json(path, {"row": row.name, **parts["made"], "config": config, **parts["evaluation"], "speed": parts["speed"]})


def _row_file(output: Path, row: Row) -> Path:
    return output / "rows" / f"{row.slug}.json"


def _load(path: Path, keys: Set[str] = ROW) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(known, dict) and known.keys() >= keys:
            return known
    except (OSError, ValueError):
        pass
    raise BimosError(f"'{path}' is damaged; delete it, and the row is done again")


def _in_a_process(job: Job, steps: list[str]) -> None:
    """Ends with this process: its standard input closes then."""
    error = Path(job.folder) / "error.txt"
    error.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bimos.comparison", str(Path(job.folder) / "job.json"), *steps]
    reading, writing = os.pipe()
    try:
        code = subprocess.run(command, stdin=reading).returncode
    finally:
        os.close(reading)
        os.close(writing)
    if code == 2 and error.exists():
        raise BimosError(error.read_text(encoding="utf-8"))
    if code == errno.ENOSPC:
        raise BimosError("no space left on the device: make room")
    if code:
        reason = "was killed (for want of memory?)" if code == -9 else f"ended with exit code {code}"
        raise BimosError(f"its process {reason}")


def _check_fit(rows: Sequence[Row], model: str, output: Path) -> None:
    """Raises BimosError: an unfinished row that does not fit the model, or whose library is missing."""
    known = load_config(model)
    refuse_quantized(known, model)
    empty = empty_model(known)
    for row in rows:
        try:
            if row.config is None:
                convertible_linears(empty)
            elif not _row_file(output, row).exists():
                method = row_config(row.config)
                if isinstance(method, Peer):
                    method.require()
                check_fit(empty, method, row.config)
        except BimosError as error:
            raise BimosError(f"row '{row.name}': {error}") from None


def _check_text(output: Path, folder: Path, text: EvaluationText) -> None:
    """Raises BimosError: rows were measured on another text of this name."""
    for path in [*sorted((output / "rows").glob("*.json")), *sorted(folder.glob("*/evaluation.json"))]:
        digest = _load(path, {"perplexity"})["perplexity"].get(text.name, {}).get("text_digest", text.digest)
        if digest != text.digest:
            raise BimosError(f"'{path}' was measured on another '{text.name}'; give that, rename the file, or name another directory")


def _check_same(output: Path, folder: Path, row: Row) -> None:
    """Raises BimosError: the row was finished, or begun, with another recipe."""
    for path in (_row_file(output, row), folder / row.slug / "job.json"):
        if not path.exists():
            continue
        known = _load(path, {"config"})
        before = flat(known["config"] or {})
        now = flat(json.loads(json.dumps(row.config.to_dict())) if row.config else {})
        options = {key for key in before.keys() ^ now.keys() if key.startswith("options.")}  # others are news of a version
        for key in sorted((before.keys() & now.keys()) | options):
            if before.get(key) != now.get(key):
                raise BimosError(
                    f"row '{row.name}' in '{output}' was run with {key}={before.get(key)}, now it is {now.get(key)}; "
                    "give the same, or another directory"
                )
