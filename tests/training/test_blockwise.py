"""Block reconstruction: every block gets better, inputs are the student's own, and finished work is not done again."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bimos import BimosError
from bimos.config import RunConfig
from bimos.methods import method_config
from bimos.models import convertible_linears
from bimos.training import blockwise, initialise, reconstruction
from bimos.training.blockfiles import block_file, load_blocks
from bimos.training.blockwise import reconstruct_blocks
from bimos.training.losses import relative_error
from bimos.training.progress import Progress
from bimos.training.student import trainable_layers, uninitialised_student

BLOCKS = 3
METHOD = method_config("binarymos", {"num_experts": 2, "compensation": 0})  # a start that leaves something to train


def teacher(dtype: torch.dtype = torch.float32, blocks: int = BLOCKS) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": blocks, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:  # so that what a block adds to its input counts
            parameter.data *= 1.0 if "embed" in name else 4.0
    return model.to(dtype).requires_grad_(False)


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1))


def config(**blocks: Any) -> RunConfig:
    quick = {"tokens": 128, "epochs": 12, "batch_size": 4, "lr_latent": 0.02, "lr_scale": 0.002}
    return RunConfig.from_dict({"sequence_length": 16, "initialise": {"sequences": 8, "refit": False}, "blocks": quick | blocks})


def reconstruct(directory: Path, windows: Tensor, run: RunConfig | None = None, seconds: float | None = None, **of: Any) -> dict[str, Any]:
    return reconstruct_blocks(of.get("model") or teacher(), windows, METHOD, run or config(), directory, Progress(None), seconds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_block_gets_better(tmp_path: Path, windows: Tensor, dtype: torch.dtype, threads: int) -> None:
    report = reconstruct(tmp_path, windows, model=teacher(dtype))
    assert report["name"] == "blocks" and report["tokens"] == 12 * 8 * 16
    assert report["seconds"] > 0 and report["tokens_per_second"] > 0 and report["peak_memory_bytes"] > 2**20
    for entry in report["blocks"]:
        assert entry["loss_last"] < 0.9 * entry["loss_first"], entry
    assert report["loss_last"] < report["loss_first"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"block-{i:03d}.safetensors" for i in range(BLOCKS)]


def test_the_teacher_is_left_as_it_is(tmp_path: Path, windows: Tensor) -> None:
    model = teacher()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reconstruct(tmp_path, windows, model=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not list(trainable_layers(model)) and not any(p.requires_grad or p.grad is not None for p in model.parameters())


def states(model: torch.nn.Module, windows: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(windows, output_hidden_states=True).hidden_states  # type: ignore[no-any-return]


@pytest.mark.parametrize("epochs", [0, 2])
def test_inputs_are_the_students_and_targets_the_teachers(tmp_path: Path, windows: Tensor, epochs: int) -> None:
    """The error that block 1 reports is that of the whole student up to there."""
    model = teacher()
    run = config(epochs=epochs, lr_latent=1e-9, lr_scale=1e-9) if epochs else config(enabled=False)
    report = reconstruct(tmp_path, windows, run, model=model)
    student = uninitialised_student(model, METHOD, [])
    load_blocks(student, tmp_path)
    mine, theirs = (states(m, windows)[2] for m in (student, model))
    per_batch = [relative_error(mine[rows], theirs[rows]).item() for rows in (slice(0, 4), slice(4, 8))]
    expected = per_batch[0] if not epochs else sum(per_batch) / 2
    assert report["blocks"][1]["loss_last"] == pytest.approx(expected, rel=0.5 if epochs else 1e-4)
    assert report["tokens"] == epochs * 128


def test_training_brings_the_whole_student_nearer(tmp_path: Path, windows: Tensor) -> None:
    model = teacher()
    errors = {}
    for name, run in (("start", config(enabled=False)), ("trained", config())):
        reconstruct(tmp_path / name, windows, run, model=model)
        student = uninitialised_student(model, METHOD, [])
        load_blocks(student, tmp_path / name)
        errors[name] = relative_error(states(student, windows)[-1], states(model, windows)[-1]).item()
    assert errors["trained"] < 0.8 * errors["start"]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_resuming_gives_the_same_blocks(tmp_path: Path, windows: Tensor, done: int, threads: int) -> None:
    whole = reconstruct(tmp_path / "whole", windows)
    torch.manual_seed(99)  # another process
    (tmp_path / "resumed").mkdir()
    for index in range(done):
        block_file(tmp_path / "resumed", index).write_bytes(block_file(tmp_path / "whole", index).read_bytes())
    (tmp_path / "resumed" / f"block-{done:03d}.safetensors.partial").write_bytes(b"half of a block")
    report = reconstruct(tmp_path / "resumed", windows)
    for a, b in zip(whole["blocks"], report["blocks"], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert [entry["seconds"] for entry in report["blocks"][:done]] == [entry["seconds"] for entry in whole["blocks"][:done]]
    assert report["tokens"] == whole["tokens"]
    first, second = (uninitialised_student(teacher(), METHOD, []) for _ in range(2))
    load_blocks(first, tmp_path / "whole")
    load_blocks(second, tmp_path / "resumed")
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("seconds", [1e-6, 0.2])
def test_a_budget_too_small_for_the_start_still_ends(tmp_path: Path, windows: Tensor, seconds: float) -> None:
    report = reconstruct(tmp_path, windows, config(epochs=100_000), seconds)
    assert len(report["blocks"]) == BLOCKS and len(contents(tmp_path)) == BLOCKS
    assert report["tokens"] < 100_000 * 128
    assert all(entry["loss_last"] > 0 for entry in report["blocks"])


def test_epochs_end_a_budget_of_plenty(tmp_path: Path, windows: Tensor) -> None:
    assert reconstruct(tmp_path, windows, config(epochs=2), 3600.0)["tokens"] == 2 * 128


def test_a_loss_that_is_not_finite_ends_in_one_line(tmp_path: Path, windows: Tensor) -> None:
    with pytest.raises(BimosError, match=r"block 0: .* not finite.*blocks\.lr_latent"):
        reconstruct(tmp_path, windows, config(lr_latent=0.0, lr_scale=1e30))
    assert not contents(tmp_path)


def test_what_is_skipped_stays_dense(tmp_path: Path, windows: Tensor) -> None:
    run = config(epochs=1)
    run.skip = ["down_proj", "layers.1.self_attn.q_proj"]
    model = teacher()
    reconstruct(tmp_path, windows, run, model=model)
    student = uninitialised_student(model, METHOD, run.skip)
    load_blocks(student, tmp_path)
    names = {name for name, _ in trainable_layers(student)}
    assert names == set(convertible_linears(model)) - {
        *(f"model.layers.{i}.mlp.down_proj" for i in range(BLOCKS)),
        "model.layers.1.self_attn.q_proj",
    }
    weights = (m.get_submodule("model.layers.1.self_attn.q_proj").weight for m in (student, model))
    assert torch.equal(*weights)  # type: ignore[arg-type]


def test_a_seed_decides(tmp_path: Path, windows: Tensor, threads: int) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = config(epochs=2)
        run.seed = seed
        losses = [{k: e[k] for k in ("loss_first", "loss_last")} for e in reconstruct(tmp_path / name, windows, run)["blocks"]]
        (tmp_path / f"{name}.txt").write_text(repr(losses))
    a, b, c = ((tmp_path / f"{name}.txt").read_text() for name in "abc")
    assert a == b != c


def test_statistics_are_used_only_when_asked_for(tmp_path: Path, windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    original = initialise.execution_groups

    def count(*arguments: Any) -> Any:
        asked.append(1)
        return original(*arguments)

    monkeypatch.setattr(initialise, "execution_groups", count)
    run = config(epochs=1)
    run.initialise.activation_aware = False
    reconstruct(tmp_path / "blind", windows, run)
    assert not asked
    reconstruct(tmp_path / "aware", windows, config(epochs=1))
    assert len(asked) == BLOCKS


def test_starts_fit_the_time(tmp_path: Path, windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = [0.0], []

    def start(*args: Any) -> tuple[float, None]:
        initialise.initialise_block(*args)
        seen.append(len(args[4][0]))
        now[0] += 3.0 + 2.0 * len(args[4][0])  # seconds
        return 3.0, None

    monkeypatch.setattr(blockwise, "initialise_block", start)
    monkeypatch.setattr(blockwise.time, "monotonic", lambda: now[0])
    report = reconstruct(tmp_path / "few", windows, config(epochs=1), seconds=49.0)
    assert not any(entry["tokens"] for entry in report["blocks"][1:])
    assert seen == [8, 8, 4]  # 19 of the 49 seconds leave 15 each, enough for 6; the second block takes 19, too; 11 are left
    assert report["seconds"] == 49
    whole = load_file(tmp_path / "few" / "block-002.safetensors")
    (tmp_path / "few" / "block-002.safetensors").unlink()
    reconstruct(tmp_path / "few", windows, config(epochs=1), seconds=49.0)
    assert seen == [8, 8, 4, 4]  # remembered, and the same ones
    torch.testing.assert_close(load_file(tmp_path / "few" / "block-002.safetensors"), whole, rtol=0, atol=0)
    now[0], seen[:] = 0.0, []
    reconstruct(tmp_path / "none", windows, config(epochs=1), seconds=1.0)
    assert seen == [8, 8, 4]  # never less than a batch
    now[0], seen[:] = 0.0, []
    reconstruct(tmp_path / "many", windows, config(epochs=1), seconds=100.0)
    assert seen == [8, 8, 8]
    now[0], seen[:] = 0.0, []
    reconstruct(tmp_path / "endless", windows, config(epochs=1))
    assert seen == [8, 8, 8]


@pytest.mark.parametrize(
    ("index", "seconds", "worked", "expected"),
    [
        (1, 1000.0, 40.0, 128),  # 120 each: all of them, trained
        (1, 440.0, 40.0, 82),  # 50 each: 4 + 82 * (0.08 + 2 * 0.24)
        (0, 390.0, 40.0, 128),  # the first one also warms up: not below twice what it says
        (1, 240.0, 40.0, 36),  # 25 each: enough to be trained
        (1, 160.0, 40.0, 32),  # 15 each would train 19: too few; these are trained for as long as there is time
        (1, 84.0, 40.0, 18),  # 5.5 each: the start alone
        (1, 40.0, 40.0, 2),  # never less than a batch
        (2, 160.0, 40.0, 128),  # later ones stay
        (2, 60.0, 40.0, 64),  # unless the start alone is far too late
    ],
)
def test_sequences_fit_the_time(index: int, seconds: float, worked: float, expected: int) -> None:
    pace = blockwise.Pace(solving=4.0, reading=0.08, training=0.24)
    run = RunConfig.from_dict({"sequence_length": 512})
    left = 8 + index + 1  # blocks, so that 8 are to come
    assert blockwise.sequences_ahead(index, left, 128, 2, seconds, worked, pace, run, pace) == expected


def test_one_slow_block_cuts_nothing_away() -> None:
    """As when something else ran meanwhile: two in a row do."""
    slow, usual = blockwise.Pace(solving=28.0, reading=0.1, training=0.3), blockwise.Pace(solving=4.0, reading=0.08, training=0.24)
    run = RunConfig.from_dict({"sequence_length": 512})
    given = 14, 30, 84, 2, 432.0, 246.0, slow, run
    assert [blockwise.sequences_ahead(*given, before) for before in (usual, None, slow)] == [84, 84, 42]
    run = RunConfig.from_dict({"sequence_length": 256})
    assert blockwise.sequences_ahead(14, 30, 84, 2, 432.0, 246.0, slow, run, slow) == 64  # enough to be trained
    assert blockwise.sequences_ahead(14, 30, 64, 2, 432.0, 280.0, slow, run, slow) == 32


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ([4.0, 4.0, 4.0, 20.0, 4.0, 4.0], [8, 8, 8, 8, 8, 8]),  # something else ran meanwhile
        ([4.0, 4.0, 20.0, 20.0, 4.0, 4.0], [8, 8, 8, 4, 4, 4]),
    ],
)
def test_slow_blocks_by_the_clock(
    taken: list[float], expected: list[int], tmp_path: Path, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, left = [0.0], list(taken)

    def start(*args: Any) -> tuple[float, None]:
        initialise.initialise_block(*args)
        now[0] += left[0]
        return left.pop(0), None

    monkeypatch.setattr(blockwise, "initialise_block", start)
    monkeypatch.setattr(blockwise.time, "monotonic", lambda: now[0])
    report = reconstruct(tmp_path, windows, config(epochs=1), seconds=30.0, model=teacher(blocks=6))
    assert [entry["next_sequences"] for entry in report["blocks"]] == expected


def test_what_is_cut_is_trained_if_it_is_enough(tmp_path: Path, windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "sequences_ahead", lambda *args: 4)
    monkeypatch.setattr(blockwise, "TRAINED", 4 * 16)
    report = reconstruct(tmp_path / "enough", windows, config(epochs=1), seconds=60.0)
    assert [entry["tokens"] for entry in report["blocks"]] == [8 * 16, 4 * 16, 4 * 16]
    monkeypatch.setattr(blockwise, "TRAINED", 4 * 16 + 1)
    report = reconstruct(tmp_path / "few", windows, config(epochs=1), seconds=60.0)
    assert [entry["tokens"] for entry in report["blocks"]] == [8 * 16, 0, 0]


def test_rates_begin_with_the_training_not_with_the_start(tmp_path: Path, windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    now, factors = [0.0], []

    def start(*args: Any) -> tuple[float, None]:
        initialise.initialise_block(*args)
        now[0] += 90.0
        return 90.0, None

    def step(optimizer: torch.optim.Optimizer, factor: float) -> None:
        factors.append(factor)
        now[0] += 1.0

    monkeypatch.setattr(blockwise, "initialise_block", start)
    monkeypatch.setattr(reconstruction, "set_rate", step)
    monkeypatch.setattr(blockwise.time, "monotonic", lambda: now[0])
    reconstruct(tmp_path, windows, config(epochs=100), seconds=390.0)  # of each block's 130 seconds 40 are left
    assert len(factors) == 120 and max(factors) > 0.8 and factors[0] < 0.2 and factors[39] < 0.05


@pytest.mark.parametrize(("seconds", "is_said"), [(100.0, True), (390.0, False)])
def test_a_budget_that_the_blocks_will_not_keep_is_said(
    tmp_path: Path, windows: Tensor, monkeypatch: pytest.MonkeyPatch, seconds: float, is_said: bool
) -> None:
    now, said = [0.0], io.StringIO()

    def start(*args: Any) -> tuple[float, None]:
        initialise.initialise_block(*args)
        now[0] += 90.0
        return 90.0, None

    monkeypatch.setattr(blockwise, "initialise_block", start)
    monkeypatch.setattr(blockwise.time, "monotonic", lambda: now[0])
    progress = Progress(Console(file=said, width=200))
    reconstruct_blocks(teacher(), windows, METHOD, config(epochs=1), tmp_path, progress, seconds)
    expected = f"{BLOCKS} blocks take about 4.5 minutes on this machine, the budget has {seconds / 60:.1f} for them"
    assert (expected in said.getvalue()) == is_said and ("--minutes" in said.getvalue()) == is_said


def test_what_is_seen_is_enough_to_be_trained() -> None:
    pace = blockwise.Pace(solving=4.0, reading=0.08, training=0.24)
    for length, size in ((512, 3), (500, 2), (384, 4), (256, 6)):
        run = RunConfig.from_dict({"sequence_length": length})
        count = blockwise.sequences_ahead(1, 10, 120, size, 160.0, 40.0, pace, run, None)
        assert count % size == 0 and blockwise.TRAINED <= count * length < blockwise.TRAINED + size * length
