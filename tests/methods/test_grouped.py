"""Products with signs scaled by group, against the weight written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bimos.methods.grouped import grouped_sign_linear
from bimos.packing.groups import by_input


@pytest.mark.parametrize("shape", [(7,), (2, 5)])
@pytest.mark.parametrize("group_size", [1, 10, 24, 64])
def test_values_and_gradients_are_those_of_the_weight(shape: tuple[int, ...], group_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 24, generator=generator, dtype=torch.float64)
    signs = torch.randn(6, 24, generator=generator, dtype=torch.float64).sign()
    scale = torch.rand(6, -(-24 // group_size), generator=generator, dtype=torch.float64)
    coefficients = torch.randn(*shape, 6, generator=generator, dtype=torch.float64)
    results = []
    for product in (
        lambda x, signs, scale: grouped_sign_linear(x, signs, scale, group_size),
        lambda x, signs, scale: F.linear(x, signs * by_input(scale, group_size, 24)),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, signs, scale)]
        y = product(*leaves)
        (y * coefficients).sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_nothing_the_size_of_the_weight_is_kept() -> None:
    x, signs = torch.randn(3, 64, requires_grad=True), torch.randn(32, 64).sign().requires_grad_()
    scale = torch.rand(32, 4, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        grouped_sign_linear(x, signs, scale, 16)
    assert set(kept) == {x.data_ptr(), signs.data_ptr(), scale.data_ptr()}


def test_gradients_that_nobody_wants_are_not_made() -> None:
    x, signs, scale = torch.randn(3, 16), torch.randn(8, 16).sign(), torch.rand(8, 2, requires_grad=True)
    grouped_sign_linear(x, signs, scale, 8).sum().backward()
    assert scale.grad is not None and x.grad is None and signs.grad is None
