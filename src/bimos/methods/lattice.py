"""Two planes of zeros and ones that fit a linear: the levels 0, a2, a1 + a2 and a1 of every group of a row.

    minimise  sum_i (w_i - q_i) H (w_i - q_i)^T      q = a1 b1 + a2 b2,  H = E[x x^T] or its diagonal

First the lattice (-s, 0, s, 2s) of every group, either way round: s searched for the least error, then refit by least squares. Then both
scales of a group go free, again by least squares and in turns with the bits. Where H is known, bits are swept column by column and make
good each other's errors (`bimos.methods.compensation`), and all scales of a row are refit together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bimos.methods.compensation import DAMPING, damped, prepared, sweep
from bimos.packing.groups import by_input, count_groups

SHARES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.85)  # of a group's largest weight, that s is looked for among
REFITS = 6  # of s, to the levels that the weights have taken
MARGIN = 0.02  # of a step, by which a latent is inside its cell
PASSES = 2  # over the groups of a row, when its scales are refit


class DualFit(NamedTuple):
    """Scales a1 and a2 `[2, out, groups]` and bits, bool `[2, out, in]`; `decision [out, in]` is what each pair of bits was taken of."""

    scale: Tensor
    bits: Tensor
    decision: Tensor


def dual_bits(weight: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both bits of weights, bool; scales broadcast.

    The paper's rule, b1 = [w - (a1 + a2)/2 >= 0] and b2 = [-(w - a1 b1 - a2/2) >= 0], is that of a1 > 0 > a2. Turned round with
    the signs of the scales, it finds the nearest level wherever they have different ones and |a1| > |a2|.
    """
    one = (weight - (first + second) / 2) * first >= 0
    return one, (weight - first * one - second / 2) * second >= 0


