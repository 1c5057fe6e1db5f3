"""`bimos quantize` from the outside: what it writes, what it says, and what it can know without weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner, Result

from bimos.cli import app
from bimos.kernels import native

QUICK = ["sequence_length=32", "initialise.sequences=4", "blocks.tokens=256", "blocks.epochs=1", "distill.batch_size=2"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, teacher_directory: Path, text_file: Path) -> tuple[Path, dict]:
    """A packed model and the JSON of the run."""
    folder = tmp_path_factory.mktemp("quantized")
    settings = [part for assignment in QUICK for part in ("--set", assignment)]
    given = ["--data", text_file, "--tokens", 256, "--seed", 3, "--ppl", text_file, "--json", folder / "run.json"]
    result = run("quantize", teacher_directory, "-o", folder / "model", *settings, *given)
    assert result.exit_code == 0, (result.output, result.exception)
    return folder / "model", json.loads((folder / "run.json").read_text())


def test_the_result_has_the_keys_that_programs_rely_on(outcome: tuple[Path, dict], text_file: Path) -> None:
    _, written = outcome
    for key in ("total_bytes", "original_bytes", "compression", "body_bits_per_weight", "bits_per_parameter", "components"):
        assert written[key], key
    for stage in written["stages"]:
        for key in ("tokens", "seconds", "tokens_per_second", "peak_memory_bytes", "loss_first", "loss_last"):
            assert stage[key] > 0, (stage["name"], key)
    assert written["config"]["seed"] == 3 and written["config"]["tokens"] == 256
    measured = written["perplexity"][str(text_file)]
    assert measured["value"] > 0 and measured["teacher"] > 0


def test_info_agrees_with_the_bytes_on_disk(outcome: tuple[Path, dict], tmp_path: Path) -> None:
    directory, written = outcome
    result = run("info", directory, "--json", tmp_path / "info.json")
    report = json.loads((tmp_path / "info.json").read_text())
    on_disk = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert report["total_bytes"] == on_disk == sum(part["bytes"] for part in report["components"]) == written["total_bytes"]
    assert report["method"] == "binarymos" and "binarymos" in result.stdout and "embeddings in 8 bits" in result.stdout


def test_the_report_lies_beside_the_model(outcome: tuple[Path, dict]) -> None:
    directory, _ = outcome
    assert (directory / "report.html").read_text().startswith("<!doctype html>")
    assert not (directory / "work").exists()


@pytest.mark.usefixtures("this_processor")  # on which the module's run was measured
def test_eval_of_the_saved_model_repeats_what_the_run_measured(outcome: tuple[Path, dict], text_file: Path, tmp_path: Path) -> None:
    directory, written = outcome
    assert run("eval", directory, "--ppl", text_file, "--json", tmp_path / "eval.json").exit_code == 0
    again = json.loads((tmp_path / "eval.json").read_text())["perplexity"][text_file.name]
    assert again["value"] == pytest.approx(written["perplexity"][str(text_file)]["value"], rel=1e-6)


def test_eval_measures_what_int8_costs(outcome: tuple[Path, dict], text_file: Path, tmp_path: Path) -> None:
    directory, written = outcome
    assert run("eval", directory, "--ppl", text_file, "--activation", "int8", "--json", tmp_path / "eval.json").exit_code == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    exact, rounded = written["perplexity"][str(text_file)]["value"], result["perplexity"][text_file.name]["value"]
    assert result["activation"] == "int8"
    assert rounded == pytest.approx(exact, rel=0.05) and (rounded != exact) == (native.isa() is not None)


def test_minutes_without_training_are_told_of(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4).save_pretrained(tmp_path)
    for method, told in (("rtn2", True), ("binarymos", False)):
        result = run("quantize", tmp_path, "--dry-run", "--method", method, "--minutes", 5)
        assert result.exit_code == 0, result.output
        assert ("--minutes 5 has no effect: method 'rtn2' is not trained here" in result.stderr) == told


def test_the_saved_model_talks(outcome: tuple[Path, dict]) -> None:
    directory, _ = outcome
    result = CliRunner().invoke(app, ["chat", str(directory), "--max-new-tokens", "6", "--seed", "0"], input="Who are you?\n")
    assert result.exit_code == 0 and result.stdout.endswith("\n") and result.stdout.strip()


@pytest.mark.parametrize(("sizes", "gigabytes", "factor"), [((4096, 32, 32, 11008), 1.36, 9.9), ((5120, 40, 40, 13824), 2.29, 11.4)])
def test_dry_run_of_llama_2_needs_its_config_only(sizes: tuple[int, ...], gigabytes: float, factor: float, tmp_path: Path) -> None:
    hidden, layers, heads, intermediate = sizes
    directory = tmp_path / "llama-2"
    directory.mkdir()
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=intermediate, vocab_size=32000
    )
    values = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    (directory / "config.json").write_text(json.dumps(values))
    # In a process of its own, which must stay under 1 GB.
    program = "import sys; from bimos.cli import app; app(standalone_mode=False); "
    program += "from bimos.memory import peak_resident_bytes; print(peak_resident_bytes(), file=sys.stderr)"
    arguments = ["quantize", str(directory), "--dry-run", "--embedding-bits", "16", "--json", str(tmp_path / "plan.json")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["total_bytes"] == pytest.approx(gigabytes * 1e9, rel=0.01)
    assert plan["compression"] == pytest.approx(factor, rel=0.01)
    assert 1.02 < plan["body_bits_per_weight"] < 1.04
    assert all(peak > 0 for peak in plan["peak_memory_bytes"].values())
    assert int(done.stderr.split()[-1]) < 1e9
