"""`bimos bench`: what is measured and how the figures hang together; no expectation of how fast anything is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from bimos import BimosError
from bimos.cli import app
from bimos.engine import Engine, windows
from bimos.evaluation import bandwidth
from bimos.evaluation.bandwidth import Bandwidth, last_caches
from bimos.evaluation.runners import EngineRunner, TransformersRunner
from bimos.evaluation.speed import Runs, bytes_read, fitting, measure
from bimos.kernels import native
from bimos.models import load_model
from bimos.packing.checkpoint import save_packed

Packed = Callable[..., PreTrainedModel]
FEW = Runs(prompts=(3, 20), batches=(1, 4), tokens=5, repeats=2, threads=1)
needs_kernels = pytest.mark.skipif(native.isa() is None, reason=f"no C++ kernels: {native.problem}")


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "SMALLEST", 2**22)
    monkeypatch.setattr(bandwidth, "last_caches", lambda: [2**19])


@pytest.fixture
def directory(packed: Packed, tmp_path: Path) -> Path:
    return save_packed(packed("llama", embedding_bits=8), None, tmp_path / "packed")


@pytest.fixture
def dense_directory(dense: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    dense("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


def test_figures_hang_together(directory: Path) -> None:
    threads = torch.get_num_threads()
    steps: list[tuple[int, int]] = []
    result = measure(directory, FEW, lambda done, total: steps.append((done, total)))
    assert torch.get_num_threads() == threads
    assert steps == [(n, 12) for n in range(1, 13)]  # a round is thrown away
    assert [(row["prompt"], row["batch"]) for row in result["runs"]] == [(3, 1), (3, 4), (20, 1), (20, 4)]
    for row in result["runs"]:
        assert row["decode_tokens_per_second"] == pytest.approx(row["batch"] / row["step_seconds"])
        assert row["prefill_tokens_per_second"] == pytest.approx(row["batch"] * row["prompt"] / row["first_token_seconds"])
        assert row["bytes_per_second"] == pytest.approx(row["bytes_per_step"] / row["step_seconds"])
        for name in ("memory", "cache"):
            read = result["bandwidth"][name]
            assert read["samples"] == 2
            assert row[f"share_of_{name}_bandwidth"] == pytest.approx(row["bytes_per_second"] / read["bytes_per_second"])
    one, four = result["runs"][2]["bytes_per_step"], result["runs"][3]["bytes_per_step"]
    position = result["memory"]["cache_per_position"]
    assert four - one == pytest.approx(3 * 23 * position)  # weights are read once, every sequence has keys and values of its own
    assert result["memory"]["cache"] == 4 * 26 * position
    assert result["memory"]["peak"] > result["memory"]["weights"]


@needs_kernels
def test_packed_models_run_in_the_engine(directory: Path) -> None:
    result = measure(directory, FEW)
    assert (result["runs_in"], result["why"], result["threads"]) == (f"engine, {native.isa()}", None, 1)
    assert result["memory"]["cache_per_position"] == 2 * 2 * 2 * 2 * 8  # keys and values, bfloat16, blocks, key heads, head


def test_others_run_in_transformers(packed: Packed, dense_directory: Path, tmp_path: Path) -> None:
    dense = measure(dense_directory, FEW)
    assert dense["runs_in"] == "transformers" and dense["why"]
    assert dense["memory"]["cache_per_position"] == 2 * 4 * 2 * 2 * 8  # in float32
    other = measure(save_packed(packed("gemma"), None, tmp_path / "gemma"), FEW)
    assert other["runs_in"] == "transformers"
    assert other["why"] == ("architecture gemma" if native.isa() else f"no C++ kernels ({native.problem})")


def test_what_a_step_reads(packed: Packed, dense: Callable[..., PreTrainedModel]) -> None:
    rest = 4 * (32 + 2 * 2 * 32) + 2 * 4 * 4  # norms, and frequencies of the rotary embedding with a copy
    body = 4 * 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 72)
    assert bytes_read(dense("llama")) == 4 * 101 * 32 + body + rest  # tied: the head is read whole
    assert bytes_read(dense("mistral")) == 4 * 101 * 32 + 4 * 32 + body + rest  # and a row of the embedding
    tied, own = packed("llama", embedding_bits=8), packed("mistral", embedding_bits=8)
    assert bytes_read(own) - bytes_read(tied) == 34  # int8 and a scale
    planes = sum(tensor.nbytes for name, tensor in tied.named_buffers() if "layers" in name)
    assert bytes_read(tied) == 101 * 34 + planes + rest


@pytest.mark.parametrize(("limit", "prompts"), [(None, (16, 128, 512)), (517, (16, 128, 512)), (516, (16, 128)), (21, (16,))])
def test_the_usual_prompts_as_far_as_the_model_has_room(limit: int | None, prompts: tuple[int, ...]) -> None:
    assert fitting(Runs(tokens=4), limit) == prompts


def test_prompts_of_a_small_model(directory: Path, dense_directory: Path) -> None:
    for model in (directory, dense_directory):
        result = run(model, "--batch", 1, "--tokens", 4, "--repeats", 1, "--json", "-")
        assert [row["prompt"] for row in json.loads(result.stdout)["runs"]] == [16]


def test_experts_are_not_counted_as_read(monkeypatch: pytest.MonkeyPatch, dense_directory: Path) -> None:
    monkeypatch.setattr("bimos.evaluation.speed.has_experts", lambda *_: True)
    result = run(dense_directory, "--prompt", 3, "--batch", 1, "--tokens", 2, "--repeats", 1, "--json", "-")
    assert result.exit_code == 0 and "mixture-of-experts" in result.stderr
    row = json.loads(result.stdout)["runs"][0]
    assert row["bytes_per_step"] is None and row["share_of_memory_bandwidth"] is None and row["decode_tokens_per_second"] > 0


@needs_kernels
def test_both_ways_say_the_same(packed: Packed) -> None:
    model = torch.nn.Module.float(packed("llama", seed=3))
    prompts = torch.randint(3, 101, (3, 9), generator=torch.Generator().manual_seed(1)).tolist()
    expected = [model.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 9:].tolist() for p in prompts]
    for runner in (TransformersRunner(model), EngineRunner(Engine(model, threads=1))):
        assert [list(column) for column in zip(*runner.steps(prompts, 8), strict=True)] == expected


def test_windows_of_the_engine(packed: Packed) -> None:
    assert windows(packed("mistral", sliding_window=5).config) == [5, 5]
    assert windows(packed("llama").config) == [0, 0]


@pytest.mark.parametrize("kernels", [pytest.param(True, marks=needs_kernels), False])
def test_bandwidth_says_how_it_reads(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr(native, "isa", lambda: None)
    words = torch.arange(1001)
    assert bandwidth._read(words, 3) == 3 * 500 * 1001
    measured = Bandwidth()
    for _ in range(3):
        measured.sample()
    result = measured.result()
    assert result["by"] == ("bimos::read_memory" if kernels else "torch.sum")
    assert [(result[name]["bytes"], result[name]["samples"]) for name in ("memory", "cache")] == [(2**22, 3), (2**18, 3)]


def test_caches_as_the_system_describes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2"), (3, "3")):
        for index, (level, size) in enumerate(((1, "32K"), (3, "32M"), (2, "1024K"))):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{text}\n")
    monkeypatch.setattr(bandwidth, "_CPUS", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert last_caches() == [2**25, 2**25]
    monkeypatch.setattr(bandwidth, "_CPUS", tmp_path / "nothing")
    assert last_caches() == []


def test_unknown_caches_leave_memory_alone(monkeypatch: pytest.MonkeyPatch, dense_directory: Path) -> None:
    monkeypatch.setattr(bandwidth, "last_caches", lambda: [])
    result = run(dense_directory, "--prompt", 3, "--batch", 1, "--tokens", 2, "--repeats", 1, "--json", "-")
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["bandwidth"]["cache"] is None


def test_the_command(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    options = ["--prompt", "20, 3", "--batch", "1,2", "--tokens", 4, "--repeats", 1, "--threads", 2, "--json", file]
    result = run(directory, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    written = json.loads(file.read_text())
    assert {"model", "runs", "bandwidth", "memory", "versions", "commit", "machine"} <= written.keys()
    assert written["threads"] == 2
    assert [(row["prompt"], row["batch"], row["tokens"]) for row in written["runs"]] == [(20, 1, 4), (20, 2, 4), (3, 1, 4), (3, 2, 4)]
    assert "decode tokens/s" in result.stdout and "read bandwidth of memory" in result.stdout and written["runs_in"] in result.stdout


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--prompt", "16,x"], "--prompt 16,x: must be whole numbers"),
        (["--prompt", "0"], "--prompt 0: must be at least 1"),
        (["--batch", "1,-2"], "--batch 1,-2: must be at least 1"),
        (["--tokens", "0"], "--tokens 0: must be at least 1"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--threads", "0"], "--threads 0: must be from 1 to 1024"),
        (["--tokens", "60"], "--tokens 60 leaves no room for a prompt of 16: the model has 64 positions"),
        (["--prompt", ""], "must be whole numbers with commas"),
        (["--prompt", "16,60", "--tokens", "8"], "--prompt 60 and --tokens 8 take 69 positions: the model has 64"),
        (["--json", "no/such/folder.json"], "there is no folder"),
    ],
)
def test_bad_input(options: list[str], fragment: str, directory: Path) -> None:
    result = run(directory, *options)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), (result.output, result.exception)
    assert fragment in result.stderr


def test_no_such_model() -> None:
    with pytest.raises(BimosError, match=r"\./no-such-model"):
        measure("./no-such-model", FEW)


@needs_kernels
def test_fewer_bits_are_fewer_bytes(directory: Path) -> None:
    few = Runs(prompts=(20,), batches=(1,), tokens=5, repeats=1, threads=1)
    plain = measure(directory, few)
    options = {"head_bits": 4, "cache_bits": 8, "activation": "int8"}
    fewer = measure(directory, few, options=options)
    assert fewer["options"] == options and plain["options"] == {"head_bits": None, "cache_bits": 16, "activation": "exact"}
    assert fewer["runs"][0]["bytes_per_step"] < plain["runs"][0]["bytes_per_step"]
    assert fewer["memory"]["cache_per_position"] < plain["memory"]["cache_per_position"]


@needs_kernels
def test_a_step_by_parts(directory: Path) -> None:
    few = Runs(prompts=(3,), batches=(1,), tokens=8, repeats=1, threads=2)
    parts = measure(directory, few)["parts"]
    assert list(parts) == ["products", "tables", "scales", "router", "attention", "head", "rest", "waiting"]
    assert all(seconds > 0 for seconds in parts.values())
    engine = Engine(load_model(directory), threads=1)
    list(EngineRunner(engine).steps([[5, 6, 7]], 4))
    assert not any(engine.spent(go_on=False).values())  # nobody asked


def test_bits_are_the_engines(dense_directory: Path) -> None:
    result = run(dense_directory, "--prompt", 3, "--tokens", 2, "--repeats", 1, "--head-bits", 4)
    assert result.exit_code == 2 and "--head-bits" in result.stderr
