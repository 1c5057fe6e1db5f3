"""Packed models go through transformers and come back bit for bit."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from bimos.errors import BimosError
from bimos.packing import mapped
from bimos.packing.agreement import check_headers
from bimos.packing.embedding import Int8Embedding, TiedInt8Head
from bimos.packing.hf import BimosConfig
from bimos.packing.linear import PackedLinear
from bimos.packing.pack import pack_model
from bimos.packing.sizes import size_report

Make = Callable[..., PreTrainedModel]
KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "opt", "gpt_neox", "phi"]


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits


def stored(directory: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            tensors.update((name, weights.get_tensor(name)) for name in weights.keys())  # noqa: SIM118
    return tensors


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name


def test_kinds_are_all_here(kinds: list[str]) -> None:
    assert kinds == KINDS


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind: str, bits: int, packed: Make, ids: Tensor, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if kind in ("llama", "gemma") else None
    model = packed(kind, embedding_bits=bits, dtype=dtype, planes=1 + (kind == "qwen3"), experts=4 if kind == "opt" else 2)
    expected = logits(model, ids)
    assert expected.dtype == (dtype or torch.float32) and expected.std() > 0.05
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(loaded, ids), expected)
    assert torch.equal(logits(copy.deepcopy(loaded), ids), expected)
    loaded.save_pretrained(tmp_path / "b", max_shard_size="5KB")
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 2
    assert_same_tensors(stored(tmp_path / "a"), stored(tmp_path / "b"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(logits(again, ids), expected)
    assert json.loads((tmp_path / "a/config.json").read_text()) == json.loads((tmp_path / "b/config.json").read_text())


@pytest.mark.parametrize(("planes", "experts", "group"), [(1, 1, None), (2, 1, 8), (1, 4, None), (2, 2, 16)])
@pytest.mark.parametrize("tied", [True, False])
def test_layouts(planes: int, experts: int, group: int | None, tied: bool, packed: Make, ids: Tensor, tmp_path: Path) -> None:
    sizes = {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16, "num_attention_heads": 3, "tie_word_embeddings": tied}
    model = packed("qwen2", planes=planes, experts=experts, group=group, embedding_bits=8, **sizes)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    config = loaded.config.quantization_config
    assert (config.planes, config.experts, config.group_size, config.modules) == (planes, experts, group, {})
    assert any(name.startswith("lm_head.") for name in stored(tmp_path)) == (not tied)


def test_linears_that_differ_and_linears_left_alone(student: Make, ids: Tensor, tmp_path: Path) -> None:
    model = student("llama", experts=1, skip="down_proj")
    two = student("llama", experts=3, planes=2, seed=1)
    for layer in (0, 1):
        model.set_submodule(f"model.layers.{layer}.self_attn.k_proj", two.get_submodule(f"model.layers.{layer}.self_attn.k_proj"))
    extra = model.model.layers[1].mlp.up_proj
    extra.tensors["bias"] = torch.randn(72).half()  # where the original has none
    model = pack_model(model, method="mixed", options={})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    config = loaded.config.quantization_config
    assert config.modules.keys() == {"model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.up_proj"}
    assert config.modules_to_not_convert == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    assert type(loaded.model.layers[0].mlp.down_proj) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_requested_dtype_leaves_stored_tensors_alone(dtype: torch.dtype, packed: Make, ids: Tensor, tmp_path: Path) -> None:
    packed("qwen2", embedding_bits=8, dtype=torch.bfloat16).save_pretrained(tmp_path)
    on_disk = stored(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    state = loaded.state_dict()
    modules = {name for name, module in loaded.named_modules() if isinstance(module, PackedLinear | Int8Embedding)}
    names = [name for name in on_disk if name.rpartition(".")[0] in modules]
    assert len(names) == 14 * 4 + 6 + 2
    assert_same_tensors({name: on_disk[name] for name in names}, {name: state[name] for name in names})
    assert loaded.dtype == dtype and logits(loaded, ids).dtype == dtype
    cast = AutoModelForCausalLM.from_pretrained(tmp_path).to(dtype)
    assert logits(cast, ids).dtype == dtype
    assert_same_tensors({name: on_disk[name] for name in names}, {name: cast.state_dict()[name] for name in names})


def test_rotary_frequencies_are_computed_anew(packed: Make, tmp_path: Path) -> None:
    model = packed("llama")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "phi"])
def test_students_that_were_cast_as_a_whole(kind: str, student: Make, ids: Tensor, tmp_path: Path) -> None:
    model = student(kind).to(torch.bfloat16)  # which rounds the rotary frequencies too
    assert any(name.endswith("inv_freq") and b.dtype == torch.bfloat16 for name, b in model.named_buffers())
    model = pack_model(model, method="any", options={})
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))


def test_base_model_loads_without_its_head(packed: Make, ids: Tensor, tmp_path: Path) -> None:
    model = packed("mistral", embedding_bits=8, skip="q_proj", planes=2)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize(("kind", "bits"), [("llama", 8), ("mistral", 16), ("opt", 8), ("gpt_neox", 8)])
def test_base_model_saved_by_itself(kind: str, bits: int, packed: Make, ids: Tensor, tmp_path: Path) -> None:
    """Its files have no prefix; with a head they load where that is the embedding, and are refused where it would be drawn at random."""
    model = packed(kind, embedding_bits=bits)
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert isinstance(next(m for name, m in again.named_modules() if name.endswith("q_proj") or name.endswith("dense")), PackedLinear)
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, base(ids).last_hidden_state)
    again.save_pretrained(tmp_path / "again")
    assert_same_tensors(stored(tmp_path / "base"), stored(tmp_path / "again"))
    if kind in ("llama", "mistral"):
        with pytest.raises(mapped.Unknown, match="saved without its head"):
            mapped.load(tmp_path / "base")
    check_headers(tmp_path / "base")
    parts = {name: {part["name"]: part["bytes"] for part in size_report(tmp_path / name)["components"]} for name in ("base", "whole")}
    alike = ("embedding", "planes", "scales", "routers", "norms and others")
    assert [parts["base"][name] for name in alike] == [parts["whole"][name] for name in alike]
    if model.config.tie_word_embeddings:
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), ids), logits(model, ids))
    else:
        with pytest.raises(BimosError, match="disagree on"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def test_generates_and_ties_again(packed: Make, ids: Tensor, tmp_path: Path) -> None:
    model = packed("llama", embedding_bits=8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.tie_weights()
    out = loaded.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
    assert torch.equal(out, model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids)))
    assert isinstance(loaded.lm_head, TiedInt8Head) and loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_embeddings_that_training_untied(student: Make, ids: Tensor, tmp_path: Path) -> None:
    for bits in (8, 16):
        model = student("llama")
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
        model = pack_model(model, method="any", options={}, embedding_bits=bits)
        model.save_pretrained(tmp_path / str(bits))
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / str(bits)), ids), logits(model, ids))
        assert torch.equal(mapped.load(tmp_path / str(bits)).get_output_embeddings().weight, model.lm_head.weight)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(
    "change",
    [{"tie_word_embeddings": None}, {"num_hidden_layers": 1}, {"embedding_bits": None}, {"group_size": 30}, {"modules_to_not_convert": []}],
    ids=lambda change: next(iter(change)),
)
def test_configs_that_describe_another_model(
    change: dict[str, Any], bits: int, untied: bool, student: Make, tmp_path: Path, ids: Tensor
) -> None:
    """Values that leave every shape as it is, or tensors without a place: both loaders refuse, and neither draws weights at random."""
    model = student("llama", group=24) if "group_size" in change else student("llama")
    if untied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    pack_model(model, method="any", options={}, embedding_bits=bits).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    description = values["quantization_config"]
    for key, value in change.items():
        where = description if key in description else values
        before = where[key]
        where[key] = {"tie_word_embeddings": untied, "embedding_bits": 24 - bits}.get(key, value)
        assert where[key] != before
    (tmp_path / "config.json").write_text(json.dumps(values))
    for loader in (AutoModelForCausalLM.from_pretrained, mapped.load):
        if untied and bits == 16 and "tie_word_embeddings" in change and loader is not mapped.load:
            assert torch.equal(logits(loader(tmp_path), ids), logits(model, ids))  # transformers sees that the files have both
            continue
        with pytest.raises(BimosError, match=r"config\.json") as error:
            loader(tmp_path)
        assert "\n" not in str(error.value)


def test_a_head_of_another_task_is_not_packed(packed: Make, ids: Tensor, tmp_path: Path) -> None:
    packed("llama", embedding_bits=8).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(model.score) is nn.Linear and isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)


def test_keys_of_the_config_survive(packed: Make, tmp_path: Path) -> None:
    model = packed("llama", card={"base_model": "someone/something"})
    model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a/config.json"
    values = json.loads(path.read_text())
    values["quantization_config"]["a_later_key"] = {"kept": [1, 2]}
    path.write_text(json.dumps(values))
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text())["quantization_config"] == values["quantization_config"]
    expected = {"quant_method": "bimos", "format_version": 1, "method": "any", "options": {"x": 1}, "embedding_bits": 16}
    assert expected.items() <= values["quantization_config"].items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format_version 3"),
        ({"format_version": "1"}, "not a version"),
        ({"experts": 3}, "disagree"),
        ({"planes": 2}, "disagree"),
        ({"embedding_bits": 4}, "embedding_bits=4"),
        ({"tensors": {"scale_in": "float16", "offsets": "float16"}}, "does not describe"),
        ({"tensors": {"scale_in": "float99"}}, "does not describe"),
    ],
)
def test_configs_that_do_not_fit_are_refused_in_one_line(change: dict[str, Any], message: str, packed: Make, tmp_path: Path) -> None:
    packed("llama").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(BimosError, match=message) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_nothing_to_pack_and_no_quantizing_while_loading(dense: Make, tmp_path: Path) -> None:
    with pytest.raises(BimosError, match="no packed linears"):
        pack_model(dense("llama"), method="any", options={})
    dense("llama").save_pretrained(tmp_path)
    with pytest.raises(BimosError, match=r"bimos\.quantize"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BimosConfig())


def test_a_layer_that_cannot_be_packed_is_named(student: Make) -> None:
    model = student("llama")
    model.model.layers[1].mlp.gate_proj.tensors["scale_in"] = torch.rand(3).half()
    with pytest.raises(BimosError, match=r"cannot pack 'model\.layers\.1\.mlp\.gate_proj'"):
        pack_model(model, method="any", options={})


def test_input_gradients_reach_the_embeddings(packed: Make, ids: Tensor) -> None:
    model = packed("llama", embedding_bits=8)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.square().mean().backward()
    assert embeddings.grad is not None and embeddings.grad.abs().min(-1).values.max() > 0


def test_fails_loudly_without_bimos(packed: Make, tmp_path: Path) -> None:
    packed("llama", embedding_bits=8).save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\nprint('LOADED', 'bimos' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment)
    assert run.returncode != 0 and "LOADED" not in run.stdout
    assert "RuntimeError" in run.stderr and "bimos" in run.stderr


def test_config_alone_needs_no_weights(packed: Make, tmp_path: Path) -> None:
    packed("llama").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.quantization_config["method"] == "any"
