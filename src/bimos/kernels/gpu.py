"""What runs the ops on a GPU: the Triton kernels (`bimos.kernels.triton`, `triton_head`) where they can, plain torch elsewhere.

Triton is no dependency, and slow to import: it is looked for here, and imported when the first tensors on a GPU come.
"""

from __future__ import annotations

import functools
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bimos.kernels import ops

FEW = 16  # tokens: up to so many a product is a decoding step's, read by bits; beyond, a prompt's, multiplied by matrix units
CAPABILITY = (8, 0)  # the least of an NVIDIA GPU: bfloat16, and float32 in three parts of tf32


def _packed_linear(x: Tensor, weight: Tensor, *arguments: Any, **named: Any) -> Tensor:
    if not x.is_cuda or problem(x.device):
        return torch.ops.bimos.packed_linear_reference(*_for_reference(x, weight, *arguments, **named))
    from bimos.kernels import triton

    return triton.packed_linear(x, weight, *arguments, **named)


def _packed_linears(x: Tensor, weight: list[Tensor], *arguments: Any, **named: Any) -> list[Tensor]:
    if problem(x.device):
        return ops.one_by_one(x, weight, *arguments, **named)
    from bimos.kernels import triton

    return triton.packed_linears(x, weight, *arguments, **named)


def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if not x.is_cuda or problem(x.device):
        return torch.ops.bimos.int8_linear_reference(x, weight, scale, bias)
    from bimos.kernels import triton_head

    return triton_head.int8_linear(x, weight, scale, bias)


def _for_reference(
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
) -> tuple[Any, ...]:
    return x, weight, scale_in, scale_out, router, scale_group, bias, group_size


@functools.cache
def problem(device: torch.device) -> str:
    """Why the kernels do not run on this GPU; empty where they do. Warns when it is found out: plain torch unpacks every plane anew."""
    why = _missing() or _failure(device)
    if why:
        warnings.warn(f"packed linears run in plain torch on {device}: {why}", stacklevel=2)
    return why


def _missing() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for CPUs"
    return "" if find_spec("triton") else "Triton is not installed: pip install 'bimos[gpu]'"


def _failure(device: torch.device) -> str:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"the kernels need compute capability {'.'.join(map(str, CAPABILITY))}"
    try:
        from bimos.kernels import triton

        triton.try_out(device)
    except torch.OutOfMemoryError:  # of this moment, and not to be remembered
        raise
    except Exception as error:  # a driver, a compiler that Triton asks for, another Triton: each has errors of its own
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return ""


if not _missing():
    torch.library.impl("bimos::packed_linear", "CUDA")(_packed_linear)
    torch.library.impl("bimos::packed_linears", "CUDA")(_packed_linears)
    torch.library.impl("bimos::int8_linear", "CUDA")(_int8_linear)
