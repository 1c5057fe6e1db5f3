"""End-to-end distillation: what is trained, in which order, what a checkpoint holds, and that it is found again."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from bimos import BimosError
from bimos.config import DistillConfig
from bimos.methods.base import TrainableLinear
from bimos.training.blockfiles import load_blocks
from bimos.training.budget import Budget
from bimos.training.checkpoints import COMPLETE, checkpoints
from bimos.training.distillation import Distillation, NumberedWindows
from bimos.training.optimizer import adamw
from bimos.training.progress import Progress
from bimos.training.teacher import TopKCache
from bimos.training.trainer import DistillTrainer
from distilling import LENGTH, METHOD, STEP, Counting, Windows, interrupted, llama, run, student_of


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor.float(), before[name].float())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_weight", [0.0, 10.0])
def test_loss_falls_and_the_teacher_stays(tmp_path: Path, dtype: torch.dtype, hidden_weight: float, threads: int) -> None:
    teacher = llama(dtype)
    student, before = student_of(teacher), copy_of(teacher)
    report = run(tmp_path, student, teacher, steps=30, hidden_weight=hidden_weight)
    assert report["loss_last"] < 0.9 * report["loss_first"], report
    assert not changed(before, teacher)
    assert report["name"] == "distill" and report["tokens"] == 30 * STEP
    assert report["seconds"] > 0 and report["tokens_per_second"] == report["tokens"] / report["seconds"]
    assert len(report["history"]) == 30


def test_what_is_trained(tmp_path: Path) -> None:
    teacher = llama()
    for number, (options, expected) in enumerate(
        [
            ({}, {"weight", "scale_in", "scale_out", "router", "norm"}),
            ({"train_norms": False}, {"weight", "scale_in", "scale_out", "router"}),
            ({"train": "scales"}, {"scale_in", "scale_out", "router", "norm"}),
        ]
    ):
        student = student_of(teacher)
        before = copy_of(student)
        run(tmp_path / str(number), student, teacher, steps=3, **options)
        moved = changed(before, student)
        assert {("norm" if "norm" in name else name.rpartition(".")[2]) for name in moved} == expected
        assert not any("embed" in name or "lm_head" in name for name in moved)
        layers = 2 * 7 * len(expected - {"norm"}) + (5 if "norm" in expected else 0)
        assert len(moved) == layers  # all of them


@pytest.mark.parametrize("accumulate", [1, 2])
def test_experts_alike_stay_alike_where_they_share_all(tmp_path: Path, threads: int, accumulate: int) -> None:
    teacher = llama()
    for share in (0.0, 1.0):
        student = student_of(teacher)
        experts = [scale for layer in student.modules() if isinstance(layer, TrainableLinear) for scale in layer.experts()]
        with torch.no_grad():
            for scale in experts:
                scale.copy_(scale.mean(0, keepdim=True).expand_as(scale))
        run(tmp_path / str(share), student, teacher, steps=3, accumulate=accumulate, expert_share=share)
        apart = [(scale - scale.mean(0)).norm() / scale.norm() for scale in experts]
        assert len(apart) == 2 * 14 and (max(apart) < 1e-6 if share == 0 else min(apart) > 1e-4)


def test_scales_alone_keep_every_sign(tmp_path: Path) -> None:
    teacher = llama()
    student = student_of(teacher)
    before = copy_of(student)
    run(tmp_path, student, teacher, train="scales")
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items() if name.endswith("proj.weight"))


@pytest.mark.parametrize("clip", [1.0, 1e9])
def test_accumulated_batches_are_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float, threads: int) -> None:
    """Told by plain gradient descent: Adam would hide a gradient of the wrong size."""

    def descent(*arguments: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(adamw(*arguments).param_groups)

    monkeypatch.setattr("bimos.training.endtoend.adamw", descent)
    teacher = llama()
    students = []
    for accumulate, batch in ((1, 4), (4, 1), (2, 2)):
        student = student_of(teacher)
        run(
            tmp_path / f"{accumulate}-{batch}", student, teacher, steps=3, accumulate=accumulate, batch_size=batch, clip=clip, lr_latent=0.5
        )
        students.append(student)
    assert changed(copy_of(student_of(teacher)), students[0])
    for name, tensor in students[0].state_dict().items():
        for other in students[1:]:
            torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_clipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    seen: list[float] = []

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            seen.append(torch.nn.utils.get_total_norm(gradients).item())

    monkeypatch.setattr("bimos.training.endtoend.adamw", lambda *arguments: Watching(adamw(*arguments).param_groups))
    for number, clip in enumerate((1e-3, 1e9)):
        run(tmp_path / str(number), student_of(llama()), llama(), steps=1, clip=clip)
    assert seen[0] == pytest.approx(1e-3, rel=1e-3) and seen[1] > 1e-2


def test_dropout_is_off(tmp_path: Path) -> None:
    """A student that drops units cannot say what its teacher says; OPT's config asks for it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    teacher = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32, dropout=0.9)).requires_grad_(False).eval()
    student, progress, data = student_of(teacher), Counting(), NumberedWindows(Windows(4), 4, None, seed=0)
    ids, window = (torch.stack([data[i][key] for i in range(4)]) for key in ("input_ids", "window"))
    expected = Distillation(student.eval(), teacher, DistillConfig(), None)(ids, window)["loss"].item()
    run(tmp_path, student, teacher, steps=1, progress=progress)
    assert progress.losses == [pytest.approx(expected, rel=1e-4)]
    assert student.training is False


