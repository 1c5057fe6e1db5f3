"""Random packed tensors for the Triton kernels, and what they give in float64: on a GPU where there is one, else in the interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bimos.kernels import reference
from bimos.kernels import triton as kernels

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
# Root of the mean square error relative to that of the result. The interpreter cuts bfloat16 off where a GPU rounds it.
ERRORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.5e-2}
if DEVICE == "cuda":
    ERRORS |= {torch.float32: 1e-4, torch.bfloat16: 6e-3}


def make(
    planes: int,
    experts: int,
    n_in: int,
    n_out: int,
    group: int | None,
    scales: tuple[str, ...] = ("scale_in", "scale_out"),
    bias: bool = True,
) -> dict[str, Any]:
    def half(*shape: int) -> Tensor:
        return (torch.rand(shape) + 0.1).half().to(DEVICE)

    return {
        "weight": torch.randint(0, 256, (planes, n_out, n_in // 8), dtype=torch.uint8).to(DEVICE),
        "scale_in": half(planes, experts, n_in) if "scale_in" in scales else None,
        "scale_out": half(planes, experts, n_out) if "scale_out" in scales else None,
        "router": (torch.randn(experts, n_in) * n_in**-0.5).half().to(DEVICE) if experts > 1 else None,
        "scale_group": half(planes, n_out, -(-n_in // group)) if group else None,
        "bias": half(n_out) if bias else None,
    }


def exact(x: Tensor, tensors: dict[str, Any], group_size: int = 0) -> Tensor:
    t = {name: None if t is None else t.cpu() if t.dtype == torch.uint8 else t.cpu().double() for name, t in tensors.items()}
    x = x.cpu().double()
    gate = torch.ones(*x.shape[:-1], 1).double() if t["router"] is None else torch.softmax(x @ t["router"].T, -1)
    y = torch.zeros(*x.shape[:-1], t["weight"].shape[1]).double() + (0 if t["bias"] is None else t["bias"])
    for plane, bits in enumerate(t["weight"]):
        signs = reference.unpack_signs(bits, torch.float64)
        if t["scale_group"] is not None:
            signs = signs * t["scale_group"][plane][:, torch.arange(signs.shape[1]) // group_size]
        s_in, s_out = (1.0 if s is None else gate @ s[plane] for s in (t["scale_in"], t["scale_out"]))
        y = y + (x * s_in) @ signs.T * s_out
    return y


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.cpu().double() - expected.cpu().double()).norm() / expected.cpu().double().norm().clamp_min(1e-30)).item()


def assert_right(y: Tensor, x: Tensor, tensors: dict[str, Any], group_size: int = 0) -> None:
    expected = exact(x, tensors, group_size)
    # A few outputs may cancel to almost nothing: their size is then what random signs would give.
    same_sign = tensors | {"weight": torch.full_like(tensors["weight"], 255)}
    size = exact(x.abs(), same_sign, group_size).norm() / x.shape[-1] ** 0.5
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert (y.cpu().double() - expected).norm() <= ERRORS[x.dtype] * max(expected.norm(), size)
