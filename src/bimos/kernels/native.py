"""The CPU's kernels in C++ (`csrc/`): loaded where they were built, absent where they were not.

They register themselves for the ops of `bimos.kernels.ops`. Instruction levels are `scalar`, `avx2`, `avx512` and `amx`; the highest that
the processor has is used, or the one that the environment variable BIMOS_ISA names. `BIMOS_ISA=reference` leaves the ops to plain torch.
BIMOS_NATIVE names another build of the library (`make sanitize`).
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import torch
from torch import Tensor

from bimos.errors import BimosError
from bimos.kernels import ops  # noqa: F401 - schemas come first

LEVELS = ("scalar", "avx2", "avx512", "amx")
TRAINED = (torch.float32, torch.bfloat16)  # what training computes in
LIBRARY = Path(os.environ.get("BIMOS_NATIVE") or Path(__file__).with_name("_native.so"))


def _load() -> tuple[str | None, str]:
    """The level in use, or None and the reason."""
    wanted = os.environ.get("BIMOS_ISA", "")
    if wanted == "reference":
        return None, "BIMOS_ISA=reference"
    if wanted and wanted not in LEVELS:
        return None, f"BIMOS_ISA={wanted} is none of reference, {', '.join(LEVELS)}"
    if not LIBRARY.exists():
        return None, "not built: they need a C++20 compiler (tried: GCC 12); `pip install -v` shows what failed"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return None, f"cannot be loaded ({error}): install bimos again"
    return torch.ops.bimos.isa(), ""


_level, problem = _load()


def pays(dtype: torch.dtype) -> bool:
    """Whether what training in `dtype` has in C++ beside torch's products and attention is faster than those.

    In bfloat16 with AVX-512 and no matrix unit. In float32 with AVX2 where that is the dtype to train in (`fast_dtype`): a product with
    signs takes a third of the time, attention half. Elsewhere float32 was asked for, and is to be exact.
    """
    if dtype == torch.bfloat16:
        return isa() == "avx512" and not _has_matrix_unit()
    return dtype == torch.float32 and isa() == "avx2" and not _multiplies_bfloat16()


def attention_pays(dtype: torch.dtype) -> bool:
    """Whether attention in C++ is faster than torch's: as `pays` says, and in bfloat16 with the matrix unit."""
    return pays(dtype) or (dtype == torch.bfloat16 and isa() == "amx")


def fast_dtype(dtype: torch.dtype, device: torch.device | None = None) -> torch.dtype:
    """The dtype in which values kept as `dtype` are best multiplied: on a CPU, float32 for 16 bits where torch has no way with those.

    On a processor without AVX-512 a product of bfloat16 matrices takes nine times as long as one of float32.

    Args:
        device: where. None: on the CPU.
    """
    is_slow = (device is None or device.type == "cpu") and dtype in (torch.bfloat16, torch.float16) and not _multiplies_bfloat16()
    return torch.float32 if is_slow else dtype


@functools.cache
def _multiplies_bfloat16() -> bool:
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return platform.machine().lower() not in ("x86_64", "amd64") or known is None or bool(known())


@functools.cache
def _has_matrix_unit() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def isa() -> str | None:
    """The instruction level in use; None where the ops run in plain torch, and `problem` says why."""
    return _level


def covers(*values: Tensor) -> bool:
    """Whether the kernels of training take these: built, and all values on a CPU, in float32 or all in bfloat16."""
    first = values[0].dtype
    return isa() is not None and first in TRAINED and all(value.device.type == "cpu" and value.dtype == first for value in values)


def use_isa(name: str) -> None:
    """Work at another instruction level from now on.

    Raises:
        BimosError: unknown, or not of this processor.
    """
    global _level
    if _level is None or not torch.ops.bimos.use_isa(name):
        raise BimosError(f"instruction level '{name}' is not to be had here; known: {', '.join(LEVELS)}")
    _level = name


def tile(weight: Tensor, scale_group: Tensor | None = None, group_size: int = 0) -> Tensor | None:
    """Planes uint8 `[planes, out, in/8]` (and group scales, float16 `[planes, out, groups]`) in the order in which kernels read them.

    None where there is nothing to gain: no kernels, another device, or groups that they do not cover.
    """
    if _level is None or weight.device.type != "cpu" or (scale_group is not None and scale_group.dtype != torch.float16):
        return None
    tiles: Tensor = torch.ops.bimos.tile(weight, scale_group, group_size)
    return tiles if tiles.numel() else None


def quantize_int4(weight: Tensor, scale: Tensor | None = None, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows `[n, k]` in 4 bits, with a scale and a zero point (16 bits) for every 32 inputs, searched for the least squared error.

    Args:
        weight: int8 with a `scale` a row, or floating point.
        importance: `[k]`, how much an input's error counts; its mean square tells. None: all alike.

    Returns:
        Tiles of 16 rows, uint8 `[n / 16, bytes]` (`csrc/int4.h`), and float32 `[n]`, a factor of each row.
    """
    weight = weight.detach()
    if importance is not None:
        importance = importance.float() / importance.float().mean().clamp_min(1e-30) + 1e-4  # an input that slept may wake
    if weight.dtype == torch.int8:
        factor = torch.ones(len(weight)) if scale is None else scale.flatten().float()
        tiles: Tensor = torch.ops.bimos.int4_pack(weight, None, importance)
        return tiles, factor
    factor = weight.abs().amax(-1).float() / 127
    tiles = torch.ops.bimos.int4_pack(weight, factor, importance)
    return tiles, factor
