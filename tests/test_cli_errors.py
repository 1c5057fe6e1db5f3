"""Bad input: one line that names the thing, exit code 2, no traceback, and nothing on disk lost."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from bimos.errors import no_space
from commands import assert_refused, quantize, run

TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def raising(error: BaseException) -> Callable[..., None]:
    def raise_it(*arguments: Any, **options: Any) -> None:
        raise error

    return raise_it


# What is given


def test_missing_model_directory(tmp_path: Path, text_file: Path) -> None:
    assert_refused(run(*quantize("./no-such-model", tmp_path / "out", text_file)), "./no-such-model")
    assert_refused(run("info", "./no-such-model"), "./no-such-model")
    assert not (tmp_path / "out").exists()


def test_empty_model_directory(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments in (
        quantize(tmp_path / "empty", tmp_path / "out", text_file),
        ["info", tmp_path / "empty"],
        ["eval", tmp_path / "empty", "--ppl", text_file],
    ):
        assert_refused(run(*arguments), "empty", "config.json")


def test_models_of_other_kinds(tmp_path: Path, quantized: Path, teacher_directory: Path) -> None:
    encoder, unknown, broken = (tmp_path / name for name in ("encoder", "unknown", "broken"))
    for directory, kind in ((encoder, "t5"), (unknown, "no-such-kind")):
        shutil.copytree(teacher_directory, directory)
        (directory / "config.json").write_text(json.dumps({"model_type": kind, "num_expert": 2}))
        assert_refused(run("info", directory), kind)
    assert_refused(run("convert", unknown, "-o", tmp_path / "out"), "no-such-kind")
    shutil.copytree(quantized, broken)
    (broken / "tokenizer.json").write_text((quantized / "tokenizer.json").read_text()[:1000])
    assert_refused(run("generate", broken, "--prompt", "x"), "broken")


def test_models_without_a_tokenizer(tmp_path: Path, teacher_directory: Path, text_file: Path) -> None:
    bare = shutil.copytree(teacher_directory, tmp_path / "bare")
    (bare / "tokenizer.json").write_text("{")
    assert_refused(run("eval", bare, "--ppl", text_file), "cannot load the tokenizer of", "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    assert_refused(run("eval", bare, "--ppl", text_file), "has no tokenizer", "copy tokenizer.json")


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_model_whose_scores_are_no_numbers(tmp_path: Path, teacher_directory: Path, temperature: float) -> None:
    broken = shutil.copytree(teacher_directory, tmp_path / "broken")
    model = LlamaForCausalLM.from_pretrained(broken)
    model.lm_head.weight.data[:] = float("nan")
    model.save_pretrained(broken)
    assert_refused(run("generate", broken, "--prompt", "x", "--temperature", temperature), "NaN", "fetch the model again")


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_seeds_that_no_generator_takes(quantized: Path, seed: str) -> None:
    result = run("generate", quantized, "--prompt", "x", "--seed", seed)
    assert result.exit_code == 2 and "--seed" in result.stderr and "Traceback" not in result.output


def test_demo_that_cannot_begin(tmp_path: Path, text_file: Path) -> None:
    assert_refused(run("demo", "-o", text_file), str(text_file))
    assert_refused(run("demo", "-o", tmp_path / "demo", "--minutes", "0"), "0.0 minutes")
    assert not (tmp_path / "demo").exists()  # nothing was fetched


def test_hub_id_without_network(tmp_path: Path, text_file: Path) -> None:
    assert_refused(run(*quantize("nobody/no-model", tmp_path / "out", text_file)), "nobody/no-model", "network")


def test_a_plan_for_several_processes(tmp_path: Path, teacher_directory: Path, text_file: Path) -> None:
    assert_refused(run(*quantize(teacher_directory, tmp_path / "out", text_file, "--processes", 2)), "--dry-run", "torchrun")
    assert not (tmp_path / "out").exists()
    planned = run("quantize", teacher_directory, "--dry-run", "--processes", 2, "--set", "sequence_length=64")
    assert_refused(run("quantize", teacher_directory, "--dry-run"), "--set sequence_length=256")
    assert planned.exit_code == 0 and "peak memory of distill in each process" in planned.stdout


def test_a_mixture_of_experts_is_refused(tmp_path: Path, text_file: Path) -> None:
    MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=2)).save_pretrained(tmp_path / "moe")
    assert_refused(run("quantize", tmp_path / "moe", "--dry-run"), "mixture-of-experts")
    assert_refused(run(*quantize(tmp_path / "moe", tmp_path / "out", text_file)), "mixture-of-experts")


def test_inputs_that_do_not_fill_bytes_are_refused(tmp_path: Path, teacher_directory: Path, text_file: Path) -> None:
    odd = tmp_path / "odd"
    LlamaForCausalLM(LlamaConfig(**TINY | {"intermediate_size": 44})).save_pretrained(odd)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(teacher_directory / name, odd)
    for arguments in (["quantize", odd, "--dry-run"], quantize(odd, tmp_path / "out", text_file)):
        assert_refused(run(*arguments), "in_features=44", "multiple of 8")
    assert not (tmp_path / "out").exists()
    assert run(*quantize(odd, tmp_path / "out", text_file, "--set", "skip=[down_proj]")).exit_code == 0  # the mend that it names


@pytest.mark.parametrize(
    ("more", "fragments"),
    [
        (["--method", "sine"], ["sine", "binarymos"]),
        (["--set", "distill.lr=1"], ["distill.lr", "lr_latent"]),
        (["--set", "options={experts: 3}"], ["experts", "num_experts"]),
        (["--set", "seed"], ["key=value"]),
        (["--set", "seed=many"], ["seed", "many"]),
        (["--config", "no/such.yaml"], ["no/such.yaml"]),
        (["--embedding-bits", "4"], ["embedding_bits=4", "8, 16"]),
        (["--tokens", "0"], ["0 tokens"]),
        (["--tokens", "-5"], ["-5 tokens"]),
        (["--minutes", "0"], ["0.0 minutes"]),
        (["--minutes", "-1"], ["-1.0 minutes"]),
        (["--minutes", "inf"], ["inf minutes", "finite"]),
        (["--minutes", "1", "--tokens", "1000"], ["not both"]),
        (["--resume", "--overwrite"], ["one of them"]),
        (["--resume"], ["resume"]),
        (["--json", "no/folder/result.json"], ["no/folder"]),
        (["--set", "skip=[no_such_proj]"], ["no_such_proj"]),
    ],
)
def test_bad_options(more: list[str], fragments: list[str], teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    assert_refused(run(*quantize(teacher_directory, tmp_path / "out", text_file, *more)), *fragments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "fragment"),
    [(["--device", "tpu"], "'tpu'"), (["--data", "missing.txt"], "missing.txt"), (["--data", "wiki.parquet:-1"], "positive number")],
)
def test_bad_options_of_a_plan(more: list[str], fragment: str, teacher_directory: Path) -> None:
    assert_refused(run("quantize", teacher_directory, "--dry-run", *more), fragment)


def test_no_output_directory(teacher_directory: Path) -> None:
    assert_refused(run("quantize", teacher_directory), "-o DIR")


@pytest.mark.parametrize(
    ("data", "fragments"),
    [("no-such-file.txt", ["no-such-file.txt"]), ("nobody/no-data-set", ["nobody/no-data-set"]), ("blank.txt", ["blank.txt", "no text"])],
)
def test_data_that_is_not_there(
    data: str, fragments: list[str], teacher_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("blank.txt").write_text(" \n\n \n")
    assert_refused(run(*quantize(teacher_directory, tmp_path / "out", data)), *fragments)
    assert not (tmp_path / "out").exists()  # or the next try, with the right name, is refused


def test_no_data(teacher_directory: Path, tmp_path: Path) -> None:
    assert_refused(run("quantize", teacher_directory, "-o", tmp_path / "out", "--tokens", 100, "--data", ""), "--data")


@pytest.mark.parametrize(
    ("more", "fragments"),
    [
        (["--ppl", "wikitext9"], ["wikitext9", "wikitext2"]),
        (["--ppl", "missing.txt"], ["missing.txt"]),
        (["--ppl", " ,"], ["--ppl ' ,'", "leave it out"]),
        (["--tasks", ""], ["--tasks ''"]),
        (["--limit", "5"], ["--tasks"]),
        (["--windows", "0"], ["--windows 0"]),
        (["--tasks", "zeroshot6", "--limit", "0"], ["--limit 0"]),
        (["--activation", "int4"], ["int4", "exact, int8"]),
        (["--activation", "int8"], ["packed"]),  # of a model that is not
        pytest.param(["--tasks", "no_such_task", "--limit", "1"], ["no_such_task"], marks=pytest.mark.slow),  # lm_eval reads its index
    ],
)
def test_bad_evaluations(more: list[str], fragments: list[str], teacher_directory: Path, text_file: Path) -> None:
    ppl = [] if "--ppl" in more or "--tasks" in more or "--limit" in more else ["--ppl", text_file]
    assert_refused(run("eval", teacher_directory, *more, *ppl), *fragments)


def test_texts_of_one_name(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / text_file.name
    other.write_text("Another text.")
    assert_refused(run("eval", teacher_directory, "--ppl", f"{text_file},{other}"), "one name")
    assert_refused(run("eval", teacher_directory, "--ppl", ","), "names nothing")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("hidden_size", "abc"), ("hidden_size", None), ("hidden_size", 0), ("num_attention_heads", 0), ("hidden_act", "no_such")),
        *(("dtype", "floaty"), ("vocab_size", -3), ("pad_token_id", 100_000), ("rope_parameters", {"rope_type": "no_such"})),
        ("num_hidden_layers", 10**7),
    ],
)
def test_absurd_configs(key: str, value: Any, quantized: Path, teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    for source, commands in ((quantized, ["info", "unpack", "generate"]), (teacher_directory, ["quantize"])):
        directory = tmp_path / source.name
        shutil.copytree(source, directory)
        config = json.loads((directory / "config.json").read_text()) | {key: value}
        (directory / "config.json").write_text(json.dumps(config))
        for command in commands:
            more = {"info": [], "unpack": ["-o", tmp_path / "o", "--approximate"], "generate": ["--prompt", "A"]}.get(command)
            if key == "num_hidden_layers" and command == "quantize":
                continue  # as many blocks as that are a plan like any other
            more = ["-o", tmp_path / "o", "--data", text_file, "--dry-run"] if more is None else more
            result = run(command, directory, *more)
            if result.exit_code != 0:  # what does not use a value need not mind it
                assert_refused(result)
            uses = (command == "unpack" and key != "dtype") or key in (
                "hidden_size",
                "num_attention_heads",
                "num_hidden_layers",
                "vocab_size",
            )
            assert result.exit_code == 2 or not uses, (command, key, value)


def test_json_replaces_nothing_but_results(quantized: Path, text_file: Path, tmp_path: Path) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(quantized, model)
    shutil.copy(text_file, text)
    before = contents(tmp_path)
    for target in (model / "config.json", model / "model.safetensors", model / "tokenizer.json", text):
        assert_refused(run("info", model, "--json", target), target.name, "no result of bimos")
    assert contents(tmp_path) == before


def test_bytes_that_are_no_text(quantized: Path) -> None:
    for arguments in (["chat", quantized], ["generate", quantized, "--prompt", "-"]):
        result = run(*arguments, "--max-new-tokens", 3, input=b"\xff\xfe\x80bad\xc3 bytes\n")
        assert result.exit_code == 0, (result.output, result.exception)


def test_an_option_of_no_command() -> None:
    assert_refused(run("--nope"), "--nope", "--help")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--temperature", "-1"), ("--top-p", "0"), ("--max-new-tokens", "0"), ("--prompt", "")),
        *(("--head-bits", "3"), ("--cache-bits", "4"), ("--head-bits", "4"), ("--cache-bits", "8")),  # the last two: not packed
    ],
)
def test_bad_generation(option: str, value: str, teacher_directory: Path) -> None:
    assert_refused(run("generate", teacher_directory, "--prompt", "The river", option, value), option.removeprefix("--"))


# What is already there


def test_an_output_directory_that_is_not_empty_is_left_alone(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("two years of work")
    assert_refused(run(*quantize(teacher_directory, tmp_path / "thesis", text_file)), "thesis", "not empty", "--overwrite")
    assert contents(tmp_path / "thesis") == {"chapter.txt": b"two years of work"}


def test_an_interrupted_run_resumes_and_no_other_takes_its_place(
    teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("bimos.finishing.save_packed", raising(KeyboardInterrupt()))
        result = run(*quantize(teacher_directory, output, text_file))
    assert result.exit_code == 130 and result.stderr.endswith("interrupted; run again with --resume\n")
    before = contents(output)
    assert_refused(run(*quantize(teacher_directory, output, text_file, "--resume", "--set", "distill.lr_latent=0.5")), "distill.lr_latent")
    other = tmp_path / "other-model"
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(teacher_directory / name, other)
    assert_refused(run("quantize", other, "-o", output, "--resume"), "other-model", "tiny-llama")
    assert_refused(run(*quantize(teacher_directory, output, text_file)), "not empty", "--resume")
    assert contents(output) == before
    assert run("quantize", teacher_directory, "-o", output, "--resume").exit_code == 0  # its options are remembered
    assert run("generate", output, "--prompt", "The river", "--max-new-tokens", 2).exit_code == 0


@pytest.mark.parametrize("command", ["unpack", "convert"])
def test_unpack_and_convert_refuse_what_is_not_theirs(command: str, teacher_directory: Path, tmp_path: Path) -> None:
    assert_refused(run(command, teacher_directory, "-o", tmp_path / "out"), "tiny-llama")
    assert not (tmp_path / "out").exists()


def test_unpack_asks_before_it_averages(quantized: Path, tmp_path: Path) -> None:
    assert_refused(run("unpack", quantized, "-o", tmp_path / "out"), "--approximate")
    assert run("unpack", quantized, "-o", tmp_path / "out", "--approximate").exit_code == 0
    assert_refused(run("unpack", quantized, "-o", tmp_path / "out", "--approximate"), "not empty")


# Whatever else ends a run


def replace_perplexity(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr("bimos.evaluation.perplexity.perplexity", raising(error))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "some/file"),
        RuntimeError("some/file: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, teacher_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    replace_perplexity(monkeypatch, error)
    assert_refused(run("eval", teacher_directory, "--ppl", text_file), "no space left", "run again")
    monkeypatch.setattr("bimos.finishing.save_packed", raising(error))
    result = run(*quantize(teacher_directory, tmp_path / "out", text_file))
    assert_refused(result, "no space left", "--resume")
    assert ("the device ('some/file'):" in result.stderr) == isinstance(error, OSError)


def test_the_file_that_found_no_room_is_named() -> None:
    copy = OSError(errno.ENOSPC, "No space left on device", "from", None, "to")
    assert "('to')" in no_space(copy)
    assert "('7')" not in no_space(OSError(errno.ENOSPC, "No space left on device", 7))
    unnamed = OSError(errno.ENOSPC, "No space left on device")
    unnamed.__context__ = FileNotFoundError(errno.ENOENT, "No such file", "another")
    assert "another" not in no_space(unnamed)


def test_an_interruption_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, teacher_directory: Path, text_file: Path) -> None:
    replace_perplexity(monkeypatch, KeyboardInterrupt())
    result = run("eval", teacher_directory, "--ppl", text_file)
    assert (result.exit_code, result.stderr) == (130, "\ninterrupted\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, teacher_directory: Path, text_file: Path) -> None:
    replace_perplexity(monkeypatch, ZeroDivisionError("a bug"))
    result = run("eval", teacher_directory, "--ppl", text_file)
    assert isinstance(result.exception, ZeroDivisionError) and "error:" not in result.stderr
