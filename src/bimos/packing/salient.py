"""What a packed linear may have besides its planes, for methods that spend more on the weights that matter most.

    salient        uint8 [in/8]             a bit a column: on those the same planes have the scales
    scale_salient  [planes, out, groups]    in the place of `scale_group`
    sparse_mask    uint8 [out, in/8]        a bit a weight: to those
    sparse_code    int8 [codes]             row by row, times
    sparse_scale   [out]                    are added

    y = sum_p (s_p B_p) x_rest + sum_p (s'_p B_p) x_salient + S x,   x_rest + x_salient = x

Bits lie as in planes. Two products with the same planes, and one with a sparse matrix that is made at the first call.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bimos.errors import BimosError
from bimos.kernels import native, packed_linear
from bimos.kernels.reference import unpack_signs

SALIENT = ("salient", "scale_salient")
SPARSE = ("sparse_mask", "sparse_code", "sparse_scale")
FEW_TOKENS = 32  # up to so many a sparse product beats a dense one, which also has to be filled in


class Parts(NamedTuple):
    """What products beside the planes' own are made of."""

    rest: Tensor | None  # bool [in]: columns that are not salient
    scale: Tensor | None  # [planes, out, groups], of those that are
    tiles: Tensor | None  # the planes with these scales
    sparse: Tensor | None  # float32 [out, in], CSR or dense


def check_salient(tensors: Mapping[str, Tensor]) -> None:
    """Raises BimosError: of these parts some are missing, or do not fit the planes."""
    planes, out_features, in_bytes = tensors["weight"].shape
    for names in (SALIENT, SPARSE):
        found = [name for name in names if name in tensors]
        if found and len(found) < len(names):
            raise BimosError(f"a packed linear has all of {', '.join(names)} or none; got {', '.join(found)}")
    if "salient" in tensors and "scale_group" not in tensors:
        raise BimosError(f"'salient' of a packed linear goes with scale_group; got {', '.join(tensors)}")
    expected = {
        "salient": ((in_bytes,), torch.uint8),
        "scale_salient": (tuple(tensors["scale_group"].shape), None) if "scale_group" in tensors else None,
        "sparse_mask": ((out_features, in_bytes), torch.uint8),
        "sparse_code": ((tensors["sparse_code"].numel(),), torch.int8) if "sparse_code" in tensors else None,
        "sparse_scale": ((out_features,), None),
    }
    for name, wanted in expected.items():
        if name not in tensors or wanted is None:
            continue
        shape, dtype = wanted
        if tuple(tensors[name].shape) != shape or (dtype is not None and tensors[name].dtype != dtype):
            kind = "" if dtype is None else f"{str(dtype).removeprefix('torch.')} "
            got = f"{tensors[name].dtype} {list(tensors[name].shape)}"
            raise BimosError(f"'{name}' of a packed linear {[planes, out_features, in_bytes]} must be {kind}{list(shape)}; got {got}")


def sparse_weight(tensors: Mapping[str, Tensor | None]) -> Tensor | None:
    """The sparse part, dense float32 `[out, in]`; None where a layer has none.

    Raises:
        BimosError: mask and codes are not of one matrix.
    """
    bits, code, scale = (tensors.get(name) for name in SPARSE)
    if bits is None or code is None or scale is None:
        return None
    mask = unpack_signs(bits) > 0
    counts = mask.sum(1)
    if not torch.compiler.is_compiling() and int(counts.sum()) != len(code):
        raise BimosError(f"sparse_mask has {int(counts.sum())} bits for {len(code)} codes; get the checkpoint again")
    values = code.float() * scale.float().repeat_interleave(counts, output_size=len(code))
    return torch.zeros(mask.shape, device=bits.device).masked_scatter(mask, values)


def salient_columns(tensors: Mapping[str, Tensor | None]) -> Tensor | None:
    """Which columns are salient, bool `[in]`; None where a layer has none."""
    bits = tensors.get("salient")
    return None if bits is None else unpack_signs(bits) > 0


def make_parts(tensors: Mapping[str, Tensor | None], group_size: int, is_tiled: bool) -> Parts | None:
    """The parts of a packed linear, with tiles for the CPU's kernels or without; None where it has none."""
    columns, sparse, planes = salient_columns(tensors), sparse_weight(tensors), tensors["weight"]
    if columns is None and sparse is None:
        return None
    scale = tensors.get("scale_salient")
    tiles = native.tile(planes, scale, group_size) if is_tiled and columns is not None and planes is not None else None
    if sparse is not None and not torch.compiler.is_compiling():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR tensors beta
            sparse = sparse.to_sparse_csr()
    return Parts(None if columns is None else ~columns, scale, tiles, sparse)


def parts_product(x: Tensor, planes: Tensor, parts: Parts, int8: bool, group_size: int) -> Tensor | float:
    """What the parts make of `x [..., in]`, to be added to the planes' own product with `x * rest`: `[..., out]`."""
    y: Tensor | float = 0.0
    if parts.rest is not None:
        y = packed_linear(x * ~parts.rest, planes, None, None, None, parts.scale, None, parts.tiles, int8, group_size)
    if parts.sparse is not None:
        tokens = x.shape[:-1].numel()
        is_plain = x.dtype == torch.float32 and not (torch.is_grad_enabled() and x.requires_grad)
        if parts.sparse.is_sparse_csr and is_plain and tokens <= FEW_TOKENS:
            y = y + (parts.sparse @ x.reshape(tokens, -1).T).T.reshape(*x.shape[:-1], -1)
        else:
            y = y + F.linear(x, parts.sparse.to_dense().to(x.dtype))
    return y
