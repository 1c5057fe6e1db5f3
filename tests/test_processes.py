"""Several processes on one run (gloo, on this machine): what they make is what one makes, and the end of one is no loss."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from bimos import BimosError
from bimos.packing.format import unpack_signs
from bimos.processes import LOST, TOLD, Processes, check_launcher
from bimos.training.checkpoints import checkpoints
from bimos.training.reconstruction import shuffled

STEPS = 20
DIVIDED = "cannot be divided between 2 processes: start as many as divide it, or --set distill.batch_size=4"
LASTING = 300  # seconds for processes that wait for each other


class Several:
    """Starts functions of `several.py` in so many processes, forked from one that has imported everything."""

    def __init__(self, folder: Path) -> None:
        import several

        self.several, self.folder = several, folder
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["bimos.quantize", "transformers.models.llama.modeling_llama", "datasets"])

    def start(self, name: str, count: int, *arguments: Any) -> list[int | None]:
        """Their exit codes."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        function = getattr(self.several, name)
        started = [self.processes.Process(target=function, args=(rank, count, port, *arguments)) for rank in range(count)]
        for process in started:
            process.start()
        for process in started:
            process.join(LASTING)
        codes = [process.exitcode for process in started]
        for process in started:
            process.kill()
        return codes

    def run(
        self,
        count: int,
        model: Path,
        output: Path,
        config: dict[str, Any] | None,
        moment: tuple[int, int] | None = None,
        tables: bool = True,
    ) -> tuple[list[int | None], list[str]]:
        """Exit codes, and what those said that could not go on."""
        said = Path(tempfile.mkdtemp(dir=self.folder))
        codes = self.start("run", count, model, output, config, moment, said, tables)
        return codes, [path.read_text() for path in sorted(said.iterdir())]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        yield Several(tmp_path_factory.mktemp("several"))


def settings(text_file: Path, **changes: Any) -> dict[str, Any]:
    """Of a run that starts from weights alone: sums over text are other last bits where others add them up, and so other signs."""
    quick: dict[str, Any] = {
        "options": {"num_experts": 2},
        "data": str(text_file),
        "sequence_length": 32,
        "tokens": 32 * 4 * STEPS,
        "initialise": {"sequences": 8, "activation_aware": False},
        "blocks": {"tokens": 32 * 4 * 10, "epochs": 2, "batch_size": 4},
        "distill": {"batch_size": 4, "checkpoint_minutes": 60.0},
    }
    for key, value in changes.items():
        quick[key] = quick[key] | value
    if not quick["distill"].get("enabled", True):
        del quick["tokens"]
    return quick


def signs(output: Path) -> Tensor:
    tensors = safetensors.torch.load_file(output / "model.safetensors")
    return torch.cat(
        [unpack_signs(tensor, torch.float32).flatten() for name, tensor in sorted(tensors.items()) if tensor.dtype == torch.uint8]
    )


def losses(output: Path, stage: int) -> list[float]:
    report = json.loads((output / "result.json").read_text())["stages"][stage]
    return (
        [loss for _, loss in report["history"]]
        if stage
        else [block[key] for block in report["blocks"] for key in ("loss_first", "loss_last")]
    )


@pytest.mark.parametrize("stage", ["blocks", "distill"])
def test_several_processes_do_what_one_does(several: Several, teacher_directory: Path, text_file: Path, tmp_path: Path, stage: str) -> None:
    other = {"blocks": "distill", "distill": "blocks"}[stage]
    config = settings(text_file, **{other: {"enabled": False}})
    outputs = {count: tmp_path / str(count) for count in (1, 2, 4)}
    for count, output in outputs.items():
        assert several.run(count, teacher_directory, output, config, tables=False) == ([0] * count, [])
    number = int(stage == "distill")
    alone, its_signs = losses(outputs[1], number), signs(outputs[1])
    assert len(alone) == (STEPS if number else 4)
    for count in (2, 4):
        assert losses(outputs[count], number) == pytest.approx(alone, rel=1e-3)
        assert (signs(outputs[count]) == its_signs).float().mean() >= 0.999
        assert not (outputs[count] / "work").exists()


