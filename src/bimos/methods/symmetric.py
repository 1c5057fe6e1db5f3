"""Large symmetric matrices `[n, n]`: products by halves; factors, inverses and solutions in the memory of what they are made of.

Second moments of the widest linear are most of what a start has in memory, so nothing here makes a second matrix of that size. A product
fills the upper triangle alone, and what follows reads no more than that: the lower one may hold anything, but for `inverse_factor_`.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 192  # rows or columns at once
SWAPPED = 1 << 20  # values at once, where a matrix is turned round


def add_product(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add `left^T right`, which is symmetric, to the upper triangle of `matrix [n, n]`, in place; what is below it comes to nothing useful.

    Args:
        left, right: `[tokens, n]`, in the dtype of `matrix`.
    """
    width = len(matrix)
    for start in range(0, width, PANEL):
        end = min(width, start + PANEL)
        matrix[start:end, start:].addmm_(left[:, start:end].T, right[:, start:])
    return matrix


def mirror(matrix: Tensor) -> Tensor:
    """Write the upper triangle of `matrix [n, n]` to the lower one, in place."""
    width = len(matrix)
    for start in range(0, width, PANEL):
        end = min(width, start + PANEL)
        corner = matrix[start:end, start:end]
        corner.copy_(corner.triu() + corner.triu(1).T)
        matrix[end:, start:end] = matrix[start:end, end:].T
    return matrix


def permuted(matrix: Tensor, order: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A copy with rows and columns in `order [n]`, in `dtype`, contiguous."""
    if order is None:
        return matrix.to(dtype, copy=True).contiguous()
    result = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for rows in torch.arange(len(order), device=order.device).split(PANEL):
        result[rows[0] : rows[-1] + 1] = matrix[order[rows]].index_select(1, order)
    return result


def cholesky_(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor of a positive definite `matrix [n, n]`, contiguous, of which the upper triangle is read; in its memory.

    Raises:
        torch.linalg.LinAlgError: `matrix` is not positive definite.
    """
    by_columns = matrix.mT  # as LAPACK has it; its lower triangle is the upper one of `matrix`
    return torch.linalg.cholesky(by_columns, out=by_columns)


def solve_(matrix: Tensor, right: Tensor) -> Tensor:
    """`matrix^-1 right` of a positive definite `matrix [n, n]`, whose upper triangle is read, and `right [n, m]`; in the memory of both.

    Fastest, and without a copy, where the transpose of `right` is contiguous.
    """
    lower = cholesky_(matrix)
    for factor, upper in ((lower, False), (lower.mT, True)):
        torch.linalg.solve_triangular(factor, right, upper=upper, out=right)
    return right


def inverse_factor_(matrix: Tensor) -> Tensor:
    """The upper triangular U with `U^T U = H^-1` of a positive definite `H [n, n]`, contiguous, both triangles there; in its memory.

    With all rows and columns in reverse a lower factor is an upper one: H = R R^T, and U = R^-1. So H itself is never inverted.
    """
    lower = cholesky_(_turned(matrix))
    _invert(lower)
    _turned(matrix)
    return matrix.mT


def _turned(matrix: Tensor) -> Tensor:
    """Rows and columns in reverse order, in place: all values are, as they lie in memory."""
    values = matrix.view(-1)
    count = len(values)
    for start in range(0, count // 2, SWAPPED):
        end = min(count // 2, start + SWAPPED)
        first, last = values[start:end], values[count - end : count - start]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)
    return matrix


def _invert(lower: Tensor) -> None:
    """A lower triangular matrix becomes its inverse: rows of it at a time, from those above them."""
    for start in range(0, len(lower), PANEL):
        rows = lower[start : start + PANEL]
        corner = rows[:, start : start + PANEL]
        identity = torch.eye(len(corner), dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=False)
        if start:
            rows[:, :start] = (inverse @ rows[:, :start]).neg_() @ lower[:start, :start]
        corner.copy_(inverse)
