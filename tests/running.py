"""What tests of whole runs share: a config that takes a second, refusals in one line, and folders before and after."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bimos import BimosError
from bimos.config import RunConfig
from bimos.quantize import run


def config(data: object = "", **changes: Any) -> RunConfig:
    """A run of a second."""
    quick: dict[str, Any] = {
        "options": {"num_experts": 2},
        "data": str(data),
        "sequence_length": 32,
        "initialise": {"sequences": 4},
        "blocks": {"tokens": 256, "epochs": 2, "batch_size": 4},
        "distill": {"batch_size": 4, "checkpoint_minutes": 60.0, "lr_latent": 7e-4},  # which a run would fill in
    }
    for key, value in changes.items():
        quick[key] = quick[key] | value if isinstance(value, dict) and key in quick and key != "options" else value
    if not {"tokens", "minutes"} & quick.keys() and quick["distill"].get("enabled", True):
        quick["tokens"] = 1024
    return RunConfig.from_dict(quick)


def teacher_like(directory: Path, target: Path, **sizes: Any) -> Path:
    """Another model with the same tokenizer."""
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, target)
    return target


def raising(error: BaseException) -> Callable[..., None]:
    def raise_it(*arguments: Any, **options: Any) -> None:
        raise error

    return raise_it


def refused(fragment: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(BimosError, match=fragment) as caught:
        run(*arguments, **options)
    assert "\n" not in str(caught.value)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
