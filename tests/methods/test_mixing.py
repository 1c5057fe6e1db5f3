"""Scales mixed per token: the fused forward and gradients against autograd on the equations in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bimos.methods import mixing
from levels import LEVELS

ERRORS = {torch.float32: 1e-5, torch.bfloat16: 5e-2}  # of bfloat16, a gate of few inputs has rounded gradients only


# Torch's own way too, which is what runs elsewhere.
pytestmark = pytest.mark.parametrize("level", ["reference", *LEVELS], indirect=True)


def leaves(tokens: int, n_in: int, n_out: int, experts: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(n_in + experts)
    x, y = torch.randn(tokens, n_in).to(dtype), torch.randn(tokens, n_out).to(dtype)
    router = torch.randn(experts, n_in) * 2 * n_in**-0.5
    return [t.requires_grad_() for t in (x, y, router, torch.rand(experts, n_in) + 0.5, torch.rand(experts, n_out) - 0.5)]


def loss_of(scaled: Tensor, mixed: Tensor) -> Tensor:
    ramp = [torch.linspace(-1, 2, t.shape[-1], dtype=torch.float64) for t in (scaled, mixed)]
    return (scaled.double().square() * ramp[0]).sum() + (mixed.double() * ramp[1]).sum()


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert (actual.double() - expected).norm() <= ERRORS[dtype] * expected.norm().clamp_min(1e-30)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("experts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("tokens", "n_in", "n_out"), [(1, 8, 24), (7, 40, 16), (37, 72, 130), (300, 264, 128)])
def test_values_and_gradients(level: str, tokens: int, n_in: int, n_out: int, experts: int, dtype: torch.dtype) -> None:
    x, y, router, scale_in, scale_out = given = leaves(tokens, n_in, n_out, experts, dtype)
    exact = [t.detach().double().requires_grad_() for t in given]
    gate = F.softmax(exact[0] @ exact[2].T, dim=-1)
    expected = exact[0] * (gate @ exact[3]), exact[1] * (gate @ exact[4])
    loss_of(*expected).backward()

    threads = torch.get_num_threads()
    torch.set_num_threads(3)  # the widest case is done in parts
    try:
        scaled, own_gate = mixing.route_and_mix(x, router, scale_in)
        mixed = mixing.mix(y, own_gate, scale_out)
        assert scaled.dtype == mixed.dtype == dtype and own_gate.dtype == torch.float32
        loss_of(scaled, mixed).backward()
    finally:
        torch.set_num_threads(threads)
    for actual, wanted in zip((own_gate, scaled, mixed), (gate, *expected), strict=True):
        assert_near(actual, wanted, dtype)
    for leaf, wanted in zip(given, exact, strict=True):
        assert leaf.grad is not None and wanted.grad is not None and leaf.grad.dtype == leaf.dtype
        assert_near(leaf.grad, wanted.grad, dtype)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_one_expert_has_no_gate(level: str, dtype: torch.dtype) -> None:
    x, _, _, scales, _ = leaves(13, 88, 8, 1, dtype)
    y = mixing.mix(x, None, scales)
    y.double().square().sum().backward()
    exact = x.detach().double(), scales.detach().double()
    assert_near(y, exact[0] * exact[1], dtype)
    assert x.grad is not None and scales.grad is not None
    assert_near(x.grad, 2 * exact[0] * exact[1].square(), dtype)
    assert_near(scales.grad, (2 * exact[0].square() * exact[1]).sum(0, keepdim=True), dtype)


def test_leading_dimensions_strides_and_no_tokens(level: str) -> None:
    x, _, router, scales, _ = leaves(24, 40, 8, 4, torch.float32)
    scaled, gate = mixing.route_and_mix(x, router, scales)
    wide, wide_gate = mixing.route_and_mix(x.view(2, 3, 4, 40), router, scales)
    assert wide.shape == (2, 3, 4, 40) and wide_gate.shape == (2, 3, 4, 4)
    turned = x.detach().T.contiguous().T
    for other in (wide.flatten(0, 2), mixing.route_and_mix(turned, router, scales)[0]):
        torch.testing.assert_close(other, scaled)
    torch.testing.assert_close(wide_gate.flatten(0, 2), gate)
    assert mixing.mix(wide, wide_gate, scales).shape == wide.shape
    assert mixing.route_and_mix(x[:0], router, scales)[0].shape == (0, 40)


def test_a_router_of_another_dtype_than_the_scales(level: str) -> None:
    x, _, router, scales, _ = leaves(6, 40, 8, 4, torch.bfloat16)
    narrow = router.detach().bfloat16().requires_grad_()
    scaled, gate = mixing.route_and_mix(x, narrow, scales)
    (scaled.float().sum() + gate.square().sum()).backward()
    exact_gate = torch.softmax(x.detach().double() @ narrow.detach().double().T, -1)
    torch.testing.assert_close(gate.double(), exact_gate, rtol=1e-4, atol=1e-5)
    exact = router.detach().bfloat16().double().requires_grad_()
    exact_gate = torch.softmax(x.detach().double() @ exact.T, -1)
    ((x.detach().double() * (exact_gate @ scales.detach().double())).sum() + exact_gate.square().sum()).backward()
    assert narrow.grad is not None and narrow.grad.dtype == torch.bfloat16 and exact.grad is not None
    assert (narrow.grad.double() - exact.grad).norm() < 0.01 * exact.grad.norm()


def test_not_a_number_spreads_over_its_token_only(level: str) -> None:
    x, _, router, scales, _ = leaves(6, 40, 8, 4, torch.bfloat16)
    with torch.no_grad():
        x[2, 3] = float("nan")
        scaled, gate = mixing.route_and_mix(x, router, scales)
    assert gate[2].isnan().all() and scaled[2].isnan().all()
    assert scaled[[0, 1, 3, 4, 5]].isfinite().all()
