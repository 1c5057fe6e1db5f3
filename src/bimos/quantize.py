"""From a teacher to a packed checkpoint: what a run is, its stages, and picking up where a killed run stopped.

While a run works, its state lies in the folder `work` of the output directory; see `bimos.resume`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, Trainer

from bimos.config import RunConfig
from bimos.devices import chosen_device
from bimos.errors import BimosError
from bimos.finishing import finish
from bimos.kernels import native
from bimos.methods import MethodConfig, method_config
from bimos.models import convertible_linears, empty_model, load_config, load_teacher, load_tokenizer, refuse_quantized
from bimos.packing.pack import pack_model, restore_rotary
from bimos.packing.sizes import size_report
from bimos.processes import ALONE, Processes, are_several, current
from bimos.resume import WORK, fingerprint, held
from bimos.settling import check_fit, check_low_memory, lean_options, settled_run, with_budget, write_run
from bimos.stages import gathered, train
from bimos.training.estimate import peak_memory
from bimos.training.mapped import load_mapped
from bimos.training.sources import parse_sources


def plan(model: str | Path, config: RunConfig, processes: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Size of the result and peak memory of every stage, from the model's config alone.

    Args:
        processes: between which the work is to be divided; memory is that of each.
        device: where they are to train, `cpu` or `cuda`: whose memory it is.

    Raises:
        BimosError: no such model or method, or a model that cannot be binarized.
    """
    method = method_config(config.method, config.options)
    known = load_config(model)
    refuse_quantized(known, model)
    empty = empty_model(known)
    check_fit(empty, method, config.settled(method))
    names = convertible_linears(empty, config.skip)
    sizes = size_report(empty, layout=method.layout_of, converted=list(names), embedding_bits=config.embedding_bits)
    return {
        "model": str(model),
        "method": config.method,
        **sizes,
        "processes": processes,
        "peak_memory_bytes": peak_memory(empty, config, processes, device),
    }


