"""`kill -9` at any point of any stage: the run resumes and ends where it would have ended."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bimos.evaluation.perplexity import perplexity
from bimos.packing.format import unpack_signs
from bimos.resume import WORK


class Runs:
    """Runs of one model with one config, in processes of their own."""

    def __init__(self, model: Path, settings: dict[str, Any], folder: Path) -> None:
        import dying

        self.dying, self.model, self.settings, self.folder = dying, model, settings, folder
        # Forked from a process that has imported everything and computed nothing: they start in a fraction of a second.
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["bimos.quantize", "transformers.models.llama.modeling_llama", "datasets"])

    def start(self, output: Path, moment: int | None = None) -> Any:
        """A process that begins the run in `output`, or resumes what is there, and dies at `moment`."""
        arguments = (moment, self.folder / "moments.txt", self.model, output, self.settings, interrupted(output))
        process = self.processes.Process(target=self.dying.run, args=arguments)
        process.start()
        return process

    def die(self, output: Path, moment: int) -> bool:
        """Whether the run died at that moment; it may have ended before."""
        process = self.start(output, moment)
        process.join()
        assert process.exitcode in (0, -9)
        return bool(process.exitcode)

    def finish(self, output: Path) -> int:
        """To the end; the moments that this took."""
        process = self.start(output)
        process.join()
        assert process.exitcode == 0
        return int((self.folder / "moments.txt").read_text())


def interrupted(output: Path) -> bool:
    """Whether there is anything to resume; a run just begun or all but over leaves nothing."""
    stranded = output.parent / f".{output.name}.saving" / WORK  # see `bimos.resume.settle`
    return output.is_dir() and any((work / "run.json").exists() for work in (output / WORK, stranded))


def saved(output: Path) -> bool:
    return (output / "report.html").exists() and not interrupted(output)


def stage(output: Path) -> str:
    """Where the run in `output` stands."""
    work = output / WORK
    if (work / "distill").exists():
        return "distillation"
    return "blocks" if (work / "blocks").exists() else "text"


@pytest.fixture(scope="module")
def runs(teacher_directory: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Some forty steps a run, and a checkpoint behind every one of distillation."""
    settings = {
        "options": {"num_experts": 2, "compensation": 0},  # a start that leaves something to train
        "data": str(text_file),
        "sequence_length": 32,
        "tokens": 32 * 4 * 16,
        "initialise": {"sequences": 8, "refit": False},
        "blocks": {"tokens": 512, "epochs": 3, "batch_size": 4, "lr_latent": 0.02},
        "distill": {"batch_size": 4, "lr_latent": 5e-3, "checkpoint_minutes": 0.0},
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        yield Runs(teacher_directory, settings, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The run that nobody kills, and its moments."""
    output = tmp_path_factory.mktemp("whole") / "model"
    return output, runs.finish(output)


def signs(directory: Path) -> Tensor:
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    return torch.cat([unpack_signs(t, torch.int8).flatten() for name, t in sorted(tensors.items()) if t.dtype == torch.uint8])


def quality(directory: Path, text: str) -> float:
    return perplexity(AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory), text).value


def assert_ends_alike(output: Path, whole: Path, text: str) -> None:
    """The same to rounding, and so is the perplexity; nothing is left of the work."""
    assert (signs(output) == signs(whole)).float().mean() > 0.999
    assert quality(output, text) == pytest.approx(quality(whole, text), rel=0.01)
    assert not (output / WORK).exists() and sorted(path.name for path in output.parent.iterdir()) == [output.name]
    assert (output / "result.json").exists() and (output / "report.html").exists()


def test_the_uninterrupted_run_trains(whole: tuple[Path, int]) -> None:
    """Or the other tests would show nothing."""
    output, moments = whole
    assert moments > 150
    for entry in json.loads((output / "result.json").read_text())["stages"]:
        assert entry["loss_last"] < 0.98 * entry["loss_first"], entry["name"]


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments(seed: int, runs: Runs, whole: tuple[Path, int], text: str, tmp_path: Path) -> None:
    output, (expected, moments) = tmp_path / "model", whole
    chance = random.Random(seed)
    died = []
    for share in (0.1, 0.4, 0.4, 0.6):  # of the whole: the first falls early, and each later run has less to do
        if not runs.die(output, chance.randrange(1, int(share * moments))):
            break
        died.append(stage(output))
    assert len(died) >= 2
    if not saved(output):
        runs.finish(output)
    assert_ends_alike(output, expected, text)


def test_killed_with_cached_logits(runs: Runs, text: str, tmp_path: Path) -> None:
    """Every window comes twice; kills fall while the cache is filled and while it is read."""
    distill = runs.settings["distill"] | {"teacher": "cached", "top_k": 16, "distinct_tokens": 32 * 4 * 8}
    cached = Runs(runs.model, runs.settings | {"distill": distill}, tmp_path)
    expected, output = tmp_path / "whole" / "model", tmp_path / "killed" / "model"
    moments = cached.finish(expected)
    stages = []
    for share in (0.45, 0.1, 0.2):
        if cached.die(output, int(share * moments)):
            stages.append(stage(output))
            assert stages[-1] != "distillation" or (output / WORK / "logits" / "cache.json").exists()
    assert "distillation" in stages
    cached.finish(output)
    assert_ends_alike(output, expected, text)


@pytest.mark.parametrize("where", ["text", "blocks", "distillation"])
def test_killed_in_each_stage(where: str, runs: Runs, whole: tuple[Path, int], text: str, tmp_path: Path) -> None:
    output, (expected, moments) = tmp_path / "model", whole
    shares = {"text": 0.02, "blocks": 0.15, "distillation": 0.5}
    assert runs.die(output, int(shares[where] * moments))
    assert stage(output) == where
    runs.finish(output)
    assert_ends_alike(output, expected, text)


def test_killed_within_a_checkpoint(runs: Runs, whole: tuple[Path, int], text: str, tmp_path: Path) -> None:
    """At several moments around one checkpoint of distillation; none costs more than that checkpoint."""
    output, (expected, moments) = tmp_path / "model", whole
    assert runs.die(output, moments // 2)
    incomplete = 0
    for moment in range(7, 15, 2):
        assert runs.die(output, moment)
        folders = list((output / WORK / "distill").glob("checkpoint-*"))
        complete = [folder for folder in folders if (folder / "complete.json").exists()]
        assert complete
        incomplete += len(folders) > len(complete)
    assert incomplete
    runs.finish(output)
    assert_ends_alike(output, expected, text)


def test_killed_while_saving(runs: Runs, whole: tuple[Path, int], text: str, tmp_path: Path) -> None:
    """What lies under the final name is nothing or the whole; the report comes with the next try."""
    output, (expected, moments) = tmp_path / "model", whole
    assert runs.die(output, moments - 60)
    tries = 0
    while tries < 20 and runs.die(output, 10 + 8 * tries):
        tries += 1
        if (output / "model.safetensors").exists():
            assert torch.equal(signs(output), signs(expected))
            AutoModelForCausalLM.from_pretrained(output)
    assert 3 < tries < 20
    assert_ends_alike(output, expected, text)


def test_killed_just_behind_the_exchange(runs: Runs, whole: tuple[Path, int], text: str, tmp_path: Path) -> None:
    """The new checkpoint is in place, the work still in what was there before."""
    output, (expected, moments) = tmp_path / "model", whole
    assert runs.die(output, moments - 60)
    shutil.copytree(output, tmp_path / ".model.saving")
    shutil.rmtree(output)
    shutil.copytree(expected, output, ignore=shutil.ignore_patterns("result.json", "report.html"))
    runs.finish(output)
    assert_ends_alike(output, expected, text)


def test_killed_before_anything(runs: Runs, whole: tuple[Path, int], text: str, tmp_path: Path) -> None:
    output, (expected, _) = tmp_path / "model", whole
    for moment in (1, 5):
        assert runs.die(output, moment)
    runs.finish(output)
    assert_ends_alike(output, expected, text)


def test_killed_from_outside(runs: Runs, whole: tuple[Path, int], text: str, tmp_path: Path) -> None:
    """At any time, in the middle of a step or of a file. What is asserted does not depend on when."""
    output, expected = tmp_path / "model", whole[0]
    chance = random.Random(0)
    for _ in range(3):
        process = runs.start(output)
        time.sleep(chance.uniform(0.2, 1.5))
        process.kill()
        process.join()
        if saved(output):
            break
    if not saved(output):
        runs.finish(output)
    assert_ends_alike(output, expected, text)


def test_the_last_checkpoint_was_not_complete(runs: Runs, whole: tuple[Path, int], text: str, tmp_path: Path) -> None:
    """As after a loss of power: half of the tensors, no mark. The stage begins again from the blocks."""
    output, (expected, moments) = tmp_path / "model", whole
    assert runs.die(output, moments // 2)
    for folder in (output / WORK / "distill").glob("checkpoint-*"):
        (folder / "complete.json").unlink(missing_ok=True)
        for tensors in folder.glob("trained.safetensors"):
            tensors.write_bytes(tensors.read_bytes()[: tensors.stat().st_size // 2])
    runs.finish(output)
    assert_ends_alike(output, expected, text)
