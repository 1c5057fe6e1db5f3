"""Recipes of distillation against each other: the same start, the same windows in the same order.

    python benchmarks/recipes/arms.py MODEL --data MIX --tokens 60000 -o build/arms \
        --arms binarymos,binarymos:distill.lr_latent=4e-4,binarymos:distill.expert_share=1

Arms are named as rows of `bimos compare` are. Those that differ in `distill.*` alone share their start and blocks, which are made once;
an arm that was killed goes on. Told are, against the first arm: losses of the last quarter, step by step (of
long runs every second or third step); perplexity on windows of 2048
tokens of WikiText-2 validation and C4, window by window; and by how much the student is above the teacher at places of a window.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from bimos.comparison.rows import Row, parse_rows
from bimos.config import RunConfig, decided
from bimos.evaluation.mode import evaluating
from bimos.evaluation.texts import load_text
from bimos.evaluation.versions import provenance, write_json
from bimos.kernels import native
from bimos.methods import method_config
from bimos.models import load_teacher
from bimos.resume import fingerprint
from bimos.stages import train

CONTEXT = 2048
PLACES = ((16, 128), (128, 256), (256, 512), (512, 1024), (1024, CONTEXT - 1))


def start(config: RunConfig, teacher: PreTrainedModel, tokenizer: Any, output: Path, console: Console) -> Path:
    """Where the blocks of this config lie, all but its distillation being what counts."""
    values = {key: value for key, value in config.to_dict().items() if key not in ("distill", "tokens", "minutes", "loss")}
    work = output / f"start-{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]}"
    if not (work / "made.json").exists():
        alone = dataclasses.replace(config, tokens=None, distill=dataclasses.replace(config.distill, enabled=False))
        _, stages = train(teacher, tokenizer, alone, work, console)
        write_json(work / "made.json", {"config": values, "stages": stages})
    return work / "blocks"


def run(row: Row, teacher: PreTrainedModel, tokenizer: Any, output: Path, console: Console) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The student of an arm, and the report of its distillation."""
    assert row.config is not None
    blocks = start(row.config, teacher, tokenizer, output, console)
    work = output / row.slug
    work.mkdir(exist_ok=True)
    if not (work / "blocks").exists():
        (work / "blocks").symlink_to(blocks.resolve())
    student, stages = train(teacher, tokenizer, row.config, work, console)
    return student, stages[-1]


@torch.no_grad()
def losses(model: PreTrainedModel, tokenizer: Any, name: str, windows: int) -> Tensor:
    """Cross-entropy `[windows, 2047]` in nats."""
    ids = tokenizer(load_text(name).text, return_tensors="pt", verbose=False).input_ids[0]
    with evaluating(model):
        return torch.stack([_losses(model, ids[w * CONTEXT : (w + 1) * CONTEXT]) for w in range(windows)])


def _losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=native.fast_dtype(torch.bfloat16) == torch.bfloat16):  # as in training
        logits = model(ids[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none")


def differences(values: Tensor) -> dict[str, float | None]:
    """Mean and standard error."""
    return {"mean": values.mean().item(), "stderr": values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None}


def described(found: Tensor, its: Tensor, first: Tensor) -> dict[str, Any]:
    """An arm's losses against the teacher's and the first arm's."""
    gaps = found - its
    return {
        "times_teacher": gaps.mean().exp().item(),
        "nats_above_first": differences((found - first).mean(1)),
        "nats_above_teacher": {f"{a}-{b}": gaps[:, a:b].mean().item() for a, b in PLACES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--arms", required=True, type=lambda text: text.split(","))
    parser.add_argument("--tokens", type=int, default=60_000, help="of distillation")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--texts", type=lambda text: text.split(","), default=["wikitext2-validation", "c4"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    shared = {"data": given.data, "tokens": given.tokens, "minutes": None, "seed": given.seed, "embedding_bits": 8}
    rows = parse_rows(given.arms, {}, shared)
    for row in rows:
        if row.config is None or not decided(row.config.distill.enabled, method_config(row.config.method).trained):
            parser.error(f"'{row.name}' is not distilled, and arms differ in their distillation")
    given.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    teacher, tokenizer = load_teacher(given.model)
    settings = {"model": fingerprint(teacher), **{key: getattr(given, key) for key in ("data", "tokens", "seed", "windows", "texts")}}
    asked = given.output / "settings.json"
    if asked.exists() and json.loads(asked.read_text(encoding="utf-8")) != settings:
        parser.error(f"the arms in '{given.output}' were run with other settings ({asked}); name another directory")
    write_json(asked, settings)
    kept = given.output / "losses"
    kept.mkdir(exist_ok=True)
    results: dict[str, Any] = {}
    for row in rows:
        finished = kept / f"{row.slug}.pt"
        if not finished.exists():
            student, report = run(row, teacher, tokenizer, given.output, console)
            texts = {name: losses(student, tokenizer, name, given.windows) for name in given.texts}
            torch.save({"report": report, "texts": texts}, finished)
            del student
    if not (kept / "teacher.pt").exists():
        torch.save({name: losses(teacher, tokenizer, name, given.windows) for name in given.texts}, kept / "teacher.pt")
    its, found = torch.load(kept / "teacher.pt"), {row.name: torch.load(kept / f"{row.slug}.pt") for row in rows}
    first = found[rows[0].name]
    for name, arm in found.items():
        steps = torch.tensor(arm["report"]["history"])[:, 1], torch.tensor(first["report"]["history"])[:, 1]
        alike = len(steps[0]) == len(steps[1])
        results[name] = {
            "tokens_per_second": arm["report"]["tokens_per_second"],
            "last_quarter_above_first": differences((steps[0] - steps[1])[-max(1, len(steps[0]) // 4) :]) if alike else None,
            **{text: described(arm["texts"][text], its[text], first["texts"][text]) for text in given.texts},
        }
    write_json(given.output / "arms.json", {"settings": settings, "arms": results, **provenance()})
    console.print_json(json.dumps(results))


if __name__ == "__main__":
    main()
