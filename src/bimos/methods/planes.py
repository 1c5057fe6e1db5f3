"""The planes of signs that a latent stands for: one by itself, or two coupled ones.

Two planes of one latent are four levels in order, a step of 1/2 from one to the next (a latent of exactly 0 is of the highest):

    latent    below -1/2   -1/2 to 0    0 to 1/2   1/2 and more
    first         -1           -1          +1           +1
    second        -1           +1          -1           +1

With planes that have a latent each, a weight goes from the second level to the third only by two flips at once; either alone is a jump
of two levels, and training falls apart on them (docs/experiments.md).
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor, nn

STEP = 0.5  # from level to level: twice the mean size of a single plane's latents at the start, so that rates mean the same
MARGIN = 0.05  # of a step


class Plane(enum.Enum):
    """Which plane of a latent."""

    ONLY = 0
    FIRST = 1
    SECOND = 2


class SignPlane(NamedTuple):
    """A plane of signs that a layer multiplies by.

    `as_values`: it takes their values alone (`sign_ste`), and has no use for the tables of `sign_linear`.
    """

    latent: nn.Parameter
    plane: Plane = Plane.ONLY
    as_values: bool = False


def decision(latent: Tensor, plane: Plane) -> Tensor:
    """Whose sign is the plane's, of the shape of `latent`; 0 counts as positive."""
    return latent * (latent.abs() - STEP) if plane is Plane.SECOND else latent


def straight_through(grad: Tensor, latent: Tensor, plane: Plane) -> Tensor:
    """What a plane's gradient adds to that of its latent; `grad` is written to.

    A single plane: the rule of BinaryMoS (2406.12311) and OneBit (2402.11295), the identity where `-1 < latent < 1` and 0 elsewhere. Of
    two, what crossing the nearest border changes: both signs, in opposite directions, within half a step of 0; else the second, within
    the same bounds.
    """
    if plane is Plane.ONLY:
        return _inside(grad, latent, 1.0)
    if plane is Plane.FIRST:
        return _inside(grad, latent, STEP / 2)
    _inside(grad, latent, 1.0)
    return torch.where(latent.abs() < STEP / 2, -grad, grad)


def between_levels(value: Tensor, first: Tensor, second: Tensor, signs: tuple[Tensor, Tensor]) -> Tensor:
    """Latents `[out, in]` with these signs, each as far between the borders of its level as its value is.

    Args:
        value: what the signs were chosen for.
        first, second: the scales of the planes at every weight, not negative; levels are `+-first +- second`.
        signs: of both planes, +1 and -1.
    """
    first, second = first.clamp_min(1e-12), second.clamp_min(1e-12)
    size = value * signs[0]
    outer = signs[0] == signs[1]
    beyond = (size - first) / (2 * second)
    within = size / first
    # Away from the borders, whatever moved the value there: a latent on one would turn with the first step.
    place = torch.where(outer, beyond, within).clamp_(MARGIN, 1 - MARGIN)
    return signs[0] * (place + outer) * STEP


def _inside(grad: Tensor, latent: Tensor, bound: float) -> Tensor:
    """`grad`, in place, with zeros where `latent` is not in (-bound, bound)."""
    # The gradient of clamping is the rule itself, in one pass.
    return torch.ops.aten.hardtanh_backward.grad_input(grad, latent, -bound, bound, grad_input=grad)
