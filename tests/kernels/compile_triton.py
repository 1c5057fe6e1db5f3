"""Compiles every Triton kernel for NVIDIA GPUs of two generations; prints their names. Needs no GPU, and no TRITON_INTERPRET."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bimos.kernels import triton_head
from bimos.kernels.triton_head import Sizes, int8_rows
from bimos.kernels.triton_kernels import add_up, prepare, product
from bimos.kernels.triton_tuning import MANY, ONE, SEVERAL, Config

STORED = ("weight", "scale_in", "scale_out", "router", "scale_group", "bias")
POINTERS = {"gate": "fp32", "parts": "fp32"}
POINTERS |= {f"{name}{end}": "u8" if name == "weight" else "fp16" for name in STORED for end in ("", "_1", "_2")}


def build(
    kernel: Any, dtype: str, absent: tuple[str, ...], constants: dict[str, Any], capability: int, source: str = "", **options: int
) -> None:
    """Compile as for a call with tensors of `dtype`, without those in `absent`, with sizes that 16 does not divide.

    Args:
        source: dtype of the inputs, where `prepare` has made others of them.
    """
    types = {"x": source or dtype, "y": dtype, "y_1": dtype, "y_2": dtype, "scaled": dtype} | POINTERS
    signature = {name: f"*{types[name]}" if name in types else "i32" for name in kernel.arg_names}
    missing = ["y_1", "y_2"] if not constants.get("IS_WHOLE", True) else []
    missing += [f"{name}{end}" for name in ("y", *STORED, "n_out") for end in ("_1", "_2")[constants.get("COUNT", 1) - 1 :]]
    constants = constants | dict.fromkeys([*missing, *(f"{name}{end}" for name in absent for end in ("", "_1", "_2"))])
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    ast = ASTSource(fn=kernel, signature=signature, constexprs=indices)
    triton.compile(ast, target=GPUTarget("cuda", capability, 32), options=options | {"enable_fp_fusion": True})
    print(kernel.__name__, capability, flush=True)


def build_product(
    config: Config,
    dtype: str,
    absent: tuple[str, ...],
    group: int,
    capability: int,
    count: int = 1,
    precision: str = "halves",
    scales: str = "fp16",
    is_whole: bool = True,
) -> None:
    sizes = {"BLOCK_TOKENS": config.block_tokens, "BLOCK_OUT": config.block_out, "BLOCK_BYTES": config.block_bytes, "BLOCK_ROUTER": 256}
    sizes["STAGES"] = config.stages
    constants = {"COUNT": count, "PLANES": 2, "EXPERTS": 3, "PADDED": 4, "GROUP_SIZE": group}
    constants |= {"IS_WHOLE": is_whole, "IS_DOT": config.is_dot, "IS_WIDE": False, "PRECISION": precision if dtype == "fp32" else "ieee"}
    source = "fp32" if config.is_prepared and not config.is_dot else ""
    POINTERS.update({f"scale_group{end}": scales for end in ("", "_1", "_2")})
    build(product, dtype, absent, constants | sizes, capability, source, num_warps=config.warps)


def build_head(sizes: Sizes, dtype: str, absent: tuple[str, ...], capability: int) -> None:
    blocks = {"BLOCK_TOKENS": sizes.block_tokens, "BLOCK_OUT": sizes.block_out, "BLOCK_IN": sizes.block_in, "STAGES": sizes.stages}
    constants = {"IS_WIDE": False, "PRECISION": "halves" if dtype == "fp32" else "ieee"} | blocks
    POINTERS.update(weight="i8", scale="fp16")
    build(int8_rows, dtype, absent, constants, capability, num_warps=sizes.warps)
    POINTERS["weight"] = "u8"


for capability in (80, 90):
    build_product(ONE[0], "bf16", ("scale_in", "router", "scale_group"), 0, capability, 3)  # what is taken where nothing is measured
    build_product(SEVERAL[3], "fp16", ("gate",), 12, capability, 2)
    build_product(MANY[0], "fp32", ("scale_in", "router"), 64, capability)
    sizes = {"COUNT": 3, "PLANES": 2, "SHARED": False, "EXPERTS": 3, "PADDED": 4, "BLOCK_BYTES": 128, "BLOCK_ROUTER": 2048}
    build(prepare, "bf16", (), sizes, capability)
    build(add_up, "bf16", (), {"COUNT": 2, "BLOCK": 512}, capability)
    build_head(triton_head.FEW, "bf16", ("bias",), capability)
    build_head(triton_head.MANY, "fp32", (), capability)
build_product(ONE[0], "bf16", ("scale_in", "router", "scale_group"), 0, 90, 3, is_whole=False)
build_product(ONE[3], "bf16", ("gate", "scale_group"), 0, 90)
build_product(MANY[0], "fp32", ("scale_in", "router"), 64, 80, 1, "tf32x3", "fp32")