def test_a_loss_that_is_not_finite_ends_in_one_line(tmp_path: Path, threads: int) -> None:
    teacher = llama()
    student = student_of(teacher)
    student.model.layers[0].mlp.up_proj.scale_out.data.fill_(torch.nan)
    with pytest.raises(BimosError, match=r"not finite.*distill\.lr_latent") as caught:
        run(tmp_path, student, teacher)
    assert "\n" not in str(caught.value)
    assert not checkpoints(tmp_path)


# Checkpoints


def test_one_complete_checkpoint_is_kept(tmp_path: Path) -> None:
    run(tmp_path, student_of(llama()), llama(), steps=5)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    assert json.loads((tmp_path / "checkpoint-5" / COMPLETE).read_text())["tokens"] == 5 * STEP


def test_checkpoints_come_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    original = DistillTrainer._save_checkpoint

    def watch(self: Any, model: Any, trial: Any) -> None:
        saved.append(self.state.global_step)
        original(self, model, trial)

    monkeypatch.setattr(DistillTrainer, "_save_checkpoint", watch)
    run(tmp_path / "rarely", student_of(llama()), llama(), steps=5, checkpoint_minutes=60.0)
    assert saved == [5]  # the last one always
    saved.clear()
    run(tmp_path / "often", student_of(llama()), llama(), steps=5, checkpoint_minutes=0.0)
    assert saved == [1, 2, 3, 4, 5]


