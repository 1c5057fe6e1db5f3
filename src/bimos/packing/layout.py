"""Which tensors the packed linears of a checkpoint have, in terms that know no method.

A checkpoint's config holds one layout that most of its linears share, and the layouts of those that differ, by name.
With them every `PackedLinear` can be built before a weight is read.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from bimos.errors import BimosError
from bimos.packing.groups import GROUPED, SCALES, count_groups
from bimos.packing.integrity import DTYPES, check_format_version
from bimos.packing.salient import SALIENT, SPARSE

DESCRIBING: dict[str, Any] = {
    **{"planes": 1, "experts": 1, "group_size": None, "sparse": None, "tensors": {}},
    **{"modules": {}, "modules_to_not_convert": [], "embedding_bits": 16},
}
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What one packed linear stores besides its planes.

    Attributes:
        planes: sign planes.
        experts: rows of `scale_in` and `scale_out`.
        group_size: inputs of a group, of which the last of a row may have fewer; None without groups.
        sparse: of 10,000 weights, how many have a code of the sparse part (rounded down for a layer); None without one.
        tensors: dtypes by name, of all but `weight`, in the order of the names.
    """

    planes: int
    experts: int
    group_size: int | None
    tensors: tuple[tuple[str, str], ...]
    sparse: int | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], group_size: int | None = None) -> Self:
        """The layout of a packed linear with these tensors; `group_size` where the last group is shorter than the others."""
        planes, _, in_bytes = tensors["weight"].shape
        experts = next((tensors[name].shape[1] for name in ("scale_in", "scale_out") if name in tensors), 1)
        groups = next((tensors[name].shape[-1] for name in SCALES if name in tensors), None)
        group_size = group_size if groups is None or group_size is not None else 8 * in_bytes // groups
        dtypes = tuple(sorted((name, str(t.dtype).removeprefix("torch.")) for name, t in tensors.items() if name != "weight"))
        sparse = None
        if "sparse_code" in tensors:
            weights = 8 * in_bytes * tensors["weight"].shape[1]
            sparse = -(-10_000 * len(tensors["sparse_code"]) // weights)  # in layers of 10,000 weights or more there is one such number
        return cls(planes, experts, group_size, dtypes, sparse)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises BimosError: not what `to_dict` writes."""
        try:
            tensors = tuple(sorted((str(k), str(v)) for k, v in values["tensors"].items()))
            for name, dtype in tensors:
                known = ("scale_in", "scale_out", "router", *GROUPED, *SALIENT, *SPARSE, "bias")
                if name not in known or not isinstance(getattr(torch, dtype), torch.dtype):
                    raise ValueError(name)
            group_size = values["group_size"]
            if group_size is None and not {name for name, _ in tensors}.isdisjoint(GROUPED):
                raise ValueError("groups without group_size")
            if "sparse_code" not in dict(tensors):
                sparse = None
            elif isinstance(sparse := values["sparse"], bool) or not isinstance(sparse, int) or not 0 <= sparse <= 10_000:
                raise ValueError(sparse)
            group_size = None if group_size is None else _count(group_size)
            return cls(_count(values["planes"]), _count(values["experts"]), group_size, tensors, sparse)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BimosError(
                f"config.json does not describe packed linears that this version knows ({error}); get the checkpoint again"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        values = {"planes": self.planes, "experts": self.experts, "group_size": self.group_size, "tensors": dict(self.tensors)}
        return values if self.sparse is None else values | {"sparse": self.sparse}

    def without_bias(self) -> Self:
        return dataclasses.replace(self, tensors=tuple(item for item in self.tensors if item[0] != "bias"))

    def shapes(self, in_features: int, out_features: int) -> Shapes:
        """Shapes and dtypes of the tensors of a linear of this size."""
        groups = count_groups(in_features, self.group_size or in_features)
        shapes: dict[str, tuple[int, ...]] = {
            "scale_in": (self.planes, self.experts, in_features),
            "scale_out": (self.planes, self.experts, out_features),
            "router": (self.experts, in_features),
            "scale_group": (self.planes, out_features, groups),
            "scale_group_01": (self.planes, out_features, groups),
            "scale_group_int": (out_features, groups),
            "offset_group": (out_features, groups),
            "salient": (in_features // 8,),
            "scale_salient": (self.planes, out_features, groups),
            "sparse_mask": (out_features, in_features // 8),
            "sparse_code": (in_features * out_features * (self.sparse or 0) // 10_000,),
            "sparse_scale": (out_features,),
            "bias": (out_features,),
        }
        layout: Shapes = {"weight": ((self.planes, out_features, in_features // 8), torch.uint8)}
        layout.update((name, (shapes[name], getattr(torch, dtype))) for name, dtype in self.tensors)
        return layout


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ValueError(value)
    return value


def common_layout(layouts: Mapping[str, Layout], biased: set[str]) -> tuple[Layout, dict[str, Layout]]:
    """The layout that most linears share, and those of the others.

    In the common layout a `bias` is there for those linears that had one in the original model.

    Args:
        layouts: by name of the linear; at least one.
        biased: names of the linears that have a bias in the original model.
    """
    common = Counter(layout.without_bias() for layout in layouts.values()).most_common(1)[0][0]
    dtypes = Counter(dict(layout.tensors)["bias"] for layout in layouts.values() if "bias" in dict(layout.tensors))
    if dtypes:
        common = dataclasses.replace(common, tensors=tuple(sorted((*common.tensors, ("bias", dtypes.most_common(1)[0][0])))))
    return common, {name: layout for name, layout in layouts.items() if layout != (common if name in biased else common.without_bias())}


def layout_of(values: Mapping[str, Any], name: str | None, bias: bool) -> Layout:
    """The layout of linear `name`, which has a bias in the original model or not, by a `quantization_config`.

    Raises:
        BimosError: it describes none that this version knows.
    """
    modules = _modules(values)
    if name is not None and name in modules:
        return Layout.from_dict(modules[name])
    shared = Layout.from_dict(values)
    return shared if bias else shared.without_bias()


def _modules(values: Mapping[str, Any]) -> Mapping[str, Any]:
    modules = values.get("modules") or {}
    if not isinstance(modules, Mapping):
        raise BimosError("config.json does not describe packed linears (modules is no mapping); get the checkpoint again")
    return modules


def check_description(values: Mapping[str, Any]) -> None:
    """Raises BimosError: a `quantization_config` of a newer format, or one that describes what this version cannot read."""
    check_format_version(values.get("format_version"))
    if values.get("embedding_bits") not in (8, 16):
        raise BimosError(f"embedding_bits={values.get('embedding_bits')}: must be 8 or 16")
    for name in (None, *_modules(values)):
        layout_of(values, name, True)


def description_sum(values: Mapping[str, Any]) -> str:
    """Eight hex digits over all that a `quantization_config` says of tensors: some of it no shape would show."""
    said = {key: values.get(key, default) for key, default in DESCRIBING.items()}
    return f"{zlib.crc32(json.dumps(said, sort_keys=True).encode()):08x}"


def compare(name: str, shapes: Shapes, headers: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Raises BimosError: tensors of linear `name` have other shapes or dtypes in the files than config.json says."""
    for key, (shape, dtype) in shapes.items():
        expected, found = (tuple(shape), DTYPES.get(dtype)), headers.get(f"{name}.{key}")
        if found != expected:
            raise BimosError(f"config.json and weights disagree on '{name}.{key}' ({expected} and {found}); copy the checkpoint again")
