"""`plan` and `run`: sizes from a config alone, the JSON that others read, and what happens when something is wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bimos import stages
from bimos.config import DEFAULT_MINUTES, LossConfig, RunConfig
from bimos.errors import BimosError
from bimos.evaluation.perplexity import perplexity
from bimos.evaluation.texts import load_text
from bimos.methods import method_config
from bimos.models import load_to_measure
from bimos.quantize import plan, run
from bimos.resume import WORK
from bimos.training.teacher import TopKCache
from running import config, raising, teacher_like

module = sys.modules["bimos.quantize"]  # the attribute of the package is the function
LLAMA = {"model_type": "llama", "dtype": "float16", "vocab_size": 32000, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "7b": LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "13b": LLAMA | {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
    "smollm2-135m": LLAMA
    | {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
        "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip
COMPONENTS = {
    "planes",
    "scales",
    "routers",
    "bitmaps",
    "codes",
    "biases",
    "embedding",
    "head",
    "norms and others",
    "unconverted linears",
    "file headers",
}


@pytest.mark.parametrize(
    ("given", "tokens", "minutes"), [({}, None, DEFAULT_MINUTES), ({"tokens": 64}, 64, None), ({"minutes": 2.0}, None, 2.0)]
)
def test_budget_of_the_python_api(
    given: dict[str, Any], tokens: int | None, minutes: float | None, teacher_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RunConfig] = []

    def stop(teacher: Any, tokenizer: Any, config: RunConfig, *more: Any, **named: Any) -> None:
        seen.append(config)
        raise InterruptedError

    monkeypatch.setattr(module, "train", stop)
    with pytest.raises(InterruptedError):
        module.quantize(teacher_directory, method_config("binarymos"), data="text.txt", sequence_length=32, **given)
    assert (seen[0].tokens, seen[0].minutes) == (tokens, minutes)


# Sizes from the config alone


def only_config(directory: Path, shape: str) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(SHAPES[shape]))
    return directory


@pytest.mark.parametrize(("shape", "gigabytes", "compression", "body"), [("7b", 1.36, 9.9, 1.036), ("13b", 2.29, 11.4, 1.029)])
def test_size_of_llama_2(tmp_path: Path, shape: str, gigabytes: float, compression: float, body: float) -> None:
    report = plan(only_config(tmp_path / shape, shape), RunConfig.from_dict({"embedding_bits": 16}))
    assert report["total_bytes"] == pytest.approx(gigabytes * 1e9, rel=0.01)
    assert report["compression"] == pytest.approx(compression, abs=0.06)
    assert report["body_bits_per_weight"] == pytest.approx(body, abs=6e-4)
    assert report["bits_per_parameter"] == pytest.approx(16 / report["compression"])
    assert report["original_bytes"] == 2 * report["parameters"]


@pytest.mark.parametrize(("method", "options", "body"), [("binarymos", {"num_experts": 4}, 1.274), ("onebit", {}, 1.046)])
def test_size_of_smollm2(tmp_path: Path, method: str, options: dict[str, Any], body: float) -> None:
    run_config = RunConfig.from_dict({"method": method, "options": options, "embedding_bits": 8})
    report = plan(only_config(tmp_path / "small", "smollm2-135m"), run_config)
    assert report["total_bytes"] <= 46e6 and report["original_bytes"] == pytest.approx(269e6, rel=0.01)
    assert report["body_bits_per_weight"] == pytest.approx(body, abs=1e-3)
    assert report["model"].endswith("small") and report["method"] == method
    assert set(report["peak_memory_bytes"]) == {"blocks", "distill"}
    assert sum(row["bytes"] for row in report["components"]) == report["total_bytes"]
    assert {row["name"] for row in report["components"]} <= COMPONENTS


def test_a_plan_is_what_comes_out(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    for bits in (8, 16):
        wanted = config(text_file, embedding_bits=bits, tokens=128, blocks={"epochs": 1})
        planned = plan(teacher_directory, wanted)
        result = run(teacher_directory, tmp_path / str(bits), wanted)
        on_disk = sum(path.stat().st_size for path in (tmp_path / str(bits)).glob("*.safetensors"))
        assert result["total_bytes"] == on_disk == pytest.approx(planned["total_bytes"], rel=0.01)
        assert result["body_bits_per_weight"] == planned["body_bits_per_weight"]


@pytest.mark.parametrize("method", ["binarymos", "onebit", "sign"])
def test_a_plan_reads_no_weights(method: str, tmp_path: Path) -> None:
    assert plan(only_config(tmp_path / "7b", "7b"), RunConfig.from_dict({"method": method}))["body_bits_per_weight"] < 1.04


@pytest.mark.parametrize(
    ("method", "bits"), [("rtn2", 2.5), ("gptq2", 2.5), ("billm", 2 + 64 / 128), ("pbllm", 2.8)], ids=["rtn2", "gptq2", "billm", "pbllm"]
)
def test_honest_bits_of_the_baselines(method: str, bits: float, tmp_path: Path) -> None:
    report = plan(only_config(tmp_path / "7b", "7b"), RunConfig.from_dict({"method": method}))
    assert report["body_bits_per_weight"] == pytest.approx(bits, abs=0.01)
    assert set(report["peak_memory_bytes"]) == {"blocks"}  # nothing is distilled


# What a run leaves behind


def test_result_has_the_promised_keys(finished: tuple[dict[str, Any], Path], teacher_directory: Path, text_file: Path) -> None:
    result, output = finished
    assert result["model"] == str(teacher_directory) and result["method"] == "binarymos"
    assert RunConfig.from_dict(result["config"]) == config(text_file, tokens=4096)
    for key in ("total_bytes", "original_bytes", "compression", "body_bits_per_weight", "bits_per_parameter", "seconds"):
        assert result[key] > 0, key
    assert all(row.keys() == {"name", "tensors", "bytes"} and row["name"] in COMPONENTS for row in result["components"])
    assert "torch" in result["versions"] and "commit" in result
    assert [stage["name"] for stage in result["stages"]] == ["blocks", "distill"]
    for stage in result["stages"]:
        for key in ("tokens", "seconds", "tokens_per_second", "peak_memory_bytes", "loss_first", "loss_last"):
            assert stage[key] > 0, (stage["name"], key)
    assert result["stages"][1]["loss_last"] < result["stages"][1]["loss_first"]
    assert result["stages"][0]["tokens"] == 2 * 256 and result["stages"][1]["tokens"] == 4096
    quality = result["perplexity"][str(text_file)]
    assert quality["value"] > 1 and quality["teacher"] > 1 and quality["windows"] > 1 and quality["context"] == 256
    assert result["embedding"]["bits"] == 8
    assert "| embeddings | perplexity " in (output / "README.md").read_text()
    assert "Embeddings in 8 bits: perplexity " in (output / "report.html").read_text()
    assert result["embedding"]["perplexity"] == pytest.approx(result["embedding"]["perplexity_16_bits"], rel=0.02)


def test_result_and_report_are_left_behind(finished: tuple[dict[str, Any], Path]) -> None:
    result, output = finished
    assert json.loads((output / "result.json").read_text()) == json.loads(json.dumps(result))
    page = (output / "report.html").read_text()
    assert "<html" in page and "binarymos" in page
    assert "binarymos" in (output / "README.md").read_text()
    assert not (output / WORK).exists()
    assert sorted(path.name for path in output.parent.iterdir()) == ["model"]  # nothing beside it either


def test_the_measured_model_is_the_one_on_disk(finished: tuple[dict[str, Any], Path], text_file: Path) -> None:
    result, output = finished
    model = load_to_measure(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    again = perplexity(model, tokenizer, text_file.read_text())
    assert again.value == pytest.approx(result["perplexity"][str(text_file)]["value"], rel=1e-3)


def test_untied_embeddings_in_8_bits(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 320}
    untied = teacher_like(teacher_directory, tmp_path / "untied", **sizes, tie_word_embeddings=False)
    result = run(untied, tmp_path / "out", config(text_file, tokens=128), evaluate=[str(text_file)])
    model = load_to_measure(tmp_path / "out")
    assert model.get_output_embeddings() is not None and not model.config.tie_word_embeddings
    again = perplexity(model, AutoTokenizer.from_pretrained(tmp_path / "out"), text_file.read_text())
    assert again.value == pytest.approx(result["perplexity"][str(text_file)]["value"], rel=1e-3)


@pytest.mark.parametrize(("aware", "expected"), [(True, 6), (False, 2)])
def test_a_start_from_weights_alone_reads_one_batch(
    aware: bool, expected: int, teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = stages.reconstruct_blocks

    def watch(teacher: Any, windows: torch.Tensor, *more: Any) -> dict[str, Any]:
        seen.append(len(windows))
        return original(teacher, windows, *more)

    monkeypatch.setattr(stages, "reconstruct_blocks", watch)
    start = {"initialise": {"activation_aware": aware, "sequences": 6}, "blocks": {"enabled": False, "batch_size": 2}}
    run(teacher_directory, tmp_path / "out", config(text_file, tokens=128, **start))
    assert seen == [expected]


def test_a_short_text_is_told_of(teacher_directory: Path, text_file: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    wanted = config(text_file, distill={"enabled": False})
    run(teacher_directory, tmp_path / "long", wanted)
    assert not [warning for warning in recwarn if "short" in str(warning.message)]
    (tmp_path / "short.txt").write_text("A sentence is all that there is.")
    short = dataclasses.replace(wanted, data=str(tmp_path / "short.txt"))
    with pytest.warns(UserWarning, match=r"short\.txt' is short: blocks alone are calibrated on \d\d times its length"):
        run(teacher_directory, tmp_path / "short", short)
    recwarn.clear()
    run(teacher_directory, tmp_path / "untrained", dataclasses.replace(short, method="rtn2", options={}))
    assert not [warning for warning in recwarn if "short" in str(warning.message)]  # nothing is learnt of it


def test_stages_can_be_left_out(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    start = run(teacher_directory, tmp_path / "start", config(text_file, blocks={"enabled": False}, distill={"enabled": False}))
    assert [(stage["name"], stage["tokens"]) for stage in start["stages"]] == [("blocks", 0)]
    odd = {"enabled": False, "batch_size": 4}  # three sequences of statistics, although a batch is four
    wanted = config(text_file, blocks=odd, initialise={"sequences": 3}, tokens=128)
    assert run(teacher_directory, tmp_path / "distilled", wanted)["stages"][1]["tokens"] == 128
    blocks = run(teacher_directory, tmp_path / "blocks", config(text_file, distill={"enabled": False}))
    assert [stage["name"] for stage in blocks["stages"]] == ["blocks"]


@pytest.mark.parametrize(
    ("method", "options", "planes"),
    [
        ("dbllm", {"group_size": 16}, "scale_group_01"),
        ("sign", {"group_size": 16}, "scale_group"),
        ("binarymos", {"planes": 2, "num_experts": 2}, "scale_in"),
        ("binarymos", {"planes": 2, "num_experts": 2, "group_size": 16}, "scale_group"),
    ],
)
def test_all_stages_of_other_methods(
    method: str, options: dict[str, Any], planes: str, teacher_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    """Blocks, distillation, packing; and the loss of the run is the one that was asked for."""
    wanted = config(text_file, method=method, options=options)
    shown = [str(text_file)]
    plain = run(teacher_directory, tmp_path / "plain", wanted, evaluate=shown)
    deviating = run(teacher_directory, tmp_path / "dad", dataclasses.replace(wanted, loss=LossConfig(dad=True, dad_lambda=1.0)))
    results = [plain, deviating]
    first = [next(stage for stage in result["stages"] if stage["name"] == "distill")["loss_first"] for result in results]
    assert first[1] > 1.05 * first[0]
    loaded = load_to_measure(tmp_path / "plain")
    tensors = safetensors.torch.load_file(tmp_path / "plain" / "model.safetensors")
    linear = "model.layers.1.mlp.up_proj"
    assert f"{linear}.{planes}" in tensors and len(tensors[f"{linear}.weight"]) == len(loaded.get_submodule(linear).weight)
    tokenizer = AutoTokenizer.from_pretrained(teacher_directory)
    measured = perplexity(loaded, tokenizer, load_text(str(text_file))).value
    assert plain["perplexity"][str(text_file)]["value"] == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("method", ["rtn2", "gptq2", "billm", "pbllm"])
def test_post_training_methods_end_with_the_start(method: str, teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    quick = {"method": method, "data": str(text_file), "sequence_length": 32, "initialise": {"sequences": 4}}
    result = run(teacher_directory, tmp_path / "out", RunConfig.from_dict(quick), evaluate=[str(text_file)])
    assert [(stage["name"], stage["tokens"]) for stage in result["stages"]] == [("blocks", 0)]
    assert result["config"]["minutes"] is None and result["perplexity"][str(text_file)]["value"] > 1
    assert result["body_bits_per_weight"] == plan(teacher_directory, RunConfig.from_dict(quick))["body_bits_per_weight"]
    wanted = quick | {"tokens": 128, "blocks": {"enabled": True, "tokens": 128}, "distill": {"enabled": True}}
    trained = run(teacher_directory, tmp_path / "trained", RunConfig.from_dict(wanted))
    assert [stage["name"] for stage in trained["stages"]] == ["blocks", "distill"] and all(s["tokens"] > 0 for s in trained["stages"])


def test_the_start_of_post_training_methods_is_resumed(
    teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the start settled for good is in the blocks' files, too."""
    quick = {"method": "billm", "data": str(text_file), "sequence_length": 32, "initialise": {"sequences": 4}}
    run(teacher_directory, tmp_path / "whole", RunConfig.from_dict(quick))
    monkeypatch.setattr(stages, "uninitialised_student", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(teacher_directory, tmp_path / "killed", RunConfig.from_dict(quick))
    monkeypatch.undo()
    run(teacher_directory, tmp_path / "killed", None, resume=True)
    one, two = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())


