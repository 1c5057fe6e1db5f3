"""Packed checkpoints back into dense ones: W = sum_p diag(s_out_p) B_p diag(s_in_p), for tools that know nothing else."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bimos.errors import BimosError
from bimos.kernels.reference import unpack_signs
from bimos.packing.checkpoint import check_output, written_aside
from bimos.packing.dense import Companions, materialise
from bimos.packing.embedding import Int8Embedding, Int8Head
from bimos.packing.groups import by_input, product_form
from bimos.packing.integrity import check_depth, is_packed
from bimos.packing.linear import PackedLinear
from bimos.packing.salient import salient_columns, sparse_weight


def unpack(
    directory: str | Path, output: str | Path, *, dtype: torch.dtype = torch.float32, approximate: bool = False, overwrite: bool = False
) -> PreTrainedModel:
    """A packed checkpoint as a dense one.

    With static scales (one expert) the dense weights are exact in float32. With several experts a token chooses its own
    scales and no dense matrix computes the same; `approximate` takes the mean of the experts, as a router without
    preferences would. Measure what that loses before using it.

    Args:
        directory: the packed checkpoint.
        output: where the dense one goes; tokenizer files are copied.
        dtype: of the dense weights. In 16 bits products of scales are rounded.
        approximate: allow the mean of several experts.
        overwrite: replace a directory that is not empty.

    Returns:
        The dense model. Memory: all its weights.

    Raises:
        BimosError: not a packed checkpoint, several experts without `approximate`, or `output` cannot be written.
    """
    check_output(output, overwrite, [directory])
    if not is_packed(directory):
        raise BimosError(f"'{directory}' is not a packed checkpoint; there is nothing to unpack")
    check_depth(directory)
    try:
        packed = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype)
    except BimosError:
        raise
    except Exception as error:  # safetensors, json and torch each have their own; all mean that it cannot be read
        raise BimosError(f"cannot load '{directory}': {' '.join(str(error).split())[:300]}") from None
    mixed = any(isinstance(m, PackedLinear) and m.router is not None for m in packed.modules())
    if mixed and not approximate:
        raise BimosError(f"'{directory}' mixes scales per token, which no dense weight can; --approximate takes the mean of its experts")
    dense = {name: tensor for name, tensor in packed.state_dict().items()}
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear | Int8Embedding | Int8Head):
            for key in module.state_dict():
                del dense[f"{name}.{key}"]
            weight = dense_weight(module) if isinstance(module, PackedLinear) else module.weight.float() * module.scale.float()
            dense[f"{name}.weight"] = weight.to(dtype)
        if getattr(module, "bias", None) is not None:
            dense[f"{name}.bias"] = module.bias.to(dtype)
    card = packed.config.quantization_config.card
    config = packed.config
    del packed, config.quantization_config
    model = materialise(directory, config, dense, dtype)
    rounded = "exact" if dtype == torch.float32 else f"rounded to {str(dtype).removeprefix('torch.')}"
    how = "the mean of its experts' scales: an approximation" if mixed else rounded
    with written_aside(output, overwrite) as aside:
        model.save_pretrained(aside)
        Companions(directory).save_pretrained(aside)
        text = f"# {Path(str(card.get('base_model') or 'A model')).name}, binarized, as dense weights\n\nUnpacked by bimos ({how}).\n"
        (aside / "README.md").write_text(text, encoding="utf-8")
    return model


def dense_weight(linear: PackedLinear) -> Tensor:
    """`sum_p diag(s_out_p) B_p diag(s_in_p)`, or the weight by groups, float32 `[out, in]`; experts averaged."""
    tensors = linear.tensors()
    scale, offset = product_form(tensors)
    salient, sparse = salient_columns(tensors), sparse_weight(tensors)
    size = linear.group_size or linear.in_features
    total = torch.zeros(linear.out_features, linear.in_features) if offset is None else by_input(offset, size, linear.in_features)
    for plane in range(linear.weight.shape[0]):
        signs = unpack_signs(linear.weight[plane])
        if scale is not None:
            scales = by_input(scale[plane].float(), size, linear.in_features)
            if salient is not None:
                scales = torch.where(salient, by_input(tensors["scale_salient"][plane].float(), size, linear.in_features), scales)
            signs = signs * scales
        if linear.scale_in is not None:
            signs = signs * linear.scale_in[plane].float().mean(0)
        if linear.scale_out is not None:
            signs = signs * linear.scale_out[plane].float().mean(0)[:, None]
        total += signs
    return total if sparse is None else total + sparse
