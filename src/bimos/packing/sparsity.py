"""What planes of zeros and ones leave undone: a zero asks for no addition.

Operations are counted a weight and token. Planes: an addition for every one, and a multiplication by its scale for every plane of a
group. A dense product with 2-bit integers, to compare: a multiplication with addition for every weight, and one for the scale of its group.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bimos.packing.groups import count_groups
from bimos.packing.layout import layout_of

_ONES = torch.tensor([bin(byte).count("1") for byte in range(256)])


def sparsity_report(files: Iterable[str | Path], description: dict[str, Any]) -> dict[str, Any] | None:
    """Shares of ones of a checkpoint's planes of zeros and ones, over all linears that have such planes; None if none has.

    Args:
        description: the checkpoint's `quantization_config`.

    Returns:
        `share_of_ones` of every plane; `additions_skipped`, the share of zeros of all planes; `operations_per_weight` and
        `dense_operations_per_weight` as above, and their ratio `operations`.
    """
    ones: dict[int, int] = {}
    weights: dict[int, int] = {}
    scales = dense_scales = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                module, _, leaf = name.rpartition(".")
                layout = layout_of(description, module, True)
                if leaf != "weight" or "scale_group_01" not in dict(layout.tensors) or tensors.get_slice(name).get_dtype() != "U8":
                    continue
                planes = tensors.get_tensor(name)
                groups = count_groups(8 * planes.shape[2], layout.group_size or 1)
                scales += planes.shape[0] * planes.shape[1] * groups
                dense_scales += planes.shape[1] * groups
                for p, plane in enumerate(planes):
                    ones[p] = ones.get(p, 0) + int((plane.flatten().bincount(minlength=256) * _ONES).sum())
                    weights[p] = weights.get(p, 0) + 8 * plane.numel()
    if not ones:
        return None
    operations, dense = (sum(ones.values()) + scales) / weights[0], (weights[0] + dense_scales) / weights[0]
    return {
        "share_of_ones": [ones[p] / weights[p] for p in sorted(ones)],
        "additions_skipped": 1 - sum(ones.values()) / sum(weights.values()),
        "operations_per_weight": operations,
        "dense_operations_per_weight": dense,
        "operations": operations / dense,
    }