def quantize(
    model: str | Path | PreTrainedModel,
    method: MethodConfig,
    *,
    data: str,
    tokenizer: Any = None,
    console: Console | None = None,
    device: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Binarize a model in memory: `bimos.quantize(model, BinaryMoSConfig(num_experts=4), data="wiki.txt", minutes=30)`.

    Args:
        model: Hub id, directory, `.gguf` file, or a loaded model, which is left as it is.
        method: which method, with its options.
        data: see `bimos.training.sources`.
        tokenizer: of a loaded model; by default the one found under the model's name.
        device: where to train, `cpu` or `cuda`; None: where a loaded model is, else the CPU. The packed model comes back there.
        options: fields of `RunConfig`, such as `tokens`, `minutes` (an hour, if neither is given), `seed`, `distill={"lr_latent": 1e-3}`.

    Returns:
        The packed model, ready for `generate` and `save_pretrained`.

    Raises:
        BimosError: see `run`.
    """
    if are_several():
        raise BimosError("bimos.quantize works in one process; with several, run `bimos quantize`")
    values = {"method": method.name, "options": method.to_dict(), "data": data, **options}
    config = with_budget(RunConfig.from_dict(values, "bimos.quantize"), method)
    if isinstance(model, PreTrainedModel):
        if config.low_memory:  # which gives back pages: what was changed in memory would be lost
            raise BimosError("low_memory reads a model from its files: give a directory or a Hub id, not a model that is loaded")
        if tokenizer is None and not model.name_or_path:
            raise BimosError("this model has no name to find a tokenizer under: give bimos.quantize a tokenizer")
        teacher, tokenizer = model, tokenizer or load_tokenizer(str(model.name_or_path))
        place = teacher.device if device is None else chosen_device(device, ALONE)
    else:
        place = chosen_device(device or "cpu", ALONE)
        teacher, found = _load(model, config, place)
        tokenizer = tokenizer or found
    check_low_memory(config)
    check_fit(teacher, method, config)
    dtype = teacher.dtype if isinstance(model, PreTrainedModel) else torch.bfloat16
    working, was_training = _working_dtype(teacher, place), teacher.training
    if (teacher.dtype, teacher.device) != (working, place) and not config.low_memory:  # mapped: block by block
        teacher = copy.deepcopy(teacher)
        restore_rotary(teacher)  # widened, frequencies that were rounded would pass for exact ones
        teacher.to(place, working)  # type: ignore[arg-type]
    teacher.eval()  # what it says must not depend on dropout
    try:
        with tempfile.TemporaryDirectory(prefix="bimos-") as work:
            student, _ = train(teacher, tokenizer, config, Path(work), console, device=place)
    finally:
        teacher.train(was_training)
    facts: dict[str, Any] = {"method": config.method, "options": method.to_dict(), "embedding_bits": config.embedding_bits}
    name = str(model.name_or_path if isinstance(model, PreTrainedModel) else model)
    packed = pack_model(student.cpu(), **facts, dtype=dtype, card={"base_model": name} if name else None)
    return packed.to(place)  # type: ignore[arg-type]


def run(
    model: str | Path,
    output: str | Path,
    config: RunConfig | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    evaluate: Sequence[str] = (),
    device: str = "cpu",
) -> dict[str, Any]:
    """Binarize `model` into the directory `output`; the work behind `bimos quantize`.

    Args:
        config: None with `resume` continues with the config that the run was started with.
        evaluate: texts on which to measure the perplexity of teacher and student (see `bimos.evaluation.texts`).
        device: where to train, `cpu` or `cuda`; packing and measuring are done on the CPU.

    Returns:
        The result as in the JSON of `bimos quantize`; also left as `result.json` and `report.html` in `output`.

    Raises:
        BimosError: bad input, an output that may not be written, or a run to resume that is not there or is another; another process
            of this run has ended.
    """
    processes = current(device)
    with processes.guarded():
        console = console if processes.is_first else None
        place = chosen_device(device, processes)
        with held(Path(output)) if processes.is_first else contextlib.nullcontext():
            return _run(model, Path(output).expanduser(), config, resume, overwrite, console, evaluate, processes, place)


def _run(
    model: str | Path,
    output: Path,
    config: RunConfig | None,
    resume: bool,
    overwrite: bool,
    console: Console | None,
    evaluate: Sequence[str],
    processes: Processes,
    device: torch.device,
) -> dict[str, Any]:
    began = time.monotonic()
    work = output / WORK
    config, evaluate = processes.first(functools.partial(settled_run, model, output, config, resume, overwrite, evaluate))
    method = method_config(config.method, config.options)
    for size, key in ((config.blocks.batch_size, "blocks.batch_size"), (config.distill.batch_size, "distill.batch_size")):
        processes.divided(size, key)
    if processes.count > 1 and lean_options(config):
        raise BimosError(f"{lean_options(config)[0]} is for one process; leave it out: several divide moments and latents between them")
    if processes.count > 1 and any(source.kind == "self" for source in parse_sources(config.data)):
        raise BimosError("text of 'self' is written by one process; write it with `bimos quantize` in one, or give other --data")
    if processes.count > 1 and not hasattr(Trainer, "_defer_fsdp_gradient_reduction"):
        raise BimosError(
            "several processes need transformers 5.23 or newer, whose Trainer leaves weights divided: pip install -U transformers"
        )
    teacher, tokenizer = _load(model, config, device)
    check_fit(teacher, method, config)
    facts = {"model": str(model), "weights": fingerprint(teacher), "config": config.to_dict(), "evaluate": list(evaluate)}
    processes.first(lambda: write_run(output, facts, resume))
    try:
        student, stages = train(teacher, tokenizer, config, work, console, began, processes, device)
    except (BimosError, RuntimeError):
        if processes.is_first and not any(work.glob("tokens/*/tokens.bin")):  # a false start: nothing to resume, so nothing in the way
            shutil.rmtree(work, ignore_errors=True)
            with contextlib.suppress(OSError):
                output.rmdir()
        raise
    in_parts = processes.count > 1 and bool(config.settled(method).distill.enabled)
    models = None if in_parts else (teacher, student)
    del teacher, student
    if in_parts:
        gc.collect()  # parts refer to each other; the first process needs the room, and others may be on its machine

    def last() -> dict[str, Any]:
        teacher, student = models or gathered(_load(model, config, torch.device("cpu"))[0], method, config, work)
        return finish(teacher.cpu(), student.cpu(), tokenizer, output, config, facts, stages, began, console)

    return processes.first(last)


def _load(model: str | Path, config: RunConfig, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """Teacher, on `device` unless it stays in its files, and tokenizer."""
    if config.low_memory:
        return load_mapped(model, native.fast_dtype(torch.bfloat16, device))
    teacher, tokenizer = load_teacher(model, None if device.type == "cpu" else torch.bfloat16)
    return teacher.to(device), tokenizer  # type: ignore[arg-type]


def _working_dtype(teacher: PreTrainedModel, device: torch.device) -> torch.dtype:
    """What to train in. Not float16, in which gradients of a loss per token vanish."""
    dtype = torch.bfloat16 if teacher.dtype == torch.float16 else teacher.dtype
    return native.fast_dtype(dtype, device)


__all__ = ["plan", "quantize", "run"]
