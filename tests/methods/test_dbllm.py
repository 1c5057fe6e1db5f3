"""DB-LLM against its equations, written out once more, and its start against what it could have been."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimos.errors import BimosError
from bimos.kernels import native
from bimos.methods import InputStatistics, method_config
from bimos.methods.compensation import DAMPING
from bimos.methods.dbllm import DBLLMConfig, DualBinary, DualBinaryLinear, step_of
from bimos.methods.lattice import DualFit, _refit, dual_bits, dual_fit, dual_weight, into_cells
from bimos.packing.linear import PackedLinear

GROUPS = pytest.mark.parametrize(("n_in", "size"), [(64, 64), (64, 16), (40, 16), (24, 64)])


def correlated(n: int, seed: int) -> Tensor:
    x = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(seed)) @ torch.randn(
        n, n, generator=torch.Generator().manual_seed(seed + 1)
    )
    return x.T @ x / len(x)


def start(weight: Tensor, gram: Tensor | None, **options: object) -> DualBinaryLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    moments = torch.ones(weight.shape[1]) if gram is None else gram.diagonal()
    statistics = InputStatistics(moments, torch.zeros(0, weight.shape[1]), gram)
    config = method_config("dbllm", dict(options))
    return DualBinaryLinear.from_linear(linear, config, statistics, torch.Generator())


def transcribed(w: Tensor, scale: Tensor, size: int) -> Tensor:
    """The paper's equations on numbers, straight through: for a1 > 0 > a2."""
    group = torch.arange(w.shape[1]) // size
    a1, a2 = scale[0][:, group], scale[1][:, group]
    b1 = torch.where(w - (a1 + a2) / 2 >= 0, 1.0, 0.0).detach()
    b2 = torch.where(-(w - a1 * b1 - a2 / 2) >= 0, 1.0, 0.0).detach()
    clipped = torch.minimum(torch.maximum(w, a2.detach()), a1.detach())  # whose gradient is 1 between the outer levels
    return a1 * b1 + a2 * b2 + clipped - clipped.detach()


