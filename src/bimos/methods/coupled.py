"""Two sign planes with scales that fit a linear together: the second is not the rest of a first that is settled.

    minimise  sum_i (w_i - q_i) H (w_i - q_i)^T      q_ij = sum_p r_pi s_pij c_pj,  H = E[x x^T]

The second plane starts from what the first leaves. Then both signs of a weight are chosen at once, as the nearest of its four levels, in
a sweep that carries errors over (`bimos.methods.compensation`), and the scales of both planes are refit together to the error that they
have in common.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bimos.methods.compensation import Fit, compensated_fit, damped, prepared, signs_of, sweep, turned
from bimos.methods.planes import between_levels
from bimos.methods.rank_one import weighted_rank_one


def coupled_fit(weight: Tensor, second_moment: Tensor, gram: Tensor | None, rounds: int, iterations: int) -> tuple[Fit, Fit]:
    """The best pair of planes found; see `compensated_fit`.

    Args:
        weight: float32 `[out, in]`.
        second_moment: `E[x_j^2]`, float32 `[in]`.
        gram: `H`, float32 `[in, in]`, or None: signs are then those of the weights and of what the first plane leaves.
        rounds: sweeps over all columns.
        iterations: of the alternating least squares behind the first scales.
    """
    rest, pair = weight, []
    for _ in range(2):
        pair.append(Fit(*weighted_rank_one(rest.abs(), second_moment, iterations), rest))
        rest = rest - matrix(pair[-1])
    if gram is None or rounds == 0:
        return pair[0], pair[1]
    gram = gram / gram.diagonal().mean().clamp_min(1e-30)
    first = compensated_fit(weight, gram, rounds, iterations)
    second = compensated_fit(weight - matrix(first), gram, rounds, iterations)
    best = min((pair, [first, second]), key=lambda fits: _error(weight, fits, gram))
    least = _error(weight, best, gram)
    held, (order, factor) = damped(gram), prepared(gram)
    pair = best
    for _ in range(rounds):
        pair = _refit(weight, held, _swept(weight, pair, factor, order))
        error = _error(weight, pair, gram)
        if error < least:
            best, least = pair, error
    return best[0], best[1]


def matrix(fit: Fit) -> Tensor:
    """The plane with its scales, float32 `[out, in]`."""
    return fit.row[:, None] * signs_of(fit.decision) * fit.column


def coupled_latents(first: Fit, second: Fit) -> Tensor:
    """The latents `[out, in]` of both planes."""
    one, two = (fit.row[:, None] * fit.column for fit in (first, second))
    value = torch.where(one >= two, first.decision, second.decision)  # the other's decision is what is left of it
    signs = signs_of(first.decision), signs_of(second.decision)
    return between_levels(value, torch.maximum(one, two), torch.minimum(one, two), signs)


def _error(weight: Tensor, fits: Sequence[Fit], gram: Tensor) -> float:
    difference = weight - sum(matrix(fit) for fit in fits)
    return ((difference @ gram) * difference).sum().item()


def _swept(weight: Tensor, fits: Sequence[Fit], factor: Tensor, order: Tensor) -> list[Fit]:
    """The pair with new decisions: of the plane that is larger at a weight its value, of the other what that leaves."""
    one, two = fits
    decisions = torch.empty(2, weight.shape[1], weight.shape[0], device=weight.device)

    def rounded(j: int, value: Tensor) -> Tensor:
        scales = torch.stack([one.row * one.column[order[j]], two.row * two.column[order[j]]])
        large, small = scales.amax(0), scales.amin(0)
        nearest = signs_of(value) * large
        rest = value - nearest
        is_first = scales[0] >= scales[1]
        decisions[0, order[j]] = torch.where(is_first, value, rest)
        decisions[1, order[j]] = torch.where(is_first, rest, value)
        return nearest + signs_of(rest) * small

    sweep(weight, factor, rounded, order=order)
    return [fit._replace(decision=decision.T) for fit, decision in zip(fits, decisions, strict=True)]


def _refit(weight: Tensor, gram: Tensor, fits: Sequence[Fit]) -> list[Fit]:
    """Rows, then columns of both planes by least squares for fixed signs; negative ones turn their signs round."""
    signs = torch.stack([signs_of(fit.decision) for fit in fits])  # [2, out, in]
    row, column = (torch.stack(parts) for parts in zip(*((fit.row, fit.column) for fit in fits), strict=True))
    product, width = weight @ gram, weight.shape[1]
    for _ in range(2):
        scaled = signs * column[:, None]
        normal = torch.einsum("poi,qoi->opq", scaled @ gram, scaled)
        held = 0.001 * normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None]  # where both planes are alike
        right = torch.einsum("poi,oi->op", scaled, product)
        row = torch.linalg.solve(normal + torch.diag_embed(held.expand(-1, 2)), right + held * row.T).T
        scaled = signs * row[..., None]
        both = scaled.movedim(0, 1).flatten(1)  # [out, 2 in]
        normal = gram.repeat(2, 2) * (both.T @ both)
        ridge = 0.01 * (normal.diagonal() + normal.diagonal().mean()).clamp_min(1e-30)
        right = (both * product.repeat(1, 2)).sum(0) + ridge * column.flatten()
        column = torch.linalg.solve(normal + ridge.diag(), right).view(2, width)
    return [Fit(row[p].abs(), column[p].abs(), turned(fits[p].decision, row[p], column[p])) for p in range(2)]
