"""Models that continue prompts greedily, in the engine and in `transformers`, with a stopwatch beside them."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from bimos.engine import Engine
from bimos.generation import Sampling

Prompts = list[list[int]]


class Runner(Protocol):
    """Continues prompts of equal length greedily: the next token of each at every step, end-of-text tokens like any other."""

    def steps(self, prompts: Prompts, tokens: int) -> Iterator[list[Any]]: ...


class EngineRunner:
    """In the engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def steps(self, prompts: Prompts, tokens: int) -> Iterator[list[Any]]:
        return self.engine.tokens(prompts, Sampling(tokens, temperature=0, repetition_penalty=1), stop=False)


class TransformersRunner:
    """In `transformers`, which keeps keys and values in a `DynamicCache`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"logits_to_keep": 1} if last_only else {}
        self.cache_bytes = 0  # a position of a sequence, of the last run

    @torch.inference_mode()
    def steps(self, prompts: Prompts, tokens: int) -> Iterator[list[Any]]:
        ids = torch.tensor(prompts)
        cache: Any = DynamicCache(config=self.model.config)
        for _ in range(tokens):
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **self.options).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            yield ids[:, 0].tolist()
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        self.cache_bytes = held // (len(prompts) * cache.get_seq_length())


def stopwatch(steps: Iterator[Any]) -> list[float]:
    """Seconds that each step takes."""
    stamps = [time.perf_counter()]
    for _ in steps:
        stamps.append(time.perf_counter())
    return [end - start for start, end in itertools.pairwise(stamps)]
