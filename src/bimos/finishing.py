"""The end of a run: what was trained is packed, measured and saved, and the run's work folder goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from bimos.config import RunConfig
from bimos.evaluation.formatting import embedding_change
from bimos.evaluation.perplexity import perplexity
from bimos.evaluation.report import write_report
from bimos.evaluation.texts import load_text
from bimos.evaluation.versions import provenance, write_json
from bimos.kernels import native
from bimos.methods import method_config
from bimos.packing.checkpoint import save_packed
from bimos.packing.embedding import Int8Embedding, quantize_embeddings
from bimos.packing.pack import pack_model
from bimos.packing.sizes import size_report
from bimos.resume import WORK, discard
from bimos.training.progress import Progress


def finish(
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
    with _widened(student):
        change = _embedding_change(student, tokenizer, evaluate, config.embedding_bits)
    with Progress(console) as progress, _widened(student):
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
        **({"embeddings": embedding_change(change["embedding"])} if change else {}),
        "perplexity": {name: {k: v for k, v in found.items() if k not in ("losses", "text")} for name, found in quality.items()},
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
        "seconds": max(time.monotonic() - began, sum(stage["seconds"] for stage in stages)),  # resumed: `began` is this process's
    }
    write_json(output / "result.json", result)
    write_report(output / "report.html", result)
    for log in work.glob("distill/runs/*"):  # TensorBoard's
        (output / "runs").mkdir(exist_ok=True)
        log.replace(output / "runs" / log.name)
    discard(output)
    return result


@contextmanager
def _widened(student: PreTrainedModel) -> Iterator[None]:
    """Within it, what is kept in bfloat16 is in float32 where that is faster, as the teacher is then: not a value changes."""
    dtype = native.fast_dtype(torch.bfloat16)

    def take(wanted: torch.dtype, held: torch.dtype) -> None:
        for parameter in student.parameters():
            parameter.data = parameter.data.to(wanted) if parameter.dtype == held else parameter.data
        for module in student.modules():
            if isinstance(module, Int8Embedding):  # which goes by a buffer of no length
                module.give(wanted)

    take(dtype, torch.bfloat16)
    try:
        yield
    finally:
        take(torch.bfloat16, dtype)


def _embedding_change(student: PreTrainedModel, tokenizer: Any, evaluate: Sequence[str], bits: int) -> dict[str, Any]:
    """Take the embeddings to `bits`, in place, and say what that did to the perplexity of the first text's first windows."""
    if bits == 16:
        return {}
    before = perplexity(student, tokenizer, load_text(evaluate[0]), windows=4) if evaluate else None
    quantize_embeddings(student)  # exact values whatever they are held in
    student.config.quantization_config.embedding_bits = bits
    if before is None:
        return {}
    after = perplexity(student, tokenizer, load_text(evaluate[0]), windows=4)
    return {"embedding": {"bits": bits, "windows": before.windows, "perplexity_16_bits": before.value, "perplexity": after.value}}
