"""What training costs on this machine: tokens/s and peak memory of block reconstruction and of end-to-end distillation, where
their time goes, and what the machine's matrix products alone would allow.

    python benchmarks/cost.py MODEL --data FILE -o benchmarks/results/cost.json

Each stage runs in a process of its own, so that its peak is its own: once untouched for speed and memory, once under the profiler for
shares. Same teacher, text, batch (4 x 512 by default) and optimizer (AdamW, float32 states) in both stages.

Block reconstruction has the whole teacher and as many windows as `bimos quantize` gives it, and ends behind a few blocks, which the
others are like. `tokens_per_second` is of gradient steps alone; `tokens_per_second_with_starts` has blocks' starts in it too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig

from bimos.config import RunConfig
from bimos.evaluation.versions import provenance, write_json
from bimos.kernels import native
from bimos.memory import kept, peak_bytes, reset_peak
from bimos.methods import InputStatistics, method_config
from bimos.models import convertible_linears, decoder_blocks, load_teacher
from bimos.training.blockwise import reconstruct_blocks
from bimos.training.budget import Budget
from bimos.training.data import TokenStream
from bimos.training.distillation import NumberedWindows
from bimos.training.endtoend import distill
from bimos.training.progress import Progress
from bimos.training.student import trainable_layers, uninitialised_student

FEW_BLOCKS = 4  # of block reconstruction; blocks cost the same


class Enough(Exception):
    """All that is to be measured has been."""


class Stopwatch(Progress):
    """Times every step."""

    def __init__(self, steps: int | None = None) -> None:
        super().__init__(None)
        self.began, self.steps = time.perf_counter(), steps
        self.stamps: list[tuple[float, float]] = []

    def tick(self, tokens: float, loss: float | None = None) -> None:
        self.stamps.append((time.perf_counter(), tokens))
        if len(self.stamps) == self.steps:
            raise Enough

    def tokens_per_second(self, skip: int) -> float:
        """Median over steps, the first `skip` and pauses between blocks left out."""
        pairs = list(zip(self.stamps[skip:], self.stamps[skip + 1 :], strict=False))
        return statistics.median(tokens / (t1 - t0) for (t0, _), (t1, tokens) in pairs)


def measure(stage: str, arguments: argparse.Namespace, profiled: bool) -> dict[str, Any]:
    teacher, tokenizer = load_teacher(arguments.model)
    length, batch = arguments.length, arguments.batch
    config = RunConfig(sequence_length=length)
    config.blocks.batch_size = config.distill.batch_size = batch
    config.blocks.epochs, config.distill.checkpoint_minutes = 1, 1e9
    method = method_config(config.method)
    watch = Stopwatch()
    profiler = torch.profiler.profile(experimental_config=_ExperimentalConfig(profile_all_threads=True)) if profiled else None
    with tempfile.TemporaryDirectory() as folder:
        stream = TokenStream(arguments.data, tokenizer, length, 0, Path(folder) / "tokens")
        if stage == "blocks":
            steps = arguments.steps if profiled else config.blocks.tokens // (batch * length)
            windows = stream.batch(0, batch * steps)
            watch = Stopwatch(FEW_BLOCKS * steps)
            reset_peak()
            if profiler:
                profiler.start()
            with suppress(Enough):
                reconstruct_blocks(teacher, windows, method, config, Path(folder) / "blocks", watch, None)
        else:
            student = uninitialised_student(teacher, method, [])
            for name, layer in trainable_layers(student):
                known = InputStatistics.uninformed(layer.in_features)
                start = method.layer.from_linear(teacher.get_submodule(name), method, known, torch.Generator())  # type: ignore[arg-type]
                layer.load_state_dict(start.state_dict())
            count = batch * arguments.steps
            reset_peak()
            if profiler:
                profiler.start()
            data = NumberedWindows(stream.as_dataset(0, count), count, None, 0)
            with kept():
                distill(student, teacher, data, length, config.distill, Budget(tokens=count * length), Path(folder) / "distill", watch)
    if profiler:
        profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            own = own_seconds(json.loads(trace.read_text())["traceEvents"])
        total = sum(own.values())
        ranked = sorted(own.items(), key=lambda item: -item[1])[:20]
        return {"share_of_time": {name: round(seconds / total, 4) for name, seconds in ranked}}
    result = {"tokens_per_second": watch.tokens_per_second(2), "peak_memory_bytes": peak_bytes(), "steps": len(watch.stamps)}
    if stage == "blocks":
        result["tokens_per_second_with_starts"] = sum(tokens for _, tokens in watch.stamps) / (watch.stamps[-1][0] - watch.began)
    return result


def own_seconds(events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by operator, those of the operators that it calls left out; all threads together.

    From the trace's file: the profiler's own sums take minutes for as many events as a step of a model has.
    """
    own: dict[str, float] = defaultdict(float)
    open_on: dict[Any, list[tuple[float, str]]] = defaultdict(list)  # per thread: (end, name) of what is running, innermost last
    operators = [event for event in events if event.get("ph") == "X" and event.get("cat") == "cpu_op"]
    for event in sorted(operators, key=lambda event: (event["ts"], -event["dur"])):
        running = open_on[event["tid"]]
        while running and running[-1][0] <= event["ts"]:
            running.pop()
        if running:
            own[running[-1][1]] -= event["dur"] / 1e6
        own[event["name"]] += event["dur"] / 1e6
        running.append((event["ts"] + event["dur"], event["name"]))
    return dict(own)


