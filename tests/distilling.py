"""Distillation of a tiny model in a moment, for tests of what it does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bimos.config import DistillConfig
from bimos.methods import method_config
from bimos.models import convertible_linears
from bimos.training.budget import Budget
from bimos.training.distillation import NumberedWindows
from bimos.training.endtoend import distill
from bimos.training.progress import Progress
from bimos.training.student import binarize
from bimos.training.teacher import TopKCache

LENGTH, STEP = 16, 64  # tokens of a window, and of a step of four
METHOD = method_config("binarymos", {"num_experts": 2})


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**(sizes | more | changes))).to(dtype).requires_grad_(False).eval()


class Windows(Dataset[dict[str, Tensor]]):
    """As a `WindowDataset` gives them, numbers that can be told apart."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return {"input_ids": torch.randint(0, 64, (LENGTH,), generator=torch.Generator().manual_seed(index))}


class Counting(Progress):
    """Calls `then` after so many steps: an interruption, say."""

    def __init__(self, steps: int = 0, then: Callable[[], None] = lambda: None) -> None:
        super().__init__(None)
        self.left, self.then, self.losses = steps, then, []  # type: ignore[var-annotated]

    def tick(self, tokens: float, loss: float | None = None) -> None:
        super().tick(tokens, loss)
        self.losses.append(loss)
        self.left -= 1
        if self.left == 0:
            self.then()


def interrupted() -> None:
    raise KeyboardInterrupt


def run(
    directory: Path, student: nn.Module, teacher: nn.Module, steps: int = 10, progress: Progress | None = None,
    cache: TopKCache | None = None, budget: Budget | None = None, distinct: int | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    quick = {"batch_size": 4, "lr_latent": 5e-3, "lr_scale": 1e-3, "warmup": 0.05, "checkpoint_minutes": 0.0}
    config = DistillConfig(**(quick | options))
    count = steps * config.batch_size * config.accumulate
    data = NumberedWindows(Windows(count), count, distinct, seed=0)
    budget = budget or Budget(tokens=count * LENGTH)
    return distill(student, teacher, data, LENGTH, config, budget, directory, progress or Progress(None), cache)


def student_of(teacher: PreTrainedModel) -> PreTrainedModel:
    """At the start that knows of no inputs, the same every time."""
    student = copy.deepcopy(teacher)
    binarize(student, list(convertible_linears(student)), METHOD, {}, torch.Generator().manual_seed(0))
    return student
