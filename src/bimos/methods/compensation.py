"""Signs and scales that fit a linear on inputs that are correlated, where one weight can make good what another lost.

    minimise  sum_i (w_i - q_i) H (w_i - q_i)^T      q_ij = r_i s_ij c_j,  H = E[x x^T]

Signs by GPTQ's column sweep (2210.17323, section 3.3): a column is binarized and its error is carried over to the columns
still to come. Between sweeps the scales are refit to the signs by least squares, as in ARB-LLM (2410.03129).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from bimos.methods.base import InputStatistics
from bimos.methods.rank_one import weighted_rank_one

DAMPING = 0.3  # of the mean of H's diagonal, added to it
PANEL = 96  # columns whose updates are applied to the rest at once


class Fit(NamedTuple):
    """`row [out] * sign(decision [out, in]) * column [in]`; `decision` is what each sign was taken of, errors carried over included."""

    row: Tensor
    column: Tensor
    decision: Tensor


def compensated_fit(weight: Tensor, gram: Tensor, rounds: int, iterations: int) -> Fit:
    """The best fit found in `rounds` sweeps, or the plain one (signs of the weights) if no sweep beats it.

    Args:
        weight: float32 `[out, in]`.
        gram: `H`, float32 `[in, in]`, symmetric and positive semi-definite.
        rounds: sweeps over all columns.
        iterations: of the alternating least squares behind the first scales.
    """
    gram = gram / gram.diagonal().mean().clamp_min(1e-30)
    row, column = weighted_rank_one(weight.abs(), gram.diagonal(), iterations)
    best = Fit(row, column, weight)
    least = _error(weight, best, gram)
    damped, order, factor = prepared(gram)
    back = order.argsort()
    for _ in range(rounds):
        decision = sweep(weight[:, order], factor, _by_signs(row, column[order]))[:, back]
        row, column, decision = _refit(weight, damped, decision, row, column)
        fit = Fit(row, column, decision)
        error = _error(weight, fit, gram)
        if error < least:
            best, least = fit, error
    return best


def prepared(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a sweep needs of `H`, whose diagonal has mean 1.

    Returns:
        `H` with damping; the order of the columns; the upper Cholesky factor of the inverse of `H` in that order.
    """
    damped = gram + DAMPING * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    order = damped.diagonal().argsort(descending=True)  # inputs that matter most first, while there are others to mend them
    return damped, order, inverse_factor(damped[order][:, order])


def inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of `H^-1`, by which errors are carried over; `H [n, n]` is positive definite."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)


def statistics_factor(statistics: InputStatistics, damping: float, order: Tensor | None = None) -> Tensor:
    """`inverse_factor` of a linear's inputs, float32 `[in, in]`, with `damping` of the mean of H's diagonal added to it.

    Args:
        statistics: without a `gram` inputs count as uncorrelated, and no error is carried over.
        order: of the columns.
    """
    gram = statistics.second_moment.diag() if statistics.gram is None else statistics.gram
    gram = gram if order is None else gram[order][:, order]
    gram = gram.to(torch.float64, copy=True)  # little damping and a few large inputs leave float32 no digits to invert with
    gram /= gram.diagonal().mean().clamp_min(1e-30)
    gram.diagonal().add_(damping)
    return inverse_factor(gram).float()


def signs_of(decision: Tensor) -> Tensor:
    """+1 or -1, float32; 0 counts as +1, as in the packed form."""
    return torch.where(decision >= 0, 1.0, -1.0)


def _error(weight: Tensor, fit: Fit, gram: Tensor) -> float:
    difference = weight - fit.row[:, None] * signs_of(fit.decision) * fit.column
    return ((difference @ gram) * difference).sum().item()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Operators on one column are too short to be shared by cores: on a busy machine they wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _by_signs(row: Tensor, column: Tensor) -> Callable[[int, Tensor], Tensor]:
    def rounded(j: int, value: Tensor) -> Tensor:
        scale = row * column[j]
        return torch.where(value >= 0, scale, -scale)

    return rounded


def sweep(
    weight: Tensor,
    factor: Tensor,
    rounded: Callable[[int, Tensor], Tensor],
    panel: int = PANEL,
    begin: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """What each weight is rounded from, errors carried over included; columns in the order of the sweep.

    Args:
        weight: float32 `[out, in]`.
        factor: the upper Cholesky factor of `H^-1` (`inverse_factor`).
        rounded: what column j becomes, `[out]`, of its values by then, `[out]`.
        panel: columns whose updates are applied to the rest at once.
        begin: called before each panel, with the number of its first column and `[out, panel]`, its values by then.
    """
    weight = weight.clone()
    width = weight.shape[1]
    for start in range(0, width, panel):
        end = min(width, start + panel)
        if begin is not None:
            begin(start, weight[:, start:end])
        # A column at a time is a row at a time of the transposed panel, whose values lie side by side.
        values, local = weight[:, start:end].T.contiguous(), factor[start:end, start:end]
        diagonal = local.diagonal().tolist()
        errors = torch.empty_like(values)
        with _one_thread():
            for j in range(end - start):
                value = values[j]
                error = torch.sub(value, rounded(start + j, value), out=errors[j]).div_(diagonal[j])
                values[j + 1 :].addr_(local[j, j + 1 :], error, alpha=-1)
        weight[:, start:end] = values.T
        weight[:, end:].addmm_(errors.T, factor[start:end, end:], alpha=-1)
    return weight


def carry_over(weight: Tensor, factor: Tensor, start: int, error: Tensor) -> None:
    """A sweep's step for columns that are rounded at once: those behind them make good, in place, what they lost together.

    Args:
        weight: float32 `[out, in]`.
        factor: of `inverse_factor`.
        start: the first of the columns.
        error: their values by then less what they become, `[out, n]`.
    """
    end = start + error.shape[1]
    errors = torch.linalg.solve_triangular(factor[start:end, start:end], error, upper=True, left=False)
    weight[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)


def _refit(weight: Tensor, gram: Tensor, decision: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales by alternating least squares for fixed signs; none comes out negative (its signs are turned round instead)."""
    signs = signs_of(decision)
    product = weight @ gram
    for _ in range(2):
        scaled = signs * column
        row = (product * scaled).sum(1) / ((scaled @ gram) * scaled).sum(1).clamp_min(1e-30)
        scaled = signs * row[:, None]
        normal = gram * (scaled.T @ scaled)
        # Held a little to the scales before: a column that no input excites would otherwise be arbitrary.
        ridge = 0.01 * (normal.diagonal() + normal.diagonal().mean()).clamp_min(1e-30)
        right = (scaled * product).sum(0) + ridge * column
        column = torch.cholesky_solve(right[:, None], torch.linalg.cholesky(normal + ridge.diag()))[:, 0]
    return row.abs(), column.abs(), turned(decision, row, column)


def turned(decision: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """`decision [out, in]` with its sign turned round wherever one of `row [out]` and `column [in]` is negative; 0 counts as positive."""
    negative = (row < 0)[:, None] != (column < 0)
    return torch.where(negative, -decision.masked_fill(decision == 0, 1e-20), decision)
