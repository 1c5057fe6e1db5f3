"""Where the bytes of a model are: in a directory, in memory, or planned from a config alone.

Total is what the weight files hold, headers included. Two figures always go together (DESIGN, section 1): body bits per
weight count planes, scales, routers, group scales, bitmaps and codes against the weights of the converted linears (their biases are
not weights and count for the whole only); bits per parameter count the whole files against the original's parameters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bimos.errors import BimosError
from bimos.packing.integrity import DESCRIPTION_KEY, DTYPES, METADATA_KEY, check_depth, named_in_full, read_headers, weight_files
from bimos.packing.pack import load_dense_config, skeleton

LayoutOf = Callable[[str, int, int, bool], Mapping[str, tuple[tuple[int, ...], torch.dtype]]]
Stored = dict[str, tuple[tuple[int, ...], str]]  # shape and safetensors dtype, by name

BODY = ("planes", "scales", "routers", "bitmaps", "codes")  # components that count for the bits of a body weight
_COMPONENTS = {
    "weight": "planes", "router": "routers", "bias": "biases", "salient": "bitmaps", "sparse_mask": "bitmaps", "sparse_code": "codes",
}  # fmt: skip
_ITEMSIZE = {name: dtype.itemsize for dtype, name in DTYPES.items()}


def size_report(
    source: str | Path | PreTrainedModel, *, layout: LayoutOf | None = None, converted: Collection[str] = (), embedding_bits: int = 16
) -> dict[str, Any]:
    """Sizes of a checkpoint directory, of a model in memory, or of what a dense model would become.

    Args:
        source: a directory of safetensors, packed or not; or a model, which may be on the meta device.
        layout: with a dense model, `MethodConfig.layout_of`: the report is of the model as it would be packed.
        converted: names of the linears that would be packed.
        embedding_bits: of the embedding and head as they would be packed; what remains is counted in 16 bits.

    Returns:
        `total_bytes`, `original_bytes` (16 bits a parameter), `compression`, `body_bits_per_weight` (None where nothing
        is packed), `bits_per_parameter`, `parameters`, `components` (a list of name, tensors, bytes).

    Raises:
        BimosError: no weights there, or a linear that the method cannot store.
    """
    if isinstance(source, str | Path):
        files = weight_files(source)
        stored = read_headers(files)
        check_depth(source)
        dense = skeleton(load_dense_config(source))
        stored = named_in_full(dense.base_model_prefix, stored)
        unknown = sorted({dtype for _, dtype in stored.values()} - set(_ITEMSIZE))
        if unknown:
            raise BimosError(f"'{source}' holds tensors of type {unknown[0]}, whose size is not known here")
        return _report(stored, dense, sum(file.stat().st_size for file in files))
    stored = _stored(source) if layout is None else _planned(source, layout, converted, embedding_bits)
    dense = source if layout is not None else skeleton(source.config)
    return _report(stored, dense, _bytes(stored.values()) + _header_bytes(stored))


def _stored(model: PreTrainedModel) -> Stored:
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)  # tied tensors are one object
    tensors = model.state_dict()
    return {name: (tuple(tensors[name].shape), DTYPES[tensors[name].dtype]) for name in names.values()}


def _planned(model: PreTrainedModel, layout: LayoutOf, converted: Collection[str], embedding_bits: int) -> Stored:
    half = "F16" if model.config.dtype == torch.float16 else "BF16"
    stored: Stored = {name: (shape, half if dtype[0] in "BF" else dtype) for name, (shape, dtype) in _stored(model).items()}
    for name in model.all_tied_weights_keys:
        stored.pop(name, None)
    for name in converted:
        linear = model.get_submodule(name)
        for leaf in ("weight", "bias"):
            stored.pop(f"{name}.{leaf}", None)
        try:
            tensors = layout(name, int(linear.in_features), int(linear.out_features), linear.bias is not None)  # type: ignore[arg-type]
        except BimosError as error:
            raise BimosError(f"'{name}': {error}") from None
        stored.update((f"{name}.{leaf}", (shape, DTYPES[dtype])) for leaf, (shape, dtype) in tensors.items())
    if embedding_bits == 8:
        for name in _tables(model):
            if f"{name}.weight" in stored:
                shape, _ = stored[f"{name}.weight"]
                stored[f"{name}.weight"], stored[f"{name}.scale"] = (shape, "I8"), ((shape[0], 1), "F16")
            if f"{name}.bias" in stored:
                stored[f"{name}.bias"] = (stored[f"{name}.bias"][0], "F16")
    return stored


def _tables(model: PreTrainedModel) -> list[str]:
    """Names of the token embedding and the head."""
    wanted = [id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    return [name for name, module in model.named_modules() if id(module) in wanted]


def _report(stored: Stored, dense: PreTrainedModel, total: int) -> dict[str, Any]:
    tables = _tables(dense)
    kinds = {name: type(module) for name, module in dense.named_modules()}
    planes = {name.removesuffix(".weight"): shape for name, (shape, dtype) in stored.items() if dtype == "U8" and len(shape) == 3}
    components: dict[str, list[tuple[tuple[int, ...], str]]] = {}
    for name, entry in stored.items():
        module, _, leaf = name.rpartition(".")
        if module in planes:
            component = _COMPONENTS.get(leaf, "scales")
        elif module in tables:
            component = "embedding" if module == tables[0] else "head"
        elif issubclass(kinds.get(module, nn.Module), nn.Linear):
            component = "unconverted linears"
        else:
            component = "norms and others"
        components.setdefault(component, []).append(entry)
    rows: list[dict[str, Any]] = [{"name": name, "tensors": len(entries), "bytes": _bytes(entries)} for name, entries in components.items()]
    rows.sort(key=lambda row: -row["bytes"])
    rows.append({"name": "file headers", "tensors": 0, "bytes": total - sum(row["bytes"] for row in rows)})
    body_bytes = sum(_bytes(components.get(name, [])) for name in BODY)
    body_weights = sum(8 * shape[1] * shape[2] for shape in planes.values())
    parameters = sum(p.numel() for name, p in dense.named_parameters() if name not in dense.all_tied_weights_keys)
    if not parameters:
        raise BimosError(f"config.json of this {dense.config.model_type} describes a model without parameters; get it again")
    return {
        "total_bytes": total,
        "original_bytes": 2 * parameters,
        "compression": 2 * parameters / total,
        "body_bits_per_weight": 8 * body_bytes / body_weights if body_weights else None,
        "bits_per_parameter": 8 * total / parameters,
        "parameters": parameters,
        "components": rows,
    }


def _bytes(entries: Collection[tuple[tuple[int, ...], str]]) -> int:
    return sum(math.prod(shape) * _ITEMSIZE[dtype] for shape, dtype in entries)


def _header_bytes(stored: Stored) -> int:
    """Size of the header that safetensors writes before these tensors, with our checksums in it."""
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: "0" * (8 * len(stored)), DESCRIPTION_KEY: "0" * 8, "format": "pt"}}
    end, order = 0, list(_ITEMSIZE)
    for name in sorted(stored, key=lambda name: (-order.index(stored[name][1]), name)):
        start, end = end, end + _bytes([stored[name]])
        header[name] = {"dtype": stored[name][1], "shape": list(stored[name][0]), "data_offsets": [start, end]}
    return 8 + math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8
