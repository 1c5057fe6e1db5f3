"""`bimos::packed_linear` on GPUs, by the kernels of `bimos.kernels.triton_kernels`: what they cover, and how calls are divided.

Imported by `bimos.kernels.gpu` when tensors on a GPU come. With TRITON_INTERPRET=1 it takes tensors on a CPU, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from bimos.kernels import triton_tuning
from bimos.kernels.gpu import FEW
from bimos.kernels.triton_kernels import add_up, prepare, product
from bimos.kernels.triton_tuning import Config

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_SPLITS = 16  # parts of a sum, which are read once more
TOGETHER = 3  # linears of one input in one launch
INTERPRETED = not isinstance(product, triton.JITFunction)


class Stored(NamedTuple):
    """What a linear stores; see `bimos.kernels.packed_linear`."""

    weight: Tensor
    scale_in: Tensor | None
    scale_out: Tensor | None
    router: Tensor | None
    scale_group: Tensor | None
    bias: Tensor | None


def packed_linear(
    x: Tensor,
    weight: Tensor,
    scale_in: Tensor | None,
    scale_out: Tensor | None,
    router: Tensor | None,
    scale_group: Tensor | None,
    bias: Tensor | None,
    tiles: Tensor | None = None,
    int8: bool = False,
    group_size: int = 0,
) -> Tensor:
    """`bimos::packed_linear` for GPUs: `x [..., in]` to `[..., out]`. `tiles` and `int8` are a CPU's and have no part in it.

    To the reference go float64, as kernels sum in float32, what does not fit together, which the reference says, layers without
    inputs or planes, which no kernel is worth, and what no configuration of tiles can do on this GPU.
    """
    return _products(x, [Stored(weight, scale_in, scale_out, router, scale_group, bias)], group_size)[0]


def packed_linears(
    x: Tensor,
    weight: list[Tensor],
    scale_in: list[Tensor],
    scale_out: list[Tensor],
    router: list[Tensor],
    scale_group: list[Tensor],
    bias: list[Tensor],
    group_size: int = 0,
) -> list[Tensor]:
    """`bimos::packed_linears` for GPUs: several linears of one input in one launch, where what they store is alike and they are few."""
    columns: list[Any] = [tensors or itertools.repeat(None, len(weight)) for tensors in (scale_in, scale_out, router, scale_group, bias)]
    linears = [Stored(*each) for each in zip(weight, *columns, strict=True)]
    kinds = {(*(_kind(t) for t in linear), linear.scale_group is not None and linear.scale_group.shape[-1]) for linear in linears}
    if 1 < len(linears) <= TOGETHER and len(kinds) == 1:
        return _products(x, linears, group_size)
    return [_products(x, [linear], group_size)[0] for linear in linears]


def _kind(tensor: Tensor | None) -> tuple[object, ...]:
    """What must be alike of tensors that one kernel reads in turns, beside what `_covers` asks for."""
    return () if tensor is None else (tensor.dtype, tensor.shape[0] if tensor.dim() > 1 else 0, tensor.dim())


def _products(x: Tensor, linears: list[Stored], group_size: int) -> list[Tensor]:
    if not all(_covers(x, *linear, group_size) for linear in linears):
        return [torch.ops.bimos.packed_linear_reference(x, *linear, group_size) for linear in linears]
    n_in, tokens = x.shape[-1], x.shape[:-1].numel()
    widths = [linear.weight.shape[1] for linear in linears]
    if tokens == 0 or 0 in widths:
        if len(linears) > 1:
            return [_products(x, [linear], group_size)[0] for linear in linears]
        return [x.new_empty(*x.shape[:-1], widths[0])]
    first = linears[0]
    if first.router is not None and (first.router.shape[0] == 1 or (first.scale_in is None and first.scale_out is None)):
        linears = [linear._replace(router=None) for linear in linears]  # a gate that is 1, or that nothing asks for
    if first.scale_group is not None:
        group_size = group_size or n_in // first.scale_group.shape[2]
    rows = x.reshape(tokens, n_in)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    linears = [Stored(*(None if t is None else t.contiguous() for t in linear)) for linear in linears]  # type: ignore[arg-type]
    run = functools.partial(launch, rows, linears, group_size)
    experts = 1 if linears[0].router is None else linears[0].router.shape[0]
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        shape = (first.weight.shape[0], *widths, n_in, experts, group_size if first.scale_group is not None else 0)
        config = triton_tuning.choose(run, rows, shape)
        if config is None:
            return [torch.ops.bimos.packed_linear_reference(x, *linear, group_size) for linear in linears]
        return [y.view(*x.shape[:-1], y.shape[1]) for y in run(config)]


def launch(x: Tensor, linears: list[Stored], group_size: int, config: Config) -> list[Tensor]:
    """The products of `x [tokens, in]`, whose rows are contiguous, with tiles of the sizes in `config`; all else is contiguous and fits."""
    first, count = linears[0], len(linears)
    (planes, _, n_bytes), tokens = first.weight.shape, x.shape[0]
    n_in, experts = 8 * n_bytes, 1 if first.router is None else first.router.shape[0]
    padded = triton.next_power_of_2(experts)
    third = (None,) * (TOGETHER - count)
    stored = {name: (*(getattr(linear, name) for linear in linears), *third) for name in Stored._fields}
    source, gate, strides = x, None, (0, 0, x.stride(0), 1, 8)
    if config.is_prepared:
        dtype = x.dtype if config.is_dot else torch.float32  # what is added up without `tl.dot` need not be rounded, nor widened again
        shared = first.scale_in is None  # nothing is scaled: what is prepared is the same for all
        source = x.new_empty(1 if shared else count, 1 if shared else planes, tokens, 8, n_bytes, dtype=dtype)
        gate = None if first.router is None else x.new_empty(count, tokens, padded, dtype=torch.float32)
        block = min(128, triton.next_power_of_2(n_bytes))
        # Without scales, but with gates, the same inputs are written by all: the same values.
        grid = (tokens, triton.cdiv(n_bytes, block) if tokens <= FEW else 1, 1 if shared and gate is None else count)
        prepare[grid](
            source, gate, x, *stored["scale_in"], *stored["router"], tokens, n_bytes, x.stride(0), COUNT=count, PLANES=source.shape[1],
            SHARED=shared, EXPERTS=experts, PADDED=padded, BLOCK_BYTES=block, BLOCK_ROUTER=_router_block(padded, n_in),
            enable_fp_fusion=True,
        )  # fmt: skip
        strides = (0, 0, n_in, n_bytes, 1) if shared else (planes * tokens * n_in, tokens * n_in, n_in, n_bytes, 1)
        stored["scale_in"] = stored["router"] = (None,) * TOGETHER
    widths = [linear.weight.shape[1] for linear in linears]
    total = sum(widths)
    tiles_each, (_, columns, splits) = divide(config, tokens, total, n_bytes, x.device)
    rows = sum(triton.cdiv(width, config.block_out) for width in widths)
    ys = [x.new_empty(tokens, width) for width in widths]
    parts = None if splits == 1 else x.new_empty(splits, tokens * total, dtype=torch.float32)
    product[rows, columns, splits](
        *(ys if parts is None else (parts, *[None] * (count - 1))), *third, source, gate,
        *(tensor for name in Stored._fields for tensor in stored[name]), tokens, n_bytes, *widths, *third,
        0 if first.scale_group is None else first.scale_group.shape[2], tiles_each, *strides,
        COUNT=count, PLANES=planes, EXPERTS=experts, PADDED=padded, GROUP_SIZE=0 if first.scale_group is None else group_size,
        IS_WHOLE=parts is None, IS_DOT=config.is_dot, IS_WIDE=INTERPRETED and x.dtype == torch.bfloat16,
        PRECISION=_precision(x, first.scale_group), BLOCK_TOKENS=config.block_tokens, BLOCK_OUT=config.block_out,
        BLOCK_BYTES=config.block_bytes, BLOCK_ROUTER=_router_block(config.block_tokens * padded, n_in), STAGES=config.stages,
        num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip
    if parts is not None:
        sizes = tokens * widths[0], tokens * widths[1] if count > 1 else 0
        add_up[(triton.cdiv(tokens * total, 512),)](*ys, *third, parts, splits, tokens * total, *sizes, COUNT=count, BLOCK=512)
    return ys


def divide(config: Config, tokens: int, n_out: int, n_bytes: int, device: torch.device) -> tuple[int, tuple[int, int, int]]:
    """Tiles of bytes that a program of `product` goes through, and its grid: blocks of outputs, blocks of tokens, splits of the inputs."""
    blocks = triton.cdiv(n_out, config.block_out), triton.cdiv(tokens, config.block_tokens)
    tiles = triton.cdiv(n_bytes, config.block_bytes)
    wanted = config.waves * _multiprocessors(device) // (blocks[0] * blocks[1])
    tiles_each = triton.cdiv(tiles, max(1, min(wanted, tiles, MAX_SPLITS)))
    return tiles_each, (*blocks, triton.cdiv(tiles, tiles_each))


def try_out(device: torch.device) -> None:
    """Compiles and starts the smallest product there is; raises what stands in the way on this machine."""
    with torch.cuda.device(device), torch.no_grad():
        x, weight = torch.zeros(1, 8, device=device), torch.zeros(1, 1, 1, dtype=torch.uint8, device=device)
        launch(x, [Stored(weight, None, None, None, None, None)], 0, triton_tuning.ONE[0])


def _precision(x: Tensor, scale_group: Tensor | None) -> str:
    """How `tl.dot` multiplies float32. 16-bit scales of groups are exact in tf32 as signs are; AMD's matrix units have float32."""
    if torch.version.hip is not None or x.dtype != torch.float32:
        return "ieee"
    return "halves" if scale_group is None or scale_group.dtype != torch.float32 else "tf32x3"


