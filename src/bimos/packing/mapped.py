"""A packed checkpoint of the Llama family as the engine wants it: checked, its tensors views of the mapped files.

    model = mapped.load("smollm2-1bit")        # nothing is copied, no module of transformers imported
    engine = Engine(model)

`MappedModel` has of a transformers model what the engine looks at, under the same names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bimos.errors import BimosError
from bimos.packing.embedding import Int8Embedding, Int8Head, TiedInt8Head
from bimos.packing.family import FamilyConfig, Unknown
from bimos.packing.integrity import DTYPES, check_format_version, check_same_description, read_config, tensors_of, weight_files
from bimos.packing.layout import check_description, compare, description_sum, layout_of
from bimos.packing.linear import PackedLinear
from bimos.packing.rotary import frequencies

LINEARS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_FLOATS = ("F16", "BF16", "F32")


class MappedModel:
    """What the engine looks at in a model: `config`, `generation_config`, embeddings, and `model` with norms and blocks."""

    def __init__(self, config: FamilyConfig, generation: SimpleNamespace, inner: Any, embedding: Any, head: Any) -> None:
        self.config, self.generation_config, self.model = config, generation, inner
        self._embedding, self._head = embedding, head

    def get_input_embeddings(self) -> Any:
        return self._embedding

    def get_output_embeddings(self) -> Any:
        return self._head

    def parameters(self) -> Iterator[Tensor]:
        return iter(())

    def buffers(self) -> Iterator[Tensor]:
        return iter(())  # all are views of files: on the CPU


def load(directory: str | Path) -> MappedModel:
    """Map a packed checkpoint: config, format version, layouts and checksums are looked at as the ordinary loader does.

    Raises:
        BimosError: whatever is wrong with it, in one line.
        Unknown: another architecture, or one in a form that only `transformers` reads.
    """
    values = read_config(directory)
    description = values.get("quantization_config")
    if not isinstance(description, dict) or description.get("quant_method") != "bimos":
        raise Unknown("not a packed checkpoint")
    check_format_version(description.get("format_version"))
    config = FamilyConfig.from_json(values)
    check_description(description)
    try:
        inverse, scaling = frequencies(config.rope_parameters, config.head_dim)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise Unknown(f"rotary embedding {error}") from None
    files = weight_files(directory)
    tensors = {name: _aligned(tensor) for name, tensor in tensors_of(files).items()}
    if not any(name.startswith("model.") for name in tensors):
        raise Unknown("a base model, saved without its head")
    reader = _Reader(config, description, tensors)
    layers = [reader.block(index) for index in range(config.num_hidden_layers)]
    rotary = SimpleNamespace(inv_freq=inverse, attention_scaling=scaling, rope_type=config.rope_parameters["rope_type"])
    inner = SimpleNamespace(layers=layers, norm=reader.norm("model.norm", config.hidden_size), rotary_emb=rotary)
    embedding = reader.table("model.embed_tokens")
    head = reader.tied(embedding) if config.tie_word_embeddings else reader.table("lm_head", head=True)
    if left := sorted(tensors.keys() - reader.used):
        raise BimosError(f"config.json has no place for '{left[0]}', which is among the weights; copy the checkpoint again")
    check_same_description(files, description_sum(description))
    return MappedModel(config, _generation(directory, values), inner, embedding, head)


class _Reader:
    """Modules out of tensors, every one of which is compared with what the config says first."""

    def __init__(self, config: FamilyConfig, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.config, self.description, self.tensors = config, description, tensors
        self.headers = {name: (tuple(tensor.shape), DTYPES.get(tensor.dtype, "?")) for name, tensor in tensors.items()}
        kept = description.get("modules_to_not_convert") or []
        if not isinstance(kept, list):
            raise BimosError("config.json does not describe packed linears (modules_to_not_convert); get the checkpoint again")
        self.kept = kept
        self.used: set[str] = set()

    def block(self, index: int) -> Any:
        config, prefix = self.config, f"model.layers.{index}"
        heads, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        sizes = {"q_proj": (config.hidden_size, heads), "k_proj": (config.hidden_size, keys), "v_proj": (config.hidden_size, keys)}
        sizes |= {"o_proj": (heads, config.hidden_size), "down_proj": (config.intermediate_size, config.hidden_size)}
        sizes |= {name: (config.hidden_size, config.intermediate_size) for name in ("gate_proj", "up_proj")}
        linears = {f"{part}.{name}": self.linear(prefix, f"{part}.{name}", *sizes[name]) for part in LINEARS for name in LINEARS[part]}
        norms = {}
        if config.model_type == "qwen3":
            norms = {name: self.norm(f"{prefix}.self_attn.{name}", config.head_dim) for name in ("q_norm", "k_norm")}
        return SimpleNamespace(
            input_layernorm=self.norm(f"{prefix}.input_layernorm", config.hidden_size),
            post_attention_layernorm=self.norm(f"{prefix}.post_attention_layernorm", config.hidden_size),
            self_attn=SimpleNamespace(**norms),
            get_submodule=linears.__getitem__,
        )

    def linear(self, prefix: str, name: str, n_in: int, n_out: int) -> PackedLinear | None:
        """None where it is not packed."""
        full = f"{prefix}.{name}"
        if full in self.kept:
            self.used |= {f"{full}.weight", f"{full}.bias"}
            return None
        layout = layout_of(self.description, full, self.config.has_bias(name))
        shapes = layout.shapes(n_in, n_out)
        compare(full, shapes, self.headers)
        self.used |= {f"{full}.{key}" for key in shapes}
        return PackedLinear.from_tensors({key: self.tensors[f"{full}.{key}"] for key in shapes}, layout.group_size)

    def norm(self, name: str, size: int) -> Any:
        return SimpleNamespace(weight=self._floats(f"{name}.weight", (size,)))

    def table(self, name: str, head: bool = False) -> Any:
        """The embedding, or a head of its own."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        if self.description["embedding_bits"] == 16:
            return SimpleNamespace(weight=self._floats(f"{name}.weight", shape))
        compare(name, {"weight": (shape, torch.int8), "scale": ((shape[0], 1), torch.float16)}, self.headers)
        self.used |= {f"{name}.weight", f"{name}.scale"}
        pair = self.tensors[f"{name}.weight"], self.tensors[f"{name}.scale"]
        return Int8Head(*pair) if head else Int8Embedding(*pair, torch.float32)

    def tied(self, embedding: Any) -> Any:
        return TiedInt8Head(embedding) if isinstance(embedding, Int8Embedding) else embedding

    def _floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = self.headers.get(name)
        if found is None or found[0] != shape or found[1] not in _FLOATS:
            raise BimosError(f"config.json and weights disagree on '{name}' ({shape} and {found}); copy the checkpoint again")
        self.used.add(name)
        return self.tensors[name]


def _aligned(tensor: Tensor) -> Tensor:
    """Files of other writers may have values at any byte, which C++ must not read where they lie."""
    return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()


def _generation(directory: str | Path, values: dict[str, Any]) -> SimpleNamespace:
    """`generation_config.json`; where there is none, what config.json says."""
    path = Path(directory) / "generation_config.json"
    if path.is_file():
        try:
            values = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            raise BimosError(f"'{path}' is corrupt; copy the checkpoint again") from None
    stop = values.get("eos_token_id")
    tokens = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise BimosError(f"'{path}' is corrupt (eos_token_id {stop!r}); copy the checkpoint again")
    return SimpleNamespace(**{"eos_token_id": None} | {str(name): value for name, value in values.items()})
