"""The memory estimate: what it depends on, and that it is not far from the truth where that can be checked cheaply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from bimos.config import RunConfig
from bimos.models import empty_model
from bimos.training.estimate import RUNTIME, peak_memory

LLAMA_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}
SMOLLM2_135M = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama_7b() -> PreTrainedModel:
    return empty_model(AutoConfig.for_model("llama", **LLAMA_7B))


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    return empty_model(AutoConfig.for_model("llama", **SMOLLM2_135M))


def config(**changes: Any) -> RunConfig:
    """Nothing here rests on the defaults, which follow experiments."""
    blocks = {"tokens": 131_072, "batch_size": 8} | changes.pop("blocks", {})
    distill = {"batch_size": 4} | changes.pop("distill", {})
    return RunConfig.from_dict({"sequence_length": 512, "blocks": blocks, "distill": distill, **changes})


def test_block_reconstruction_of_7b_is_one_block_and_two_streams(llama_7b: PreTrainedModel) -> None:
    stages = peak_memory(llama_7b, config())
    teacher = 2 * sum(p.numel() for p in llama_7b.parameters())
    block = sum(p.numel() for p in llama_7b.model.layers[0].parameters())
    streams = 2 * 2 * 4096 * 131_072
    floor = teacher + 16 * block + streams
    assert floor < stages["blocks"] < 1.5 * floor
    body = 32 * block
    assert stages["distill"] > teacher + 16 * body  # all of it in training state
    assert stages["distill"] > 3 * stages["blocks"]


def test_fewer_calibration_tokens_take_less(llama_7b: PreTrainedModel) -> None:
    few, many = (peak_memory(llama_7b, config(blocks={"tokens": n}))["blocks"] for n in (65_536, 131_072))
    assert many - few == 2 * 2 * 4096 * 65_536  # both streams, 16 bits


def test_small_model_stays_three_times_below_full_training(small: PreTrainedModel) -> None:
    stages = peak_memory(small, config(blocks={"batch_size": 4}))
    assert stages["distill"] - RUNTIME > 3 * (stages["blocks"] - RUNTIME)


def test_what_is_not_done_takes_nothing(small: PreTrainedModel) -> None:
    everything = peak_memory(small, config())
    assert "distill" not in peak_memory(small, config(distill={"enabled": False}))
    assert peak_memory(small, config(distill={"train": "scales"}))["distill"] < everything["distill"]
    assert peak_memory(small, config(distill={"hidden_weight": 10.0}))["distill"] > everything["distill"]
    assert peak_memory(small, config(distill={"batch_size": 8}))["distill"] > everything["distill"]
    tiles = everything["distill"] - peak_memory(small, config(distill={"int8_teacher": False}))["distill"]
    assert tiles == sum(p.numel() for p in small.parameters() if p.dim() == 2) * 17 // 16  # the embedding is the head


@pytest.mark.usefixtures("avx2_alone")
def test_tiles_of_a_teacher_in_float32(small: PreTrainedModel) -> None:
    tiles = peak_memory(small, config())["distill"] - peak_memory(small, config(distill={"int8_teacher": False}))["distill"]
    shapes = {module.weight.shape for module in small.modules() if isinstance(module, nn.Linear)}
    packed = sum(torch.ops.bimos.int16_pack(torch.zeros(shape)).nbytes for shape in shapes)
    weights = sum(module.weight.numel() for module in small.modules() if isinstance(module, nn.Linear))
    assert tiles / weights == pytest.approx(packed / sum(shape.numel() for shape in shapes), rel=0.02)


def test_lean_states_take_less(llama_7b: PreTrainedModel) -> None:
    latents = sum(p.numel() for p in llama_7b.model.layers.parameters() if p.dim() == 2)
    whole = peak_memory(llama_7b, config())["distill"]
    saved = {
        ("adamw8bit", "float32"): 6,  # of 4 + 4 + 8 bytes
        ("adamw", "bfloat16"): 8,
        ("adamw8bit", "bfloat16"): 10,
    }
    for (optimizer, dtype), bytes_a_latent in saved.items():
        lean = peak_memory(llama_7b, config(distill={"optimizer": optimizer, "latents": dtype}))["distill"]
        assert whole - lean == bytes_a_latent * latents
    recomputed = peak_memory(llama_7b, config(distill={"checkpointing": True}))["distill"]
    assert whole - recomputed > 0.5 * (whole - peak_memory(llama_7b, config(distill={"batch_size": 1}))["distill"])


def test_several_processes_divide_the_work(llama_7b: PreTrainedModel) -> None:
    alone, two, eight = (peak_memory(llama_7b, config(distill={"batch_size": 8}), n) for n in (1, 2, 8))
    latents = sum(p.numel() for p in llama_7b.model.layers.parameters() if p.dim() == 2)
    assert alone["distill"] - two["distill"] > 8 * latents  # half of 16 bytes, and of the activations
    assert eight["distill"] < two["distill"]
    weights = 2 * sum(p.numel() for p in llama_7b.parameters())
    assert eight["distill"] > weights + 4 * latents  # before anything is divided
    assert alone["blocks"] - two["blocks"] > 2 * 4096 * 131_072  # half of both streams
    assert peak_memory(llama_7b, config(), 1) == peak_memory(llama_7b, config())


def test_a_gpu_has_no_lanes_tiles_or_disk(llama_7b: PreTrainedModel, small: PreTrainedModel) -> None:
    weights, latents = sum(p.numel() for p in small.parameters()), sum(p.numel() for p in small.model.layers.parameters() if p.dim() == 2)
    with_tiles, without = (peak_memory(small, config(distill={"int8_teacher": tiled}), device="cuda") for tiled in (True, False))
    assert with_tiles == without
    assert without["distill"] < peak_memory(small, config(distill={"int8_teacher": False}))["distill"] - 2 * latents  # signs
    assert without["distill"] > RUNTIME + 2 * weights + 16 * latents
    low = peak_memory(llama_7b, config(low_memory=True, distill={"enabled": False}), device="cuda")["blocks"]
    on_disk = peak_memory(llama_7b, config(low_memory=True, distill={"enabled": False}))["blocks"]
    assert low - on_disk > 2 * 2 * 4096 * 131_072  # both streams, and moments


@pytest.mark.usefixtures("avx2_alone")
def test_a_gpu_works_in_16_bits_beside_a_cpu_that_does_not(small: PreTrainedModel) -> None:
    weights = sum(p.numel() for p in small.parameters())
    on_cpu, on_gpu = (peak_memory(small, config(), device=device)["blocks"] for device in ("cpu", "cuda"))
    assert on_cpu - on_gpu > 1.5 * weights


def test_nothing_is_allocated(llama_7b: PreTrainedModel) -> None:
    assert {p.device for p in llama_7b.parameters()} == {torch.device("meta")}
