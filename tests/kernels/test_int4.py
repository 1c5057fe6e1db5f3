"""Rows of four bits against float64, at every level that this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bimos.kernels import native
from levels import LEVELS

pytestmark = pytest.mark.skipif(native.isa() is None, reason=f"no C++ kernels: {native.problem}")

HIGHEST = native.isa()


# Not the fixture `level`: hypothesis takes none that is made anew for every test.
@pytest.fixture(autouse=True)
def highest_level_afterwards() -> Iterator[None]:
    yield
    if HIGHEST:
        native.use_isa(HIGHEST)


def unpacked(tiles: Tensor, rows: int, n: int) -> Tensor:
    """Rows `[rows, n]`, float64, of the tiles that csrc/int4.h describes."""
    groups = -(-n // 32)
    codes = tiles[:, : groups * 256].reshape(len(tiles), groups, 4, 16, 4)  # tile, group, part, row, byte
    codes = torch.stack((codes & 15, codes >> 4), -2)  # ..., row, nibble, byte
    codes = codes.permute(0, 3, 1, 2, 4, 5).reshape(len(tiles) * 16, groups, 32)
    stored = tiles[:, groups * 256 : groups * 288].contiguous().view(torch.int16).reshape(len(tiles), groups, 16)
    stored = stored.transpose(1, 2).reshape(len(tiles) * 16, groups, 1)
    scale, zero = (stored & ~15).view(torch.float16).double(), (stored & 15).double()
    return (scale * (codes.double() - zero)).flatten(1)[:rows, :n]


def of_two_signs(w: Tensor) -> Tensor:
    """Squared error of the rows with scales from the largest value of every 32, codes from -7 to 7: what the search must beat."""
    groups = torch.nn.functional.pad(w.double(), (0, -w.shape[1] % 32)).unflatten(1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 7
    return ((groups / scale).round() * scale - groups).square().sum()


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 70), width=st.integers(1, 300), tokens=st.integers(1, 9), outlier=st.sampled_from([1, 1000]))
def test_products(level: str, rows: int, width: int, tokens: int, outlier: int) -> None:
    native.use_isa(level)
    torch.manual_seed(rows)
    tiles, _ = native.quantize_int4(torch.randint(-127, 128, (rows, width), dtype=torch.int8))
    weight = unpacked(tiles, rows, width)
    x = torch.randn(tokens, width) + 1  # a mean that zero points must not leave behind
    x[:, 0] *= outlier
    y = torch.ops.bimos.int4_multiply(x, tiles, rows)
    assert y.shape == (tokens, rows)
    squares = (weight**2).T
    size = (x.double() ** 2 @ squares).sum().sqrt()
    # Rounding to 1/32512 of the largest of 32, whose mean square is a twelfth of a step's: more than 1e-4 only beside outliers.
    groups = torch.nn.functional.pad(x.double().abs(), (0, -width % 32)).unflatten(1, (-1, 32))
    step = (groups.amax(-1, keepdim=True) / 32512).expand_as(groups).flatten(1)[:, :width]
    several = 1 + 5 / (rows * tokens) ** 0.5  # deviations, that no single sum exceeds
    assert (y - x.double() @ weight.T).norm() < max(1e-4 * size, several * (step**2 / 12 @ squares).sum().sqrt())
    x[-1, width // 2] = float("inf")
    again = torch.ops.bimos.int4_multiply(x, tiles, rows)
    assert again[-1].isnan().all() and torch.equal(again[:-1], y[:-1])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [-3.0, 3.0])
def test_products_at_the_ends_of_their_range(level: str, value: float) -> None:
    native.use_isa(level)
    tiles = torch.full((2, 3 * 288 + 32), 0xFF, dtype=torch.uint8)  # codes of 15
    tiles[:, 3 * 256 :] = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8).repeat(3 * 16 + 16)  # less a zero point of 0
    y = torch.ops.bimos.int4_multiply(torch.full((5, 96), value), tiles, 20)
    assert (y / (15 * value * 96) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(64, 576), (5, 40), (33, 7)], ids=str)
def test_quantizing(level: str, shape: tuple[int, int]) -> None:
    native.use_isa(level)
    torch.manual_seed(0)
    normal = torch.randn(shape)
    normal[0] = 0
    normal[-1] += 3  # of one sign: a zero point at an end
    integers = (normal * 30).round().clamp(-127, 127).to(torch.int8)
    tiles, factor = native.quantize_int4(integers, torch.full((shape[0], 1), 0.5).half())
    assert torch.equal(factor, torch.full((shape[0],), 0.5))
    assert (unpacked(tiles, *shape) - integers.double()).square().sum() < 0.75 * of_two_signs(integers)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rows = (normal * 1e-3).to(dtype)  # scales that float16 could not hold by themselves
        tiles, factor = native.quantize_int4(rows)
        back = unpacked(tiles, *shape) * factor.double().unsqueeze(1)
        assert (back - rows.double()).square().sum() < 0.75 * of_two_signs(rows)
        assert not back[0].any()


def test_inputs_that_count_more_have_less_error() -> None:
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (200, 64), dtype=torch.int8)
    importance = torch.ones(64)
    importance[[5, 40]] = 100
    off = [
        (unpacked(native.quantize_int4(weight, None, counts)[0], 200, 64) - weight.double()).square().mean(0)
        for counts in (None, importance)
    ]
    assert (off[1] * importance).sum() < 0.6 * (off[0] * importance).sum()
    assert off[1].sum() < 1.5 * off[0].sum()


def test_levels_pack_alike() -> None:
    weight = torch.randint(-127, 128, (40, 100), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = [unpacked(native.quantize_int4(weight)[0], 40, 100) for level in LEVELS if native.use_isa(level) is None]
    for other in packed[1:]:  # but for ties that another order of additions breaks
        assert ((other - weight).square().sum() / (packed[0] - weight).square().sum() - 1).abs() < 1e-3


def test_wrong_shapes_are_refused() -> None:
    tiles, _ = native.quantize_int4(torch.ones(20, 40, dtype=torch.int8))
    for x, rows in ((torch.ones(1, 40), 33), (torch.ones(1, 65), 20), (torch.ones(40), 20), (torch.ones(1, 40).double(), 20)):
        with pytest.raises(RuntimeError, match=r"tiles are not those|x must be"):
            torch.ops.bimos.int4_multiply(x, tiles, rows)
    with pytest.raises(RuntimeError, match="weight must be"):
        torch.ops.bimos.int4_pack(torch.ones(20, dtype=torch.int8), None, None)
