"""Distillation on a GPU: tokens/s, the share of the GPU's peak that they come to, and memory, for several batches and options.

    python benchmarks/gpu/training.py -o benchmarks/results/gpu-training.json      # about five minutes
    python benchmarks/gpu/training.py --device cpu --hidden 64 --layers 2 --batches 2 --length 64      # to see that it runs

Teacher and student have the shape of SmolLM2-135M and random weights, the text is random tokens: speed and memory are those of a real run,
losses mean nothing. The peak is what a product of two 8192 x 8192 matrices in bfloat16 reaches here; counted are matrix products alone
(teacher and student forward, the student's backward), without attention's own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from bimos.config import DistillConfig
from bimos.evaluation.versions import provenance, write_json
from bimos.methods import InputStatistics, method_config
from bimos.models import convertible_linears
from bimos.training.budget import Budget
from bimos.training.distillation import NumberedWindows
from bimos.training.endtoend import distill
from bimos.training.progress import Progress
from bimos.training.student import trainable_layers, uninitialised_student

STEPS, WARM = 20, 6  # of every run; the first ones compile and tune
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "adamw8bit, bfloat16 latents": {"optimizer": "adamw8bit", "latents": "bfloat16"},
}


class RandomTokens(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        self.count, self.length, self.vocabulary = count, length, vocabulary

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(self.vocabulary, (self.length,), generator=generator)}


class Stopwatch(Progress):
    """When every step was done: its loss has come back from the GPU by then."""

    def __init__(self) -> None:
        super().__init__(None)
        self.stamps: list[float] = []

    def tick(self, tokens: float, loss: float | None = None) -> None:
        self.stamps.append(time.perf_counter())


def models(arguments: argparse.Namespace) -> tuple[Any, Any]:
    torch.manual_seed(0)
    hidden = arguments.hidden
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden // 3 * 8, num_hidden_layers=arguments.layers, num_attention_heads=hidden // 64 or 1,
        num_key_value_heads=max(1, hidden // 192), vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config).to(arguments.device, torch.bfloat16).requires_grad_(False).eval()
    method = method_config("binarymos")
    student = uninitialised_student(teacher, method, [])
    for name, layer in trainable_layers(student):
        linear: Any = teacher.get_submodule(name)
        start = method.layer.from_linear(
            linear, method, InputStatistics.uninformed(linear.in_features, linear.weight.device), torch.Generator()
        )
        layer.load_state_dict(start.state_dict())
    return teacher, student


def measure(arguments: argparse.Namespace, batch: int, options: dict[str, Any]) -> dict[str, Any]:
    teacher, student = models(arguments)
    on_gpu, length, count = arguments.device == "cuda", arguments.length, batch * STEPS
    config, watch = DistillConfig(batch_size=batch, checkpoint_minutes=1e9, **options), Stopwatch()
    data = NumberedWindows(RandomTokens(count, length, teacher.config.vocab_size), count, None, 0)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        distill(student, teacher, data, length, config, Budget(tokens=count * length), Path(folder), watch)
    seconds = statistics.median(end - start for start, end in zip(watch.stamps[WARM:], watch.stamps[WARM + 1 :], strict=False))
    body = sum(linear.weight.numel() for linear in convertible_linears(teacher, []).values())
    flops = 2 * (4 * body + 3 * teacher.get_output_embeddings().weight.numel())  # a token
    rate = batch * length / seconds
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    return {"tokens_per_second": rate, "flops_per_second": rate * flops, "step_seconds": seconds, "peak_memory_bytes": peak}


def products(device: str) -> float:
    """FLOP/s of a large product in bfloat16, median of ten."""
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batches", default="16,64,128", help="sequences a step")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is visible to torch; --device cpu shows that the script runs")
    peak = products(arguments.device)
    result: dict[str, Any] = {"hidden_size": arguments.hidden, "layers": arguments.layers, "sequence_length": arguments.length}
    result |= {"product_flops_per_second": peak, "runs": []}
    batches = [int(batch) for batch in arguments.batches.split(",")]
    for batch in batches:
        for name, options in OPTIONS.items() if batch == batches[-1] else [("plain", OPTIONS["plain"])]:
            row: dict[str, Any] = {"batch": batch, "options": name}
            try:
                row |= measure(arguments, batch, options)
                row["share_of_peak"] = row["flops_per_second"] / peak
                told = f"{row['tokens_per_second']:,.0f} tokens/s, {row['share_of_peak']:.1%} of the peak"
            except Exception as error:  # one that has no library or no room here is no reason to lose the others
                row["error"] = told = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
            print(f"batch {batch}, {name}: {told}", flush=True)
            result["runs"].append(row)
            if arguments.output:  # after every row: device time may end
                write_json(arguments.output, result | provenance())


if __name__ == "__main__":
    main()
