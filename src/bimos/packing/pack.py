"""A trained student becomes a packed model in memory, ready to be saved, with the config that describes it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel

from bimos.errors import BimosError
from bimos.packing.embedding import quantize_embeddings, record_tie
from bimos.packing.hf import BimosConfig, attach
from bimos.packing.layout import Layout, common_layout
from bimos.packing.linear import PackedLinear
from bimos.packing.together import join_siblings


def pack_model(
    model: PreTrainedModel,
    *,
    method: str,
    options: dict[str, Any],
    embedding_bits: int = 16,
    dtype: torch.dtype | None = None,
    card: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Turn a trained student into a packed model, in place: what `from_pretrained` gives after a save and a load.

    Args:
        model: every module of it that has a `pack()` method (a trainable linear) is replaced.
        method: name of the method, for the config.
        options: of the method, for the config.
        embedding_bits: 8 converts the token embedding and the head to int8 by row; 16 leaves them alone.
        dtype: what remains (norms, embeddings in 16 bits) is cast to it; None leaves it alone.
        card: facts for the model card.

    Returns:
        `model`, in evaluation mode.

    Raises:
        BimosError: nothing to pack, weights that cannot be packed, or embeddings that int8 cannot hold.
    """
    trained = [(name, m) for name, m in model.named_modules() if callable(getattr(m, "pack", None)) and not isinstance(m, PackedLinear)]
    trained.reverse()
    while trained:  # none is held longer than it takes: all of them may be more than memory has
        name, module = trained.pop()
        try:
            packed = PackedLinear.from_tensors(module.pack(), getattr(module, "group_size", None))
        except BimosError as error:
            raise BimosError(f"cannot pack '{name}': {error}") from None
        model.set_submodule(name, packed)
        del module
    if dtype is not None:
        for parameter in model.parameters():  # not model.to(): that would round the rotary frequencies too
            parameter.data = parameter.data.to(dtype)
    restore_rotary(model)
    if embedding_bits == 8:
        quantize_embeddings(model)
    else:
        record_tie(model)
    config = describe(model, method=method, options=options, embedding_bits=embedding_bits)
    config.card = dict(card or {})
    attach(model, config)
    join_siblings(model)
    return model.eval()


def describe(model: PreTrainedModel, *, method: str, options: dict[str, Any], embedding_bits: int) -> BimosConfig:
    """The config of a model whose linears are packed already."""
    dense = {name: m for name, m in skeleton(model.config).named_modules() if isinstance(m, nn.Linear)}
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    layouts = {name: Layout.of(m.tensors(), m.group_size) for name, m in packed.items()}
    if not layouts:
        raise BimosError(f"{type(model).__name__} has no packed linears; binarize it first")
    common, others = common_layout(layouts, {name for name, m in dense.items() if m.bias is not None})
    return BimosConfig(
        format_version=max(m.format_version for m in packed.values()),
        method=method,
        options=dict(options),
        **common.to_dict(),
        modules={name: layout.to_dict() for name, layout in others.items()},
        modules_to_not_convert=[name for name in dense if name not in layouts],
        embedding_bits=embedding_bits,
    )


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The dense model of this config on the meta device: the names, shapes and ties of the original."""
    from transformers import AutoModelForCausalLM  # not at the top: this module may be imported while transformers is

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise not_causal(config, error) from None


def not_causal(config: PretrainedConfig, error: Exception) -> BimosError:
    """What is wrong with a config that no model can be made of."""
    if isinstance(error, ValueError) and "Unrecognized configuration class" in str(error):  # an encoder, say
        return BimosError(f"a model of type '{config.model_type}' is no causal language model; there is nothing to binarize")
    reason = " ".join(str(error).split())[:200]
    return BimosError(f"config.json describes no model that can be made ({type(error).__name__}: {reason}); get it again")


def load_dense_config(directory: str | Path) -> PretrainedConfig:
    """The config of a model directory. Raises BimosError if transformers cannot make sense of it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(directory))
    except Exception as error:  # transformers checks values by dataclasses of another library, and some by using them
        raise BimosError(f"cannot read the config of '{directory}': {' '.join(str(error).split())[:300] or type(error).__name__}") from None


def restore_rotary(model: Any) -> None:
    """Compute rotary frequencies anew where a cast of the whole model has rounded them: no checkpoint stores them."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq") and module.inv_freq.dtype != torch.float32:
            module.inv_freq, module.original_inv_freq = module.inv_freq.float(), module.original_inv_freq.float()
            model._init_weights(module)