def _router_block(logits: int, n_in: int) -> int:
    """Inputs that are multiplied with a router at a time: as many as registers hold for so many logits."""
    return min(max(16, 8192 // triton.next_power_of_2(logits)), triton.next_power_of_2(n_in))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _covers(
    x: Tensor,
    weight: Tensor,
    scale_in: Tensor | None,
    scale_out: Tensor | None,
    router: Tensor | None,
    scale_group: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> bool:
    """Whether all fits together: kernels read what shapes promise, and nothing looks after them."""
    if x.dtype not in DTYPES or weight.dtype != torch.uint8 or weight.dim() != 3 or weight.device != x.device or not x.dim():
        return False
    planes, n_out, n_bytes = weight.shape
    n_in, experts = 8 * n_bytes, 1 if router is None else router.shape[0]
    if not planes or not n_in or not experts or x.shape[-1] != n_in:
        return False
    groups = 0
    if scale_group is not None:
        groups = scale_group.shape[-1] if not group_size else -(-n_in // group_size)
        if not groups or (not group_size and n_in % groups):
            return False
    shapes = (planes, experts, n_in), (planes, experts, n_out), (experts, n_in), (planes, n_out, groups), (n_out,)
    return all(
        t is None or (t.shape == shape and t.dtype in DTYPES and t.device == x.device)
        for t, shape in zip((scale_in, scale_out, router, scale_group, bias), shapes, strict=True)
    )
