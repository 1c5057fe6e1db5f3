"""The three stages of a run, in order, with their budget: text, blocks, distillation."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from bimos.config import RunConfig
from bimos.errors import BimosError
from bimos.evaluation.versions import write_json
from bimos.memory import kept, peak_bytes, reset_peak
from bimos.methods import MethodConfig, method_config
from bimos.processes import ALONE, Processes
from bimos.resume import check_same_text
from bimos.training.blockfiles import load_blocks
from bimos.training.blockwise import reconstruct_blocks
from bimos.training.budget import Budget
from bimos.training.checkpoints import checkpoints
from bimos.training.data import TokenStream
from bimos.training.distillation import NumberedWindows
from bimos.training.endtoend import distill
from bimos.training.progress import Progress
from bimos.training.sources import parse_sources
from bimos.training.student import load_tensors, load_trained, uninitialised_student
from bimos.training.teacher import TopKCache, discard_other

ENDLESS = 10**9  # windows of a stage whose end the clock decides
SHORT = 3  # times that calibration may read a text to its end without a warning


def train(
    teacher: PreTrainedModel,
    tokenizer: Any,
    config: RunConfig,
    work: Path,
    console: Console | None,
    started: float | None = None,
    processes: Processes = ALONE,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """The three stages; everything that survives a restart lies in `work`.

    Args:
        device: where to train; None: where the teacher is.

    Returns:
        The trained student and the stages' reports. Behind the distillation of several processes the student is in parts: `gathered`.

    Raises:
        BimosError: text that is none, or another than before a restart; no room for what the disk is to hold; a loss that is not finite.
    """
    started = time.monotonic() if started is None else started
    method = method_config(config.method, config.options)
    config = config.settled(method)
    length = config.sequence_length
    stream = TokenStream(config.data, tokenizer, length, config.seed, work / "tokens", teacher=teacher)
    processes.first(lambda: check_same_text(stream, work / "text.json"))
    calibration = _whole_batches(config.blocks.tokens // length, config.blocks.batch_size)
    if not config.blocks.enabled:  # a start from weights alone needs text for no more than to say how far off its blocks are
        reads = config.initialise.activation_aware and (config.initialise.refit or method.uses_inputs)
        calibration = _whole_batches(config.initialise.sequences if reads else 1, config.blocks.batch_size)
    with Progress(console) as progress:
        progress.begin("reading text", 1)
        processes.first(lambda: stream.prepare(calibration, lambda done, total: progress.set(done / max(total, 1))))
        if config.blocks.enabled or config.distill.enabled:
            processes.first(lambda: _warn_of_short_text(stream, calibration))
        windows = stream.batch(0, calibration)
        check_vocabulary(teacher, windows)
        total = None if config.minutes is None else 60 * config.minutes
        overhead = processes.agreed(time.monotonic() - started)
        seconds = None
        if total is not None and config.blocks.enabled:
            seconds = total * config.blocks.share if config.distill.enabled else max(1.0, total - overhead)
        count, distinct = _windows_of_distillation(config)
        cache = _logit_cache(work, min(distinct or count, count), teacher, config, processes)  # its room is taken before the work
        report = reconstruct_blocks(teacher, windows, method, config, work / "blocks", progress, seconds, processes, device)
        # All latents at once are more than blocks one by one: only what trains them needs the room of a GPU.
        student = uninitialised_student(teacher, method, config.skip, None if config.distill.enabled else torch.device("cpu"))
        load_blocks(student, work / "blocks")
        stages = [report]
        if config.distill.enabled:
            reset_peak()
            # Whichever is more: blocks of an earlier process, or what this one has also done between the stages.
            spent = processes.agreed(max(report["seconds"] + overhead, time.monotonic() - started))
            budget = Budget(tokens=config.tokens) if total is None else Budget(seconds=_limit(work, max(1.0, total - spent), processes))
            data = NumberedWindows(stream.as_dataset(calibration, count), count, distinct, config.seed)
            options = config.distill
            if any(source.kind == "self" for source in parse_sources(config.data)):
                options = dataclasses.replace(options, int8_teacher=False)  # it goes on writing: the same text whoever writes when
            given = student, teacher, data, length, options, budget, work / "distill", progress, cache, config.seed, config.loss
            with kept():  # around all of it: what the trainer holds is free before the heap is given back
                report = distill(*given, processes)
            seen = -(-report["tokens"] // length)
            read = stream.rounds(calibration + (seen if distinct is None else min(seen, distinct)))
            stages.append(
                {**report, "peak_memory_bytes": peak_bytes(), "text_rounds": read}
            )  # how often each text was read; 0: not to its end
    return student, stages  # type: ignore[return-value]


def _windows_of_distillation(config: RunConfig) -> tuple[int, int | None]:
    """How many windows are seen, and how many of them differ (None: all)."""
    length, steps = config.sequence_length, config.distill.batch_size * config.distill.accumulate
    count = ENDLESS if config.tokens is None else _whole_batches(-(-config.tokens // length), steps)
    again = config.distill.distinct_tokens
    return count, None if again is None else _whole_batches(-(-again // length), steps)


def _logit_cache(work: Path, windows: int, teacher: PreTrainedModel, config: RunConfig, processes: Processes) -> TopKCache | None:
    """The cache of the teacher's logits, if the config asks for one. One of options that a restart has changed makes room.

    Raises:
        BimosError: the disk has no room for it.
    """
    directory, wanted = work / "logits", bool(config.distill.enabled) and config.distill.teacher == "cached"
    vocabulary = teacher.config.get_text_config().vocab_size
    shape = {"windows": windows, "length": config.sequence_length, "k": min(config.distill.top_k, vocabulary), "vocabulary": vocabulary}

    def make() -> None:
        if not checkpoints(work / "distill"):  # until there is one, options of distillation may change
            discard_other(directory, shape if wanted else None)
        if wanted:
            TopKCache(directory, **shape).close()

    processes.first(make)  # made by one; opened by all
    return TopKCache(directory, **shape) if wanted else None


def gathered(teacher: PreTrainedModel, method: MethodConfig, config: RunConfig, work: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The teacher, and the student as the newest checkpoint of the distillation has it."""
    student = uninitialised_student(teacher, method, config.skip)
    load_blocks(student, work / "blocks")
    tensors, _ = load_tensors(checkpoints(work / "distill")[-1] / "trained.safetensors")
    load_trained(student, {name.removeprefix("student."): tensor for name, tensor in tensors.items()})
    return teacher, student  # type: ignore[return-value]


def _warn_of_short_text(stream: TokenStream, calibration: int) -> None:
    for name, rounds in stream.rounds(calibration).items():
        if rounds > SHORT:
            advice = "a model learns so little by heart; give more text"
            warnings.warn(f"data '{name}' is short: blocks alone are calibrated on {rounds:.0f} times its length; {advice}", stacklevel=2)


def _limit(work: Path, seconds: float, processes: Processes) -> float:
    """What distillation was given when it first began: a restart neither adds to it nor moves the learning rate."""
    path = work / "limit.json"

    def settle() -> float:
        if not path.exists():
            write_json(path, {"seconds": seconds})
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])

    return processes.first(settle)


def check_vocabulary(teacher: PreTrainedModel, windows: torch.Tensor) -> None:
    """Raises BimosError: a token that the model has no row for."""
    rows, largest = teacher.get_input_embeddings().weight.shape[0], int(windows.max())  # type: ignore[index]
    if largest >= rows:
        raise BimosError(f"the tokenizer gives token {largest}, and the model's embedding has {rows} rows; use the model's own tokenizer")


def _whole_batches(windows: int, batch: int) -> int:
    """The next multiple of the batch: no stage sees a batch of another size."""
    return batch * max(1, -(-windows // batch))
