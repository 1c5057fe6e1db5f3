"""Comparisons of tiny models: what rows say is what their models are; what is finished is not done again; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from bimos.comparison.setting import Setting
from bimos.config import RunConfig
from bimos.errors import BimosError
from bimos.evaluation.perplexity import perplexity
from bimos.evaluation.texts import load_text
from bimos.models import load_config, load_teacher, load_to_measure, load_tokenizer
from bimos.packing.sizes import size_report

Compare = Callable[..., dict[str, Any]]
Compared = tuple[dict[str, Any], Path]


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["row"]: row for row in result["rows"]}


def never(job: Any, steps: list[str]) -> None:
    pytest.fail(f"{job.name} was to {steps} again")


def copied(compared: Compared, target: Path) -> Path:
    shutil.copytree(compared[1], target)
    return target


def refused(compare: Compare, output: Path, fragments: tuple[str, ...], *rows: str, **changes: Any) -> None:
    with pytest.raises(BimosError) as caught:
        compare(output, *(rows or ("fp16",)), spawn=never, **changes)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)


@pytest.mark.usefixtures("this_processor")
def test_rows_say_what_their_models_are(compared: Compared, teacher_directory: Path, text_file: Path) -> None:
    result, output = compared
    rows = by_name(result)
    assert set(rows) == {"fp16", "sign:untrained", "binarymos:num_experts=1", "binarymos:num_experts=2"}
    text = load_text(str(text_file))
    for name, row in rows.items():
        if name == "fp16":
            model, tokenizer = load_teacher(teacher_directory)
            assert (row["body_bits_per_weight"], row["bits_per_parameter"]) == (16, 16)
            assert row["total_bytes"] == 2 * sum(parameter.numel() for parameter in model.parameters())
            assert row["stages"] == [] and row["config"] is None
        else:
            directory = output / "work" / name.replace(":", "-") / "model"
            model, tokenizer = load_to_measure(directory), load_tokenizer(directory)
            sizes = size_report(directory)
            assert {key: row[key] for key in sizes} == sizes
            assert row["total_bytes"] == (directory / "model.safetensors").stat().st_size
            assert row["experts"] == (2 if name.endswith("=2") else 1)
        measured = row["perplexity"][text_file.name]
        assert measured["value"] == pytest.approx(perplexity(model, tokenizer, text, windows=2).value, rel=1e-6)
        assert row["speed"]["decode_tokens_per_second"] > 0 and row["speed"]["runs_in"]
        assert row["versions"]["torch"] and "commit" in row
    distilled = [stage["tokens"] for stage in rows["binarymos:num_experts=2"]["stages"] if stage["name"] == "distill"]
    assert distilled == [512] and [stage["name"] for stage in rows["sign:untrained"]["stages"]] != ["distill"]
    assert rows["binarymos:num_experts=2"]["stages"][-1]["peak_memory_bytes"] > 0


def test_finished_rows_are_not_run_again(compared: Compared, compare_tiny: Compare, tmp_path: Path) -> None:
    output = copied(compared, tmp_path / "out")
    before = {path: path.read_bytes() for path in (output / "rows").glob("*.json")}
    result = compare_tiny(output, "binarymos:num_experts=2", "fp16", spawn=never)
    assert len(result["rows"]) == 4 and {path: path.read_bytes() for path in before} == before


def test_rows_and_texts_are_added(compared: Compared, compare_tiny: Compare, tmp_path: Path, text_file: Path) -> None:
    output = copied(compared, tmp_path / "out")
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[2000:6000])
    model = output / "work" / "sign-untrained" / "model" / "model.safetensors"
    made = model.stat().st_mtime_ns
    result = compare_tiny(output, "sign:untrained", "onebit:untrained", texts=[str(text_file), str(other)])
    rows = by_name(result)
    assert len(rows) == 5 and model.stat().st_mtime_ns == made
    assert set(rows["sign:untrained"]["perplexity"]) == set(rows["onebit:untrained"]["perplexity"]) == {"river.txt", "other.txt"}
    assert set(rows["fp16"]["perplexity"]) == {"river.txt"}
    assert rows["sign:untrained"]["perplexity"]["river.txt"] == by_name(compared[0])["sign:untrained"]["perplexity"]["river.txt"]


def test_a_row_whose_model_is_gone_is_not_made_again_unasked(compared: Compared, compare_tiny: Compare, tmp_path: Path) -> None:
    output = copied(compared, tmp_path / "out")
    shutil.rmtree(output / "work" / "sign-untrained")
    other = tmp_path / "other.txt"
    other.write_text("The river is wide and slow. " * 40)
    with pytest.raises(BimosError, match="no model of it any more"):
        compare_tiny(output, "sign:untrained", spawn=never, texts=[str(other)])


def test_another_setting_is_refused(compared: Compared, compare_tiny: Compare, tmp_path: Path, text_file: Path) -> None:
    output = copied(compared, tmp_path / "out")
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text())
    refused(compare_tiny, output, ("seed=0", "now it is 1"), seed=1)
    refused(compare_tiny, output, ("data=", "other.txt"), data=str(other))
    refused(compare_tiny, output, ("tokens=512", "1024"), tokens=1024)
    refused(compare_tiny, output, ("tokens=512", "now it is None"), tokens=None, minutes=2)
    refused(compare_tiny, output, ("windows=2", "now it is 3"), windows=3)


def test_work_of_another_setting_is_refused(compared: Compared, compare_tiny: Compare, tmp_path: Path) -> None:
    work, output = copied(compared, tmp_path / "out") / "work", tmp_path / "new"
    for row in ("fp16", "binarymos:num_experts=2"):
        refused(compare_tiny, output, ("windows=2", "now it is 3"), row, windows=3, work=work)
        assert not (output / "setting.json").exists()  # nothing holds the mended command to what was refused
    result = compare_tiny(output, "fp16", work=work, spawn=lambda job, steps: None)
    assert by_name(result)["fp16"]["perplexity"] == by_name(compared[0])["fp16"]["perplexity"]


def test_a_text_that_has_changed_is_another(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(text_file, text)
    config = RunConfig(data=str(text), tokens=512)
    (tmp_path / "out").mkdir()
    Setting.of(str(teacher_directory), config).agreed(tmp_path / "out").keep(tmp_path / "out")
    text.write_text("shorter")
    with pytest.raises(BimosError, match="text_bytes"):
        Setting.of(str(teacher_directory), config).agreed(tmp_path / "out")


def test_the_limit_is_settled_once_tasks_are_asked_for(tmp_path: Path) -> None:
    def settle(**changes: Any) -> Setting:
        found = Setting("m", "d", 512, None, **changes).agreed(tmp_path)
        found.keep(tmp_path)
        return found

    assert settle().limit is None
    assert settle(tasks=True, limit=5).limit == 5
    assert settle().limit == 5  # a row without tasks
    with pytest.raises(BimosError, match="limit=5, now it is 6"):
        settle(tasks=True, limit=6)


def test_a_row_with_another_recipe_under_the_same_name_is_refused(compared: Compared, compare_tiny: Compare, tmp_path: Path) -> None:
    output = copied(compared, tmp_path / "out")
    path = output / "rows" / "binarymos-num_experts=2.json"
    row = json.loads(path.read_text())
    row["config"]["distill"]["lr_latent"] = 0.25
    path.write_text(json.dumps(row))
    refused(compare_tiny, output, ("'binarymos:num_experts=2'", "distill.lr_latent=0.25"), "binarymos:num_experts=2")


def test_directories_that_are_something_else(compare_tiny: Compare, tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    refused(compare_tiny, tmp_path / "mine", ("'" + str(tmp_path / "mine"), "holds no comparison"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    refused(compare_tiny, text_file, (str(text_file),))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "setting.json").write_text("{")
    refused(compare_tiny, tmp_path / "broken", ("setting.json", "damaged"))


def test_a_damaged_row_is_named(compared: Compared, compare_tiny: Compare, tmp_path: Path) -> None:
    output = copied(compared, tmp_path / "out")
    (output / "rows" / "fp16.json").write_text('{"row": "fp16"')
    refused(compare_tiny, output, ("fp16.json", "damaged"))


def test_another_text_of_the_same_name_is_refused(compared: Compared, compare_tiny: Compare, tmp_path: Path, text_file: Path) -> None:
    output = copied(compared, tmp_path / "out")
    other = tmp_path / "other" / text_file.name
    other.parent.mkdir()
    other.write_text(text_file.read_text()[100:])
    refused(compare_tiny, output, ("rows/binarymos-num_experts=1.json", f"another '{text_file.name}'"), "sign", texts=[str(other)])
    for path in (output / "rows").glob("*.json"):
        path.unlink()  # measured, but never finished
    refused(compare_tiny, output, ("evaluation.json", f"another '{text_file.name}'"), "sign", texts=[str(other)])


def test_a_directory_in_use_is_refused(compared: Compared, compare_tiny: Compare, tmp_path: Path) -> None:
    output = copied(compared, tmp_path / "out")
    with FileLock(output / ".lock"):
        refused(compare_tiny, output, ("in use by another run",))


def test_what_cannot_be_stored_or_measured_is_refused_before_any_work(compare_tiny: Compare, tmp_path: Path) -> None:
    refused(compare_tiny, tmp_path / "out", ("row 'sign'", "nothing_proj"), "fp16", "sign", base={"skip": ["nothing_proj"]})
    refused(compare_tiny, tmp_path / "out", ("row 'sign'", "sequence_length=4096"), "fp16", "sign", base={"sequence_length": 4096})
    refused(compare_tiny, tmp_path / "out", ("no-such-text",), texts=["no-such-text"])
    assert not (tmp_path / "out").exists()


def test_a_packed_model_is_no_original(
    compare_tiny: Compare, teacher_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(teacher_directory)
    config.quantization_config = {"quant_method": "bimos"}
    monkeypatch.setattr("bimos.comparison.run.load_config", lambda model: config)
    refused(compare_tiny, tmp_path / "out", ("quantized already", "original"), "fp16", "sign")
    assert not (tmp_path / "out").exists()


def test_a_failed_row_does_not_stop_the_others(compare_tiny: Compare, tmp_path: Path, text_file: Path) -> None:
    from bimos.comparison.work import work

    def failing(job: Any, steps: list[str]) -> None:
        if job.name == "sign:untrained":
            raise BimosError("its process was killed (for want of memory?)")
        work(job, steps)

    with pytest.raises(BimosError, match=r"row 'sign:untrained' failed: its process was killed.*1 rows are finished") as caught:
        compare_tiny(tmp_path / "out", "sign:untrained", "fp16", spawn=failing)
    assert "\n" not in str(caught.value)
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["row"] for row in kept["rows"]] == ["fp16"]
    assert len(compare_tiny(tmp_path / "out", "sign:untrained", "fp16")["rows"]) == 2


def test_tasks_are_measured_once_and_tokenised_once(
    compare_tiny: Compare, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from bimos.evaluation.harness import Harness

    folder = tmp_path / "data" / "lm_eval_tasks"
    folder.mkdir(parents=True)
    documents = [
        {"question": "The river is", "choices": ["wide", "seldom"], "answer": 0},
        {"question": "Boats", "choices": ["x", "y"], "answer": 1},
    ]
    (folder.parent / "questions.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name in ("first", "second"):
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: questions.jsonl}}}}\noutput_type: multiple_choice\n"
            'test_split: test\ndoc_to_text: "{{question}}"\ndoc_to_target: answer\ndoc_to_choice: "{{choices}}"\n'
            "metric_list: [{metric: acc}]\n"
        )
    monkeypatch.setenv("BIMOS_DATA", str(folder.parent))
    encoded: list[str] = []
    encode = Harness.tok_encode
    monkeypatch.setattr(
        Harness, "tok_encode", lambda self, text, *rest, **options: encoded.append(text) or encode(self, text, *rest, **options)
    )
    output = tmp_path / "out"
    compare_tiny(output, "fp16", tasks=["first"])
    assert encoded
    encoded.clear()
    result = compare_tiny(output, "fp16", "sign:untrained", tasks=["first"])  # one row has them, the other the same requests
    assert not encoded
    assert {row["row"]: row["tasks"]["first"]["n"] for row in result["rows"]} == {"fp16": 2, "sign:untrained": 2}
    before = by_name(result)["fp16"]
    after = by_name(compare_tiny(output, "fp16", tasks=["first", "second"]))["fp16"]
    assert list(after["tasks"]) == ["first", "second"] and after["tasks"]["first"] == before["tasks"]["first"]
    assert after["perplexity"] == before["perplexity"]
    refused(compare_tiny, output, ("limit=None", "now it is 1"), tasks=["first"], limit=1)