@pytest.mark.parametrize(
    ("method", "options", "changes"),
    [
        ("dbllm", {"group_size": 8}, {"accumulate": 2, "checkpointing": True}),
        ("binarymos", {"num_experts": 2, "planes": 2}, {"train": "scales", "accumulate": 2}),
    ],
)
def test_other_ways_to_train_in_two_processes(
    several: Several,
    teacher_directory: Path,
    text_file: Path,
    tmp_path: Path,
    method: str,
    options: dict[str, int],
    changes: dict[str, Any],
) -> None:
    config = settings(text_file, blocks={"enabled": False}, distill=changes) | {"method": method, "options": options}
    config["initialise"]["refit"] = False
    for count in (1, 2):
        assert several.run(count, teacher_directory, tmp_path / str(count), config, tables=False) == ([0] * count, [])
    alone = losses(tmp_path / "1", 1)
    assert len(alone) == STEPS // 2 and losses(tmp_path / "2", 1) == pytest.approx(alone, rel=1e-3)
    assert alone[-1] != alone[0]


@pytest.mark.parametrize("count", [2, 4])
def test_a_start_sees_what_one_process_sees(several: Several, teacher_directory: Path, tmp_path: Path, count: int) -> None:
    windows = torch.randint(320, (12, 16), generator=torch.Generator().manual_seed(0))
    found = {}
    for processes in (1, count):
        assert several.start("measure", processes, teacher_directory, windows, tmp_path / str(processes)) == [0] * processes
        found[processes] = torch.load(tmp_path / str(processes))
    assert len(found[1]) == 7
    for name, expected in found[1].items():
        for key, value in expected.items():
            torch.testing.assert_close(found[count][name][key], value, rtol=1e-4, atol=1e-6, msg=f"{name} {key}")


