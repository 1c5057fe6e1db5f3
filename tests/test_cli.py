"""The command line: what it lists, what its documentation says, and what its commands do on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner, Result

import bimos
from bimos.cli import app
from bimos.cli.group import write_result
from bimos.engine import Engine
from bimos.kernels import native

ROOT = Path(__file__).parents[1]
COMMANDS = ["quantize", "eval", "compare", "inspect", "bench", "info", "generate", "chat", "unpack", "convert", "methods", "doctor", "demo"]
GROUP = typer.main.get_command(app)


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def parse(line: str) -> None:
    """Parse a line of documentation as the program would, without doing what it says."""
    program, name, *arguments = shlex.split(line, comments=True)
    assert program == "bimos"
    GROUP.commands[name].make_context(name, arguments, parent=GROUP.make_context("bimos", [name]))  # type: ignore[attr-defined]


def documented(text: str) -> list[str]:
    return [
        line
        for block in re.findall(r"```(?:bash|console|sh)\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("bimos ")
    ]


def test_help_lists_every_command_and_nothing_else() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert re.findall(r"^[^\w-]+([a-z]+)  +[A-Z]", result.stdout, re.MULTILINE) == COMMANDS
    assert list(GROUP.commands) == COMMANDS  # type: ignore[attr-defined]


def test_no_command_shows_help() -> None:
    result = run()
    assert result.exit_code == 0 and "quantize" in result.stdout


def test_version() -> None:
    assert run("--version").stdout.strip() == f"bimos {bimos.__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_parses(name: str) -> None:
    help_text = GROUP.commands[name].help or ""  # type: ignore[attr-defined]
    (examples,) = re.findall(r"Example: (.*)", help_text)
    lines = re.findall(r"`(?:[^`]*\| )?(bimos [^`]*)`", examples)
    assert lines and all(line.split()[1] == name for line in lines)
    for line in lines:
        parse(line)


@pytest.mark.parametrize("line", documented((ROOT / "README.md").read_text()))
def test_readme_lines_parse(line: str) -> None:
    parse(line)


def test_readme_names_only_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"\b(?:configs|docs|src|benchmarks)/[\w./-]+\w", text)) - {"src/bimos/methods/yours.py", "configs/yours.yaml"}
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_make_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"^(?: {4})?make ([a-z-]+)", text, re.MULTILINE)) <= targets


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("eval --nonsense", "No such option: --nonsense; see bimos eval --help"),
        ("quantize", "Missing argument 'MODEL'; see bimos quantize --help"),
        ("nonsense", "No such command 'nonsense'; see bimos --help"),
        ("quantize x --embedding-bits", "Option '--embedding-bits' requires an argument"),
    ],
)
def test_wrong_usage_is_one_line(line: str, said: str) -> None:
    result = CliRunner().invoke(app, line.split(), prog_name="bimos")
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {said}") and result.stderr.count("\n") == 1


def test_methods_lists_the_registry(tmp_path: Path) -> None:
    result = run("methods", "--json", tmp_path / "methods.json")
    assert result.exit_code == 0
    written = json.loads((tmp_path / "methods.json").read_text())
    assert set(written["methods"]) == set(bimos.available_methods()) and written["bimos"] == bimos.__version__
    assert written["methods"]["binarymos"]["options"]["num_experts"] == 4
    assert all(name in result.stdout for name in written["methods"])
    assert run("methods", "--json", tmp_path / "methods.json").exit_code == 0  # again: its own file


def test_doctor_reports_kernels_and_their_check(tmp_path: Path) -> None:
    result = run("doctor", "--json", tmp_path / "doctor.json")
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert result.exit_code == (1 if report["problems"] else 0)
    assert report["kernels"]["packed_linear on CPU"]
    assert not [problem for problem in report["problems"] if "packed_linear" in problem]
    assert report["memory"]["total_bytes"] > report["memory"]["available_bytes"] > 0


def test_doctor_names_extras_in_their_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    import bimos.doctor

    monkeypatch.setattr(bimos.doctor, "_version", lambda name: None)
    monkeypatch.setattr(bimos.doctor, "_requirements", lambda: ({}, ["transformers[torch] is not installed"]))
    result = run("doctor")
    assert result.exit_code == 1
    assert "pip install 'bimos[eval]'" in result.stdout and "problem: transformers[torch] is not installed" in result.stdout


def test_doctor_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import bimos.doctor

    monkeypatch.setattr(bimos.doctor, "packed_linear", lambda x, *rest: x[:, :64])
    _, problems = bimos.doctor._kernels()
    assert len(problems) == 1 and "packed_linear on CPU is off by" in problems[0]


def test_info_of_a_dense_model_counts_its_file(teacher_directory: Path) -> None:
    result = run("info", teacher_directory, "--json", "-")
    written = json.loads(result.stdout)
    assert written["total_bytes"] == (teacher_directory / "model.safetensors").stat().st_size
    assert sum(part["bytes"] for part in written["components"]) == written["total_bytes"]
    assert "no linear is packed" in result.stderr


def test_eval_writes_perplexity_and_provenance(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    result = run("eval", teacher_directory, "--ppl", text_file, "--windows", 2, "--context", 64, "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["perplexity"][text_file.name]["windows"] == 2
    assert written["perplexity"][text_file.name]["value"] == pytest.approx(320, rel=0.3)  # a random model knows nothing
    assert written["versions"]["torch"] and written["seconds"] > 0


def test_json_goes_where_it_is_sent(tmp_path: Path) -> None:
    """A link stays a link, and a pipe a pipe."""
    (tmp_path / "real.json").touch()
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    assert run("methods", "--json", tmp_path / "link.json").exit_code == 0
    assert (tmp_path / "link.json").is_symlink() and "binarymos" in json.loads((tmp_path / "real.json").read_text())["methods"]
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit((tmp_path / "pipe").read_text)
        assert run("methods", "--json", tmp_path / "pipe").exit_code == 0
        assert "binarymos" in json.loads(reading.result(60))["methods"]
    assert (tmp_path / "pipe").is_fifo()
    reading_end, writing_end = os.pipe()  # as a shell's >(...) makes it
    with ThreadPoolExecutor(1) as pool, open(reading_end) as source:
        reading = pool.submit(source.read)
        assert run("methods", "--json", f"/dev/fd/{writing_end}").exit_code == 0
        os.close(writing_end)
        assert "binarymos" in json.loads(reading.result(60))["methods"]


def test_what_json_cannot_say_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    write_result(Path("-"), {"value": float("inf"), "losses": [float("nan"), 1.5]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "bimos": bimos.__version__,
        "value": None,
        "losses": [None, 1.5],
    }


def test_generate_repeats_itself_for_a_seed_only(teacher_directory: Path) -> None:
    texts = [
        run("generate", teacher_directory, "--prompt", "The river", "--max-new-tokens", 12, "--temperature", 2, "--seed", seed).stdout
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("The river") for text in texts)


def test_generate_reads_a_prompt_from_stdin(teacher_directory: Path) -> None:
    result = run("generate", teacher_directory, "--prompt", "-", "--max-new-tokens", 4, "--temperature", 0, stdin="The harbour\n")
    assert result.exit_code == 0 and result.stdout.startswith("The harbour")


@pytest.mark.skipif(native.isa() is None, reason=f"no C++ kernels: {native.problem}")
def test_generate_with_fewer_bits(packed: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed("llama", vocab_size=320, bos_token_id=0, eos_token_id=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked: list[dict[str, Any]] = []

    class Watched(Engine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            asked.append(options)
            super().__init__(*arguments, **options)

    monkeypatch.setattr("bimos.engine.Engine", Watched)
    arguments = ("generate", tmp_path, "--prompt", "The river", "--max-new-tokens", 5, "--temperature", 0)
    for options in (("--head-bits", 4, "--cache-bits", 8, "--activation", "int8"), ()):
        result = run(*arguments, *options)
        assert result.exit_code == 0 and result.stdout.startswith("The river"), result.output
    plain = {"head_bits": None, "cache_bits": 16, "activation": "exact"}
    assert asked == [{"head_bits": 4, "cache_bits": 8, "activation": "int8"}, plain]


def test_chat_through_a_pipe(teacher_directory: Path) -> None:
    result = run("chat", teacher_directory, "--max-new-tokens", 5, "--seed", 0, stdin="Hello\n/reset\n\nHello\n/exit\nnever read\n")
    assert result.exit_code == 0, result.output
    assert "> " not in result.stdout and "never read" not in result.stdout
    assert len([line for line in result.stdout.splitlines() if line.strip()]) >= 2  # an answer to either


def test_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "bimos", "info", "no/such/model/here"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no such model directory: 'no/such/model/here'; give one, a .gguf file or a Hub id\n"
