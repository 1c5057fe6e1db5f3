from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bimos.errors import BimosError
from bimos.packing.format import pack_signs, unpack_signs


def test_least_significant_bit_first() -> None:
    w = torch.tensor([[1.0, -1, -1, -1, -1, -1, -1, 0.5], [-1, -1, 3, -1, -1, -1, -1, -1]])
    assert pack_signs(w).tolist() == [[0b1000_0001], [0b0000_0100]]


def test_zero_is_plus_one_of_either_sign() -> None:
    assert pack_signs(torch.tensor([0.0, -0.0, 1, -1, 0.0, -0.0, 1e-30, -1e-30])).tolist() == [0b0111_0111]


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_round_trip(rows: int, groups: int, seed: int, dtype: torch.dtype) -> None:
    w = torch.randn(2, rows, 8 * groups, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bits = pack_signs(w)
    assert bits.dtype == torch.uint8 and bits.shape == (2, rows, groups)
    signs = unpack_signs(bits, dtype)
    assert signs.dtype == dtype
    assert torch.equal(signs, torch.where(w >= 0, 1.0, -1.0).to(dtype))
    assert torch.equal(pack_signs(signs), bits)


def test_every_byte_survives() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_signs(unpack_signs(bits)), bits)


@pytest.mark.parametrize("n", [1, 7, 12])
def test_rows_must_be_whole_bytes(n: int) -> None:
    with pytest.raises(BimosError, match=f"rows of {n} weights"):
        pack_signs(torch.randn(3, n))


def test_nan_is_refused() -> None:
    with pytest.raises(BimosError, match="NaN"):
        pack_signs(torch.tensor([1.0] * 7 + [float("nan")]))
