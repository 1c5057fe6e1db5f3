"""What `run` and `plan` refuse: one line, and nothing lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from bimos import BimosError
from bimos.methods import method_config
from bimos.models import load_teacher
from bimos.quantize import plan, run
from bimos.resume import WORK
from bimos.settling import check_fit
from running import config, contents, refused, teacher_like


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_no_model(name: str, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(name, tmp_path / name, tmp_path / "out", config(text_file))
    with pytest.raises(BimosError, match=name):
        plan(tmp_path / name, config())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"method": "sine"}, "unknown method 'sine'.*binarymos"),
        ({"options": {"experts": 2}}, "no option 'experts'"),
        ({"options": {1: 2}}, "no option '1'"),
        ({"options": {"num_experts": "two"}}, "num_experts='two'"),
        ({"data": ""}, "no training text.*--data"),
        ({"data": "no-such-file.txt"}, r"no-such-file\.txt"),
        ({"skip": ["no_such_proj"]}, "no_such_proj"),
        ({"sequence_length": 512}, "sequence_length=512.*256"),
        ({"distill": {"report_to": "nowhere"}}, "distill.report_to=nowhere.*none"),
        ({"method": "sign", "options": {"group_size": 24}}, "'model.layers.*group_size=24"),
    ],
)
def test_wrong_options(changes: dict[str, Any], fragment: str, teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    refused(fragment, teacher_directory, tmp_path / "out", config(**({"data": text_file} | changes)))
    assert not (tmp_path / "out").exists()  # or the next try would be refused


def test_text_without_text(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n \n")
    refused(r"blank\.txt", teacher_directory, tmp_path / "out", config(tmp_path / "blank.txt"))
    assert not (tmp_path / "out").exists()
    refused("missing", teacher_directory, tmp_path / "out", config(text_file), evaluate=[str(tmp_path / "missing.txt")])
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    fewer = teacher_like(teacher_directory, tmp_path / "fewer", **sizes)
    refused(r"token 3\d\d, and the model's embedding has 300 rows", fewer, tmp_path / "out", config(text_file))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_embedding_that_8_bits_cannot_store(teacher_directory: Path) -> None:
    class Shifted(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + 1

    teacher, _ = load_teacher(teacher_directory)
    teacher.set_input_embeddings(Shifted(320, 64))
    method = method_config("binarymos")
    with pytest.raises(BimosError, match="Shifted cannot be stored in 8 bits"):
        check_fit(teacher, method, config())
    check_fit(teacher, method, config(embedding_bits=16))


def test_linears_that_do_not_fill_bytes(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 320}
    odd = teacher_like(teacher_directory, tmp_path / "odd", **sizes)
    refused("mlp.down_proj.*in_features=44.*multiple of 8.*skip", odd, tmp_path / "out", config(text_file))
    assert not (tmp_path / "out").exists()
    with pytest.raises(BimosError, match="in_features=44"):
        plan(odd, config())


def test_a_packed_model_is_no_teacher(finished: tuple[dict[str, Any], Path], text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(BimosError, match="quantized already"):
        plan(finished[1], config())
    refused("quantized already", finished[1], tmp_path / "out", config(text_file))


def test_an_output_that_is_not_empty(
    finished: tuple[dict[str, Any], Path], teacher_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "model"
    shutil.copytree(finished[1], output)
    (output / "notes.log").write_text("mine")
    before = contents(output)
    refused("not empty.*--overwrite", teacher_directory, output, config(text_file))
    refused(r"nothing to resume.*finished", teacher_directory, output, config(text_file), resume=True)
    refused("blank", teacher_directory, output, config(blank(tmp_path)), overwrite=True)
    assert contents(output) == before
    run(teacher_directory, output, config(text_file, seed=5, tokens=128), overwrite=True)
    after = contents(output)
    assert after["model.safetensors"] != before["model.safetensors"] and after["notes.log"] == b"mine"


def blank(directory: Path) -> Path:
    (directory / "blank.txt").write_text("\n")
    return directory / "blank.txt"


def test_an_output_that_is_a_file(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    refused("is a file", teacher_directory, tmp_path / "out", config(text_file))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_that_name_is_not_ours(overwrite: bool, teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / WORK).mkdir(parents=True)
    (tmp_path / "out" / WORK / "thesis.txt").write_text("two years")
    refused("something else" if overwrite else "not empty", teacher_directory, tmp_path / "out", config(text_file), overwrite=overwrite)
    assert contents(tmp_path / "out") == {f"{WORK}/thesis.txt": b"two years"}


@pytest.mark.parametrize("what", ["model", "text", "evaluated text"])
def test_an_output_that_holds_what_is_read(what: str, teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "all"
    output.mkdir()
    shutil.copytree(teacher_directory, output / "model")
    shutil.copy(text_file, output / "mine.txt")
    before = contents(output)
    model = output / "model" if what == "model" else teacher_directory
    data = output / "mine.txt" if what == "text" else text_file
    evaluate = [str(output / "mine.txt")] if what == "evaluated text" else []
    refused("which is read", model, output, config(data), overwrite=True, evaluate=evaluate)
    assert contents(output) == before


def test_an_output_below_a_file(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    refused("cannot write to", teacher_directory, tmp_path / "file" / "out", config(text_file))
    assert (tmp_path / "file").read_text() == "a file"


def test_a_plan_for_no_causal_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(BimosError, match="type 't5' is no causal language model"):
        plan(tmp_path, config())
