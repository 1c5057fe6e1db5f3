"""Zero-shot tasks through lm_eval, in this process, on a model that is already loaded.

`zeroshot6` are the six tasks of the BinaryMoS and DB-LLM tables: BoolQ, PIQA, HellaSwag, WinoGrande, ARC-easy and
ARC-challenge. Prompts, targets and metrics are lm_eval's own; only where the documents come from may differ: a folder
`lm_eval_tasks/` of task files in the local data directory wins over the Hub (`taskfiles.py`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bimos.errors import BimosError
from bimos.evaluation.mode import evaluating
from bimos.evaluation.taskfiles import local_tasks

BATCH_TOKENS = 1024  # of a forward pass, of which two run side by side on a CPU
Scores = dict[str, float | int | None]
ZEROSHOT6 = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge")
GROUPS: dict[str, tuple[str, ...]] = {"zeroshot6": ZEROSHOT6, "lambada": ("lambada_openai",)}


def zero_shot(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = ("zeroshot6",),
    *,
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    folder: str | Path | None = None,
    cache: Path | None = None,
    done: Callable[[str, Scores], None] | None = None,
) -> dict[str, Scores]:
    """Accuracies of `model` on `tasks`, without examples in the prompt.

    Args:
        model: a causal language model of transformers.
        tasks: `zeroshot6`, `lambada`, or names of lm_eval tasks.
        limit: only the first so many documents a task.
        batch_tokens: of a forward pass: as many requests, sorted by length and with what they share once, as make up so many.
        folder: task files that win over lm_eval's own. None: `lm_eval_tasks` in the local data directory, if there.
        cache: folder in which the tokens of requests are kept for later runs with the same tokenizer.
        done: called after every task with its name and scores.

    Returns:
        For each task `{acc, acc_norm, stderr, acc_norm_stderr, n, seconds}`, as shares of 1; None where a task has no such
        metric. If all of `zeroshot6` were run, `zeroshot6` is their unweighted mean, its acc_norm with acc in place of
        the acc_norm that BoolQ and WinoGrande have not, as in the papers' tables.

    Raises:
        BimosError: lm_eval is missing, a task is unknown, or its documents cannot be had.
    """
    _require_lm_eval()
    if limit is not None and limit <= 0:
        raise BimosError(f"limit={limit}: must be positive")
    names = expand(tasks)
    import lm_eval

    scores: dict[str, Scores] = {}
    with _quiet(logging.getLogger("lm_eval")), local_tasks(names, folder) as local:
        loaded = _load(names, local)
        from bimos.evaluation.harness import Harness

        with evaluating(model):
            harness = Harness(model, tokenizer, batch_tokens, cache)
            for name, task in loaded.items():  # one by one, so that each has its time, and is not lost with the next
                began = time.monotonic()
                with harness.remembering(name):
                    # not simple_evaluate: it would set every random seed of the process and inspect the machine for seconds
                    output = lm_eval.evaluate(harness, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0, log_samples=False)
                assert output is not None  # None is for ranks other than 0
                found = _scores(output["results"][name], output["n-samples"][name]["effective"])
                scores[name] = found | {"seconds": time.monotonic() - began}
                if done is not None:
                    done(name, scores[name])
    return with_mean(scores)


def expand(tasks: Sequence[str]) -> list[str]:
    """Names of tasks, those of a group in place of its name, each once. Raises BimosError: there are none."""
    names = list(dict.fromkeys(name for task in tasks for name in GROUPS.get(task, (task,))))
    if not names:
        raise BimosError("no zero-shot task given; for example zeroshot6")
    return names


def check_tasks(tasks: Sequence[str], folder: str | Path | None = None) -> None:
    """Raises what `zero_shot` would: before hours of work, not after them."""
    _require_lm_eval()
    names = expand(tasks)
    with _quiet(logging.getLogger("lm_eval")), local_tasks(names, folder) as local:
        _load(names, local)


def with_mean(scores: dict[str, Scores]) -> dict[str, Scores]:
    """`scores` and, if all of `zeroshot6` are among them, their mean."""
    alone = {name: found for name, found in scores.items() if name != "zeroshot6"}
    if all(name in alone for name in ZEROSHOT6):
        alone["zeroshot6"] = _mean([alone[name] for name in ZEROSHOT6])
    return alone


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise BimosError(f"zero-shot tasks need lm_eval ({error}); install it with: pip install 'bimos[eval]'") from None


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
    for name, task in loaded.items():
        if {"acc", "acc_norm"}.isdisjoint(task.aggregation()):
            raise BimosError(f"task '{name}' has no accuracy (it has {', '.join(task.aggregation())}); measure it with lm_eval itself")
        task.set_config(key="num_fewshot", value=0)
    return loaded


def _scores(metrics: dict[str, Any], count: int) -> Scores:
    def share(name: str) -> float | None:
        value = metrics.get(f"{name},none")
        return None if value is None else float(value)

    def error(value: float | None) -> float | None:
        """Of the mean of `count` outcomes that are 0 or 1: the same as lm_eval's `mean_stderr`."""
        return None if value is None or count < 2 else math.sqrt(value * (1.0 - value) / (count - 1))

    acc, acc_norm = share("acc"), share("acc_norm")
    return {"acc": acc, "acc_norm": acc_norm, "stderr": error(acc), "acc_norm_stderr": error(acc_norm), "n": count}


def _mean(scores: list[dict[str, Any]]) -> Scores:
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
        "seconds": sum(score["seconds"] for score in scores),
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