def test_a_run_is_repeatable(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 20260801), ("b", 20260801), ("c", 1)):
        run(teacher_directory, tmp_path / name, config(text_file, seed=seed, tokens=256))
    a, b, c = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())
    assert not all(torch.equal(tensor, c[key]) for key, tensor in a.items())


def test_the_python_api_makes_what_the_command_makes(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    wanted = config(text_file, tokens=256)
    run(teacher_directory, tmp_path / "command", wanted)
    options = {key: value for key, value in wanted.to_dict().items() if key not in ("method", "options", "data")}
    packed = module.quantize(teacher_directory, method_config(wanted.method, wanted.options), data=str(text_file), **options)
    packed.save_pretrained(tmp_path / "api")
    a, b = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("command", "api"))
    assert a.keys() == b.keys() and all(torch.equal(tensor, b[key]) for key, tensor in a.items())
    assert teacher_directory.name in (tmp_path / "api" / "README.md").read_text(encoding="utf-8")
    model = load_to_measure(teacher_directory)
    model.name_or_path = model.config._name_or_path = ""
    with pytest.raises(BimosError, match="has no name to find a tokenizer under"):
        module.quantize(model, method_config("sign"), data=str(text_file))


def test_a_budget_of_minutes_ends(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    result = run(teacher_directory, tmp_path / "out", config(text_file, minutes=0.05, blocks={"epochs": 10**6}))
    assert result["seconds"] >= 1.0 and result["config"]["minutes"] == 0.05
    assert all(stage["seconds"] > 0 for stage in result["stages"])
    assert result["stages"][1]["tokens"] > 0


@pytest.mark.parametrize("minutes", [1e-9, 1e-4])
def test_a_budget_too_small_still_gives_a_model(minutes: float, teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    result = run(teacher_directory, tmp_path / "out", config(text_file, minutes=minutes))
    assert [stage["name"] for stage in result["stages"]] == ["blocks", "distill"]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_hour_is_the_default(teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(teacher_directory, tmp_path / "out", RunConfig.from_dict({"data": str(text_file), "sequence_length": 32}))
    assert json.loads((tmp_path / "out" / WORK / "run.json").read_text())["config"]["minutes"] == 60.0


def test_logits_from_the_cache(teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text four times, asked of the teacher once; with most of the vocabulary it ends where the live teacher does."""
    put: list[int] = []
    original = TopKCache.put
    monkeypatch.setattr(TopKCache, "put", lambda self, window, *rest: (put.append(window), original(self, window, *rest))[1])
    wanted = {"distinct_tokens": 1024, "top_k": 1000}  # more than there are
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 320}
    model = teacher_like(teacher_directory, tmp_path / "model", **sizes, initializer_range=0.3)
    results = {
        teacher: run(model, tmp_path / teacher, config(text_file, tokens=4096, distill=wanted | {"teacher": teacher}))
        for teacher in ("live", "cached")
    }
    assert sorted(put) == list(range(1024 // 32))
    live, cached = (result["stages"][1] for result in results.values())
    assert cached["loss_first"] == pytest.approx(live["loss_first"], rel=0.02)
    assert cached["loss_last"] == pytest.approx(live["loss_last"], rel=0.05)


def test_a_cache_that_finds_no_room_is_told_before_the_work(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    wanted = config(text_file, tokens=10**13, distill={"teacher": "cached", "distinct_tokens": 10**13})
    with pytest.raises(BimosError, match=r"the logit cache needs .* GiB"):
        run(teacher_directory, tmp_path / "out", wanted)
    work = tmp_path / "out" / WORK
    assert (work / "run.json").exists() and not list(work.glob("blocks/*"))
    run(teacher_directory, tmp_path / "few", dataclasses.replace(wanted, tokens=64))  # no more windows than are seen


@pytest.mark.parametrize("changed", [{"teacher": "cached", "distinct_tokens": 256}, {"teacher": "live"}])
def test_a_cache_of_options_that_have_changed_makes_room(
    changed: dict[str, Any], teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = {"teacher": "cached", "distinct_tokens": 128}
    with monkeypatch.context() as patched:
        patched.setattr(stages, "distill", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(teacher_directory, tmp_path / "out", config(text_file, tokens=256, distill=cached))
    logits, seen = tmp_path / "out" / WORK / "logits", []
    monkeypatch.setattr(module, "finish", lambda *_: seen.extend(logits.glob("cache.json")) or {})
    run(teacher_directory, tmp_path / "out", config(text_file, tokens=256, distill=changed), resume=True)
    assert [json.loads(path.read_text())["windows"] for path in seen] == ([8] if changed["teacher"] == "cached" else [])


def test_losses_go_to_tensorboard(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(teacher_directory, tmp_path / "out", config(text_file, tokens=32 * 4 * 20, distill={"report_to": "tensorboard"}))
    (events,) = (tmp_path / "out" / "runs").rglob("events.out.tfevents.*")
    log = accumulator.EventAccumulator(str(events))
    log.Reload()
    assert {"train/loss", "train/learning_rate"} <= set(log.Tags()["scalars"])
    assert [event.step for event in log.Scalars("train/loss")] == [10, 20]
    assert 0 < log.Scalars("train/loss")[0].value < 20
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # the folder does not disturb it


def test_losses_go_to_trackio(teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a stand-in with the part of its interface that the Trainer's callback uses; tried with trackio 0.43 itself."""
    trackio: Any = ModuleType("trackio")
    trackio.__spec__ = ModuleSpec("trackio", None)
    trackio.__version__ = "0.43.0"
    logged: list[dict[str, Any]] = []
    nobody = SimpleNamespace(get=lambda: None)
    trackio.context_vars = SimpleNamespace(current_space_id=nobody, current_project=nobody)
    trackio.config = MagicMock()
    trackio.init, trackio.log, trackio.finish = MagicMock(), logged.append, MagicMock()
    trackio.freeze = trackio.sync = MagicMock(side_effect=AssertionError("nothing is to leave the machine"))
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    run(teacher_directory, tmp_path / "out", config(text_file, tokens=32 * 4 * 20, distill={"report_to": "trackio"}))
    losses = [entry for entry in logged if "train/loss" in entry]
    assert [entry["train/global_step"] for entry in losses] == [10, 20] and all(0 < entry["train/loss"] < 20 for entry in losses)
    assert all(entry["train/learning_rate"] >= 0 for entry in losses) and trackio.finish.called
