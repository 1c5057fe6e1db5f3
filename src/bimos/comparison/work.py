"""One row of a comparison, in a process of its own: no row works in memory that another has left behind.

    python -m bimos.comparison JOB.json make evaluate      (`__main__.py`)

Every step leaves its result in the row's folder and does nothing where that is there already; `make` goes on with a run that was killed,
`evaluate` with the next text or task. The process ends with the one that started it, however that ended: it watches its standard input.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from bimos.comparison import peers
from bimos.config import RunConfig
from bimos.errors import BimosError
from bimos.evaluation.perplexity import perplexity
from bimos.evaluation.speed import Runs, measure
from bimos.evaluation.texts import load_text
from bimos.evaluation.versions import provenance, write_json
from bimos.evaluation.zeroshot import with_mean, zero_shot
from bimos.models import convertible_linears, empty_model, load_config, load_teacher, load_to_measure, load_tokenizer
from bimos.quantize import run
from bimos.resume import WORK, settle
from bimos.training.data import tokenizer_digest
from bimos.training.progress import Progress

LAST_BREATH = 30.0  # seconds that a process whose starter was killed may take to end
SPEED = Runs(prompts=(16,), batches=(1,), tokens=32, repeats=3)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a row asks for.

    Attributes:
        config: of `RunConfig`; None for the teacher itself.
        texts: evaluation texts as they were given, by the names that results have them under.
        tasks: zero-shot tasks, no groups.
        folder: of this row: checkpoint and what the steps leave.
        cache: folder for what rows share.
    """

    model: str
    name: str
    config: dict[str, Any] | None
    texts: dict[str, str]
    tasks: list[str]
    windows: int | None
    limit: int | None
    folder: str
    cache: str

    @property
    def source(self) -> str:
        """The model to evaluate."""
        return self.model if self.config is None else str(Path(self.folder) / "model")


def make(job: Job, console: Console | None) -> None:
    """The packed model, and its sizes and stages in `made.json`."""
    path = Path(job.folder) / "made.json"
    if path.exists():
        return
    if job.config is None:
        write_json(path, _teacher(job.model) | provenance())
        return
    output = Path(job.source)
    settle(output)
    if not (output / "result.json").exists():
        config, unfinished = RunConfig.from_dict(job.config), (output / WORK / "run.json").exists()
        if config.method in peers.PEERS:
            peers.run(job.model, output, config)
        else:
            # What was begun goes on as it was: options that have come since have another default in it.
            run(job.model, output, None if unfinished else config, resume=unfinished, overwrite=not unfinished, console=console)
    result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    packing = json.loads((output / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    write_json(path, result | {key: packing.get(key) for key in ("planes", "experts", "group_size", "options")})


def evaluate(job: Job, console: Console | None) -> None:
    """Perplexities and accuracies in `evaluation.json`, each as soon as it is known."""
    path = Path(job.folder) / "evaluation.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"perplexity": {}, "tasks": {}}
    texts = {name: given for name, given in job.texts.items() if name not in known["perplexity"]}
    tasks = [name for name in job.tasks if name not in known["tasks"]]
    if not texts and not tasks:
        return
    model, tokenizer = load_teacher(job.model) if job.config is None else (load_to_measure(job.source), load_tokenizer(job.source))
    with Progress(console) as bar:
        for name, given in texts.items():
            text, began = load_text(given), time.monotonic()
            bar.begin(f"perplexity of {text.label}", 1)
            measured = perplexity(
                model, tokenizer, text, windows=job.windows, progress=lambda done, total, _: bar.set(done / total)
            ).to_dict()
            known["perplexity"][name] = measured | {"text_digest": text.digest, "seconds": time.monotonic() - began}
            write_json(path, known)
            bar.end()
            if console is not None:
                console.print(f"perplexity of {measured['text']}: {measured['value']:.2f} ± {measured['stderr'] or 0:.2f}", markup=False)

    def keep(name: str, scores: dict[str, Any]) -> None:
        known["tasks"][name] = scores
        write_json(path, known)
        if console is not None:
            console.print(f"{name}: acc {100 * (scores['acc'] or 0):.1f} % of {scores['n']}, {scores['seconds']:.0f} s", markup=False)

    if tasks:
        zero_shot(model, tokenizer, tasks, limit=job.limit, cache=Path(job.cache) / f"requests-{tokenizer_digest(tokenizer)}", done=keep)
        known["tasks"] = with_mean(known["tasks"])
        write_json(path, known)


def speed(job: Job, console: Console | None) -> None:
    """Tokens/s of one sequence in `speed.json`, in the engine where that covers the model, and the memory that it takes."""
    path = Path(job.folder) / "speed.json"
    if path.exists():
        return
    measured = measure(job.source, SPEED)
    row = {key: measured["runs"][0][key] for key in ("decode_tokens_per_second", "prefill_tokens_per_second", "prompt", "tokens")}
    facts = {key: measured[key] for key in ("runs_in", "why", "threads", "dtype", "repeats")}
    write_json(path, row | facts | {"peak_memory_bytes": measured["memory"]["peak"]})


STEPS: dict[str, Callable[[Job, Console | None], None]] = {"make": make, "evaluate": evaluate, "speed": speed}


def work(job: Job, steps: list[str], console: Console | None = None) -> None:
    """The steps, one after another; see their own docstrings.

    Raises:
        BimosError: as the step's work does, or another process still works on this row.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=LAST_BREATH):
            for step in steps:
                STEPS[step](job, console)
    except Timeout:
        raise BimosError(f"another process works in '{folder}'; let it finish, or end it") from None


def _teacher(model: str) -> dict[str, Any]:
    """Sizes of the teacher, as it is evaluated: 16 bits a parameter."""
    empty = empty_model(load_config(model))
    convertible_linears(empty)
    parameters = sum(p.numel() for name, p in empty.named_parameters() if name not in empty.all_tied_weights_keys)
    sizes = {"total_bytes": 2 * parameters, "original_bytes": 2 * parameters, "compression": 1.0, "parameters": parameters}
    return {"model": model, "method": None, **sizes, "body_bits_per_weight": 16.0, "bits_per_parameter": 16.0, "stages": []}
