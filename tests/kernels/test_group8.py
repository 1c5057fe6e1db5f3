"""Products of bfloat16 values rounded by groups with weights of 8 bits, against float64, at every level that this processor has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bimos.kernels import native

pytestmark = pytest.mark.skipif(native.isa() is None, reason=f"no C++ kernels: {native.problem}")

SHAPES = [(1, 1, 1), (1, 5, 3), (2, 64, 48), (5, 63, 49), (7, 65, 47), (13, 130, 200), (31, 576, 192), (200, 100, 70), (400, 72, 129)]


def unpacked(tiles: Tensor, out: int, n: int) -> tuple[Tensor, Tensor]:
    """Whole numbers `[out, in]` and the sums `[out, groups]`, int64, of the tiles that csrc/group8.h describes."""
    groups = tiles.unflatten(1, (-1, 3264))
    sums = groups[..., :192].contiguous().view(torch.int32).transpose(1, 2).flatten(0, 1)
    weight = groups[..., 192:].contiguous().view(torch.int8).unflatten(2, (16, 48, 4))  # tile, group, four inputs, row, input
    weight = weight.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)
    assert not weight[out:].any() and not weight[:, n:].any()
    return weight[:out, :n].long(), sums[:out].long()


def inverse(largest: Tensor) -> Tensor:
    """`127 / largest` rounded once: ties are broken as the kernels break them. Torch divides a number by way of the reciprocal."""
    return torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0).double()


def rounded(x: Tensor) -> Tensor:
    """float64 of `x [..., n]` as it is rounded by groups of 64."""
    groups = F.pad(x.float(), (0, -x.shape[-1] % 64)).unflatten(-1, (-1, 64))
    largest = groups.abs().amax(-1, keepdim=True)
    whole = (groups.double() * inverse(largest)).round()
    return (whole * (largest / 127).double()).flatten(-2)[..., : x.shape[-1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("out", "n"), [(1, 1), (48, 64), (49, 63), (200, 130)])
def test_weights_are_rounded_by_row(out: int, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    weight = (torch.randn(n, out) * torch.logspace(-3, 2, out)).to(dtype).T  # not contiguous
    tiles, scale = torch.ops.bimos.group8_pack(weight)
    whole, sums = unpacked(tiles, out, n)
    largest = weight.float().abs().amax(1)
    torch.testing.assert_close(scale, largest / 127)
    assert torch.equal(whole, (weight.double() * inverse(largest)[:, None]).round().long())
    assert torch.equal(sums, -128 * F.pad(whole, (0, -n % 64)).unflatten(1, (-1, 64)).sum(-1))


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("outlier", [1, 50])
@pytest.mark.parametrize(("tokens", "n", "out"), SHAPES)
def test_products(level: str, tokens: int, n: int, out: int, outlier: int, with_bias: bool) -> None:
    torch.manual_seed(n)
    x, weight = torch.randn(tokens, n).bfloat16(), torch.randn(out, n).bfloat16()
    x[:, n // 2] *= outlier  # of one group, not of the others
    bias = torch.randn(out) if with_bias else None
    tiles, scale = torch.ops.bimos.group8_pack(weight)
    y = torch.ops.bimos.group8_linear(x, tiles, scale, bias)
    assert y.shape == (tokens, out) and y.dtype == torch.bfloat16
    factor = unpacked(tiles, out, n)[0].double() * scale.double()[:, None]
    plain = 0 if bias is None else bias.double()
    expected = rounded(x) @ factor.T + plain
    # What bfloat16 keeps, half of its last bit, and what float32 loses of sums over groups.
    size = rounded(x).abs() @ factor.abs().T
    assert ((y.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * size).all()
    exact = x.double() @ weight.double().T + plain
    assert (y.double() - exact).norm() <= (1.5e-2 if outlier == 1 else 6e-2) * exact.norm()


def test_tokens_of_any_shape_and_order(level: str) -> None:
    x, weight = torch.randn(6, 3, 100).bfloat16(), torch.randn(70, 100).bfloat16()
    packed = torch.ops.bimos.group8_pack(weight)
    y = torch.ops.bimos.group8_linear(x, *packed, None)
    assert torch.equal(torch.ops.bimos.group8_linear(x.transpose(0, 1), *packed, None), y.transpose(0, 1))
    assert torch.equal(torch.ops.bimos.group8_linear(x[2, 1], *packed, None), y[2, 1])
    assert torch.ops.bimos.group8_linear(x[:0], *packed, None).shape == (0, 3, 70)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        many = x.repeat(100, 1, 1)
        assert torch.equal(torch.ops.bimos.group8_linear(many, *packed, None), y.repeat(100, 1, 1))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_stay_with_their_token(level: str, strange: float) -> None:
    x, weight = torch.randn(9, 130).bfloat16(), torch.randn(70, 130).bfloat16()
    x[4, 129] = strange
    weight[3, 7] = strange
    y = torch.ops.bimos.group8_linear(x, *torch.ops.bimos.group8_pack(weight), None)
    expected = torch.zeros(9, 70, dtype=torch.bool)
    expected[4] = expected[:, 3] = True
    assert torch.equal(y.isnan(), expected) and y[~expected].isfinite().all()


def test_next_to_nothing_is_nothing(level: str) -> None:
    x, weight = torch.zeros(3, 70).bfloat16(), torch.randn(5, 70).bfloat16()
    x[1] = 1e-39
    y = torch.ops.bimos.group8_linear(x, *torch.ops.bimos.group8_pack(weight), None)
    assert not y.any()
    weight[2] = 0
    y = torch.ops.bimos.group8_linear(torch.randn(3, 70).bfloat16(), *torch.ops.bimos.group8_pack(weight), None)
    assert not y[:, 2].any() and y[:, [0, 1, 3, 4]].all()


@pytest.mark.parametrize("outlier", [1, 50])
@pytest.mark.parametrize(("tokens", "out", "n"), [(1, 1, 1), (3, 16, 48), (64, 17, 49), (65, 15, 47), (130, 200, 70), (512, 96, 130)])
def test_products_over_tokens(level: str, tokens: int, out: int, n: int, outlier: int) -> None:
    torch.manual_seed(n)
    left, right = torch.randn(tokens, out).bfloat16(), torch.randn(tokens, n).bfloat16()
    left[tokens // 2] *= outlier  # of one group, not of the others
    y = torch.ops.bimos.group8_outer(left, right)
    assert y.shape == (out, n) and y.dtype == torch.bfloat16
    a, b = rounded(left.T), rounded(right.T)
    expected, size = a @ b.T, a.abs() @ b.abs().T
    assert ((y.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * size).all()
    exact = left.double().T @ right.double()
    assert (y.double() - exact).norm() <= (1.5e-2 if outlier == 1 else 6e-2) * exact.norm()
    wide = torch.stack([left, left], 2)[..., 0]  # not contiguous
    assert torch.equal(torch.ops.bimos.group8_outer(wide, right), y)


def test_products_over_no_tokens_are_zeros(level: str) -> None:
    y = torch.ops.bimos.group8_outer(torch.zeros(0, 5).bfloat16(), torch.zeros(0, 70).bfloat16())
    assert y.shape == (5, 70) and not y.any()


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_columns_that_are_not_finite_stay_by_themselves(level: str, strange: float) -> None:
    left, right = torch.randn(130, 20).bfloat16(), torch.randn(130, 70).bfloat16()
    left[129, 4] = right[3, 7] = strange
    left[:, 9] = 1e-39
    y = torch.ops.bimos.group8_outer(left, right)
    expected = torch.zeros(20, 70, dtype=torch.bool)
    expected[4] = expected[:, 7] = True
    assert torch.equal(y.isnan(), expected) and y[~expected].isfinite().all()
    assert not y[9, ~expected[9]].any()


def test_steps_whose_product_no_float_holds(level: str) -> None:
    left, right = torch.full((2, 1), 3e37).bfloat16(), torch.tensor([[3e37, 1e-20], [-3e37, 1e-20]]).bfloat16()
    y = torch.ops.bimos.group8_outer(left, right)
    assert y[0, 0] == 0 and y[0, 1].item() == pytest.approx(6e17, rel=2e-2)


def test_products_over_tokens_in_several_threads(level: str) -> None:
    left, right = torch.randn(300, 200).bfloat16(), torch.randn(300, 400).bfloat16()
    threads = torch.get_num_threads()
    y = torch.ops.bimos.group8_outer(left, right)
    torch.set_num_threads(3)
    try:
        assert torch.equal(torch.ops.bimos.group8_outer(left, right), y)
    finally:
        torch.set_num_threads(threads)


def test_opcheck() -> None:
    x, weight, bias = torch.randn(2, 3, 100).bfloat16(), torch.randn(70, 100).bfloat16(), torch.randn(70)
    torch.library.opcheck(torch.ops.bimos.group8_pack.default, (weight,))
    torch.library.opcheck(torch.ops.bimos.group8_linear.default, (x, *torch.ops.bimos.group8_pack(weight), None))
    torch.library.opcheck(torch.ops.bimos.group8_linear.default, (x, *torch.ops.bimos.group8_pack(weight), bias))
    torch.library.opcheck(torch.ops.bimos.group8_outer.default, (x[0], torch.randn(3, 20).bfloat16()))


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(2, 100).bfloat16()
    tiles, scale = torch.ops.bimos.group8_pack(torch.randn(70, 100))
    for words, arguments in {
        "x must be bfloat16": (x.float(), tiles, scale, None),
        r"not those of a weight \[70, 200\]": (torch.cat([x, x], 1), tiles, scale, None),
        r"not those of a weight \[140, 100\]": (x, tiles, scale.repeat(2), None),
        "scale must be float32": (x, tiles, scale.double(), None),
        "bias must be float32": (x, tiles, scale, torch.zeros(69)),
    }.items():
        with pytest.raises(RuntimeError, match=words):
            torch.ops.bimos.group8_linear(*arguments)
    for other in (torch.randn(3, 5).bfloat16(), torch.randn(2, 5), torch.randn(2).bfloat16()):
        with pytest.raises(RuntimeError, match=r"takes bfloat16 \[tokens, out\]"):
            torch.ops.bimos.group8_outer(x, other)
    with pytest.raises(RuntimeError, match=r"must be \[out, in\]"):
        torch.ops.bimos.group8_pack(torch.randn(70))
