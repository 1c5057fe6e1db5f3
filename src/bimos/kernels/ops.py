"""The ops: schema and fake side by side, the reference as the implementation that every device falls back to.

A faster kernel overrides one dispatch key (`torch.library.impl("bimos::packed_linear", "CPU")`, or
`STABLE_TORCH_LIBRARY_IMPL` in C++) and touches nothing else.

The ops have no backward. A caller that needs gradients (adapters trained on top of a packed model) gets the reference,
which is made of differentiable parts; asking costs two comparisons a call, an autograd formula a trip through Python.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from bimos.kernels import reference

torch.library.define(
    "bimos::packed_linear",
    "(Tensor x, Tensor weight, Tensor? scale_in, Tensor? scale_out, Tensor? router, Tensor? scale_group, Tensor? bias, "
    "Tensor? tiles=None, bool int8=False, int group_size=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Several of one input. Lists are as long as that of the weights, or empty: what one stores all do.
torch.library.define(
    "bimos::packed_linears",
    "(Tensor x, Tensor[] weight, Tensor[] scale_in, Tensor[] scale_out, Tensor[] router, Tensor[] scale_group, Tensor[] bias, "
    "int group_size=0) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# What a faster kernel calls for what it does not cover itself.
torch.library.define(
    "bimos::packed_linear_reference",
    "(Tensor x, Tensor weight, Tensor? scale_in, Tensor? scale_out, Tensor? router, Tensor? scale_group, Tensor? bias, "
    "int group_size=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("bimos::packed_linear")
def _(
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
    planes, out_features, in_bytes = weight.shape
    torch._check(weight.dtype == torch.uint8, lambda: f"weight must be uint8, got {weight.dtype}")
    torch._check(x.shape[-1] == 8 * in_bytes, lambda: f"x has {x.shape[-1]} features, the planes {8 * in_bytes}")
    experts = 1 if router is None else router.shape[0]
    for name, scale, features in (("scale_in", scale_in, 8 * in_bytes), ("scale_out", scale_out, out_features)):
        if scale is not None:
            torch._check(scale.shape == (planes, experts, features), lambda n=name, s=scale: f"{n} has shape {list(s.shape)}")
    if scale_group is not None:
        groups = -(-8 * in_bytes // group_size) if group_size else scale_group.shape[-1]
        fits = scale_group.shape == (planes, out_features, groups) and (group_size or 8 * in_bytes % groups == 0)
        torch._check(bool(fits), lambda: f"scale_group has shape {list(scale_group.shape)}")
    return x.new_empty(*x.shape[:-1], out_features)


def one_by_one(
    x: Tensor,
    weight: list[Tensor],
    scale_in: list[Tensor],
    scale_out: list[Tensor],
    router: list[Tensor],
    scale_group: list[Tensor],
    bias: list[Tensor],
    group_size: int = 0,
) -> list[Tensor]:
    """`bimos::packed_linears` without a kernel of its own."""
    columns: list[Any] = [tensors or itertools.repeat(None, len(weight)) for tensors in (scale_in, scale_out, router, scale_group, bias)]
    return [torch.ops.bimos.packed_linear(x, *each, None, False, group_size) for each in zip(weight, *columns, strict=True)]


torch.library.register_fake("bimos::packed_linears")(one_by_one)
torch.library.impl("bimos::packed_linears", "CompositeExplicitAutograd")(one_by_one)


torch.library.define(
    "bimos::int8_linear",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "bimos::int8_linear_reference",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("bimos::int8_linear")
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    torch._check(weight.dtype == torch.int8, lambda: f"weight must be int8, got {weight.dtype}")
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"x has {x.shape[-1]} features, the head {weight.shape[1]}")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# Products of bytes in training (csrc/group8.h): bfloat16 values rounded by groups of 64 inputs with a frozen teacher's weights of 8 bits;
# and two matrices [tokens, out], [tokens, in] over tokens, both rounded by columns of 64 tokens, for gradients of weights.
torch.library.define("bimos::group8_pack", "(Tensor weight) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.define(
    "bimos::group8_linear", "(Tensor x, Tensor tiles, Tensor scale, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
torch.library.define("bimos::group8_outer", "(Tensor left, Tensor right) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("bimos::group8_pack")
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    out_features, in_features = weight.shape
    tiles = weight.new_empty(-(-out_features // 48), -(-in_features // 64) * 3264, dtype=torch.uint8)
    return tiles, weight.new_empty(out_features, dtype=torch.float32)


@torch.library.register_fake("bimos::group8_linear")
def _(x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    torch._check(x.dtype == torch.bfloat16, lambda: f"x must be bfloat16, got {x.dtype}")
    return x.new_empty(*x.shape[:-1], scale.shape[0])


@torch.library.register_fake("bimos::group8_outer")
def _(left: Tensor, right: Tensor) -> Tensor:
    torch._check(left.dtype == right.dtype == torch.bfloat16, lambda: f"group8_outer takes bfloat16, got {left.dtype} and {right.dtype}")
    torch._check(left.shape[0] == right.shape[0], lambda: f"{left.shape[0]} and {right.shape[0]} tokens")
    return left.new_empty(left.shape[1], right.shape[1])


# Products in whole numbers of 16 bits in training (csrc/int16.h): float32 values with a frozen teacher's weights, both rounded by groups of
# up to 128 inputs; and two matrices [tokens, out], [tokens, in] over tokens.
torch.library.define("bimos::int16_pack", "(Tensor weight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.define(
    "bimos::int16_linear", "(Tensor x, Tensor panels, int out, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
torch.library.define("bimos::int16_outer", "(Tensor left, Tensor right) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("bimos::int16_pack")
def _(weight: Tensor) -> Tensor:
    out_features, in_features = weight.shape
    groups = -(-in_features // 128)
    return weight.new_empty(-(-out_features // 16), 16 * groups * (-(-in_features // (4 * groups)) * 2 + 1), dtype=torch.int32)


@torch.library.register_fake("bimos::int16_linear")
def _(x: Tensor, panels: Tensor, out: int, bias: Tensor | None) -> Tensor:
    torch._check(x.dtype == torch.float32, lambda: f"x must be float32, got {x.dtype}")
    return x.new_empty(*x.shape[:-1], out)


@torch.library.register_fake("bimos::int16_outer")
def _(left: Tensor, right: Tensor) -> Tensor:
    torch._check(left.dtype == right.dtype == torch.float32, lambda: f"int16_outer takes float32, got {left.dtype} and {right.dtype}")
    torch._check(left.shape[0] == right.shape[0], lambda: f"{left.shape[0]} and {right.shape[0]} tokens")
    return left.new_empty(left.shape[1], right.shape[1])


torch.library.impl("bimos::packed_linear", "CompositeExplicitAutograd")(
    lambda x, weight, scale_in, scale_out, router, scale_group, bias, tiles=None, int8=False, group_size=0: reference.packed_linear(
        x, weight, scale_in, scale_out, router, scale_group, bias, group_size
    )
)
torch.library.impl("bimos::packed_linear_reference", "CompositeExplicitAutograd")(reference.packed_linear)
torch.library.impl("bimos::int8_linear", "CompositeExplicitAutograd")(reference.int8_linear)
torch.library.impl("bimos::int8_linear_reference", "CompositeExplicitAutograd")(reference.int8_linear)


def packed_linear(
    x: Tensor,
    weight: Tensor,
    scale_in: Tensor | None = None,
    scale_out: Tensor | None = None,
    router: Tensor | None = None,
    scale_group: Tensor | None = None,
    bias: Tensor | None = None,
    tiles: Tensor | None = None,
    int8: bool = False,
    group_size: int = 0,
) -> Tensor:
    """The product of `x [..., in]` with packed planes; see `bimos.kernels.reference.packed_linear`.

    Args:
        tiles: what `bimos.kernels.native.tile` made of the same planes; without it a kernel that wants them makes them every time.
        int8: allow a kernel to be faster and less exact: sums of four scaled inputs, under all signs, are rounded to 8 bits, 127 being
            the largest `|x_1| + .. + |x_4|` of its 256 inputs (or of its group). The reference stays exact.
        group_size: inputs of a group, of which the last may have fewer; 0: their number divides the inputs.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return reference.packed_linear(x, weight, scale_in, scale_out, router, scale_group, bias, group_size)
    return torch.ops.bimos.packed_linear(x, weight, scale_in, scale_out, router, scale_group, bias, tiles, int8, group_size)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of `x [..., in]` with an int8 matrix scaled by row; see `bimos.kernels.reference.int8_linear`."""
    differentiable = torch.is_grad_enabled() and x.requires_grad
    op = reference.int8_linear if differentiable else torch.ops.bimos.int8_linear
    return op(x, weight, scale, bias)
