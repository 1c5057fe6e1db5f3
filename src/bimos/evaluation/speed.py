"""How fast a model reads prompts and decodes, what memory it takes, and what share of the machine's read bandwidth decoding reaches.

Packed models that the engine covers run in it, all others in `transformers`, a loop around the forward pass with greedy choice. Prompts
are random tokens, other ones in every run, so that no beginning is remembered.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from bimos.engine import Engine, refusal, refuse_bits, windows
from bimos.errors import BimosError
from bimos.evaluation.bandwidth import Bandwidth
from bimos.evaluation.perplexity import maximum_context
from bimos.evaluation.runners import EngineRunner, Runner, TransformersRunner, stopwatch
from bimos.kernels import native
from bimos.memory import peak_resident_bytes
from bimos.models import has_experts, load_model
from bimos.packing.embedding import Int8Embedding
from bimos.packing.linear import set_activation

USUAL_PROMPTS = (16, 128, 512)


@dataclasses.dataclass(frozen=True)
class Runs:
    """What is measured: every prompt length with every batch size.

    Raises:
        BimosError: a value that is not positive, or more threads than can be.
    """

    prompts: tuple[int, ...] | None = None  # tokens; None: 16, 128 and 512, as far as the model has room
    batches: tuple[int, ...] = (1, 8)  # sequences side by side
    tokens: int = 64  # decoded behind each prompt
    repeats: int = 5
    threads: int | None = None  # None: as many as torch takes

    def __post_init__(self) -> None:
        prompts = USUAL_PROMPTS if self.prompts is None else self.prompts
        values = {"prompt": prompts, "batch": self.batches, "tokens": (self.tokens,), "repeats": (self.repeats,)}
        for name, given in values.items():
            if not given or min(given) < 1:
                raise BimosError(f"--{name} {','.join(map(str, given))}: must be at least 1")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise BimosError(f"--threads {self.threads}: must be from 1 to 1024")


def fitting(runs: Runs, limit: int | None) -> tuple[int, ...]:
    """The lengths of the prompts, for a model of `limit` positions. Raises BimosError: what was asked for has no room, or none has."""
    room = math.inf if limit is None else limit - runs.tokens - 1
    if runs.prompts is None:
        if found := tuple(length for length in USUAL_PROMPTS if length <= room):
            return found
        raise BimosError(f"--tokens {runs.tokens} leaves no room for a prompt of {USUAL_PROMPTS[0]}: the model has {limit} positions")
    if (longest := max(runs.prompts)) > room:
        raise BimosError(f"--prompt {longest} and --tokens {runs.tokens} take {longest + runs.tokens + 1} positions: the model has {limit}")
    return runs.prompts


def measure(
    source: str | Path, runs: Runs, progress: Callable[[int, int], None] | None = None, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Load a model on the CPU and measure it; a first round is thrown away, figures are medians over the others.

    Args:
        options: of the engine: `head_bits`, `cache_bits`, `activation`.

    Returns:
        `runs_in`, `why` it is not the engine (or None), `threads`, `dtype`, `repeats`; `runs`, a list with a row for every prompt length
        and batch size; `parts`, seconds of a step of one sequence behind the shortest prompt by what they go to, in one thread (None in
        transformers); `bandwidth` as `Bandwidth.result` has it; `memory` in bytes: the process before loading and at its peak (both
        without the buffer of the bandwidth), weights as stored, keys and values of a position and of the longest run.

    Raises:
        BimosError: the model cannot be loaded, or has fewer positions than a run needs.
    """
    before, torch_threads = psutil.Process().memory_info().rss, torch.get_num_threads()
    model = load_model(source)
    prompts = fitting(runs, maximum_context(model))
    longest = max(prompts) + runs.tokens + 1
    config, why = model.config.get_text_config(), refusal(model)
    options = {"head_bits": None, "cache_bits": 16, "activation": "exact"} | (options or {})
    if why:
        refuse_bits(options["head_bits"], options["cache_bits"], why)
        set_activation(model, options["activation"])
    weights = sum(tensor.nbytes for tensor in _tensors(model).values())
    read = None if has_experts(model, model) else bytes_read(model, options["head_bits"])
    result: dict[str, Any] = {"runs_in": "transformers" if why else f"engine, {native.isa()}", "why": why}
    result["dtype"] = str(model.dtype).removeprefix("torch.")
    try:
        torch.set_num_threads(runs.threads or torch_threads)
        result |= {"threads": torch.get_num_threads(), "repeats": runs.repeats}
        runner: Any = TransformersRunner(model) if why else EngineRunner(Engine(model, **options))
        del model
        rounds = _Rounds(runner, runs, prompts, config.vocab_size, progress)
        rounds.run()
        peak = peak_resident_bytes()
        rounds.forget()
        bandwidth = Bandwidth()
        for _ in range(runs.repeats):
            rounds.run()
            bandwidth.sample()
        parts = None if why else rounds.parts()
    finally:
        torch.set_num_threads(torch_threads)
    result |= {"options": options, "parts": parts}
    result["bandwidth"] = speeds = bandwidth.result()
    position = runner.cache_bytes if why else _engine_cache_bytes(config, options["cache_bits"])
    seen = [0] if why else windows(config)
    result["runs"] = []
    for (prompt, batch), (first, step) in rounds.medians().items():
        middle = prompt + (runs.tokens + 1) / 2  # positions that a step in the middle of a run looks at
        cache = batch * position * statistics.mean(min(middle, window or middle) for window in seen)
        rate = None if read is None else (read + cache) / step
        row: dict[str, Any] = {"prompt": prompt, "batch": batch, "tokens": runs.tokens, "first_token_seconds": first, "step_seconds": step}
        row |= {"prefill_tokens_per_second": batch * prompt / first, "decode_tokens_per_second": batch / step}
        row |= {"bytes_per_step": None if read is None else read + cache, "bytes_per_second": rate}
        shares = {name: rate / speeds[name]["bytes_per_second"] if rate and speeds[name] else None for name in ("memory", "cache")}
        result["runs"].append(row | {f"share_of_{name}_bandwidth": share for name, share in shares.items()})
    result["memory"] = {"before_loading": before, "peak": peak, "weights": weights}
    result["memory"] |= {"cache_per_position": position, "cache": position * longest * max(runs.batches)}
    return result


