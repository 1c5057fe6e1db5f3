"""Gates against an independent computation, figures and page, and refusals."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bimos.analysis.experts import by_experts
from bimos.analysis.inspect import inspect
from bimos.analysis.routing import observe, read_text
from bimos.errors import BimosError
from bimos.evaluation.texts import EvaluationText
from tiny_models import CONFIGS

TEXT = EvaluationText("t", "t", "The river is wide and slow, and in spring it covers the meadows.\nA ferry crosses.")


@pytest.fixture(scope="module")
def routed(packed: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model of two blocks with three experts in every linear."""
    directory = tmp_path_factory.mktemp("routed") / "model"
    packed("llama", experts=3, planes=2, vocab_size=320, bos_token_id=0, eos_token_id=1).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_gates_of_every_architecture(kind: str, packed: Callable[..., Any], tokenizer: Any) -> None:
    routing = observe(packed(kind, experts=3, vocab_size=320), tokenizer, TEXT, 20)
    assert routing.gates
    for gate in routing.gates.values():
        assert gate.shape == (20, 3) and torch.allclose(gate.sum(1), torch.ones(20))


def test_gates_are_those_of_the_equation(packed: Callable[..., Any], tokenizer: Any) -> None:
    model = packed("llama", experts=3, vocab_size=320)
    routing = observe(model, tokenizer, TEXT, 20)
    ids = torch.tensor(tokenizer(TEXT.text)["input_ids"][:20])
    block = model.model.layers[0]
    name = "model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        x = block.input_layernorm(model.model.embed_tokens(ids))
        scores = x.double() @ block.self_attn.q_proj.router.double().T
        gate = (scores - scores.logsumexp(-1, keepdim=True)).exp()
    assert torch.allclose(routing.gates[name].double(), gate, atol=1e-5)
    assert len(routing.gates) == 14 and len(routing.pieces) == 20
    assert "".join(routing.pieces) == tokenizer.decode(ids)
    assert torch.allclose(routing.load(name).double(), gate.mean(0), atol=1e-5)
    expected = [-sum(p * math.log(p) for p in row) / math.log(3) for row in gate.tolist()]
    assert routing.entropy(name).tolist() == pytest.approx(expected, abs=1e-4)
    mixed = gate @ block.self_attn.q_proj.scale_out[0].double()
    scales = routing.scales(name, "scale_out")
    assert scales is not None and torch.allclose(scales[0].double(), mixed, atol=1e-5)
    spread = (mixed.std(0) / mixed.mean(0).abs()).median().item()
    assert routing.spread(name, "scale_out") == pytest.approx(spread, rel=1e-3)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_gate_that_is_certain_has_no_entropy(packed: Callable[..., Any], tokenizer: Any) -> None:
    model = packed("llama", experts=2, vocab_size=320)
    linear = model.model.layers[1].mlp.up_proj
    linear.router.zero_()
    model.model.layers[1].mlp.gate_proj.router.mul_(1e4)
    routing = observe(model, tokenizer, TEXT, 12)
    assert routing.entropy("model.layers.1.mlp.up_proj").tolist() == pytest.approx([1.0] * 12)
    assert routing.entropy("model.layers.1.mlp.gate_proj").tolist() == pytest.approx([0.0] * 12, abs=1e-3)


