"""Weights with scales by group of a row, and the form in which kernels multiply them: signs, and one offset a group.

    scale_group      [planes, out, groups]   w = sum_p s_p B_p
    scale_group_01   [planes, out, groups]   w = sum_p s_p (B_p + 1)      planes of zeros and ones, whose ones count 2 s_p
    scale_group_int  [out, groups]           w = sum_p s 2^p B_p          integers of as many bits as there are planes
    offset_group     [out, groups]           is added to any of them

A layer has one of the three scales at most. Group k of a row are its inputs from k g to (k + 1) g - 1; the last one may be shorter.

    y = sum_p (s_p B_p) x + offset @ (sums of x over each group)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bimos.errors import BimosError

SCALES = ("scale_group", "scale_group_01", "scale_group_int")
GROUPED = (*SCALES, "offset_group")


def count_groups(in_features: int, group_size: int) -> int:
    """Groups of a row; the last one may be shorter than the others."""
    return -(-in_features // group_size)


def check_groups(tensors: Mapping[str, Tensor], group_size: int | None) -> int | None:
    """Inputs of a group of a packed linear with these tensors, or None where it has no groups.

    Args:
        group_size: None where groups are all alike: their number tells.

    Raises:
        BimosError: what has groups does not fit together.
    """
    planes, out_features, in_bytes = tensors["weight"].shape
    in_features = 8 * in_bytes
    found = [name for name in SCALES if name in tensors]
    if not found:
        if "offset_group" in tensors or group_size is not None:
            raise BimosError(f"a packed linear with groups needs one of {', '.join(SCALES)}; got {', '.join(tensors)}")
        return None
    if len(found) > 1:
        raise BimosError(f"a packed linear has one kind of group scales; got {' and '.join(found)}")
    mixed = [name for name in ("scale_in", "scale_out", "router") if name in tensors]
    if mixed and (found[0] != "scale_group" or "offset_group" in tensors):
        raise BimosError(f"'{mixed[0]}' of a packed linear goes with scale_group alone; leave out {mixed[0]}, or the groups' offsets")
    groups = tensors[found[0]].shape[-1] if tensors[found[0]].ndim else 0
    if groups and group_size is None and in_features % groups == 0:
        group_size = in_features // groups
    for name in (*found, *(["offset_group"] if "offset_group" in tensors else [])):
        leading = (out_features,) if name in ("scale_group_int", "offset_group") else (planes, out_features)
        shape = tuple(tensors[name].shape)
        if not group_size or group_size < 1 or shape != (*leading, count_groups(in_features, group_size)):
            wanted = ", ".join(["planes", "out", "in/g"][-len(leading) - 1 :])
            size = "" if group_size is None else f" with g = {group_size}"
            raise BimosError(f"'{name}' of a packed linear {[planes, out_features, in_bytes]} must be [{wanted}]{size}; got {list(shape)}")
    return group_size


def product_form(tensors: Mapping[str, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Scales of the signs `[planes, out, groups]`, and offsets, float32 `[out, groups]`; None where a layer has none."""
    scale, offset = tensors.get("scale_group"), tensors.get("offset_group")
    offset = None if offset is None else offset.float()
    if (ones := tensors.get("scale_group_01")) is not None:
        scale, shift = ones, ones.float().sum(0)
        offset = shift if offset is None else offset + shift
    elif (step := tensors.get("scale_group_int")) is not None:
        planes: Any = tensors["weight"]
        scale = torch.stack([step * 2**p for p in range(planes.shape[0])])
    return scale, offset


def group_sums(x: Tensor, group_size: int) -> Tensor:
    """`[..., in]` to the sums over each group `[..., groups]`."""
    group_size = min(group_size, x.shape[-1])  # nothing is padded to a group that is wider than all there is
    groups = count_groups(x.shape[-1], group_size)
    return F.pad(x, (0, groups * group_size - x.shape[-1])).unflatten(-1, (groups, group_size)).sum(-1)


def by_input(values: Tensor, group_size: int, in_features: int) -> Tensor:
    """What groups have `[..., groups]`, for each of their inputs `[..., in]`."""
    return values.repeat_interleave(min(group_size, in_features), dim=-1)[..., :in_features]
