"""Two planes for some linears of a model, by parts of their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bimos
from bimos.config import RunConfig
from bimos.errors import BimosError
from bimos.methods import method_config
from bimos.methods.binarymos import BinaryMoSConfig, BinaryMoSLinear
from bimos.models import convertible_linears, load_model
from bimos.quantize import plan
from bimos.training.optimizer import adamw, select
from bimos.training.student import trainable_layers, uninitialised_student
from running import config, raising, run

PARTS = ["v_proj", "layers.1", "v_proj+layers.1", "layers.1.self_attn", "layers.0.mlp.down_proj+q_proj", "self_attn.o_proj"]


def with_two(second_plane: str, names: list[str]) -> set[str]:
    method = BinaryMoSConfig(second_plane=second_plane)
    return {name for name in names if method.of_linear(name).planes == 2}  # type: ignore[attr-defined]


@pytest.mark.parametrize("parts", PARTS)
def test_a_block_knows_its_linears_by_the_rest_of_their_names(parts: str, teacher_directory: Path) -> None:
    names = list(convertible_linears(load_model(teacher_directory)))
    method, two = BinaryMoSConfig(second_plane=parts), with_two(parts, names)
    method.check_names(names)
    assert two and len(two) < len(names)
    for name in names:
        block, local = ".".join(name.split(".")[:3]), ".".join(name.split(".")[3:])
        assert method.of_block(block).of_linear(local).planes == method.of_linear(name).planes  # type: ignore[attr-defined]


def test_what_is_left_of_a_part_begins_the_rest_of_a_name() -> None:
    method = BinaryMoSConfig(second_plane="0.up_proj")
    for name in ("mlp.experts.1.up_proj", "mlp.experts.0.up_proj", "up_proj", "mlp.up_proj"):
        whole, within = method.of_linear(f"model.layers.0.{name}"), method.of_block("model.layers.0").of_linear(name)
        assert whole == within


def test_numbers_are_whole() -> None:
    assert with_two("layers.1", ["model.layers.1.v_proj", "model.layers.11.v_proj", "model.layers.21.v_proj"]) == {"model.layers.1.v_proj"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_plane": "v_proj", "planes": 2}, "all linears have two with planes=2"),
        ({"second_plane": "v_proj++o_proj"}, "must be parts of names"),
        ({"second_plane": "layers.1."}, "must be parts of names"),
        ({"second_plane": 0}, "must be of type str"),
        ({"second_plane": ["v_proj"]}, "must be of type str"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BimosError, match=message):
        method_config("binarymos", options)
    with pytest.raises(BimosError, match="onebit has one plane"):
        method_config("onebit", {"second_plane": "v_proj"})


def test_names_that_are_not_there(teacher_directory: Path, text_file: Path) -> None:
    with pytest.raises(BimosError, match="no linear that is converted has 'w_proj' in its name"):
        plan(teacher_directory, config(text_file, options={"second_plane": "v_proj+w_proj"}))
    with pytest.raises(BimosError, match="that is all linears, which planes=2 is for"):
        plan(teacher_directory, config(text_file, options={"second_plane": "self_attn+mlp"}))


def test_latents_of_two_planes_learn_at_their_own_rate(teacher_directory: Path) -> None:
    method = BinaryMoSConfig(second_plane="v_proj")
    student = uninitialised_student(load_model(teacher_directory), method, [])
    select(student, {"latent": 1.0, "scale": 1.0})
    optimizer = adamw(student, {"latent": 1.0, "scale": 1.0}, (0.9, 0.95), 0.0, by_layer=True)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    one, two = BinaryMoSConfig().lr_latent(), BinaryMoSConfig(planes=2).lr_latent()
    for name, layer in trainable_layers(student):
        assert isinstance(layer, BinaryMoSLinear)
        assert rates[id(layer.weight)] == pytest.approx(two / one if "v_proj" in name else 1.0)
        assert rates[id(layer.scale_in)] == 1.0
    assert {group["lr"] for group in adamw(student, {"latent": 1.0}, (0.9, 0.95), 0.0).param_groups} == {1.0}


def test_a_run_from_start_to_end(teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    wanted = config(text_file, options={"second_plane": "v_proj+layers.0.mlp", "num_experts": 2}, tokens=256, blocks={"epochs": 1})
    planned = plan(teacher_directory, wanted)
    result = run(teacher_directory, tmp_path / "out", wanted)
    assert result["body_bits_per_weight"] == planned["body_bits_per_weight"]
    plain = plan(teacher_directory, RunConfig.from_dict(wanted.to_dict() | {"options": {"num_experts": 2}}))
    assert planned["body_bits_per_weight"] > plain["body_bits_per_weight"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    planes = {name: module.weight.shape[0] for name, module in model.named_modules() if type(module).__name__ == "PackedLinear"}
    assert {name for name, count in planes.items() if count == 2} == with_two("v_proj+layers.0.mlp", list(planes))
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["options"]
    assert method_config("binarymos", stored) == method_config("binarymos", wanted.options)
    ids = list(range(3, 40))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    actual = bimos.Engine.from_pretrained(tmp_path / "out", threads=2).logits(ids)
    assert (actual - expected).norm() < 2e-2 * expected.norm()


def test_what_blocks_left_is_found_again(teacher_directory: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are done are read into layers of their own shapes, and so is a checkpoint."""
    wanted = config(text_file, options={"second_plane": "layers.0+layers.1.mlp.down_proj"}, tokens=256, blocks={"epochs": 1})
    whole = run(teacher_directory, tmp_path / "whole", wanted)
    for again, place in enumerate(("bimos.stages.distill", "bimos.finishing.save_packed")):
        with monkeypatch.context() as patched:
            patched.setattr(place, raising(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                run(teacher_directory, tmp_path / "out", wanted, resume=bool(again))
    resumed = run(teacher_directory, tmp_path / "out", wanted, resume=True)
    assert resumed["body_bits_per_weight"] == whole["body_bits_per_weight"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
