"""From a teacher to a packed checkpoint: what a run is, its stages, and picking up where a killed run stopped.

While a run works, its state lies in the folder `work` of the output directory; see `bimos.resume`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
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
from transformers import PreTrainedModel
from transformers.integrations import get_available_reporting_integrations

from bimos.config import RunConfig
from bimos.devices import chosen_device
from bimos.errors import BimosError
from bimos.evaluation.perplexity import maximum_context, perplexity
from bimos.evaluation.report import write_report
from bimos.evaluation.texts import load_text
from bimos.evaluation.versions import provenance, write_json
from bimos.kernels import native
from bimos.methods import MethodConfig, method_config
from bimos.models import convertible_linears, empty_model, load_config, load_teacher, load_tokenizer
from bimos.packing.checkpoint import check_output, save_packed
from bimos.packing.embedding import quantize_embeddings
from bimos.packing.hf import pack_model, restore_rotary
from bimos.packing.sizes import size_report
from bimos.processes import ALONE, Processes, are_several, current
from bimos.resume import WORK, check_same_run, fingerprint, read_run, remembered, settle
from bimos.stages import gathered, train
from bimos.training.estimate import peak_memory
from bimos.training.mapped import load_mapped
from bimos.training.progress import Progress
from bimos.training.sources import parse_sources

DEFAULT_MINUTES = 60.0


def plan(model: str | Path, config: RunConfig) -> dict[str, Any]:
    """Size of the result and peak memory of every stage, from the model's config alone.

    Raises:
        BimosError: no such model or method, or a model that cannot be binarized.
    """
    method = method_config(config.method, config.options)
    empty = empty_model(load_config(model))
    names = convertible_linears(empty, config.skip)
    sizes = size_report(empty, layout=method.packed_layout, converted=list(names), embedding_bits=config.embedding_bits)
    return {"model": str(model), "method": config.method, **sizes, "peak_memory_bytes": peak_memory(empty, config)}


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
        raise BimosError("bimos.quantize works in one process; with several, run `bimos quantize` or bimos.run")
    values = {"method": method.name, "options": method.to_dict(), "data": data, **options}
    config = _with_budget(RunConfig.from_dict(values, "bimos.quantize"), method)
    if isinstance(model, PreTrainedModel):
        if config.low_memory:  # which gives back pages: what was changed in memory would be lost
            raise BimosError("low_memory reads a model from its files: give a directory or a Hub id, not a model that is loaded")
        teacher, tokenizer = model, tokenizer or load_tokenizer(str(model.name_or_path))
        place = teacher.device if device is None else chosen_device(device, ALONE)
    else:
        place = chosen_device(device or "cpu", ALONE)
        teacher, found = _load(model, config, place)
        tokenizer = tokenizer or found
    _check_low_memory(config)
    _check_fit(teacher, method, config)
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
    packed = pack_model(student.cpu(), method=config.method, options=method.to_dict(), embedding_bits=config.embedding_bits, dtype=dtype)
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
    config, evaluate = processes.first(functools.partial(_settled, model, output, config, resume, overwrite, evaluate))
    method = method_config(config.method, config.options)
    for size, key in ((config.blocks.batch_size, "blocks.batch_size"), (config.distill.batch_size, "distill.batch_size")):
        processes.divided(size, key)
    if processes.count > 1 and any(source.kind == "self" for source in parse_sources(config.data)):
        raise BimosError("text of 'self' is written by one process; write it with `bimos quantize` in one, or give other --data")
    teacher, tokenizer = _load(model, config, device)
    _check_fit(teacher, method, config)
    facts = {"model": str(model), "weights": fingerprint(teacher), "config": config.to_dict(), "evaluate": list(evaluate)}
    processes.first(lambda: _write_run(output, facts, resume))
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

    def finish() -> dict[str, Any]:
        teacher, student = models or gathered(_load(model, config, torch.device("cpu"))[0], method, config, work)
        return _finish(teacher.cpu(), student.cpu(), tokenizer, output, config, facts, stages, began, console)

    return processes.first(finish)


def _finish(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: Any,
    output: Path,
    config: RunConfig,
    facts: dict[str, Any],
    stages: list[dict[str, Any]],
    began: float,
    console: Console | None,
) -> dict[str, Any]:
    """Pack, measure and save what was trained; the result."""
    model, evaluate, work, method = facts["model"], facts["evaluate"], output / WORK, method_config(config.method, config.options)
    quality: dict[str, Any] = {}
    student = pack_model(student, method=config.method, options=method.to_dict(), embedding_bits=16, dtype=torch.bfloat16)
    change = _embedding_change(student, tokenizer, evaluate, config.embedding_bits)
    with Progress(console) as progress:
        for name in evaluate:
            text = load_text(name)
            for role, subject in (("value", student), ("teacher", teacher)):
                progress.begin(f"perplexity of {text.label}, {'student' if role == 'value' else 'teacher'}", 1)
                measured = perplexity(subject, tokenizer, text, progress=lambda done, total, _: progress.set(done / total))
                quality.setdefault(name, measured.to_dict() if role == "value" else {})
                quality[name][role] = measured.value
    card = {
        "base_model": model,
        "recipe": {
            key: value
            for key, value in config.to_dict().items()
            if key in ("data", "sequence_length", "seed", "initialise", "blocks", "distill", "loss")
        },
        "budget": {stage["name"]: f"{stage['tokens']:,} tokens, {stage['seconds'] / 60:.1f} minutes" for stage in stages},
        "perplexity": quality,
        "versions": provenance()["versions"],
    }
    save_packed(student, tokenizer, output, overwrite=True, card=card)
    result = {
        "model": model,
        "method": config.method,
        "config": config.to_dict(),
        **size_report(output),
        "stages": stages,
        "perplexity": quality,
        **change,
        **provenance(),
        "seconds": time.monotonic() - began,
    }
    write_json(output / "result.json", result)
    write_report(output / "report.html", result)
    for log in work.glob("distill/runs/*"):  # TensorBoard's
        (output / "runs").mkdir(exist_ok=True)
        log.replace(output / "runs" / log.name)
    (work / "run.json").unlink(missing_ok=True)  # first: work without it is not taken for a run to resume
    shutil.rmtree(work, ignore_errors=True)
    return result


def _settled(
    model: str | Path, output: Path, config: RunConfig | None, resume: bool, overwrite: bool, evaluate: Sequence[str]
) -> tuple[RunConfig, list[str]]:
    """What a run is to do, all of it checked that can be without its model, and an output directory that may be written."""
    work = output / WORK
    settle(output)
    if resume:
        evaluate = evaluate or read_run(output)["evaluate"]
        config = config or RunConfig.from_dict(remembered(output), str(work / "run.json"))
    config = config or RunConfig()
    config = _with_budget(config, method_config(config.method, config.options))
    if not config.data:
        raise BimosError("no training text: give --data a txt, jsonl or parquet file, a Hub dataset, or 'self'")
    _check_low_memory(config, evaluate)
    for name in evaluate:
        load_text(name)  # before the work, not after it
    if resume:
        check_same_run(output, read_run(output), str(model), config)
        return config, list(evaluate)
    if (work / "run.json").exists() and not overwrite:
        raise BimosError(f"'{output}' is not empty: it holds an interrupted run; --resume goes on with it, --overwrite starts anew")
    texts = [file for source in parse_sources(config.data) for file in source.files]
    check_output(output, overwrite, [model, *texts, *evaluate])
    if work.exists() and not (work / "run.json").exists():
        raise BimosError(f"'{work}' is where the run would keep its work, and holds something else; name another output directory")
    return config, list(evaluate)


def _write_run(output: Path, facts: dict[str, Any], resume: bool) -> None:
    """Leave what the run is in its work folder. Raises BimosError: one to resume is of other weights, or there is no writing."""
    work = output / WORK
    if resume and read_run(output)["weights"] != facts["weights"]:
        raise BimosError(f"'{facts['model']}' has other weights than the run in '{output}' was started with; start anew with --overwrite")
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BimosError(f"cannot write to '{output}': {error.strerror}; name another output directory") from None
    write_json(work / "run.json", facts)


def _with_budget(config: RunConfig, method: MethodConfig) -> RunConfig:
    """The config, with the method's rate, and the default's minutes where something is trained and neither minutes nor tokens are given.

    Raises:
        BimosError: see `RunConfig.settled`.
    """
    settled = config.settled(method)
    endless = config.tokens is None and config.minutes is None and bool(settled.blocks.enabled or settled.distill.enabled)
    distill = dataclasses.replace(config.distill, lr_latent=settled.distill.lr_latent)
    return dataclasses.replace(config, minutes=DEFAULT_MINUTES if endless else config.minutes, distill=distill)


def _load(model: str | Path, config: RunConfig, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """Teacher, on `device` unless it stays in its files, and tokenizer."""
    if config.low_memory:
        return load_mapped(model, native.fast_dtype(torch.bfloat16, device))
    teacher, tokenizer = load_teacher(model, None if device.type == "cpu" else torch.bfloat16)
    return teacher.to(device), tokenizer  # type: ignore[arg-type]


def _check_low_memory(config: RunConfig, evaluate: Sequence[str] = ()) -> None:
    """Raises BimosError: what would need the whole teacher at once."""
    if config.low_memory and evaluate:
        raise BimosError(
            "--low-memory does not hold the whole model, and --ppl measures it: leave --ppl out, and use bimos eval afterwards"
        )
    if config.low_memory and any(source.kind == "self" for source in parse_sources(config.data)):
        raise BimosError("--low-memory does not hold the whole model, which would have to write the text of 'self'; give other --data")


def _working_dtype(teacher: PreTrainedModel, device: torch.device) -> torch.dtype:
    """What to train in. Not float16, in which gradients of a loss per token vanish."""
    dtype = torch.bfloat16 if teacher.dtype == torch.float16 else teacher.dtype
    return native.fast_dtype(dtype, device)


def _check_fit(teacher: PreTrainedModel, method: MethodConfig, config: RunConfig) -> None:
    """Raises BimosError on whatever would end the run only after much work."""
    for name, linear in convertible_linears(teacher, config.skip).items():
        try:
            method.packed_layout(linear.in_features, linear.out_features, linear.bias is not None)
        except BimosError as error:
            raise BimosError(f"'{name}': {error}") from None
    limit = maximum_context(teacher)
    if limit is not None and config.sequence_length > limit:
        raise BimosError(f"sequence_length={config.sequence_length} is more than this model can take; set it to {limit} or less")
    known = get_available_reporting_integrations()
    if config.distill.report_to not in ("none", "all", *known):
        raise BimosError(f"distill.report_to={config.distill.report_to}: unknown or not installed; here: {', '.join(['none', *known])}")


def _embedding_change(student: PreTrainedModel, tokenizer: Any, evaluate: Sequence[str], bits: int) -> dict[str, Any]:
    """Take the embeddings to `bits`, in place, and say what that did to the perplexity of the first text's first windows."""
    if bits == 16:
        return {}
    before = perplexity(student, tokenizer, load_text(evaluate[0]), windows=4) if evaluate else None
    quantize_embeddings(student)
    student.config.quantization_config.embedding_bits = bits
    if before is None:
        return {}
    after = perplexity(student, tokenizer, load_text(evaluate[0]), windows=4)
    return {"embedding": {"bits": bits, "windows": before.windows, "perplexity_16_bits": before.value, "perplexity": after.value}}


__all__ = ["plan", "quantize", "run"]
