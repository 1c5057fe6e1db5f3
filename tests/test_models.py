"""Teachers: where they come from, what of them is converted, and one clear line when that cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bimos import BimosError
from bimos.kernels import native
from bimos.models import (
    convertible_linears,
    decoder_blocks,
    empty_model,
    load_config,
    load_model,
    load_teacher,
    load_to_measure,
    load_tokenizer,
)
from bimos.quantize import run
from running import config


def refused(fragment: str, load: object, *arguments: object) -> None:
    assert callable(load)
    with pytest.raises(BimosError, match=fragment) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)


def test_a_directory(teacher_directory: Path) -> None:
    teacher, tokenizer = load_teacher(teacher_directory)
    assert teacher.dtype == native.fast_dtype(torch.bfloat16) and not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert tokenizer("The river").input_ids == AutoTokenizer.from_pretrained(teacher_directory)("The river").input_ids
    assert load_teacher(str(teacher_directory), torch.float32)[0].dtype == torch.float32
    assert load_teacher(teacher_directory, torch.bfloat16)[0].dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float32 for name, buffer in teacher.named_buffers() if name.endswith("inv_freq"))


def test_a_processor_slow_in_16_bits_gets_the_same_weights_in_32(
    teacher_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_multiplies_bfloat16", lambda: False)
    wide, _ = load_teacher(teacher_directory)
    narrow, _ = load_teacher(teacher_directory, torch.bfloat16)
    assert all(torch.equal(a, b.float()) and a.dtype == torch.float32 for a, b in zip(wide.parameters(), narrow.parameters(), strict=True))
    narrow.save_pretrained(tmp_path)
    assert load_to_measure(tmp_path).dtype == torch.float32 and load_model(tmp_path).dtype == torch.bfloat16
    monkeypatch.setattr(native, "_multiplies_bfloat16", lambda: True)
    assert load_to_measure(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("load", [load_teacher, load_config, load_model, load_tokenizer])
def test_what_is_not_there(load: object, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("not a model")
    refused("no such model directory: './missing'", load, "./missing")
    refused("no such model directory", load, tmp_path / "missing")
    refused("no such model directory", load, "~/no/such/place")
    refused(r"empty' has no config\.json", load, tmp_path / "empty")
    refused(r"no such model directory.*notes\.txt", load, tmp_path / "notes.txt")
    refused(r"no such file: .*missing\.gguf", load, tmp_path / "missing.gguf")
    refused("nobody/no-model.*network", load, "nobody/no-model")


def test_a_directory_without_weights(teacher_directory: Path, tmp_path: Path) -> None:
    shutil.copy(teacher_directory / "config.json", tmp_path)
    assert load_config(tmp_path).hidden_size == 64
    refused(f"cannot load '{tmp_path}'", load_model, tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "garbled", "no json"])
def test_damaged_models(damage: str, teacher_directory: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(teacher_directory, model)
    weights = model / "model.safetensors"
    if damage == "no json":
        (model / "config.json").write_text("{")
    else:
        weights.write_bytes(weights.read_bytes()[:-100] if damage == "truncated" else b"\xff" * 4000)
    refused(f"'{model}/config.json' is corrupt" if damage == "no json" else f"cannot load '{model}'", load_model, model)


def changed_weights(teacher_directory: Path, model: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of the teacher, what its file holds changed by `change`."""
    shutil.copytree(teacher_directory, model)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def test_tensors_that_no_file_has_are_not_drawn_at_random(teacher_directory: Path, tmp_path: Path) -> None:
    lost = "model.layers.1.mlp.up_proj.weight"
    model = changed_weights(teacher_directory, tmp_path / "model", lambda tensors: tensors.pop(lost))
    refused(f"lack 1 tensors, .*{lost}", load_model, model)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_no_numbers(value: float, teacher_directory: Path, text_file: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("model.layers.1.input_layernorm.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight")):
        model = changed_weights(teacher_directory, tmp_path / f"model{number}", lambda tensors, of=name: tensors[of][3:4].fill_(value))
        for more in ({}, {"low_memory": True, "tokens": None, "minutes": 1.0}):
            refused(f"'{name}' .*NaN or infinite", run, model, tmp_path / "out", config(text_file, **more))
            assert not (tmp_path / "out").exists()