@GROUPS
def test_rule_is_that_of_the_paper(n_in: int, size: int) -> None:
    torch.manual_seed(n_in)
    groups = -(-n_in // size)
    latent = torch.randn(7, n_in, requires_grad=True)
    scale = torch.stack([torch.rand(7, groups) + 0.8, -torch.rand(7, groups) * 0.5 - 0.2]).requires_grad_()
    grad = torch.randn(7, n_in)
    actual = DualBinary.apply(latent, scale, size, False, torch.float32)
    got = torch.autograd.grad(actual, (latent, scale), grad)
    expected = transcribed(latent, scale, size)
    wanted = torch.autograd.grad(expected, (latent, scale), grad)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert (got[0] == 0).any() and (got[0] != 0).any()  # some beyond the outer levels


@pytest.mark.parametrize(("rows", "n_in", "size"), [(1, 8, 8), (7, 40, 16), (5, 200, 64), (300, 136, 128), (3, 24, 64), (4, 31, 5)])
@pytest.mark.parametrize("in_steps", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_gives_what_torch_gives(
    rows: int, n_in: int, size: int, in_steps: bool, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(n_in)
    scale = torch.randn(2, rows, -(-n_in // size))  # some pairs out of order, as training may leave them
    scale[:, 0, 0] = 0
    latent, grad = torch.randn(rows, n_in).contiguous(), torch.randn(n_in, rows).T.to(dtype)
    latent[-1, -1], scale[0, -1, -1] = torch.nan, scale[0, -1, -1] if rows < 7 else torch.nan

    def answers() -> tuple[Tensor, ...]:
        leaves = latent.clone().requires_grad_(), scale.clone().requires_grad_()
        weight = DualBinary.apply(*leaves, size, in_steps, dtype)
        return (weight.detach(), *torch.autograd.grad(weight, leaves, grad))

    assert native.covers(latent, scale)  # or torch would be compared with itself
    got = answers()
    monkeypatch.setattr(native, "covers", lambda *_: False)
    expected = answers()
    assert got[0].dtype == dtype
    for one, other in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_kernel_refuses_what_does_not_fit(level: str) -> None:
    with pytest.raises(RuntimeError, match="scales do not fit"):
        torch.ops.bimos.dual_weight(torch.ones(2, 8), torch.ones(2, 2, 3), 4, True, False)
    with pytest.raises(RuntimeError, match="a gradient of another"):
        torch.ops.bimos.dual_weight_backward(torch.ones(8, 2), torch.ones(2, 8), torch.ones(2, 2, 2), 4, True)


def test_latents_in_steps_are_weights_in_other_units() -> None:
    torch.manual_seed(0)
    weight, scale = torch.randn(5, 40), torch.stack([torch.rand(5, 3) + 0.8, -torch.rand(5, 3) - 0.2])
    step = step_of(scale)[:, torch.arange(40) // 16]
    relative, plain = (weight / step).requires_grad_(), weight.clone().requires_grad_()
    a, b = (scale.clone().requires_grad_() for _ in range(2))
    one, two = DualBinary.apply(relative, a, 16, True, torch.float32), DualBinary.apply(plain, b, 16, False, torch.float32)
    assert torch.equal(one, two)
    for product in (one, two):
        product.square().sum().backward()
    assert relative.grad is not None and plain.grad is not None
    torch.testing.assert_close(relative.grad, plain.grad * step)
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("turn", [1.0, -1.0])
def test_bits_give_the_nearest_level(turn: float) -> None:
    torch.manual_seed(1)
    weight = torch.randn(2000)
    first, second = torch.tensor(turn * 1.3), torch.tensor(turn * -0.5)
    one, two = dual_bits(weight, first, second)
    levels = torch.stack([torch.zeros(()), second, first + second, first])
    nearest = levels[(weight[:, None] - levels).abs().argmin(1)]
    torch.testing.assert_close(first * one + second * two, nearest)
    assert {(bool(a), bool(b)) for a, b in zip(one, two, strict=True)} == set(itertools.product([False, True], repeat=2))


@GROUPS
@pytest.mark.parametrize("in_steps", [True, False])
def test_layer_computes_with_its_planes(n_in: int, size: int, in_steps: bool) -> None:
    torch.manual_seed(2)
    weight = torch.randn(6, n_in)
    layer = start(weight, None, group_size=size, relative_latents=in_steps)
    layer.scale.data = layer.scale.data.half().float()
    packed = PackedLinear(layer.pack(), layer.group_size)
    group = torch.arange(n_in) // size
    scale = layer.scale[:, :, group]
    byte = packed.weight[..., torch.arange(n_in) // 8]
    bits = (byte >> (torch.arange(n_in) % 8) & 1).float()
    x = torch.randn(3, n_in)
    torch.testing.assert_close(layer(x), F.linear(x, (scale * bits).sum(0)))
    assert packed.weight.numel() * 8 == 2 * weight.numel() and set(packed.tensors()) == {"weight", "scale_group_01"}


def test_start_finds_the_best_lattice() -> None:
    """Against every s of a fine grid, both ways round; and far better than the range's."""
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    h = torch.rand(64, generator=torch.Generator().manual_seed(4)) + 0.1

    def error(q: Tensor) -> Tensor:
        return (h * (weight - q).square()).sum(1)

    least = torch.full((50,), torch.inf)
    for s in torch.linspace(0.02, 3, 600):
        for turn in (s, -s):
            least = torch.minimum(least, error(turn * (weight / turn).round().clamp(-1, 2)))
    lattice = dual_fit(weight, h, None, 64, 0, 0)
    assert torch.equal(lattice.scale[0], -2 * lattice.scale[1])
    found = error(dual_weight(lattice, 64))
    assert found.sum() <= 1.01 * least.sum()
    step = (weight.amax(1) - weight.amin(1))[:, None] / 3
    assert found.sum() < 0.8 * error(step * (weight / step).round().clamp(-1, 2)).sum()
    free = error(dual_weight(dual_fit(weight, h, None, 64, 0, 8), 64))
    assert (free <= found + 1e-5).all() and free.sum() < 0.96 * found.sum()


def test_error_of_the_start_on_gaussian_weights() -> None:
    """The design's figures: .149 of the variance at the best s, .138 with free scales, of long rows."""
    weight = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(5))
    for iterations, expected in ((0, 0.149), (20, 0.138)):
        fit = dual_fit(weight, torch.ones(100_000), None, 100_000, 0, iterations)
        assert (weight - dual_weight(fit, 100_000)).square().mean().item() == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize(("n_in", "size"), [(64, 16), (40, 16)])
def test_compensation_mends_outputs(n_in: int, size: int) -> None:
    weight, gram = torch.randn(30, n_in, generator=torch.Generator().manual_seed(6)), correlated(n_in, 7)

    def error(fit: DualFit) -> float:
        difference = weight - dual_weight(fit, size)
        return ((difference @ gram) * difference).sum().item()

    plain, mended = (error(dual_fit(weight, gram.diagonal(), gram, size, rounds, 8)) for rounds in (0, 3))
    assert mended < 0.6 * plain
    layer = start(weight, gram, group_size=size)  # and the layer starts there
    x = torch.randn(4, n_in)
    torch.testing.assert_close(layer(x), x @ dual_weight(dual_fit(weight, gram.diagonal(), gram, size, 3, 4), size).T, rtol=1e-4, atol=1e-4)


def test_scales_are_the_least_squares_of_their_bits() -> None:
    """On a tiny row, against a solve over all scales at once."""
    weight, gram = torch.randn(3, 24, generator=torch.Generator().manual_seed(8)), correlated(24, 9)
    fit = dual_fit(weight, gram.diagonal(), None, 8, 0, 8)
    bits, found = fit.bits.float(), fit.scale
    for _ in range(20):
        found, error = _refit(weight, gram, fit.bits, found, 8)
    difference = weight - (found.repeat_interleave(8, -1) * bits).sum(0)
    assert error == pytest.approx(((difference @ (gram - DAMPING * torch.eye(24))) * difference).sum().item(), rel=1e-3)
    root = torch.linalg.cholesky(gram).T
    for i in range(3):
        columns = [torch.where(torch.arange(24) // 8 == g, bits[p, i], 0.0) for p in range(2) for g in range(3)]
        design = root @ torch.stack(columns, 1)
        best = torch.linalg.lstsq(design, (root @ weight[i])[:, None]).solution[:, 0]

        def left(scale: Tensor, design: Tensor = design, i: int = i) -> float:
            return (design @ scale - root @ weight[i]).square().sum().item()

        before, after = left(fit.scale[:, i].flatten()), left(found[:, i].flatten())
        assert left(best) <= after + 1e-4 and after - left(best) < 0.05 * (before - left(best)) + 1e-3


def test_latents_stay_in_their_cells() -> None:
    scale = torch.tensor([[[1.0], [-1.0]], [[-0.4], [0.4]]])  # [2, out, groups], the second row the other way round
    decision = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    bits = torch.rand(2, 2, 300, generator=torch.Generator().manual_seed(1)) < 0.5
    moved = into_cells(DualFit(scale, bits, decision), 300)
    assert torch.equal(torch.stack(dual_bits(moved, *scale.expand(-1, -1, 300))), bits)
    assert moved[0].min() > -0.4 and moved[0].max() < 1 and moved[1].min() > -1 and moved[1].max() < 0.4
    inside = into_cells(DualFit(scale, bits, moved), 300)
    torch.testing.assert_close(inside, moved)  # what is inside stays


def test_weights_that_say_nothing() -> None:
    for weight in (torch.zeros(4, 16), torch.ones(4, 16), torch.full((4, 16), 1e-20)):
        for gram in (None, torch.zeros(16, 16), torch.eye(16)):
            layer = start(weight, gram, group_size=8)
            assert torch.isfinite(layer.scale).all() and torch.isfinite(layer.weight).all()
            assert torch.isfinite(layer(torch.randn(2, 16))).all()
            torch.testing.assert_close(layer(torch.eye(16)).T, weight, rtol=0, atol=0.02)


def test_training_brings_a_layer_nearer_its_target() -> None:
    torch.manual_seed(3)
    weight, x = torch.randn(16, 32), torch.randn(512, 32)
    layer = start(torch.randn(16, 32), None, group_size=16)
    optimizer = torch.optim.Adam([{"params": [layer.weight], "lr": 2e-2}, {"params": [layer.scale], "lr": 1e-2}])
    losses = []
    for _ in range(150):
        loss = (layer(x) - x @ weight.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]


@pytest.mark.parametrize(("options", "fragment"), [({"group_size": 0}, "group_size=0"), ({"iterations": -1}, "iterations=-1")])
def test_options_that_cannot_be(options: dict[str, int], fragment: str) -> None:
    with pytest.raises(BimosError, match=fragment):
        DBLLMConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "bits"), [(32, 3.0), (64, 2.5), (128, 2.25 + 32 * 0.5 / 576), (None, 2 + 32 / 576)])
def test_bits_of_a_weight(size: int | None, bits: float) -> None:
    """2 + 32/group; 576 inputs are four and a half groups of 128, of which five are stored."""
    stored = DBLLMConfig(group_size=size).packed_layout(576, 10, False)
    assert sum(tensor.bits for tensor in stored.values()) / 5760 == pytest.approx(bits)