def products() -> float:
    """FLOP/s of the teacher's largest body linear, 2048 tokens, all threads, in what training computes in; median of 30."""
    dtype = native.fast_dtype(torch.bfloat16)
    x, weight = torch.randn(2048, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - start)
    return 2 * 2048 * 576 * 1536 / statistics.median(times)


def operations(model: str) -> dict[str, float]:
    """FLOPs of the matrix products behind one token of each stage, attention's own left out.

    Distillation: body and head of teacher and student forward, the student's backward to inputs and to body weights (the head is
    frozen). Reconstruction: a block forward and backward.
    """
    teacher, _ = load_teacher(model)
    body = sum(linear.weight.numel() for linear in convertible_linears(teacher, []).values())
    _, blocks = decoder_blocks(teacher)
    return {"blocks": 2 * 3 * body / len(blocks), "distill": 2 * (4 * body + 3 * teacher.get_output_embeddings().weight.numel())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--stage", choices=("blocks", "distill"), help=argparse.SUPPRESS)
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(measure(arguments.stage, arguments, arguments.profiled)))
        return
    result: dict[str, Any] = {
        "model": Path(arguments.model).name,
        "batch": arguments.batch,
        "sequence_length": arguments.length,
        "threads": torch.get_num_threads(),
    }
    needed = operations(arguments.model)
    for stage in ("blocks", "distill"):
        rate = products()  # before every stage: other work on the machine changes it
        result[stage] = {"product_flops_per_second": rate, "tokens_per_second_of_products_alone": rate / needed[stage]}
        # A profile of all steps would be gigabytes; the last of two --steps counts.
        for extra in ([], ["--profiled", "--steps", "3"]):
            command = [sys.executable, __file__, *sys.argv[1:], "--stage", stage, *extra]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result[stage] |= json.loads(done.stdout.strip().splitlines()[-1])
        print(stage, json.dumps(result[stage], indent=2), flush=True)
    result["memory_ratio"] = result["distill"]["peak_memory_bytes"] / result["blocks"]["peak_memory_bytes"]
    print(f"memory: distillation takes {result['memory_ratio']:.2f} times what block reconstruction takes")
    if arguments.output:
        write_json(arguments.output, result | provenance())


if __name__ == "__main__":
    main()
