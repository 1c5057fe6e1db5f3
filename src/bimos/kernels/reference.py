"""The ops in plain torch: slow, obvious and right. Every faster kernel is tested against this file.

    gate   = softmax(x @ router^T)                      in float32, [..., e]
    y      = sum_p  s_out_p * (B_p @ (s_in_p * x))  +  bias
    s_in_p = gate @ scale_in[p]      s_out_p = gate @ scale_out[p]      (one expert: the row itself)

`B_p` are the signs of plane p, each times the scale of its group where there are group scales (DESIGN, sections 1-3).

Numerics: gates, scales and every product with a scale are float32; `s_in * x` and the product with `B_p` are rounded
to the dtype of `x`; planes and bias are summed in float32; the result has the dtype of `x`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_CHUNK_BYTES = 16 * 2**20  # of dequantised rows of an int8 head that exist at a time


def unpack_signs(bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 `[..., n/8]` to signs `[..., n]`: bit 1 is +1, bit 0 is -1, least significant bit first."""
    byte = torch.arange(256, device=bits.device).unsqueeze(1)
    position = torch.arange(8, device=bits.device)
    signs_of_byte = ((byte >> position & 1) * 2 - 1).to(dtype)  # [256, 8]
    return F.embedding(bits.int(), signs_of_byte).flatten(-2)


def packed_linear(
    x: Tensor,
    weight: Tensor,
    scale_in: Tensor | None = None,
    scale_out: Tensor | None = None,
    router: Tensor | None = None,
    scale_group: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    """`[..., in]` to `[..., out]`; the equation above. Differentiable in `x` and in every scale.

    Args:
        x: `[..., in]`, floating point.
        weight: uint8 `[planes, out, in/8]`.
        scale_in: `[planes, e, in]`.
        scale_out: `[planes, e, out]`.
        router: `[e, in]`; None where e = 1.
        scale_group: `[planes, out, groups]`.
        bias: `[out]`.
        group_size: inputs of a group, of which the last may have fewer; 0: their number divides the inputs.
    """
    gate = None if router is None else torch.softmax(F.linear(x.float(), router.float()), dim=-1)
    y = torch.zeros(*x.shape[:-1], weight.shape[1], dtype=torch.float32, device=x.device)
    for plane in range(weight.shape[0]):
        signs = unpack_signs(weight[plane], x.dtype)
        if scale_group is not None:
            inputs = group_size or x.shape[-1] // scale_group.shape[2]
            signs = signs * scale_group[plane].to(x.dtype).repeat_interleave(inputs, dim=1)[:, : x.shape[-1]]
        scaled = x if scale_in is None else (x.float() * _mix(gate, scale_in[plane])).to(x.dtype)
        product = F.linear(scaled, signs).float()
        y = y + (product if scale_out is None else product * _mix(gate, scale_out[plane]))
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _mix(gate: Tensor | None, scales: Tensor) -> Tensor:
    """`scales [e, n]` mixed by `gate [..., e]` to `[..., n]`; without a gate its only row `[n]`."""
    return scales.float().squeeze(0) if gate is None else gate @ scales.float()


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`y = scale * (weight @ x) + bias`, `[..., in]` to `[..., out]`: the head of a model with int8 embeddings.

    Rows are dequantised a chunk at a time, so that no copy of the table exists in a wider dtype. The integers are
    divided by 128 (exact in every dtype) and `scale` multiplied by it, so that a float16 product cannot overflow where
    that of the dense head would not.

    Args:
        x: `[..., in]`, floating point.
        weight: int8 `[out, in]`.
        scale: `[out, 1]`.
        bias: `[out]`.
    """
    rows = max(1, HEAD_CHUNK_BYTES // (weight.shape[1] * x.element_size()))
    factor = scale.float().squeeze(-1) * 128
    chunks = []
    for start in range(0, weight.shape[0], rows):
        chunk = slice(start, start + rows)
        y = F.linear(x, weight[chunk].to(x.dtype) / 128).float() * factor[chunk]
        chunks.append((y if bias is None else y + bias[chunk].float()).to(x.dtype))
    return torch.cat(chunks, dim=-1)
