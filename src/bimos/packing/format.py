"""Planes: eight signs a byte, least significant bit first; bit 1 is +1, bit 0 is -1.

    weight   w0   w1   w2   w3   w4   w5   w6   w7      w >= 0: bit 1 (-0.0 too), w < 0: bit 0
    bit      0    1    2    3    4    5    6    7       of byte 0 of the row

`unpack_signs` is the kernels' own (`bimos.kernels.reference`): one rule in training, packing and every kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bimos.errors import BimosError
from bimos.kernels.reference import unpack_signs

__all__ = ["pack_signs", "unpack_signs"]


def pack_signs(w: Tensor) -> Tensor:
    """The signs of `w [..., n]` as uint8 `[..., n/8]`.

    Raises:
        BimosError: n is not a multiple of 8, or `w` has NaNs, which have no sign.
    """
    if w.shape[-1] % 8:
        raise BimosError(f"rows of {w.shape[-1]} weights cannot be packed: planes need a multiple of 8; skip this layer")
    if w.isnan().any():
        raise BimosError("weights with NaN cannot be packed; check the model or lower the learning rate")
    bits = (w >= 0).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=w.device)).sum(-1, dtype=torch.uint8)
