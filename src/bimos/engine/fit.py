"""Which models the engine runs and with which options, and how a checkpoint is opened for it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bimos.engine.weights import LINEARS
from bimos.errors import BimosError
from bimos.kernels import native
from bimos.packing import mapped
from bimos.packing.family import MODEL_TYPES, Unknown
from bimos.packing.linear import ACTIVATIONS, PackedLinear

ROTARY_TYPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length
SETTINGS = (  # of transformers' generate, that change what is said and that the engine does not have
    *("no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "min_new_tokens", "min_length", "sequence_bias"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "stop_strings", "max_time", "penalty_alpha"),
    *("epsilon_cutoff", "eta_cutoff", "top_h", "watermarking_config"),
)
SETTINGS_AT_ONE = ("num_beams", "num_beam_groups", "typical_p", "guidance_scale", "encoder_repetition_penalty")  # whose 1 is none, too


def refusal(model: Any) -> str | None:
    """Why the engine cannot run a loaded model; None if it can."""
    config = model.config
    if native.isa() is None:
        return f"no C++ kernels ({native.problem})"
    if config.model_type not in MODEL_TYPES:
        return f"architecture {config.model_type}"
    if not all(isinstance(size, int) and 0 < size < 2**31 for size in (config.max_position_embeddings, config.vocab_size)):
        return f"max_position_embeddings {config.max_position_embeddings!r}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    rope = getattr(model.model.rotary_emb, "rope_type", "default")
    if rope not in ROTARY_TYPES:
        return f"rotary embedding {rope}"
    for block in model.model.layers:
        for name in LINEARS:
            layer = block.get_submodule(name)
            if not isinstance(layer, PackedLinear):
                return f"{name} is not packed"
            if layer.salient is not None or layer.sparse_mask is not None:
                return "salient weights beside the planes"
            if any(t.dtype != torch.float16 for n, t in layer.tensors().items() if n not in ("weight", "bias")):
                return "scales that are not float16"
            if layer.group_size is not None and layer.group_size % 32:
                return "groups that are no multiple of 32"
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        return "a head with a bias"
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        return "a device other than the CPU"
    for setting in (*SETTINGS, *SETTINGS_AT_ONE):
        value = getattr(model.generation_config, setting, None)
        if value and not (setting in SETTINGS_AT_ONE and value == 1):
            return f"generation_config.json asks for {setting}"
    return None


def is_engine_model(model: Any) -> bool:
    """Whether the engine runs a loaded model."""
    return refusal(model) is None


def load(directory: str | Path) -> Any:
    """What `Engine` takes, out of a checkpoint directory: mapped where its config is in the form that bimos writes, else loaded.

    Raises:
        BimosError: no such checkpoint, or a corrupt one.
    """
    path = Path(directory).expanduser()
    if (path / "config.json").is_file():
        with suppress(Unknown):
            return mapped.load(path)
    from bimos.models import load_model

    return load_model(directory)


def check_options(head_bits: int | None, cache_bits: int, activation: str) -> None:
    """Raises BimosError: what an engine's head, cache or products cannot have."""
    if head_bits not in (None, 8, 4):
        raise BimosError(f"--head-bits {head_bits}: must be 8 or 4")
    if cache_bits not in (16, 8):
        raise BimosError(f"--cache-bits {cache_bits}: must be 16 or 8")
    if activation not in ACTIVATIONS:
        raise BimosError(f"activation '{activation}' is not known; known: {', '.join(ACTIVATIONS)}")


def refuse_bits(head_bits: int | None, cache_bits: int, why: str) -> None:
    """Raises BimosError: bits that only the engine has, asked for a model that it does not run."""
    if head_bits is not None or cache_bits != 16:
        raise BimosError(f"--head-bits and --cache-bits are the engine's, and it does not run this model ({why}): leave them out")
