"""Products of float32 matrices in whole numbers of 13 bits, against float64, at every level that this processor has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bimos.kernels import native

pytestmark = pytest.mark.skipif(native.isa() is None, reason=f"no C++ kernels: {native.problem}")

SHAPES = [(1, 1, 1), (1, 5, 3), (2, 64, 48), (5, 63, 49), (7, 65, 47), (13, 130, 200), (31, 576, 192), (200, 100, 70), (400, 257, 33)]
outer: Callable[[Tensor, Tensor], Tensor] = torch.ops.bimos.int16_outer


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.bimos.int16_linear(x, torch.ops.bimos.int16_pack(weight), len(weight), bias)
    return y


def rounded(x: Tensor) -> Tensor:
    """float64 of `x [..., n]` as it is rounded by groups."""
    n = x.shape[-1]
    count = -(-n // 128)
    size = -(-n // (4 * count)) * 4
    groups = F.pad(x, (0, count * size - n)).unflatten(-1, (count, size))
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.full_like(largest, 4095) / largest, 0)
    whole = (groups * inverse).round().double()
    return (whole * (largest / 4095).double()).flatten(-2)[..., :n]


def assert_products(y: Tensor, left: Tensor, right: Tensor, bias: Tensor | float, furthest: float) -> None:
    """`y` is `left right^T` of rounded sides to what float32 loses of sums, and of the exact ones nearly."""
    a, b = rounded(left), rounded(right)
    assert ((y.double() - a @ b.T - bias).abs() <= 1e-6 * (a.abs() @ b.abs().T + abs(bias)) + 1e-30).all()
    exact = left.double() @ right.double().T + bias
    assert (y.double() - exact).norm() <= furthest * exact.norm()


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("outlier", [1, 50])
@pytest.mark.parametrize(("tokens", "n", "out"), SHAPES)
def test_products(level: str, tokens: int, n: int, out: int, outlier: int, with_bias: bool) -> None:
    torch.manual_seed(n)
    x, weight = torch.randn(tokens, n), torch.randn(n, out).T  # not contiguous
    x[:, n // 2] *= outlier  # of one group, not of the others
    bias = torch.randn(out) if with_bias else None
    y = linear(x, weight, bias)
    assert y.shape == (tokens, out) and y.dtype == torch.float32
    assert_products(y, x, weight, 0.0 if bias is None else bias.double(), 1e-3 if outlier == 1 else 3e-3)


@pytest.mark.parametrize("outlier", [1, 50])
@pytest.mark.parametrize(("n", "tokens", "out"), SHAPES)
def test_products_over_tokens(level: str, tokens: int, out: int, n: int, outlier: int) -> None:
    torch.manual_seed(n)
    left, right = torch.randn(tokens, out), torch.randn(tokens, n)
    left[tokens // 2] *= outlier
    y = outer(left, right)
    assert y.shape == (out, n) and y.dtype == torch.float32
    assert_products(y, left.T, right.T, 0.0, 1e-3 if outlier == 1 else 3e-3)
    wide = torch.stack([left, left], 2)[..., 0]  # not contiguous
    assert torch.equal(outer(wide, right), y)


@pytest.mark.parametrize("n", [128, 1536])
def test_sums_of_the_largest_numbers_hold(level: str, n: int) -> None:
    x = torch.full((5, n), -3.0)
    torch.testing.assert_close(linear(x, torch.full((16, n), 2.0)), torch.full((5, 16), -6.0 * n), rtol=1e-6, atol=0)


def test_tokens_of_any_shape_and_order(level: str) -> None:
    x, weight = torch.randn(6, 3, 100), torch.randn(70, 100)
    y = linear(x, weight)
    assert torch.equal(linear(x.transpose(0, 1), weight), y.transpose(0, 1))
    assert torch.equal(linear(x[2, 1], weight), y[2, 1])
    assert linear(x[:0], weight).shape == (0, 3, 70)
    threads = torch.get_num_threads()
    over_tokens = outer(x.flatten(0, 1).repeat(20, 1), x.flatten(0, 1).repeat(20, 1))
    torch.set_num_threads(3)
    try:
        assert torch.equal(linear(x.repeat(100, 1, 1), weight), y.repeat(100, 1, 1))
        assert torch.equal(outer(x.flatten(0, 1).repeat(20, 1), x.flatten(0, 1).repeat(20, 1)), over_tokens)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_stay_by_themselves(level: str, strange: float) -> None:
    left, right = torch.randn(9, 130), torch.randn(70, 130)
    left[4, 129] = right[3, 7] = strange
    left[8] = 1e-39
    expected = torch.zeros(9, 70, dtype=torch.bool)
    expected[4] = expected[:, 3] = True
    for y in (linear(left, right), outer(left.T, right.T)):
        assert torch.equal(y.isnan(), expected) and y[~expected].isfinite().all()
        assert not y[8, ~expected[8]].any() and y[0, 0]


def test_steps_whose_product_no_float_holds(level: str) -> None:
    left, right = torch.full((2, 1), 3e37), torch.tensor([[3e37, 1e-20], [-3e37, 1e-20]])
    y = outer(left, right)
    assert y[0, 0] == 0 and y[0, 1].item() == pytest.approx(6e17, rel=1e-3)


def test_products_over_nothing_are_zeros(level: str) -> None:
    y = outer(torch.zeros(0, 5), torch.zeros(0, 70))
    assert y.shape == (5, 70) and not y.any()
    assert outer(torch.randn(3, 0), torch.randn(3, 70)).shape == (0, 70)


def test_opcheck() -> None:
    x, weight, bias = torch.randn(2, 3, 300), torch.randn(70, 300), torch.randn(70)
    torch.library.opcheck(torch.ops.bimos.int16_pack.default, (weight,))
    torch.library.opcheck(torch.ops.bimos.int16_linear.default, (x, torch.ops.bimos.int16_pack(weight), 70, None))
    torch.library.opcheck(torch.ops.bimos.int16_linear.default, (x, torch.ops.bimos.int16_pack(weight), 70, bias))
    torch.library.opcheck(torch.ops.bimos.int16_outer.default, (x[0], torch.randn(3, 20)))


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(2, 100)
    panels = torch.ops.bimos.int16_pack(torch.randn(70, 100))
    for words, arguments in {
        "x must be float32": (x.bfloat16(), panels, 70, None),
        r"not those of a weight \[70, 200\]": (torch.cat([x, x], 1), panels, 70, None),
        r"not those of a weight \[140, 100\]": (x, panels, 140, None),
        "bias must be float32": (x, panels, 70, torch.zeros(69)),
    }.items():
        with pytest.raises(RuntimeError, match=words):
            torch.ops.bimos.int16_linear(*arguments)
    for other in (torch.randn(3, 5), torch.randn(2, 5).bfloat16(), torch.randn(2)):
        with pytest.raises(RuntimeError, match=r"takes float32 \[tokens, out\]"):
            outer(x, other)
    with pytest.raises(RuntimeError, match=r"must be float32 \[out, in\]"):
        torch.ops.bimos.int16_pack(torch.randn(70))
