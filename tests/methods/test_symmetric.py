"""Matrices in place: what comes out, where the lower triangle does not matter, and that no second matrix is made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bimos.methods import symmetric
from bimos.methods.symmetric import PANEL, add_product, cholesky_, inverse_factor_, mirror, permuted, solve_

WIDTHS = [1, 7, PANEL, 2 * PANEL + 24]  # panels that are not full


def positive(width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(2 * width + 3, width, generator=torch.Generator().manual_seed(width), dtype=dtype)
    return x.T @ x / len(x) + 0.1 * torch.eye(width, dtype=dtype)


def upper(matrix: Tensor) -> Tensor:
    """The same, with something else below the diagonal."""
    return matrix.triu() + torch.full_like(matrix, torch.nan).tril(-1)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [5, 64])
def test_products_add_up(width: int, tokens: int) -> None:
    x, weight = torch.randn(tokens, width), torch.rand(tokens, 1)
    total = torch.zeros(width, width)
    for part in range(2):
        assert add_product(total, (part + 1) * weight * x, x) is total
    expected = 3 * (x * weight).T @ x
    torch.testing.assert_close(mirror(total), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(total, total.T)


@pytest.mark.parametrize("width", WIDTHS)
def test_factor_and_solution_from_the_upper_triangle(width: int) -> None:
    matrix, right = positive(width), torch.randn(3, width, dtype=torch.float64)
    given = upper(matrix)
    lower = cholesky_(given)
    assert lower.data_ptr() == given.data_ptr()
    torch.testing.assert_close(lower, torch.linalg.cholesky(matrix))
    for columns in (right.clone().mT, right.mT.contiguous()):  # as is best, and as is not
        expected = torch.linalg.solve(matrix, columns)
        torch.testing.assert_close(solve_(upper(matrix), columns), expected)
        torch.testing.assert_close(columns, expected)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("swapped", [3, symmetric.SWAPPED])
def test_inverse_factor(width: int, swapped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric, "SWAPPED", swapped if width < PANEL else symmetric.SWAPPED)
    matrix = positive(width)
    given = matrix.clone()
    factor = inverse_factor_(given)
    assert factor.data_ptr() == given.data_ptr() and torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor, torch.linalg.cholesky(matrix.inverse(), upper=True))


def test_not_positive_definite() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        cholesky_(-torch.eye(4))


@pytest.mark.parametrize("width", WIDTHS)
def test_permuted(width: int) -> None:
    matrix, order = positive(width), torch.randperm(width)
    assert torch.equal(permuted(matrix, order, torch.float64), matrix[order][:, order])
    same = permuted(matrix.T, None, torch.float32)
    assert torch.equal(same, matrix.T.float()) and same.is_contiguous()
    assert permuted(matrix, None, torch.float64).data_ptr() != matrix.data_ptr()