def write_gguf(directory: Path, path: Path) -> None:
    """The tiny Llama as llama.cpp's converter writes it, in float32."""
    model, config = load_model(directory, torch.float32), load_config(directory)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    rules = json.loads((directory / "tokenizer.json").read_text())["model"]
    tokens = sorted(rules["vocab"], key=rules["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in rules["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for index in range(config.num_hidden_layers):
        for name, short in names.items():
            weight = state[f"model.layers.{index}.{name}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short)
            if heads:  # llama.cpp turns pairs of neighbours where transformers turns halves
                weight = np.ascontiguousarray(weight.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(weight.shape))
            writer.add_tensor(f"blk.{index}.{short}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(teacher_directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(teacher_directory, path)
    original, loaded = load_model(teacher_directory, torch.float32), load_model(path, torch.float32)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, original(ids).logits)
    assert not hasattr(loaded.config, "quantization_config")  # an ordinary model now, which saves as one
    teacher, tokenizer = load_teacher(path)
    assert teacher.dtype == torch.bfloat16
    assert tokenizer("The river").input_ids == load_tokenizer(teacher_directory)("The river").input_ids
    assert load_config(path).hidden_size == 64


# Which linears


def llama(**changes: int) -> PreTrainedModel:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return empty_model(LlamaConfig(**(sizes | changes)))


def test_an_empty_model_takes_no_memory_and_keeps_its_config() -> None:
    config = LlamaConfig(hidden_size=2**16, intermediate_size=2**18, num_hidden_layers=100)
    assert {parameter.device.type for parameter in empty_model(config).parameters()} == {"meta"}
    assert config.to_dict() == LlamaConfig(hidden_size=2**16, intermediate_size=2**18, num_hidden_layers=100).to_dict()


def test_linears_of_all_blocks_and_nothing_else() -> None:
    names = list(convertible_linears(llama()))
    assert len(names) == 14 and names[:7] == [name.replace(".1.", ".0.") for name in names[7:]]
    assert all(name.startswith("model.layers.") for name in names)


@pytest.mark.parametrize(
    ("skip", "left"),
    [(["down_proj"], 12), (["layers.0.mlp.down_proj"], 13), (["mlp.down_proj", "q_proj"], 10), (["1.self_attn.q_proj"], 13)],
)
def test_skip_by_the_end_of_the_name(skip: list[str], left: int) -> None:
    names = convertible_linears(llama(), skip)
    assert len(names) == left and not any(name.endswith(tuple(skip)) for name in names)


@pytest.mark.parametrize("skip", [["proj"], ["lm_head"], ["down_proj", "layers.7.mlp.up_proj"]])
def test_skipping_what_is_not_there(skip: list[str]) -> None:
    refused(f"no linear's name ends in '{skip[-1]}'.*model.layers.0", convertible_linears, llama(), skip)


def test_skipping_everything() -> None:
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    refused("no linears to convert", convertible_linears, llama(), everything)


def test_the_longest_list_is_that_of_the_blocks() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapters = nn.ModuleList([nn.Linear(8, 8)])
            self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(9)])
            inner = [nn.Sequential(nn.ModuleList([nn.Linear(8, 8) for _ in range(5)])) for _ in range(3)]
            self.blocks = nn.ModuleList(inner)

    name, blocks = decoder_blocks(Odd())
    assert (name, len(blocks)) == ("blocks", 3)
    with pytest.raises(BimosError, match="no decoder blocks"):
        decoder_blocks(nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8)))


def test_binarized_blocks_are_found_too(teacher_directory: Path) -> None:
    from bimos.methods import method_config
    from bimos.training.student import uninitialised_student

    student = uninitialised_student(load_model(teacher_directory), method_config("sign"), [])
    assert decoder_blocks(student)[0] == "model.layers"


def test_a_model_that_is_quantized_already(teacher_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher_directory, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    refused("quantized already", load_teacher, tmp_path / "model")


def test_configs_of_other_architectures_build_without_weights() -> None:
    for kind in ("qwen2", "gpt_neox", "opt", "phi"):
        assert convertible_linears(empty_model(AutoConfig.for_model(kind, num_hidden_layers=1)))
    assert isinstance(llama(), LlamaForCausalLM)
