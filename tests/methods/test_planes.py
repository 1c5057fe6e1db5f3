"""Two planes of one latent: levels in order, gradients of the nearest border, latents that have the signs they are made for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bimos.methods import ste
from bimos.methods.coupled import coupled_fit, coupled_latents
from bimos.methods.planes import MARGIN, Plane, SignPlane, between_levels, decision
from bimos.methods.ste import SharedSigns, sign_linear

PAIR = (Plane.FIRST, Plane.SECOND)


def signs(latent: Tensor) -> Tensor:
    return torch.stack([torch.where(decision(latent, plane) >= 0, 1.0, -1.0) for plane in PAIR])


def test_levels_are_in_order() -> None:
    latent = torch.tensor([-9.0, -0.8, -0.4, -0.1, 0.0, 0.4, 0.5, 3.0])
    first, second = signs(latent)
    assert first.tolist() == [-1, -1, -1, -1, 1, 1, 1, 1]
    assert second[:4].tolist() == [-1, -1, 1, 1] and second[5:].tolist() == [-1, 1, 1]
    order = latent[latent != 0]  # on a border either level will do
    level = (2 * signs(order)[0] + signs(order)[1]).tolist()
    assert level == sorted(level) and set(level) == {-3.0, -1.0, 1.0, 3.0}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_what_crossing_the_nearest_border_changes(shared: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the loss on either side of the border, of a loss that is linear in the signs."""
    monkeypatch.setattr(ste, "tables_pay", lambda *_: False)
    torch.manual_seed(0)
    latent = nn.Parameter(torch.tensor([[-1.3, -0.85, -0.6, -0.35, -0.15, 0.1, 0.3, 0.7, 0.95, 1.05]]))
    towards = torch.randn(2, 10).to(dtype)

    def loss(latent: Tensor) -> Tensor:
        planes = [sign_linear(torch.eye(10, dtype=dtype), latent, plane)[:, 0] for plane in PAIR]
        return sum((part * weight).float().sum() for part, weight in zip(planes, towards, strict=True))  # type: ignore[return-value]

    if shared:
        planes = SharedSigns([SignPlane(latent, plane) for plane in PAIR], dtype)
        for _ in range(2):  # the second time on top of the first
            with planes:
                loss(latent).backward()
        assert latent.grad is not None and not hasattr(latent, "shared_signs")
        latent.grad /= 2
    else:
        loss(latent).backward()
    assert latent.grad is not None
    for j, value in enumerate(latent[0].tolist()):
        border = min((-0.5, 0.0, 0.5), key=lambda at, value=value: abs(at - value))
        sides = []
        for side in (-0.01, 0.01):
            moved = latent.detach().clone()
            moved[0, j] = border + side
            sides.append(loss(moved).item())
        expected = (sides[1] - sides[0]) / 2 if abs(value) < 1 else 0.0
        assert latent.grad[0, j].item() == pytest.approx(expected, abs=1e-5), value


def test_latents_have_the_signs_and_the_order_of_their_values() -> None:
    torch.manual_seed(1)
    value = torch.randn(32, 48)
    first, second = torch.rand(32, 48) + 1, torch.rand(32, 48) / 2 + 0.3
    one = torch.where(value >= 0, 1.0, -1.0)
    two = torch.where(value - one * first >= 0, 1.0, -1.0)
    latent = between_levels(value, first, second, (one, two))
    assert torch.equal(signs(latent), torch.stack([one, two]))
    size = 2 * latent.abs()  # in steps
    free = (size > MARGIN + 1e-4) & (size < 1 - MARGIN - 1e-4)  # of the inner levels, where no margin was kept
    torch.testing.assert_close(2 * latent[free], (value / first)[free])
    assert size.max() <= 2 - MARGIN and (size - 1).abs().min() >= MARGIN - 1e-6


@pytest.mark.parametrize("known", [False, True])
def test_latents_of_a_fit_have_its_signs(known: bool) -> None:
    torch.manual_seed(2)
    weight, sample = torch.randn(40, 64), torch.randn(256, 64)
    gram = sample.T @ sample / 256 if known else None
    pair = coupled_fit(weight, torch.ones(64), gram, 2, None, 3, 4)
    latent = coupled_latents(*pair)
    wanted = torch.stack([torch.where(fit.decision >= 0, 1.0, -1.0) for fit in pair])
    assert torch.equal(signs(latent), wanted)
    assert ((latent.abs() > 0.5).float().mean() - 0.3).abs() < 0.15  # of Gaussian weights a third or so is far out
