"""Training on a GPU: refused in a line where there is none; where there is one, the same run as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StaticCache

from bimos import BimosError
from bimos.config import RunConfig
from bimos.devices import chosen_device
from bimos.kernels import native
from bimos.processes import ALONE, Processes
from bimos.quantize import run

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")


@pytest.mark.parametrize("name", ["cuda:1", "mps", "gpu", ""])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(BimosError, match="cpu or cuda"):
        chosen_device(name, ALONE)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BimosError, match=r"no GPU.*--device"):
        run(teacher_directory, tmp_path / "out", RunConfig.from_dict({"data": str(text_file)}), device="cuda")
    assert not (tmp_path / "out").exists()


def test_each_process_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device("cuda", ALONE) == torch.device("cuda", 0)
    assert chosen_device("cuda", Processes(3, 4, torch.device("cuda", 3))) == torch.device("cuda", 3)
    assert chosen_device("cpu", ALONE) == torch.device("cpu")


def test_only_a_cpu_is_slow_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_multiplies_bfloat16", lambda: False)
    found = [native.fast_dtype(torch.bfloat16, device) for device in (None, torch.device("cpu"), torch.device("cuda"))]
    assert found == [torch.float32, torch.float32, torch.bfloat16]


@needs_gpu
@pytest.mark.parametrize("method", ["binarymos", "dbllm", "gptq2"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_run_on_a_gpu(method: str, low_memory: bool, teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"method": method, "data": str(text_file), "sequence_length": 32, "low_memory": low_memory}
    values |= {"tokens": None if low_memory or method == "gptq2" else 512}
    values |= {"blocks": {"tokens": 512, "enabled": method != "gptq2"}, "initialise": {"sequences": 16}}
    if low_memory:
        values["distill"] = {"enabled": False}
    losses = []
    for device in ("cpu", "cuda"):
        result = run(teacher_directory, tmp_path / device, RunConfig.from_dict(values), device=device)
        losses.append([stage["loss_last"] for stage in result["stages"]])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)  # bfloat16 there, here maybe float32


@needs_gpu
def test_a_decoding_step_in_a_cuda_graph(packed: Callable[..., PreTrainedModel]) -> None:
    """Token, position and cache stay on the GPU: replayed, a step goes on from the last one, as without a graph."""
    model = packed("llama", embedding_bits=8, dtype=torch.bfloat16).cuda()
    cache = StaticCache(config=model.config, max_cache_len=32)
    token, position = torch.ones(1, 1, dtype=torch.long, device="cuda"), torch.zeros(1, 1, dtype=torch.long, device="cuda")
    every = torch.arange(32, device="cuda")

    def step() -> torch.Tensor:
        seen = (every <= position)[None, None]
        logits = model(token, attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True).logits[:, -1]
        token.copy_(logits.argmax(-1, keepdim=True))
        position.add_(1)
        return logits

    def again() -> None:
        cache.reset()
        token.fill_(1)
        position.zero_()

    with torch.inference_mode():
        expected = [step().clone() for _ in range(6)]  # compiles and chooses, too
        again()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        again()
        for eager in expected:
            graph.replay()
            torch.testing.assert_close(logits, eager, rtol=2e-2, atol=2e-2)
