"""Distillation in less memory: moments in 8 bits, latents in bfloat16, activations computed again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bimos import BimosError
from bimos.config import RunConfig
from bimos.models import decoder_blocks
from bimos.settling import lean_options
from bimos.training.checkpoints import checkpoints
from bimos.training.optimizer import adamw, trained_parameters
from bimos.training.recomputing import checkpointed
from bimos.training.student import load_tensors
from distilling import Counting, interrupted, llama, run, student_of
from running import config, refused

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # torchao leaves parameters of less than 4096 values as they are
LEAN = [{"optimizer": "adamw8bit"}, {"latents": "bfloat16"}, {"optimizer": "adamw8bit", "latents": "bfloat16"}]


@pytest.fixture
def eager() -> Iterator[None]:
    """A step as it stands: it is compiled for every shape otherwise, which takes a minute."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("options", LEAN, ids=lambda options: "-".join(options.values()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("eager")
def test_lean_states_end_where_others_do(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = llama(dtype, **WIDE)
    made: list[torch.optim.Optimizer] = []

    def watched(*arguments: Any) -> torch.optim.Optimizer:
        made.append(adamw(*arguments))
        return made[-1]

    monkeypatch.setattr("bimos.training.endtoend.adamw", watched)
    fast = {"lr_latent": 2e-2, "checkpoint_minutes": 60.0}
    expected = run(tmp_path / "whole", student_of(teacher), teacher, steps=30, **fast)
    student = student_of(teacher)
    report = run(tmp_path / "lean", student, teacher, steps=30, **fast, **options)
    assert report["loss_last"] < 0.8 * report["loss_first"]
    assert report["loss_last"] == pytest.approx(expected["loss_last"], rel=0.15)  # a single batch
    made = [made[0], made[-1]]
    plain, lean = ([float(group[key]) for group in optimizer.param_groups for key in ("lr", "base_lr")] for optimizer in made)
    assert lean == pytest.approx(plain, rel=1e-3)
    latents = trained_parameters(student)["latent"]
    assert {latent.dtype for latent in latents} == {torch.bfloat16 if "latents" in options else torch.float32}
    moments: Any = [made[-1].state[latent]["exp_avg"] for latent in latents if latent.numel() >= 4096]
    assert moments and all(hasattr(moment, "codes") == ("optimizer" in options) for moment in moments)
    saved, _ = load_tensors(checkpoints(tmp_path / "lean")[-1] / "trained.safetensors")
    assert {tensor.dtype for name, tensor in saved.items() if name.endswith(".weight") and "proj" in name} == {latents[0].dtype}


@pytest.mark.parametrize("options", LEAN, ids=lambda options: "-".join(options.values()))
@pytest.mark.usefixtures("eager")
def test_lean_states_resume(tmp_path: Path, options: dict[str, Any]) -> None:
    teacher = llama(**WIDE)
    whole, resumed = student_of(teacher), student_of(teacher)
    expected = run(tmp_path / "whole", whole, teacher, steps=6, **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", student_of(teacher), teacher, 6, Counting(4, interrupted), **options)
    report = run(tmp_path / "resumed", resumed, teacher, steps=6, **options)
    assert [loss for _, loss in report["history"]] == [loss for _, loss in expected["history"]]
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_stochastic_rounding_keeps_small_steps() -> None:
    """Steps of a tenth of what the last bit means: rounded to the nearest none of them would be seen."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from bimos.methods import InputStatistics, method_config

    torch.manual_seed(0)
    settings = method_config("onebit", {})
    layer = settings.layer.from_linear(nn.Linear(64, 64), settings, InputStatistics.uninformed(64), torch.Generator())
    layer.weight.data = torch.full((64, 64), 0.5, dtype=torch.bfloat16)
    optimizer = adamw(nn.Sequential(layer), {"latent": 2e-4}, (0.9, 0.95), 0.0)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(20):
            layer.weight.grad = torch.ones_like(layer.weight)
            optimizer.step()
    assert layer.weight.float().mean().item() == pytest.approx(0.5 - 20 * 2e-4, rel=1e-3)


def test_without_torchao_it_is_said_at_once(
    teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bimos.settling.find_spec", lambda name: None)
    for key, value in (("optimizer", "adamw8bit"), ("latents", "bfloat16")):
        refused(
            rf"distill.{key}={value} needs torchao: pip install",
            teacher_directory,
            tmp_path / "out",
            config(text_file, distill={key: value}),
        )
    assert not (tmp_path / "out").exists()
    with pytest.raises(BimosError, match=r"distill\.optimizer"):
        RunConfig.from_dict({"distill": {"optimizer": "sgd"}})
    assert lean_options(RunConfig()) == []


@pytest.mark.parametrize("options", [{}, {"hidden_weight": 10.0}], ids=["kl", "hidden"])
def test_recomputed_activations_change_nothing(tmp_path: Path, threads: int, options: dict[str, Any]) -> None:
    teacher = llama()
    runs: list[tuple[dict[str, Any], dict[str, Tensor], int]] = []
    for recompute in (False, True):
        student, calls = student_of(teacher), []
        for block in decoder_blocks(student)[1]:
            block.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        report = run(tmp_path / str(recompute), student, teacher, steps=4, checkpointing=recompute, **options)
        runs.append((report, student.state_dict(), len(calls)))
    (plain, state, once), (report, other, twice) = runs
    assert [loss for _, loss in report["history"]] == [loss for _, loss in plain["history"]]
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    assert twice == once + 4 * 2 * (2 if threads > 1 else 1)  # steps, blocks, lanes


def test_blocks_keep_what_enters_them_alone() -> None:
    student = student_of(llama())
    ids = torch.randint(0, 64, (2, 16))

    def kept() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            student(input_ids=ids, use_cache=False).logits.sum()
        return sum(sizes)

    whole = kept()
    with checkpointed(student):
        assert kept() < whole / 3
    assert kept() == whole