def interrupt(directory: Path, teacher: PreTrainedModel, steps: int, after: int, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(directory, student_of(teacher), teacher, steps, Counting(after, interrupted), **options)


@pytest.mark.parametrize(("stops", "accumulate"), [([1], 1), ([4], 2), ([3, 2, 3], 1)])
def test_resuming_gives_the_same_student(tmp_path: Path, stops: list[int], accumulate: int, threads: int) -> None:
    teacher = llama()
    whole = student_of(teacher)
    expected = run(tmp_path / "whole", whole, teacher, accumulate=accumulate)
    for stop in stops:
        interrupt(tmp_path / "resumed", teacher, 10, stop, accumulate=accumulate)
    progress = Counting()
    resumed = student_of(teacher)
    report = run(tmp_path / "resumed", resumed, teacher, progress=progress, accumulate=accumulate)
    assert len(progress.losses) == 10 - sum(stop - 1 for stop in stops)  # a step that was not saved is done again
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert [loss for _, loss in report["history"]] == [loss for _, loss in expected["history"]]
    assert report["tokens"] == expected["tokens"] and report["loss_first"] == expected["loss_first"]


def damage_unfinished(checkpoint: Path) -> None:
    (checkpoint / COMPLETE).unlink()


def damage_half_written(checkpoint: Path) -> None:
    (checkpoint / COMPLETE).unlink()
    (checkpoint / "optimizer.pt").unlink()
    tensors = checkpoint / "trained.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    (checkpoint / f"{COMPLETE}.partial").write_text("{")


@pytest.mark.parametrize("damage", [damage_unfinished, damage_half_written])
def test_an_incomplete_checkpoint_does_not_count(tmp_path: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = llama()
    whole = student_of(teacher)
    run(tmp_path / "whole", whole, teacher)
    with monkeypatch.context() as patched:  # the older one, which is deleted once the newer is complete, is still there
        patched.setattr("bimos.training.checkpoints.shutil.rmtree", lambda *arguments, **options: None)
        interrupt(tmp_path / "killed", teacher, 10, 5)
    assert [path.name for path in checkpoints(tmp_path / "killed")] == [f"checkpoint-{i}" for i in range(1, 5)]
    for index in (1, 2):
        shutil.rmtree(tmp_path / "killed" / f"checkpoint-{index}")
    damage(tmp_path / "killed" / "checkpoint-4")
    progress, resumed = Counting(), student_of(teacher)
    run(tmp_path / "killed", resumed, teacher, progress=progress)
    assert len(progress.losses) == 7  # from checkpoint 3
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_a_finished_stage_is_loaded(tmp_path: Path) -> None:
    teacher = llama()
    whole, again, progress = student_of(teacher), student_of(teacher), Counting()
    expected = run(tmp_path, whole, teacher)
    report = run(tmp_path, again, teacher, progress=progress)
    assert not progress.losses
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert {key: report[key] for key in ("tokens", "loss_first", "loss_last", "seconds")} == {
        key: pytest.approx(expected[key], rel=0.5 if key == "seconds" else 1e-9) for key in ("tokens", "loss_first", "loss_last", "seconds")
    }


def test_every_step_has_the_rate_of_where_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        rates.append(self.param_groups[0]["lr"] / self.param_groups[0]["base_lr"])
        assert self.defaults["eps"] == 1e-9
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    teacher, options = llama(), {"schedule": "linear", "warmup": 0.2, "epsilon": 1e-9}
    run(tmp_path / "whole", student_of(teacher), teacher, **options)
    assert rates == pytest.approx([0.02, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    rates.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", student_of(teacher), teacher, progress=Counting(5, interrupted), **options)
    before = len(rates)
    run(tmp_path / "killed", student_of(teacher), teacher, **options)
    again = 10 - (len(rates) - before)  # the step that it begins anew with
    assert rates[before:] == pytest.approx([0.02, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125][again:])


def test_a_budget_of_time_ends(tmp_path: Path) -> None:
    report = run(tmp_path, student_of(llama()), llama(), steps=10**7, budget=Budget(seconds=1.0))
    assert report["seconds"] >= 1.0 and 0 < report["tokens"] < 10**7 * STEP
    assert len(checkpoints(tmp_path)) == 1


# The order of the text, and the cache


def numbers(windows: NumberedWindows) -> list[int]:
    return [int(windows[i]["window"]) for i in range(len(windows))]


def test_every_window_comes_once() -> None:
    order = numbers(NumberedWindows(Windows(600), 600, None, seed=0))
    assert sorted(order) == list(range(600))
    windows = NumberedWindows(Windows(600), 600, None, seed=0)
    assert torch.equal(windows[7]["input_ids"], Windows(600)[order[7]]["input_ids"])
    assert [int(windows[i]["window"]) for i in (599, 3, 300)] == [order[599], order[3], order[300]]  # whatever came before


def test_distinct_windows_come_again_in_another_order() -> None:
    order = numbers(NumberedWindows(Windows(1200), 1200, 300, seed=0))
    passes = [order[i : i + 300] for i in range(0, 1200, 300)]
    assert all(sorted(one) == list(range(300)) for one in passes)
    assert all(a != b for a, b in itertools.combinations(passes, 2))


@pytest.mark.parametrize(("count", "distinct"), [(10, 300), (280, 300), (8, 8)])
def test_more_distinct_windows_than_there_is_budget_for(count: int, distinct: int) -> None:
    assert sorted(numbers(NumberedWindows(Windows(count), count, distinct, seed=0))) == list(range(count))


@pytest.mark.parametrize("seed", [0, 1, 20260801, 2**40])
def test_any_seed_will_do(seed: int) -> None:
    assert sorted(numbers(NumberedWindows(Windows(40), 40, 20, seed))) == sorted(2 * list(range(20)))


def test_a_long_run_starts_at_once() -> None:
    windows = NumberedWindows(Windows(10**9), 10**9, None, seed=0)
    assert len(windows) == 10**9 and 0 <= int(windows[10**9 - 1]["window"]) < 10**9


def test_the_cache_asks_the_teacher_once(tmp_path: Path, threads: int) -> None:
    teacher = llama()
    rows: list[int] = []
    student = student_of(teacher)
    handle = teacher.model.register_forward_hook(lambda module, args, output: rows.append(len(output.last_hidden_state)))
    cache = TopKCache(tmp_path / "logits", 8, LENGTH, 8, 64)
    report = run(tmp_path / "run", student, teacher, steps=10, distinct=8, cache=cache)
    handle.remove()
    assert rows == ([4, 4] if threads == 1 else [2, 2, 2, 2])  # eight windows, four a step
    assert report["loss_last"] < report["loss_first"]


def test_cached_losses_are_near_those_of_the_live_teacher(tmp_path: Path) -> None:
    teacher = llama()
    student = student_of(teacher)
    ids, window = torch.stack([Windows(4)[i]["input_ids"] for i in range(4)]), torch.arange(4)
    live = Distillation(student, teacher, DistillConfig(), None)(ids, window)["loss"].item()
    losses = []
    for k in (4, 16, 60):
        cache = TopKCache(tmp_path / str(k), 4, LENGTH, k, 64)
        cached = Distillation(student, teacher, DistillConfig(), cache)
        losses.append(cached(ids, window)["loss"].item())
        assert Distillation(student, None, DistillConfig(), cache)(ids, window)["loss"].item() == losses[-1]  # now without a teacher
    assert losses == sorted(losses) and losses[0] < live
    assert losses[-1] == pytest.approx(live, rel=0.01)


def test_the_student_of_stage_two_is_the_start(tmp_path: Path) -> None:
    """What `load_blocks` puts in is what the first step sees."""
    from bimos.config import RunConfig
    from bimos.training.blockwise import reconstruct_blocks

    teacher = llama()
    windows = torch.stack([Windows(8)[i]["input_ids"] for i in range(8)])
    config = RunConfig.from_dict({"sequence_length": LENGTH, "blocks": {"tokens": 128, "epochs": 10, "batch_size": 4}})
    reconstruct_blocks(teacher, windows, METHOD, config, tmp_path / "blocks", Progress(None), None)
    reconstructed = student_of(teacher)
    load_blocks(reconstructed, tmp_path / "blocks")
    losses = []
    for number, student in enumerate((student_of(teacher), reconstructed)):
        progress = Counting()
        run(tmp_path / str(number), student, teacher, steps=1, progress=progress)
        losses.append(progress.losses[0])
    assert losses[1] < losses[0]
