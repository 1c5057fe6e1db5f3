"""Other people's checkpoints into packed ones, and packed ones back into dense ones.

`convert` reads the layout in which the BinaryMoS authors release models (github.com/dongwonjo/BinaryMoS): a dense
transformers checkpoint in float16 whose `config.json` has `num_expert`, and for every binary linear

    weight              [out, in]     latents, of which the signs count
    gate_linear.weight  [e, in]       the router
    in_channel_scale    [e, in]
    out_channel_scale   [e, out]
    bias                [out], where the linear has one

`unpack` writes W = sum_p diag(s_out_p) B_p diag(s_in_p) as a dense checkpoint, for tools that know nothing else.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from bimos.errors import BimosError
from bimos.kernels.reference import unpack_signs
from bimos.packing.checkpoint import check_output, save_packed, written_aside
from bimos.packing.embedding import Int8Embedding, Int8Head
from bimos.packing.format import pack_signs
from bimos.packing.groups import by_input, product_form
from bimos.packing.integrity import is_packed, read_config
from bimos.packing.linear import PackedLinear
from bimos.packing.pack import describe, load_dense_config, pack_model, skeleton
from bimos.packing.salient import salient_columns, sparse_weight

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
    for name, tensor in _read_tensors(Path(source)):
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
            "weight": pack_signs(latent)[None],
            "scale_in": parts["scale_in"].half()[None],
            "scale_out": parts["scale_out"].half()[None],
        }
        if experts > 1:
            packed["router"] = parts["router"].half()
        if f"{name}.bias" in tensors:
            packed["bias"] = tensors.pop(f"{name}.bias").half()
        model.set_submodule(name, PackedLinear(packed))
    if zeros:
        warnings.warn(f"{zeros} of {weights} latents of '{source}' are exactly 0; they are stored as +1", stacklevel=2)
    options = {"num_experts": experts}
    config.quantization_config = describe(model, method="binarymos", options=options, embedding_bits=16).to_dict()
    tensors.update((name, t) for name, t in model.state_dict().items() if name.rpartition(".")[0] in linears)
    model = _materialise(source, config, tensors, torch.float16)
    model = pack_model(model, method="binarymos", options=options, embedding_bits=embedding_bits)
    origin = f"{Path(source).resolve().name}, in the BinaryMoS authors' layout"
    card = {"base_model": values.get("_name_or_path") or "", "converted from": origin}
    save_packed(model, _Companions(source), directory, overwrite=overwrite, card=card)
    return model


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
    packed = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype)
    if not approximate and any(isinstance(m, PackedLinear) and m.router is not None for m in packed.modules()):
        raise BimosError(f"'{directory}' mixes scales per token, which no dense weight can; --approximate takes the mean of its experts")
    dense = {name: tensor for name, tensor in packed.state_dict().items()}
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear | Int8Embedding | Int8Head):
            for key in module.state_dict():
                del dense[f"{name}.{key}"]
            weight = _dense_weight(module) if isinstance(module, PackedLinear) else module.weight.float() * module.scale.float()
            dense[f"{name}.weight"] = weight.to(dtype)
        if getattr(module, "bias", None) is not None:
            dense[f"{name}.bias"] = module.bias.to(dtype)
    card = packed.config.quantization_config.card
    config = packed.config
    del packed, config.quantization_config
    model = _materialise(directory, config, dense, dtype)
    exact = "the mean of its experts' scales: an approximation" if approximate else "exact"
    with written_aside(output, overwrite) as aside:
        model.save_pretrained(aside)
        _Companions(directory).save_pretrained(aside)
        text = f"# {Path(str(card.get('base_model') or 'A model')).name}, binarized, as dense weights\n\nUnpacked by bimos ({exact}).\n"
        (aside / "README.md").write_text(text, encoding="utf-8")
    return model


def _dense_weight(linear: PackedLinear) -> Tensor:
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


def _materialise(source: str | Path, config: PretrainedConfig, tensors: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` with exactly these tensors. Raises BimosError: `source` lacks some."""
    model_class: Any = type(skeleton(config))
    quiet = [name for name in tensors if name.endswith(("rotary_emb.inv_freq", ".position_ids"))]  # buffers of old checkpoints
    model, info = model_class.from_pretrained(
        None, config=config, state_dict={k: v for k, v in tensors.items() if k not in quiet}, dtype=dtype, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise BimosError(f"'{source}' lacks {len(missing)} tensors of the model, such as '{missing[0]}'; download it again")
    return model


def _read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a dense checkpoint. Raises BimosError: no weights, or unreadable ones."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = directory / f"{stem}.{ending}.index.json"
        files = [directory / f"{stem}.{ending}"]
        if not files[0].is_file() and index.is_file():
            files = [directory / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
        if not files[0].is_file():
            continue
        for file in files:
            try:
                if ending == "bin":
                    yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
                else:
                    with safe_open(file, framework="pt") as weights:
                        yield from ((name, weights.get_tensor(name)) for name in weights.keys())  # noqa: SIM118
            except (OSError, SafetensorError, RuntimeError) as error:
                raise BimosError(f"'{file}' is missing, truncated or corrupt ({' '.join(str(error).split())}); download it again") from None
        return
    raise BimosError(f"'{directory}' has no weights (model.safetensors or pytorch_model.bin)")


class _Companions:
    """What lies beside the weights of a checkpoint (tokenizer, generation config), saved as it is."""

    def __init__(self, source: str | Path) -> None:
        self.source = Path(source)

    def save_pretrained(self, directory: Any) -> None:
        for path in self.source.iterdir():
            weights = path.name == "config.json" or path.name.endswith(".index.json")
            if path.is_file() and path.suffix in (".json", ".model", ".txt", ".jinja") and not weights:
                shutil.copyfile(path, Path(directory) / path.name)
            elif path.name == "additional_chat_templates":
                shutil.copytree(path, Path(directory) / path.name)
