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
from bimos.methods.symmetric import add_product, inverse_factor_, permuted, solve_

DAMPING = 0.3  # of the mean of H's diagonal, added to it
PANEL = 96  # columns whose updates are applied to the rest at once
ROWS = 512  # of a weight, in products with moments
KEPT = 4096  # inputs up to which a factor is kept from sweep to sweep; of more it is made again, for there is no room for it in between


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
    row, column = weighted_rank_one(weight.abs(), gram.diagonal(), iterations)
    best = Fit(row, column, weight)
    least = _error(weight, best, gram)
    if rounds == 0:
        return best
    mean = gram.diagonal().mean().item()
    damping = DAMPING * (mean if mean > 1e-30 else 1.0)  # of inputs that are all zero, whatever gives a factor
    kept: tuple[Tensor, Tensor] | None = None
    for _ in range(rounds):
        order, factor = kept or prepared(gram, damping)
        decision = sweep(weight, factor, _by_signs(row, column[order]), order=order)
        kept = (order, factor) if len(gram) <= KEPT else None
        del factor
        row, column, decision = _refit(weight, gram, damping, decision, row, column)
        fit = Fit(row, column, decision)
        error = _error(weight, fit, gram)
        if error < least:
            best, least = fit, error
    return best


def prepared(gram: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """What a sweep needs of `H`: the order of the columns, and `inverse_factor` of `H` in that order with `damping` on its diagonal."""
    order = gram.diagonal().argsort(descending=True)  # inputs that matter most first, while there are others to mend them
    matrix = permuted(gram, order, gram.dtype)
    matrix.diagonal().add_(damping)
    return order, inverse_factor_(matrix)


def damped(gram: Tensor) -> Tensor:
    """`H`, whose diagonal has mean 1, with damping."""
    result = gram.clone()
    result.diagonal().add_(DAMPING)
    return result


def inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of `H^-1`, by which errors are carried over; `H [n, n]` is positive definite."""
    return inverse_factor_(permuted(gram, None, gram.dtype))


def statistics_factor(statistics: InputStatistics, damping: float, order: Tensor | None = None) -> Tensor:
    """`inverse_factor` of a linear's inputs, float32 `[in, in]`, with `damping` of the mean of H's diagonal added to it.

    Args:
        statistics: without a `gram` inputs count as uncorrelated, and no error is carried over.
        order: of the columns.
    """
    gram = statistics.second_moment.diag() if statistics.gram is None else statistics.gram
    gram = permuted(gram, order, torch.float64)  # little damping and a few large inputs leave float32 no digits to invert with
    gram /= gram.diagonal().mean().clamp_min(1e-30)
    gram.diagonal().add_(damping)
    return inverse_factor_(gram).float()


def signs_of(decision: Tensor) -> Tensor:
    """+1 or -1, float32; 0 counts as +1, as in the packed form."""
    return torch.where(decision >= 0, 1.0, -1.0)


def _error(weight: Tensor, fit: Fit, gram: Tensor) -> float:
    error = 0.0
    for rows in _panels(weight):
        difference = weight[rows] - fit.row[rows, None] * signs_of(fit.decision[rows]) * fit.column
        error += ((difference @ gram) * difference).sum().item()
    return error


def _panels(weight: Tensor) -> Iterator[slice]:
    """Some rows of a matrix at a time: what is made of them is then small beside it."""
    for start in range(0, len(weight), ROWS):
        yield slice(start, start + ROWS)


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
    order: Tensor | None = None,
) -> Tensor:
    """What each weight is rounded from `[out, in]`, errors carried over included; columns where they were.

    Args:
        weight: float32 `[out, in]`.
        factor: the upper Cholesky factor of `H^-1` (`inverse_factor`), of columns in the order of the sweep.
        rounded: what column j, in that order, becomes, `[out]`, of its values by then, `[out]`.
        panel: columns whose updates are applied to the rest at once.
        begin: called before each panel, with the number of its first column and `[out, panel]`, its values by then.
        order: of columns, `[in]`; None: as they are.
    """
    weight = weight.clone() if order is None else weight.index_select(1, order)
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
    if order is not None:
        back = order.argsort()
        for rows in _panels(weight):
            weight[rows] = weight[rows].index_select(1, back)
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


def _refit(weight: Tensor, gram: Tensor, damping: float, decision: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales by alternating least squares for fixed signs; none comes out negative (its signs are turned round instead).

    Args:
        damping: of `H`, added to its diagonal.
        decision: is written to.
    """
    product = torch.addmm(weight, weight, gram, beta=damping)
    normal = torch.empty_like(gram)
    for _ in range(2):
        rows = []
        for part in _panels(weight):
            scaled = signs_of(decision[part]) * column
            size = (torch.addmm(scaled, scaled, gram, beta=damping) * scaled).sum(1)
            rows.append((product[part] * scaled).sum(1) / size.clamp_min(1e-30))
        row = torch.cat(rows)
        normal.zero_()
        right = torch.zeros_like(column)
        for part in _panels(weight):
            scaled = signs_of(decision[part]) * row[part, None]
            add_product(normal, scaled, scaled)
            right += (scaled * product[part]).sum(0)
        normal.mul_(gram).diagonal().add_(damping * row.square().sum())
        # Held a little to the scales before: a column that no input excites would otherwise be arbitrary.
        ridge = 0.01 * (normal.diagonal() + normal.diagonal().mean()).clamp_min(1e-30)
        normal.diagonal().add_(ridge)
        column = solve_(normal, (right + ridge * column)[:, None])[:, 0]
    return row.abs(), column.abs(), turned(decision, row, column)


def turned(decision: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """`decision [out, in]` with its sign turned round, in place, where one of `row [out]` and `column [in]` is negative; 0 is positive."""
    negative = row < 0, column < 0
    if any(part.any() for part in negative):
        for rows in _panels(decision):
            part = decision[rows]
            part[part == 0] = 1e-20
            part[negative[0][rows]] *= -1
            part *= torch.where(negative[1], -1.0, 1.0)
    return decision