class _Rounds:
    """Every prompt length with every batch size, once a round."""

    def __init__(
        self, runner: Runner, runs: Runs, prompts: tuple[int, ...], vocabulary: int, progress: Callable[[int, int], None] | None
    ) -> None:
        self.runner, self.runs, self.vocabulary, self.progress = runner, runs, vocabulary, progress
        self.generator = torch.Generator().manual_seed(0)
        self.kinds = list(itertools.product(prompts, runs.batches))
        self.done = 0
        self.forget()

    def forget(self) -> None:
        self.firsts: dict[tuple[int, int], list[float]] = {kind: [] for kind in self.kinds}
        self.steps: dict[tuple[int, int], list[float]] = {kind: [] for kind in self.kinds}

    def run(self) -> None:
        for prompt, batch in self.kinds:
            ids = torch.randint(self.vocabulary, (batch, prompt), generator=self.generator).tolist()
            first, *later = stopwatch(self.runner.steps(ids, self.runs.tokens + 1))
            self.firsts[prompt, batch].append(first)
            self.steps[prompt, batch] += later
            self.done += 1
            if self.progress:
                self.progress(self.done, (self.runs.repeats + 1) * len(self.kinds))

    def parts(self) -> dict[str, float]:
        """Seconds of a step of one sequence behind the shortest prompt, by part (`Engine.spent`)."""
        assert isinstance(self.runner, EngineRunner)
        engine, tokens = self.runner.engine, 4 * self.runs.tokens
        shortest = min(prompt for prompt, _ in self.kinds)
        tokens = max(1, min(tokens, engine.config.max_position_embeddings - shortest - 1))
        ids = torch.randint(self.vocabulary, (1, shortest), generator=self.generator).tolist()
        steps = self.runner.steps(ids, tokens + 1)
        next(steps)
        engine.spent(go_on=True)
        count = sum(1 for _ in steps)
        return {name: seconds / count for name, seconds in engine.spent(go_on=False).items()}

    def medians(self) -> dict[tuple[int, int], tuple[float, float]]:
        """Seconds to the first token, and for a step after it."""
        return {kind: (statistics.median(self.firsts[kind]), statistics.median(self.steps[kind])) for kind in self.kinds}


def bytes_read(model: nn.Module, head_bits: int | None = None) -> int:
    """Bytes of weights that a step reads: all as stored, but of a table that only embeds one row; a head of other bits in those."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    total = sum(tensor.nbytes for tensor in _tensors(model).values())
    for module in model.modules():
        if isinstance(module, nn.Embedding | Int8Embedding) and (head is None or head.weight.data_ptr() != module.weight.data_ptr()):
            own = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
            total -= own - own // module.weight.shape[0]
    if head is not None and head_bits is not None:
        rows, width = head.weight.shape
        scales = 4 * rows + (0 if head_bits == 8 else 2 * rows * -(-width // 32))  # of rows; of 32 inputs
        stored = head.weight.nbytes + (head.scale.nbytes if hasattr(head, "scale") else 0)
        total += rows * width * head_bits // 8 + scales - stored
    return total


def _tensors(model: nn.Module) -> dict[int, torch.Tensor]:
    """Parameters and buffers, tied ones once."""
    return {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}


def _engine_cache_bytes(config: Any, bits: int) -> int:
    """Bytes of keys and values of one position: bfloat16, or int8 with a float32 scale a head."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * (2 * head if bits == 16 else head + 4)
