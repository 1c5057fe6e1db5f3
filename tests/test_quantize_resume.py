"""Stopping and resuming; kills in the middle of a stage are in test_resume.py."""

from __future__ import annotations

import errno
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from bimos import stages
from bimos.config import RunConfig
from bimos.errors import disk_full
from bimos.packing.checkpoint import save_packed as save_packed_itself
from bimos.quantize import run
from bimos.resume import DONE, WORK, held, remembered
from bimos.training.blockfiles import block_file
from bimos.training.budget import Budget
from bimos.training.student import load_tensors, save_tensors
from running import config, contents, raising, refused, teacher_like


@pytest.fixture
def stopped(teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was interrupted when it was about to save."""
    with monkeypatch.context() as patched:
        patched.setattr("bimos.finishing.save_packed", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(teacher_directory, tmp_path / "out", config(text_file))
    return tmp_path / "out"


def test_resuming_another_run(stopped: Path, teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    before = contents(stopped)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 320}
    other = teacher_like(teacher_directory, tmp_path / "other", **sizes)
    refused("is of model .*tiny-llama.*, not .*other", other, stopped, config(text_file), resume=True)
    refused("seed=0, now it is 3", teacher_directory, stopped, config(text_file, seed=3), resume=True)
    refused("distill.clip=1.0, now it is 0.5", teacher_directory, stopped, config(text_file, distill={"clip": 0.5}), resume=True)
    refused("num_experts", teacher_directory, stopped, config(text_file, options={"num_experts": 4}), resume=True)
    refused("minutes", teacher_directory, stopped, config(text_file, minutes=5), resume=True)
    refused("not empty: it holds an interrupted run; --resume", teacher_directory, stopped, config(text_file))
    assert contents(stopped) == before


def test_resuming_after_the_model_changed(
    teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(teacher_directory, model)
    with monkeypatch.context() as patched:
        patched.setattr("bimos.finishing.save_packed", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", config(text_file, tokens=128))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    teacher_like(teacher_directory, model, **sizes, vocab_size=320, tie_word_embeddings=True)
    refused("other weights", model, tmp_path / "out", None, resume=True)


def test_resuming_after_the_text_changed(teacher_directory: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with monkeypatch.context() as patched:
        patched.setattr("bimos.finishing.save_packed", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(teacher_directory, tmp_path / "out", config(path, tokens=128))
    path.rename(tmp_path / "aside.txt")
    path.write_text(text + "One more sentence.\n")
    refused("text .* has changed", teacher_directory, tmp_path / "out", None, resume=True)
    (tmp_path / "aside.txt").rename(path)
    assert run(teacher_directory, tmp_path / "out", None, resume=True)["stages"]


def test_nothing_to_resume(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    refused("nothing to resume", teacher_directory, tmp_path / "out", config(text_file), resume=True)
    refused("nothing to resume", teacher_directory, tmp_path / "out", None, resume=True)
    assert not (tmp_path / "out").exists()


def test_a_damaged_run_file(stopped: Path, teacher_directory: Path) -> None:
    (stopped / WORK / "run.json").write_text("{")
    refused(r"run\.json.*damaged.*--overwrite", teacher_directory, stopped, None, resume=True)


def test_a_resumed_run_remembers_its_options(stopped: Path, teacher_directory: Path, text_file: Path) -> None:
    result = run(teacher_directory, stopped, None, resume=True)
    assert RunConfig.from_dict(result["config"]) == config(text_file)
    assert result["stages"][1]["tokens"] == 1024
    assert not (stopped / WORK).exists()


def test_a_run_that_was_begun_before_there_was_a_key(stopped: Path, teacher_directory: Path) -> None:
    """It goes on as it began, and says so."""
    known = json.loads((stopped / WORK / "run.json").read_text())
    for key in ("int8_teacher", "expert_share"):
        del known["config"]["distill"][key]
    del known["config"]["low_memory"]
    (stopped / WORK / "run.json").write_text(json.dumps(known))
    distill = run(teacher_directory, stopped, None, resume=True)["config"]["distill"]
    assert distill["int8_teacher"] is False and distill["expert_share"] == 1


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), safetensors.SafetensorError("I/O error: No space left on device (os error 28)")],
)
def test_a_full_disk_while_saving(
    error: Exception, finished: tuple[dict[str, Any], Path], teacher_directory: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The old checkpoint and the work survive; with room again, the run resumes and nothing is trained twice."""
    output = tmp_path / "model"
    shutil.copytree(finished[1], output)
    before = contents(output)
    wanted = config(text_file, seed=7)
    with monkeypatch.context() as patched:
        patched.setattr("transformers.modeling_utils.safe_save_file", raising(error))
        refused("no space left", teacher_directory, output, wanted, overwrite=True)
    kept = {name: data for name, data in contents(output).items() if not name.startswith(f"{WORK}/")}
    assert kept == before
    AutoModelForCausalLM.from_pretrained(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    monkeypatch.setattr(torch.optim.AdamW, "step", raising(AssertionError("trained again")))
    assert run(teacher_directory, output, None, resume=True)["stages"][1]["tokens"] == 1024
    assert contents(output)["model.safetensors"] != before["model.safetensors"]


@pytest.mark.parametrize("stage", ["blockwise", "trainer"])
def test_a_full_disk_while_training(
    stage: str, teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(f"bimos.training.{stage}.save_tensors", raising(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):  # the command line makes one line of it
            run(teacher_directory, output, config(text_file))
    assert run(teacher_directory, output, None, resume=True)["stages"][1]["tokens"] == 1024


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_while_the_optimizer_is_saved(
    teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, save = tmp_path / "out", torch.save
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", lambda state, path: save(state, "/dev/full"))
        with pytest.raises(RuntimeError) as caught:
            run(teacher_directory, output, config(text_file))
    assert disk_full(caught.value)
    for state in ({"small": torch.zeros(3)}, {"large": torch.zeros(100_000)}):  # which end in other words
        with pytest.raises(RuntimeError) as caught:
            save(state, "/dev/full")
        assert disk_full(caught.value)
    assert run(teacher_directory, output, None, resume=True)["stages"][1]["tokens"] == 1024


def test_a_save_that_was_killed_is_done_again(stopped: Path, teacher_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the checkpoint and the report: the checkpoint is whole, the run resumes."""

    def save_and_die(*arguments: Any, **options: Any) -> None:
        save_packed_itself(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("bimos.finishing.save_packed", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(teacher_directory, stopped, None, resume=True)
    AutoModelForCausalLM.from_pretrained(stopped)
    assert run(teacher_directory, stopped, None, resume=True)["total_bytes"] > 0
    assert (stopped / "report.html").exists() and not (stopped / WORK).exists()


def test_the_model_may_be_named_in_another_way(stopped: Path, teacher_directory: Path, text_file: Path) -> None:
    named = teacher_directory / ".." / teacher_directory.name
    assert run(named, stopped, config(text_file), resume=True)["total_bytes"] > 0


def test_texts_to_evaluate_are_remembered(
    teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("bimos.finishing.save_packed", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(teacher_directory, tmp_path / "out", config(text_file), evaluate=[str(text_file)])
    assert remembered(tmp_path / "out") == json.loads(json.dumps(config(text_file).to_dict()))
    assert list(run(teacher_directory, tmp_path / "out", None, resume=True)["perplexity"]) == [str(text_file)]


def test_rates_of_a_stage_that_has_not_begun_may_change(
    teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the message about a loss that is not finite tells the user to do."""
    output, wild = tmp_path / "out", config(text_file, distill={"lr_latent": 1e30, "lr_scale": 1e30, "warmup": 0.0, "clip": 0.0})
    refused("not finite.*--resume", teacher_directory, output, wild)
    blocks = contents(output / WORK / "blocks")
    assert blocks
    shutil.rmtree(output / WORK / "distill")
    refused("blocks.lr_latent", teacher_directory, output, config(text_file, blocks={"lr_latent": 1e-3}), resume=True)
    monkeypatch.setattr("bimos.training.blockwise.save_tensors", raising(AssertionError("trained again")))
    result = run(teacher_directory, output, config(text_file), resume=True)
    assert RunConfig.from_dict(result["config"]) == config(text_file)


@pytest.mark.parametrize("damage", ["truncated", "of another model"])
def test_a_block_that_is_damaged(damage: str, stopped: Path, teacher_directory: Path, text_file: Path) -> None:
    shutil.rmtree(stopped / WORK / "distill")
    path = block_file(stopped / WORK / "blocks", 1)
    good = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(good[: len(good) // 2])
        assert run(teacher_directory, stopped, None, resume=True)["stages"][1]["tokens"] == 1024  # that block is done again
    else:
        tensors, metadata = load_tensors(path)
        save_tensors({name: tensor[:4] for name, tensor in tensors.items()}, path, metadata)
        refused("does not fit.*--overwrite", teacher_directory, stopped, None, resume=True)


COMPLETE = '{"model": "m", "weights": "w", "evaluate": [], "config": %s}'


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": 1}', COMPLETE % "[1]", COMPLETE % '{"distill": 3}', COMPLETE % "null"])
def test_a_run_file_without_what_it_should_say(content: str, stopped: Path, teacher_directory: Path) -> None:
    (stopped / WORK / "run.json").write_text(content)
    refused(r"run\.json.*damaged.*--overwrite", teacher_directory, stopped, None, resume=True)


def test_a_restart_does_not_move_the_end_of_a_budget_of_minutes(
    teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float | None] = []

    def noted(*arguments: Any, **options: Any) -> None:
        limits.append(next(argument for argument in arguments if isinstance(argument, Budget)).seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "distill", noted)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run(teacher_directory, tmp_path / "out", None if resume else config(text_file, minutes=0.5), resume=resume)
        time.sleep(0.05)  # the next process's text and blocks take another time
    assert limits[0] == limits[1] is not None


def test_blocks_that_are_done_are_not_gone_through_again(stopped: Path, teacher_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((stopped / WORK / "run.json").read_text())
    monkeypatch.setattr("bimos.training.blockwise.advance", raising(AssertionError("again")))
    monkeypatch.setattr("bimos.training.blockwise.embed", raising(AssertionError("again")))
    result = run(teacher_directory, stopped, None, resume=True)
    blocks = result["stages"][0]
    assert len(blocks["blocks"]) == 2 and blocks["tokens"] == 512 and blocks["seconds"] > 0 and blocks["loss_last"] > 0
    assert result["config"] == before["config"]


def test_a_kill_while_the_work_is_deleted(
    teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, delete = tmp_path / "out", shutil.rmtree

    def die(path: Path, *arguments: Any, **options: Any) -> None:
        if Path(path).name == DONE and Path(path).exists():
            (Path(path) / "run.json").unlink()
            raise KeyboardInterrupt
        delete(path, *arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", die)
        run(teacher_directory, output, config(text_file, tokens=128))
    assert (output / DONE).exists() and not (output / WORK).exists()
    refused("the run there is finished", teacher_directory, output, None, resume=True)
    assert not (output / DONE).exists()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # while the work of an earlier run gives way to another
        patched.setattr(sys.modules["bimos.quantize"], "train", raising(KeyboardInterrupt()))
        run(teacher_directory, output, config(text_file, tokens=128), overwrite=True)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", die)
        run(teacher_directory, output, config(text_file, tokens=256), overwrite=True)
    assert run(teacher_directory, output, config(text_file, tokens=128), overwrite=True)["stages"][1]["tokens"] == 128


def test_two_runs_do_not_work_in_one_place(
    stopped: Path, teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(stopped)
    with held(stopped):
        for options in ({"resume": True}, {"overwrite": True}, {}):
            refused("another run works in", teacher_directory, stopped, config(text_file), **options)
    assert contents(stopped) == before
    began: list[str] = []

    def load(*arguments: Any) -> None:  # long before there is a folder for the work
        refused("another run works in", teacher_directory, tmp_path / "new", config(text_file))
        began.append("loading")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sys.modules["bimos.quantize"], "_load", load)
        run(teacher_directory, tmp_path / "new", config(text_file))
    assert began == ["loading"]
    assert run(teacher_directory, stopped, None, resume=True)["total_bytes"] > 0
    assert not list(tmp_path.glob(".*.lock"))


def test_a_folder_of_the_users_is_left_alone(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("work.done", "runs"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "thesis.txt").write_text("mine")
    refused("not empty", teacher_directory, tmp_path / "out", config(text_file))
    run(teacher_directory, tmp_path / "out", config(text_file, tokens=128), overwrite=True)
    assert all((tmp_path / "out" / name / "thesis.txt").read_text() == "mine" for name in ("work.done", "runs"))