def dual_fit(weight: Tensor, second_moment: Tensor, gram: Tensor | None, group_size: int, rounds: int, iterations: int) -> DualFit:
    """The best fit found.

    Args:
        weight: float32 `[out, in]`.
        second_moment: `E[x_j^2]`, float32 `[in]`.
        gram: `E[x x^T]`, float32 `[in, in]`, or None.
        rounds: sweeps with error compensation, where there is a `gram`.
        iterations: of bits and free scales in turns; 0 leaves a1 = 2 s and a2 = -s.
    """
    scale, bits = _free(weight, second_moment, _lattice(weight, second_moment, group_size), group_size, iterations)
    best = DualFit(scale, bits, weight)
    if gram is None or rounds == 0:
        return best
    gram = gram / gram.diagonal().mean().clamp_min(1e-30)
    held, (order, factor) = damped(gram), prepared(gram)
    difference = weight - dual_weight(best, group_size)
    least = ((difference @ gram) * difference).sum().item()
    group_of = (order // group_size).tolist()
    for _ in range(rounds):
        columns = scale.movedim(2, 0).contiguous().unbind()  # of every group [2, out]

        def rounded(j: int, value: Tensor, columns: tuple[Tensor, ...] = columns) -> Tensor:
            first, second = columns[group_of[j]]
            one, two = dual_bits(value, first, second)
            return first * one + second * two

        decision = sweep(weight, factor, rounded, order=order)
        bits = torch.stack(dual_bits(decision, *by_input(scale, group_size, weight.shape[1])))
        scale, error = _refit(weight, held, bits, scale, group_size)
        if error < least:
            best, least = DualFit(scale, bits, decision), error
    return best


def dual_weight(fit: DualFit, group_size: int) -> Tensor:
    """`a1 b1 + a2 b2`, float32 `[out, in]`."""
    return (by_input(fit.scale, group_size, fit.decision.shape[1]) * fit.bits).sum(0)


def into_cells(fit: DualFit, group_size: int) -> Tensor:
    """What bits were taken of `[out, in]`, moved as little as it takes to lie inside their cells and between the outer levels."""
    first, second = by_input(fit.scale, group_size, fit.decision.shape[1])
    turn = torch.where(first < 0, -1.0, 1.0)
    a1, a2, (one, two) = first.abs(), second.abs(), fit.bits
    low = torch.where(one, torch.where(two, (a1 - a2) / 2, a1 - a2 / 2), torch.where(two, -a2, -a2 / 2))
    high = torch.where(one, torch.where(two, a1 - a2 / 2, a1), torch.where(two, -a2 / 2, (a1 - a2) / 2))
    margin = MARGIN * (a1 + a2) / 3
    return turn * (turn * fit.decision).clamp(low + margin, high - margin)


def _grouped(values: Tensor, group_size: int) -> Tensor:
    """`[..., in]` to `[..., groups, g]`, zeros where the last group has no inputs."""
    group_size = min(group_size, values.shape[-1])
    groups = count_groups(values.shape[-1], group_size)
    missing = groups * group_size - values.shape[-1]
    return (F.pad(values, (0, missing)) if missing else values).unflatten(-1, (groups, group_size))


def _lattice(weight: Tensor, second_moment: Tensor, group_size: int) -> Tensor:
    """a1 = 2 s and a2 = -s `[2, out, groups]` with the s, of either sign, that leaves the least error."""
    w = _grouped(weight, group_size)
    h = _grouped((second_moment / second_moment.mean().clamp_min(1e-30)).clamp_min(1e-6), group_size)
    largest = w.abs().amax(-1).clamp_min(1e-12)

    def measured(s: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of the error where s is refit to the levels that it gives, and that s."""
        levels = (w / s[..., None]).round_().clamp_(-1, 2)
        weighted = h * levels
        match, size = (weighted * w).sum(-1), (weighted * levels).sum(-1)
        refit = torch.where(size > 0, match / size.clamp_min(1e-30), s)
        refit = torch.where(refit.abs() < 1e-12, s, refit)
        return -match.square() / size.clamp_min(1e-30), refit  # less the sum of h w^2, which no s changes

    best, least = largest, torch.full_like(largest, torch.inf)
    for share in SHARES:
        for turn in (1, -1):
            error, s = measured(largest * (turn * share))
            best, least = torch.where(error < least, s, best), torch.minimum(error, least)
    for _ in range(REFITS):
        best = measured(best)[1]
    return torch.stack([2 * best, -best])


def _free(weight: Tensor, second_moment: Tensor, scale: Tensor, group_size: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Scales `[2, out, groups]` and bits, bool `[2, out, in]`, taken in turns; each group keeps what had the least error."""
    w = _grouped(weight, group_size)
    h = _grouped((second_moment / second_moment.mean().clamp_min(1e-30)).clamp_min(1e-6), group_size)

    def taken(scale: Tensor) -> tuple[Tensor, Tensor]:
        """Bits `[2, out, groups, g]` and what they leave of the error."""
        first, second = scale[..., None]
        one, two = dual_bits(w, first, second)
        return torch.stack([one, two]), (h * (w - first * one - second * two).square()).sum(-1)

    bits, least = taken(scale)
    for _ in range(iterations):
        one, two = bits.float()
        weighted = h * one
        n11, n12, r1 = weighted.sum(-1), (weighted * two).sum(-1), (weighted * w).sum(-1)
        weighted = h * two
        n22, r2 = weighted.sum(-1), (weighted * w).sum(-1)
        determinant = n11 * n22 - n12 * n12
        solved = torch.stack([r1 * n22 - r2 * n12, r2 * n11 - r1 * n12]) / determinant.clamp_min(1e-12)
        new, error = taken(solved)
        better = (error < least) & (determinant > 1e-12) & _is_in_order(solved)
        scale, bits = torch.where(better, solved, scale), torch.where(better[..., None], new, bits)
        least = torch.where(better, error, least)
    return scale, bits.flatten(2)[..., : weight.shape[1]]


def _is_in_order(scale: Tensor) -> Tensor:
    """Whether the rule finds the nearest level with these scales, `[...]` of `[2, ...]`."""
    return (scale[0] * scale[1] < 0) & (scale[1].abs() < 0.95 * scale[0].abs())


def _refit(weight: Tensor, gram: Tensor, bits: Tensor, scale: Tensor, group_size: int) -> tuple[Tensor, float]:
    """Scales by least squares for fixed bits, a group at a time given all others; and the error, without the damping of `gram`.

    A pair that would come out of order stays as it is.
    """
    scale, ones = scale.clone(), bits.float()
    difference = weight - (by_input(scale, group_size, weight.shape[1]) * ones).sum(0)
    product = difference @ gram
    for group in [*range(scale.shape[2])] * PASSES:
        columns = slice(group * group_size, (group + 1) * group_size)
        one, two = ones[:, :, columns]
        at_one, at_two = one @ gram[columns, columns], two @ gram[columns, columns]
        n11, n12, n22 = (at_one * one).sum(-1), (at_one * two).sum(-1), (at_two * two).sum(-1)
        r1, r2 = (product[:, columns] * one).sum(-1), (product[:, columns] * two).sum(-1)
        # Held a little to what they are: a plane without ones, or one that is the other's, would otherwise be arbitrary.
        held = 0.01 * (n11 + n22).clamp_min(1e-30)
        n11, n22 = n11 + held, n22 + held
        determinant = (n11 * n22 - n12 * n12).clamp_min(1e-30)
        change = torch.stack([r1 * n22 - r2 * n12, r2 * n11 - r1 * n12]) / determinant
        change = torch.where(_is_in_order(scale[:, :, group] + change), change, 0.0)
        scale[:, :, group] += change
        moved = change[0][:, None] * one + change[1][:, None] * two
        difference[:, columns] -= moved
        product.addmm_(moved, gram[columns], alpha=-1)
    return scale, ((product - DAMPING * difference) * difference).sum().item()