@pytest.mark.parametrize("count", [2, 4])
def test_gradients_and_states_of_several_are_those_of_one(several: Several, teacher_directory: Path, tmp_path: Path, count: int) -> None:
    """By size, which Adam would hide; with experts held together, norms, hidden states and two batches to a step."""
    batches = torch.randint(320, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    found = {}
    for processes in (1, count):
        assert several.start("step", processes, teacher_directory, batches, tmp_path / str(processes)) == [0] * processes
        found[processes] = torch.load(tmp_path / str(processes))
    alone, divided = found[1]["gradients"], found[count]["gradients"]
    assert {name.rpartition(".")[2] for name in alone} >= {"weight", "scale_in", "scale_out", "router"}
    for name, expected in alone.items():
        torch.testing.assert_close(divided[name], expected, rtol=2e-3, atol=1e-5 * expected.abs().max().item() + 1e-9, msg=name)
    for key, values in found[1]["state"].items():
        assert values.keys() == found[count]["state"][key].keys() and found[count]["state"][key]["step"] == values["step"] == 1


def test_a_killed_process_ends_the_run_which_any_number_resumes(
    several: Several, teacher_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    config = settings(text_file, distill={"checkpoint_minutes": 0.0})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert several.run(1, teacher_directory, whole, config)[0] == [0]
    blocks = 2 * 2 * 10  # steps
    codes, said = several.run(2, teacher_directory, killed, config, moment=(1, blocks + 7))
    assert codes == [2, -9] and said == [LOST]
    done = checkpoints(killed / "work" / "distill")
    assert [path.name for path in done] in (["checkpoint-6"], ["checkpoint-7"])
    for count in (1, 2, 4):
        output = tmp_path / f"resumed-{count}"
        shutil.copytree(killed, output)
        assert several.run(count, teacher_directory, output, None) == ([0] * count, [])
        assert losses(output, 1) == pytest.approx(losses(whole, 1), rel=0.05)
        assert len(losses(output, 1)) == STEPS
        assert (signs(output) == signs(whole)).float().mean() >= 0.99


def test_a_process_killed_between_blocks(several: Several, teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    """The first one: it is the one that writes."""
    config = settings(text_file, distill={"enabled": False})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert several.run(2, teacher_directory, whole, config)[0] == [0, 0]
    codes, said = several.run(2, teacher_directory, killed, config, moment=(0, 25))
    assert codes == [-9, 2] and said == [LOST]
    assert (killed / "work" / "blocks" / "block-000.safetensors").exists()
    assert several.run(2, teacher_directory, killed, None) == ([0, 0], [])
    assert torch.equal(signs(killed), signs(whole))


def test_cached_logits_of_several_processes(several: Several, teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    cached = {"teacher": "cached", "distinct_tokens": 32 * 4 * 5, "top_k": 16}
    config = settings(text_file, blocks={"enabled": False}, distill=cached)
    for count in (1, 2):
        assert several.run(count, teacher_directory, tmp_path / str(count), config) == ([0] * count, [])
    # Gradients are rounded by groups of tokens, and which tokens meet depends on the processes: of losses of 3e-4 that shows.
    assert losses(tmp_path / "2", 1) == pytest.approx(losses(tmp_path / "1", 1), rel=1e-3, abs=2e-6)


def test_what_several_processes_cannot_do(several: Several, teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    config = settings(text_file, distill={"batch_size": 3})
    codes, said = several.run(2, teacher_directory, tmp_path / "batch", config)
    assert codes == [2, 2] and set(said) == {f"distill.batch_size=3 {DIVIDED}"}
    codes, said = several.run(2, teacher_directory, tmp_path / "self", settings(text_file) | {"data": "self"})
    assert codes == [2, 2] and "text of 'self' is written by one process" in said[0]
    codes, said = several.run(2, teacher_directory, tmp_path / "none", settings(text_file) | {"data": "nowhere.txt"})
    assert codes == [2, 2] and said[0] == said[1] and "nowhere.txt" in said[0]


@pytest.mark.parametrize(
    ("variables", "said"),
    [({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "accelerate launch"), ({"OMPI_COMM_WORLD_SIZE": "2"}, "MPI")],
)
def test_launchers_whose_processes_would_not_find_each_other(variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    check_launcher()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BimosError, match=f"{said}.*torchrun"):
        check_launcher()
    monkeypatch.setenv("RANK", "0")
    check_launcher()


def test_told_to_end_where_no_handler_runs() -> None:
    """As behind a collective on a GPU whose peer is gone: foreign code that waits for ever, and is no call that a signal interrupts."""
    told = "exec >/dev/null 2>&1; kill -TERM $PPID; while kill -0 $PPID; do sleep 0.1; done"  # by what it waits for: never before it waits
    script = f"""
import ctypes, bimos.processes
bimos.processes.GRACE = 0.5
with bimos.processes.Processes(0, 2).guarded():
    ctypes.CDLL(None).system({told.encode()!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LASTING)
    assert done.returncode == 2 and done.stderr.splitlines() == [f"error: {TOLD}"]


def test_a_launcher_starts_the_command(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bimos", "quantize"]
    options = ["--data", text_file, "--method", "sign", "--set", "sequence_length=32", "--set", "distill.enabled=false"]
    budget = ["--set", "blocks.enabled=false", "-o", tmp_path / "model"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launched, teacher_directory, *options, *budget], capture_output=True, text=True, env=environment, timeout=LASTING
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1 and (tmp_path / "model" / "result.json").exists()


def test_shares_and_orders_for_any_number_of_processes() -> None:
    size, count = 4, 12
    rows = torch.arange(count)
    orders = []
    for processes in (Processes(), *(Processes(rank, 2) for rank in range(2)), *(Processes(rank, 4) for rank in range(4))):
        part = processes.divided(size, "size")
        mine = processes.share(rows, size)
        order = shuffled(len(mine), part, processes, torch.Generator().manual_seed(3))
        orders.append(mine[order].view(-1, part))
    assert sorted(orders[0].flatten().tolist()) == rows.tolist() and orders[0].flatten().tolist() != rows.tolist()
    assert torch.equal(torch.cat(orders[1:3], 1), orders[0]) and torch.equal(torch.cat(orders[3:], 1), orders[0])
    with pytest.raises(BimosError, match="key=6 cannot be divided between 4 processes: start as many as divide it, or --set key=8"):
        Processes(0, 4).divided(6, "key")
