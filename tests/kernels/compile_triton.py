"""Compiles every Triton kernel for NVIDIA GPUs of two generations; prints their names. Needs no GPU, and no TRITON_INTERPRET."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bimos.kernels.triton_kernels import add_up, prepare, product
from bimos.kernels.triton_tuning import MANY, ONE, SEVERAL, Config

SCALES = ("scale_in", "scale_out", "router", "scale_group", "bias")
POINTERS = {"weight": "u8", "gate": "fp32", "parts": "fp32"} | dict.fromkeys(SCALES, "fp16")


def build(kernel: Any, dtype: str, absent: tuple[str, ...], constants: dict[str, Any], capability: int, **options: int) -> None:
    """Compile as for a call with tensors of `dtype`, without those in `absent`, with sizes that 16 does not divide."""
    types = {"x": dtype, "y": dtype, "scaled": dtype} | POINTERS
    signature = {name: f"*{types[name]}" if name in types else "i32" for name in kernel.arg_names}
    constants = constants | dict.fromkeys(absent)
    signature |= dict.fromkeys(constants, "constexpr")
    indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=indices)
    triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options | {"enable_fp_fusion": True})
    print(kernel.__name__, flush=True)


def build_product(config: Config, dtype: str, absent: tuple[str, ...], group: int, capability: int) -> None:
    sizes = {"BLOCK_TOKENS": config.block_tokens, "BLOCK_OUT": config.block_out, "BLOCK_BYTES": config.block_bytes, "BLOCK_ROUTER": 256}
    sizes["STAGES"] = config.stages
    constants = {"PLANES": 2, "EXPERTS": 3, "PADDED": 4, "GROUP_SIZE": group}
    constants |= {"IS_DOT": config.is_dot, "IS_WIDE": False, "PRECISION": "halves" if dtype == "fp32" else "ieee"}
    build(product, dtype, absent, constants | sizes, capability, num_warps=config.warps)


build_product(ONE[3], "bf16", ("gate", "scale_group"), 0, 90)
build_product(SEVERAL[3], "fp16", ("gate",), 12, 80)
build_product(MANY[0], "fp32", ("scale_in", "router"), 64, 80)
build(prepare, "bf16", (), {"PLANES": 2, "EXPERTS": 3, "PADDED": 4, "BLOCK_BYTES": 128, "BLOCK_ROUTER": 2048}, 80)
build(add_up, "bf16", (), {"BLOCK": 512}, 90)