def test_pictures_and_page(routed: Path, tmp_path: Path) -> None:
    result = inspect(routed, TEXT.text, tmp_path / "out", layer="layers.1.mlp.down_proj", tokens=24, shown=8)
    assert result["layer"] == "model.layers.1.mlp.down_proj" and result["tokens"] == 24
    assert result["pictures"] == ["gates.png", "scales.png", "layers.png"]
    for name in result["pictures"]:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "<script" not in page and not re.findall(r'(?:src|href)="(?!data:)', page)
    written = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert set(written["kinds"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for facts in written["linears"].values():
        assert sum(facts["load"]) == pytest.approx(1) and 0 <= facts["entropy"] <= 1


def test_a_text_is_a_file_a_name_or_itself(text_file: Path) -> None:
    assert read_text("The river.").text == "The river."
    assert read_text(str(text_file)).text == text_file.read_text()
    for given in ("川は広くてゆっくり流れる", "~ is a tilde", "The river is wide. " * 40, "nul\0 here"):
        assert read_text(given).text == given
    for given in ("no-such.txt", "wikitext", "x" * 300, "no/such"):
        with pytest.raises(BimosError, match=given[:7]):
            read_text(given)


@pytest.mark.parametrize("layer", ["q_proj", "layers.0.self_attn.z_proj"])
def test_a_linear_that_is_not_one(routed: Path, tmp_path: Path, layer: str) -> None:
    with pytest.raises(BimosError, match=re.escape(layer)) as caught:
        inspect(routed, TEXT.text, tmp_path / "out", layer=layer)
    assert "model.layers.0" in str(caught.value) and not (tmp_path / "out").exists()


def test_models_without_routers_are_refused(packed: Callable[..., Any], tokenizer: Any, teacher_directory: Path, tmp_path: Path) -> None:
    packed("llama", experts=1, vocab_size=320).save_pretrained(tmp_path / "one")
    tokenizer.save_pretrained(tmp_path / "one")
    with pytest.raises(BimosError, match=r"no routers.*any, mixes no scales"):
        inspect(tmp_path / "one", TEXT.text, tmp_path / "out")
    with pytest.raises(BimosError, match=r"no routers.*not packed"):
        inspect(teacher_directory, TEXT.text, tmp_path / "out")


def compared(*rows: tuple[str, int | None, float], losses: bool = False) -> dict[str, Any]:
    entries = []
    for name, experts, value in rows:
        measured: dict[str, Any] = {"value": value, "stderr": 1.0, "windows": 2, "context": 64, "text": "WikiText-2"}
        if losses:  # windows that differ by far more than rows do
            measured["losses"] = [math.log(value) - 2.0, math.log(value) + 2.0 + (experts or 0) / 100]
        entries.append({"row": name, "perplexity": {"wikitext2": measured}} | ({} if experts is None else {"experts": experts}))
    return {"rows": entries}


def test_series_differ_in_experts_alone() -> None:
    rows = [
        ("binarymos:num_experts=8", 8, 40.0),
        ("fp16", None, 20.0),
        ("binarymos", 4, 50.0),
        ("binarymos:num_experts=2:distill.lr_scale=1e-3", 2, 70.0),
        ("onebit", 1, 90.0),
        ("binarymos:num_experts=1", 1, 60.0),
    ]
    series = by_experts(compared(*rows), "out")
    assert series == {"WikiText-2": {"binarymos": [(1, 60.0, None), (4, 50.0, None), (8, 40.0, None)]}}
    onebit = by_experts(compared(*rows[:-1]), "out")  # binarymos with one expert, by definition
    assert onebit["WikiText-2"]["binarymos"][0] == (1, 90.0, None)
    with pytest.raises(BimosError, match="'out' has no two rows"):
        by_experts(compared(*rows[1:2], *rows[3:5]), "out")


def test_errors_of_the_series_are_those_of_differences() -> None:
    rows = compared(("binarymos:num_experts=1", 1, 60.0), ("binarymos", 4, 50.0), losses=True)
    (_, value, error) = by_experts(rows, "out")["WikiText-2"]["binarymos"][1]
    # Differences of the windows' losses: d and d + 0.03; their standard error is 0.015.
    assert value == 50.0 and error == pytest.approx(50.0 * math.exp(0.015) * 0.015, rel=1e-6)


def test_perplexity_against_experts_is_drawn(routed: Path, tmp_path: Path) -> None:
    from bimos.comparison.page import write_json

    comparison = tmp_path / "compared"
    setting = {"model": "m", "data": "d", "tokens": 1, "minutes": None, "seed": 0, "embedding_bits": 8}
    write_json(comparison / "setting.json", setting | {"windows": None, "tasks": False, "limit": None, "text_bytes": {}})
    for row in compared(("binarymos:num_experts=2", 2, 55.0), ("binarymos", 4, 50.0))["rows"]:
        write_json(comparison / "rows" / f"{row['experts']}.json", row | dict.fromkeys(("config", "tasks", "stages", "speed")))
    result = inspect(routed, TEXT.text, tmp_path / "out", tokens=16, comparison=comparison)
    assert result["pictures"][-1] == "experts.png" and (tmp_path / "out" / "experts.png").stat().st_size > 5000
    with pytest.raises(BimosError, match="holds no comparison"):
        inspect(routed, TEXT.text, tmp_path / "out", comparison=tmp_path)
    write_json(comparison / "rows" / "4.json", {"config": {}})
    with pytest.raises(BimosError, match=r"4\.json' is damaged"):
        inspect(routed, TEXT.text, tmp_path / "out", comparison=comparison)


def test_what_is_somebody_elses_stays(routed: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("mine")
    for output, said in ((tmp_path / "mine", "is not empty"), (text_file, "is a file"), (text_file / "below", "Not a directory")):
        with pytest.raises(BimosError, match=said):
            inspect(routed, TEXT.text, output, tokens=8)
    assert (tmp_path / "mine" / "index.html").read_text() == "mine"
