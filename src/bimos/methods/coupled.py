"""Sign planes with scales that fit a linear together: the second is not the rest of a first that is settled.

    minimise  sum_i (w_i - q_i) H (w_i - q_i)^T      q_ij = sum_p r_pi s_pij g_pik c_pj,  H = E[x x^T],  k the group of j

A second plane starts from what the first leaves. Then all signs of a weight are chosen at once, as the nearest of its levels, in a
sweep that carries errors over (`bimos.methods.compensation`), and the scales of all planes are refit together to the error that they
have in common: rows, columns and, where there are groups, those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bimos.methods.compensation import Fit, compensated_fit, damped, prepared, signs_of, sweep, turned
from bimos.methods.planes import between_levels
from bimos.methods.rank_one import weighted_rank_one
from bimos.packing.groups import by_input, count_groups, group_sums

ROWS = 256  # of a weight, whose groups are refit at once


class GroupedFit(NamedTuple):
    """A `Fit` with a factor `[out, groups]` besides; all ones where there are no groups."""

    row: Tensor
    column: Tensor
    decision: Tensor
    group: Tensor
    size: int

    @property
    def scales(self) -> Tensor:
        """Not negative, float32 `[out, in]`."""
        return self.row[:, None] * by_input(self.group, self.size, len(self.column)) * self.column

    @property
    def matrix(self) -> Tensor:
        """The plane with its scales, float32 `[out, in]`."""
        return signs_of(self.decision).mul_(self.scales)

    def balanced(self) -> GroupedFit:
        """The same with factors that are equally large on average: one rate then suits all of them."""
        means = [factor.mean().clamp_min(1e-30) for factor in (self.row, self.column, self.group)]
        size = (means[0] * means[1] * means[2]) ** (1 / 3)
        row, column, group = (factor * size / mean for factor, mean in zip((self.row, self.column, self.group), means, strict=True))
        return self._replace(row=row, column=column, group=group)


def coupled_fit(
    weight: Tensor, second_moment: Tensor, gram: Tensor | None, planes: int, group_size: int | None, rounds: int, iterations: int
) -> list[GroupedFit]:
    """The best planes found; see `compensated_fit`.

    Args:
        weight: float32 `[out, in]`.
        second_moment: `E[x_j^2]`, float32 `[in]`.
        gram: `H`, float32 `[in, in]`, or None: signs are then those of the weights and of what the first plane leaves.
        planes: 1 or 2.
        group_size: inputs that share a scale of a row; None: no groups.
        rounds: sweeps over all columns.
        iterations: of the alternating least squares behind the first scales.
    """
    plain = _one_by_one(weight, planes, group_size, lambda rest: Fit(*weighted_rank_one(rest.abs(), second_moment, iterations), rest))
    if gram is None or rounds == 0:
        return plain if group_size is None else [fit.balanced() for fit in _refit_groups(weight, second_moment.diag(), plain)]
    gram = gram / gram.diagonal().mean().clamp_min(1e-30)
    swept = _one_by_one(weight, planes, group_size, lambda rest: compensated_fit(rest, gram, rounds, iterations))
    best = min((plain, swept), key=lambda fits: _error(weight, fits, gram))
    least = _error(weight, best, gram)
    held, (order, factor) = damped(gram), prepared(gram)
    fits = best if group_size is None else _refit_groups(weight, held, best)
    for _ in range(rounds):
        fits = _refit(weight, held, _swept(weight, fits, factor, order))
        if group_size is not None:
            fits = _refit_groups(weight, held, fits)
        error = _error(weight, fits, gram)
        if error < least:
            best, least = fits, error
    return best if group_size is None else [fit.balanced() for fit in best]


def coupled_latents(first: GroupedFit, second: GroupedFit) -> Tensor:
    """The latents `[out, in]` of both planes."""
    one, two = first.scales, second.scales
    value = torch.where(one >= two, first.decision, second.decision)  # the other's decision is what is left of it
    signs = signs_of(first.decision), signs_of(second.decision)
    return between_levels(value, torch.maximum(one, two), torch.minimum(one, two), signs)


def _one_by_one(weight: Tensor, planes: int, group_size: int | None, fit: Callable[[Tensor], Fit]) -> list[GroupedFit]:
    """Each plane fit to what those before it leave, without groups yet."""
    size = group_size or weight.shape[1]
    ones = weight.new_ones(weight.shape[0], count_groups(weight.shape[1], size))
    rest, found = weight, []
    for _ in range(planes):
        found.append(GroupedFit(*fit(rest), ones, size))
        rest = rest - found[-1].matrix
    return found


def _error(weight: Tensor, fits: Sequence[GroupedFit], gram: Tensor) -> float:
    difference = weight - sum(fit.matrix for fit in fits)
    return ((difference @ gram) * difference).sum().item()


def _swept(weight: Tensor, fits: Sequence[GroupedFit], factor: Tensor, order: Tensor) -> list[GroupedFit]:
    """With new decisions: of the plane that is larger at a weight its value, of the other what that leaves."""
    scales = torch.stack([fit.scales for fit in fits]).permute(2, 0, 1)[order].contiguous()  # [in, planes, out]
    decisions = torch.empty(len(fits), weight.shape[1], weight.shape[0], device=weight.device)

    def rounded(j: int, value: Tensor) -> Tensor:
        if len(fits) == 1:
            decisions[0, order[j]] = value
            return signs_of(value) * scales[j, 0]
        one, two = scales[j]
        nearest = signs_of(value) * torch.maximum(one, two)
        rest = value - nearest
        is_first = one >= two
        decisions[0, order[j]] = torch.where(is_first, value, rest)
        decisions[1, order[j]] = torch.where(is_first, rest, value)
        return nearest + signs_of(rest) * torch.minimum(one, two)

    sweep(weight, factor, rounded, order=order)
    return [fit._replace(decision=decision.T) for fit, decision in zip(fits, decisions, strict=True)]


def _refit(weight: Tensor, gram: Tensor, fits: Sequence[GroupedFit]) -> list[GroupedFit]:
    """Rows, then columns of all planes by least squares for fixed signs; negative ones turn their signs round."""
    planes, width = len(fits), weight.shape[1]
    signs = torch.stack([signs_of(fit.decision).mul_(by_input(fit.group, fit.size, width)) for fit in fits])  # [planes, out, in]
    row, column = (torch.stack(parts) for parts in zip(*((fit.row, fit.column) for fit in fits), strict=True))
    product = weight @ gram
    for _ in range(2):
        scaled = signs * column[:, None]
        normal = torch.einsum("poi,qoi->opq", scaled @ gram, scaled)
        held = 0.001 * normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None]  # where both planes are alike
        right = torch.einsum("poi,oi->op", scaled, product)
        row = torch.linalg.solve(normal + torch.diag_embed(held.expand(-1, planes)), right + held * row.T).T
        scaled = signs * row[..., None]
        both = scaled.movedim(0, 1).flatten(1)  # [out, planes in]
        normal = gram.repeat(planes, planes) * (both.T @ both)
        ridge = 0.01 * (normal.diagonal() + normal.diagonal().mean()).clamp_min(1e-30)
        right = (both * product.repeat(1, planes)).sum(0) + ridge * column.flatten()
        column = torch.linalg.solve(normal + ridge.diag(), right).view(planes, width)
    return [
        fit._replace(row=row[p].abs(), column=column[p].abs(), decision=turned(fit.decision, row[p], column[p]))
        for p, fit in enumerate(fits)
    ]


def _refit_groups(weight: Tensor, gram: Tensor, fits: Sequence[GroupedFit]) -> list[GroupedFit]:
    """Factors of groups by least squares, those of a row together, held a little to what they are."""
    planes, size, width = len(fits), fits[0].size, weight.shape[1]
    found = []
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        scaled = torch.stack([fit.matrix[rows] for fit in fits])
        right = group_sums(scaled * (weight[rows] @ gram), size).movedim(0, 1).flatten(1)  # [out, planes groups]
        normal = []
        for group in range(0, width, size):
            columns = slice(group, min(width, group + size))
            part = scaled[..., columns] @ gram[columns]
            normal.append(group_sums(part[:, None] * scaled, size))  # [planes, planes, out, groups]
        system = torch.stack(normal, 2).permute(3, 0, 2, 1, 4).flatten(3).flatten(1, 2)  # [out, planes groups, planes groups]
        diagonal = system.diagonal(dim1=1, dim2=2)
        ridge = 0.01 * (diagonal + diagonal.mean(1, keepdim=True)).clamp_min(1e-30)
        found.append(torch.linalg.solve(system + torch.diag_embed(ridge), right + ridge).unflatten(1, (planes, -1)))
    factor = torch.cat(found).movedim(1, 0)  # [planes, out, groups]
    result = []
    for fit, change in zip(fits, factor, strict=True):
        decision = fit.decision.clone()
        decision[decision == 0] = 1e-20
        decision *= by_input(change.sign() + (change == 0), size, width)
        result.append(fit._replace(group=fit.group * change.abs(), decision=decision))
    return result
