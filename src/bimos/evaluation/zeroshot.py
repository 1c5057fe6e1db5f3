"""Zero-shot tasks through lm_eval, in this process, on a model that is already loaded.

`zeroshot6` are the six tasks of the BinaryMoS and DB-LLM tables: BoolQ, PIQA, HellaSwag, WinoGrande, ARC-easy and
ARC-challenge. Prompts, targets and metrics are lm_eval's own; only where the documents come from may differ: a folder
`lm_eval_tasks/` of task files in the local data directory, with a `local_<task>.yaml` a task whose `data_files` are
relative to the data directory, wins over the Hub.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bimos.errors import BimosError
from bimos.evaluation.mode import evaluating
from bimos.evaluation.texts import data_directory

ZEROSHOT6 = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge")
GROUPS: dict[str, tuple[str, ...]] = {"zeroshot6": ZEROSHOT6, "lambada": ("lambada_openai",)}


def zero_shot(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = ("zeroshot6",),
    *,
    limit: int | None = None,
    batch_size: int = 8,
    folder: str | Path | None = None,
) -> dict[str, dict[str, float | int | None]]:
    """Accuracies of `model` on `tasks`, without examples in the prompt.

    Args:
        model: a causal language model of transformers.
        tasks: `zeroshot6`, `lambada`, or names of lm_eval tasks.
        limit: only the first so many documents a task.
        batch_size: requests a forward pass.
        folder: task files that win over lm_eval's own. None: `lm_eval_tasks` in the local data directory, if there.

    Returns:
        For each task `{acc, acc_norm, stderr, acc_norm_stderr, n}`, as shares of 1; None where a task has no such
        metric. If all of `zeroshot6` were run, `zeroshot6` is their unweighted mean, its acc_norm with acc in place of
        the acc_norm that BoolQ and WinoGrande have not, as in the papers' tables.

    Raises:
        BimosError: lm_eval is missing, a task is unknown, or its documents cannot be had.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise BimosError(f"zero-shot tasks need lm_eval ({error}); install it with: pip install 'bimos[eval]'") from None
    if limit is not None and limit <= 0:
        raise BimosError(f"limit={limit}: must be positive")
    names = list(dict.fromkeys(name for task in tasks for name in GROUPS.get(task, (task,))))
    if not names:
        raise BimosError("no zero-shot task given; for example zeroshot6")
    with _quiet(logging.getLogger("lm_eval")), _local_tasks(names, folder) as local:
        loaded = _load(names, local)
        with evaluating(model):
            wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)  # it sets a padding token
            # not simple_evaluate: it would set every random seed of the process and inspect the machine for seconds
            output = lm_eval.evaluate(wrapped, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    assert output is not None  # None is for ranks other than 0
    scores: dict[str, dict[str, float | int | None]] = {}
    for name in output["results"]:
        scores[name] = _scores(output["results"][name], output["n-samples"][name]["effective"])
    if all(name in scores for name in ZEROSHOT6):
        scores["zeroshot6"] = _mean([scores[name] for name in ZEROSHOT6])
    return scores


def _load(names: list[str], local: Path | None) -> dict[str, Any]:
    """lm_eval's task objects, by name. Its own thousands of task files are indexed only if one of them is needed."""
    import datasets
    from lm_eval.tasks import TaskManager

    here = {path.stem for path in local.glob("*.yaml")} if local else set()
    manager = TaskManager(include_path=str(local) if local else None, include_defaults=not here.issuperset(names))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        known = ", ".join((*GROUPS, *ZEROSHOT6))
        raise BimosError(f"unknown zero-shot task '{unknown[0]}'; use {known}, or a task that `lm_eval ls tasks` lists")
    loaded: dict[str, Any] = {}
    for name in names:
        try:
            with _no_bars(datasets):
                loaded |= manager.load([name])["tasks"]
        except Exception as error:  # from the Hub's client, datasets, or a task's own code
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            mend = "check its task file" if name in here else "set BIMOS_DATA to a folder with lm_eval_tasks/, or go online"
            raise BimosError(f"cannot load the documents of task '{name}' ({first_line}); {mend}") from None
    for task in loaded.values():
        task.set_config(key="num_fewshot", value=0)
    return loaded


@contextmanager
def _local_tasks(names: list[str], folder: str | Path | None) -> Iterator[Path | None]:
    """A temporary folder with a task file for every one of `names` that `folder` has: that one, with a plain name and absolute paths."""
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


def _scores(metrics: dict[str, Any], count: int) -> dict[str, float | int | None]:
    def share(name: str) -> float | None:
        value = metrics.get(f"{name},none")
        return None if value is None else float(value)

    def error(value: float | None) -> float | None:
        """Of the mean of `count` outcomes that are 0 or 1: the same as lm_eval's `mean_stderr`."""
        return None if value is None or count < 2 else math.sqrt(value * (1.0 - value) / (count - 1))

    acc, acc_norm = share("acc"), share("acc_norm")
    return {"acc": acc, "acc_norm": acc_norm, "stderr": error(acc), "acc_norm_stderr": error(acc_norm), "n": count}


def _mean(scores: list[dict[str, Any]]) -> dict[str, float | int | None]:
    """Unweighted mean over tasks, whose standard errors are independent."""

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None

    def error(values: list[float | None]) -> float | None:
        variance = mean([None if value is None else value**2 for value in values])
        return None if variance is None else math.sqrt(variance / len(values))

    normed = ["acc_norm" if score["acc_norm"] is not None else "acc" for score in scores]
    errors = {"acc": "stderr", "acc_norm": "acc_norm_stderr"}
    return {
        "acc": mean([score["acc"] for score in scores]),
        "acc_norm": mean([score[name] for name, score in zip(normed, scores, strict=True)]),
        "stderr": error([score["stderr"] for score in scores]),
        "acc_norm_stderr": error([score[errors[name]] for name, score in zip(normed, scores, strict=True)]),
        "n": sum(score["n"] for score in scores),
    }


@contextmanager
def _no_bars(datasets: Any) -> Iterator[None]:
    """Without the two bars a task that `datasets` draws while it reads local files."""
    enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """lm_eval warns of things that are meant here: a model that is already loaded, zero-shot."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
