"""Other people's checkpoints into packed ones.

`convert` reads the layout in which the BinaryMoS authors release models (github.com/dongwonjo/BinaryMoS): a dense
transformers checkpoint in float16 whose `config.json` has `num_expert`, and for every binary linear

    weight              [out, in]     latents, of which the signs count
    gate_linear.weight  [e, in]       the router
    in_channel_scale    [e, in]
    out_channel_scale   [e, out]
    bias                [out], where the linear has one
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bimos.errors import BimosError
from bimos.packing.checkpoint import check_output, save_packed
from bimos.packing.dense import Companions, materialise, read_tensors
from bimos.packing.format import pack_signs
from bimos.packing.integrity import read_config
from bimos.packing.linear import PackedLinear
from bimos.packing.pack import describe, load_dense_config, pack_model, skeleton

_AUTHORS = {"in_channel_scale": "scale_in", "out_channel_scale": "scale_out", "gate_linear.weight": "router"}


def convert(source: str | Path, directory: str | Path, *, embedding_bits: int = 16, overwrite: bool = False) -> PreTrainedModel:
    """A BinaryMoS checkpoint of the authors, as a packed checkpoint.

    Latents that are exactly 0 count as +1 here and as 0 in the authors' code; there is a warning where any exist.

    Args:
        source: directory with `config.json` and safetensors or `.bin` weights.
        directory: where the packed checkpoint goes; tokenizer files are copied.
        embedding_bits: 8 also converts the embedding and head.
        overwrite: replace a directory that is not empty.

    Returns:
        The packed model.

    Raises:
        BimosError: not such a checkpoint, an incomplete one, or `directory` cannot be written.
    """
    check_output(directory, overwrite, [source])
    values = read_config(source)
    experts = values.get("num_expert")
    if not isinstance(experts, int):
        raise BimosError(f"'{source}' has no num_expert in config.json: not a checkpoint in the BinaryMoS authors' layout")
    config = load_dense_config(source)
    del config.num_expert
    tensors: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, tensor in read_tensors(Path(source)):
        ending = next((ending for ending in _AUTHORS if name.endswith("." + ending)), None)
        (tensors if ending is None else scales)[name] = tensor
    linears = sorted(name.removesuffix(".in_channel_scale") for name in scales if name.endswith(".in_channel_scale"))
    if not linears:
        raise BimosError(f"'{source}' has no in_channel_scale tensors: not a checkpoint in the BinaryMoS authors' layout")
    model = skeleton(config)
    zeros = weights = 0
    for name in linears:
        latent = tensors.pop(f"{name}.weight", None)
        parts = {ours: scales[key] for theirs, ours in _AUTHORS.items() if (key := f"{name}.{theirs}") in scales}
        if latent is None or len(parts) != len(_AUTHORS) or any(part.ndim != 2 or len(part) != experts for part in parts.values()):
            raise BimosError(f"'{source}': '{name}' has not the weight, scales and router of {experts} experts; download it again")
        zeros, weights = zeros + int((latent == 0).sum()), weights + latent.numel()
        packed = {
            "weight": _signs(latent, source, name)[None],
            "scale_in": parts["scale_in"].half()[None],
            "scale_out": parts["scale_out"].half()[None],
        }
        if experts > 1:
            packed["router"] = parts["router"].half()
        if f"{name}.bias" in tensors:
            packed["bias"] = tensors.pop(f"{name}.bias").half()
        try:
            model.get_submodule(name)
            model.set_submodule(name, PackedLinear(packed))
        except AttributeError:
            raise BimosError(f"'{source}' has scales for '{name}', which the model of its config.json has not; download it again") from None
        except BimosError as error:
            raise BimosError(f"'{source}': '{name}': {error}") from None
    if zeros:
        warnings.warn(f"{zeros} of {weights} latents of '{source}' are exactly 0; they are stored as +1", stacklevel=2)
    options = {"num_experts": experts}
    config.quantization_config = describe(model, method="binarymos", options=options, embedding_bits=16).to_dict()
    tensors.update((name, t) for name, t in model.state_dict().items() if name.rpartition(".")[0] in linears)
    model = materialise(source, config, tensors, torch.float16)
    model = pack_model(model, method="binarymos", options=options, embedding_bits=embedding_bits)
    origin = f"{Path(source).resolve().name}, in the BinaryMoS authors' layout"
    card = {"base_model": values.get("_name_or_path") or "", "converted from": origin}
    save_packed(model, Companions(source), directory, overwrite=overwrite, card=card)
    return model


def _signs(latent: Tensor, source: str | Path, name: str) -> Tensor:
    try:
        return pack_signs(latent)
    except BimosError as error:
        raise BimosError(f"'{source}': '{name}': {error}") from None
