"""`bimos::int8_linear` on GPUs: a head's int8 rows, widened where they were loaded and multiplied by matrix units.

Imported by `bimos.kernels.gpu` when tensors on a GPU come. With TRITON_INTERPRET=1 it takes tensors on a CPU, for tests.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimos.kernels.triton_kernels import add_dot

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Sizes(NamedTuple):
    """How a product is divided."""

    block_tokens: int
    block_out: int
    block_in: int
    warps: int
    stages: int


FEW = Sizes(16, 64, 128, 4, 4)  # a decoding step's, which is as fast as rows are read
MANY = Sizes(64, 128, 64, 8, 3)


@triton.jit(do_not_specialize=["tokens"])
def int8_rows(
    y: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor | None,
    tokens: tl.tensor,
    n_in: tl.tensor,
    n_out: tl.tensor,
    stride_token: tl.tensor,
    IS_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Tile `[BLOCK_OUT, BLOCK_TOKENS]` of `y [tokens, out]`, from `x [tokens, in]`, `weight [out, in]`, `scale [out]` and `bias [out]`.

    IS_WIDE and PRECISION: see `add_dot`.
    """
    row = (tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)
    token = (tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    is_row, is_token = row < n_out, token < tokens
    total = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.float32)
    for start in tl.range(0, n_in, BLOCK_IN, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_IN)
        is_column = column < n_in
        numbers = tl.load(weight + row[:, None] * n_in + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0)
        values = tl.load(x + token[:, None] * stride_token + column[None, :], mask=is_token[:, None] & is_column[None, :], other=0.0)
        inputs = tl.trans(values)
        weights = numbers.to(tl.float32).to(x.dtype.element_ty)
        total = add_dot(total, weights, inputs, IS_WIDE, PRECISION)
    total *= tl.load(scale + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        total += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    tl.store(y + token[None, :] * n_out + row[:, None], total.to(y.dtype.element_ty), mask=is_row[:, None] & is_token[None, :])


INTERPRETED = not isinstance(int8_rows, triton.JITFunction)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`bimos::int8_linear` for GPUs. What the kernel does not cover (float64, what does not fit together) goes to the reference."""
    if not _covers(x, weight, scale, bias):
        return torch.ops.bimos.int8_linear_reference(x, weight, scale, bias)
    (n_out, n_in), tokens = weight.shape, x.shape[:-1].numel()
    y = x.new_empty(*x.shape[:-1], n_out)
    if y.numel() == 0:
        return y
    rows = x.reshape(tokens, n_in)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    is_divided = x.dtype == torch.float32 and not torch.version.hip  # AMD's matrix units have float32
    sizes = FEW if tokens <= FEW.block_tokens else MANY
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        int8_rows[triton.cdiv(n_out, sizes.block_out), triton.cdiv(tokens, sizes.block_tokens)](
            y, rows, weight.contiguous(), scale.contiguous(), None if bias is None else bias.contiguous(), tokens, n_in, n_out,
            rows.stride(0), IS_WIDE=INTERPRETED and x.dtype == torch.bfloat16, PRECISION="halves" if is_divided else "ieee",
            BLOCK_TOKENS=sizes.block_tokens, BLOCK_OUT=sizes.block_out, BLOCK_IN=sizes.block_in, STAGES=sizes.stages,
            num_warps=sizes.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def _covers(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
    """Whether all fits together: the kernel reads what shapes promise, and nothing looks after it."""
    if x.dtype not in DTYPES or weight.dtype != torch.int8 or weight.dim() != 2 or not x.dim() or x.shape[-1] != weight.shape[1]:
        return False
    n_out, n_in = weight.shape
    shapes = ((scale, (n_out, 1)), (bias, (n_out,)))
    fits = all(t is None or (t.shape == shape and t.dtype in DTYPES and t.device == x.device) for t, shape in shapes)
    return fits and n_in > 0 and weight.device == x.device
