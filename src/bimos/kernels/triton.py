"""`bimos::packed_linear` on GPUs, by the kernels of `bimos.kernels.triton_kernels`: what they cover, and how calls are divided.

Imported by `bimos.kernels.gpu` when tensors on a GPU come. With TRITON_INTERPRET=1 it takes tensors on a CPU, for tests.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
from torch import Tensor

from bimos.kernels import triton_tuning
from bimos.kernels.triton_kernels import add_up, prepare, product
from bimos.kernels.triton_tuning import FEW, Config

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_SPLITS = 16  # parts of a sum, which are read once more
INTERPRETED = not isinstance(product, triton.JITFunction)


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
    tensors = (weight, scale_in, scale_out, router, scale_group, bias)
    if not _covers(x, *tensors, group_size):
        return torch.ops.bimos.packed_linear_reference(x, *tensors, group_size)
    n_out, n_in = weight.shape[1], x.shape[-1]
    tokens = x.shape[:-1].numel()
    if tokens == 0 or n_out == 0:
        return x.new_empty(*x.shape[:-1], n_out)
    if router is not None and (router.shape[0] == 1 or (scale_in is None and scale_out is None)):
        router = None  # a gate that is 1, or that nothing asks for
    if scale_group is not None:
        group_size = group_size or n_in // scale_group.shape[2]
    rows = x.reshape(tokens, n_in)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    scale_in, scale_out, router, scale_group, bias = (
        None if t is None else t.contiguous() for t in (scale_in, scale_out, router, scale_group, bias)
    )
    run = functools.partial(launch, rows, weight.contiguous(), scale_in, scale_out, router, scale_group, bias, group_size)
    experts = 1 if router is None else router.shape[0]
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        config = triton_tuning.choose(run, rows, (weight.shape[0], n_out, n_in, experts, group_size if scale_group is not None else 0))
        if config is None:
            return torch.ops.bimos.packed_linear_reference(x, *tensors, group_size)
        return run(config).view(*x.shape[:-1], n_out)


def launch(
    x: Tensor,
    weight: Tensor,
    scale_in: Tensor | None,
    scale_out: Tensor | None,
    router: Tensor | None,
    scale_group: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    config: Config,
) -> Tensor:
    """The op for `x [tokens, in]`, whose rows are contiguous, with tiles of the sizes in `config`; all else is contiguous and fits."""
    (planes, n_out, n_bytes), tokens = weight.shape, x.shape[0]
    n_in, experts = 8 * n_bytes, 1 if router is None else router.shape[0]
    padded = triton.next_power_of_2(experts)
    source, gate, strides = x, None, (0, x.stride(0), 1, 8)
    if config.is_prepared:
        dtype = x.dtype if config.is_dot else torch.float32  # what is added up without `tl.dot` need not be rounded, nor widened again
        source = x.new_empty(1 if scale_in is None else planes, tokens, 8, n_bytes, dtype=dtype)
        gate = None if router is None else x.new_empty(tokens, padded, dtype=torch.float32)
        block = min(128, triton.next_power_of_2(n_bytes))
        prepare[(tokens, triton.cdiv(n_bytes, block) if tokens <= FEW else 1)](
            source, gate, x, scale_in, router, tokens, n_bytes, x.stride(0), PLANES=source.shape[0], EXPERTS=experts, PADDED=padded,
            BLOCK_BYTES=block, BLOCK_ROUTER=_router_block(padded, n_in), enable_fp_fusion=True,
        )  # fmt: skip
        strides = (0 if scale_in is None else tokens * n_in, n_in, n_bytes, 1)
        scale_in = router = None
    tiles_each, grid = divide(config, tokens, n_out, n_bytes, x.device)
    splits = grid[2]
    y = x.new_empty(tokens, n_out)
    parts = y if splits == 1 else x.new_empty(splits, tokens, n_out, dtype=torch.float32)
    product[grid](
        parts, source, weight, scale_in, scale_out, router, gate, scale_group, bias if splits == 1 else None,
        tokens, n_bytes, n_out, 0 if scale_group is None else scale_group.shape[2], tiles_each, *strides,
        PLANES=planes, EXPERTS=experts, PADDED=padded, GROUP_SIZE=0 if scale_group is None else group_size,
        IS_DOT=config.is_dot, IS_WIDE=INTERPRETED and x.dtype == torch.bfloat16, PRECISION=_precision(x, scale_group),
        BLOCK_TOKENS=config.block_tokens, BLOCK_OUT=config.block_out, BLOCK_BYTES=config.block_bytes,
        BLOCK_ROUTER=_router_block(config.block_tokens * padded, n_in), STAGES=config.stages,
        num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        add_up[(triton.cdiv(y.numel(), 512),)](y, parts, bias, splits, y.numel(), n_out, BLOCK=512)
    return y


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
        launch(x, weight, None, None, None, None, None, 0, triton_tuning.ONE[0])


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
