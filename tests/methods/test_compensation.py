"""Signs and scales for correlated inputs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bimos.methods import compensation
from bimos.methods.base import InputStatistics
from bimos.methods.compensation import Fit, _error, carry_over, compensated_fit, inverse_factor, statistics_factor, sweep
from bimos.methods.rank_one import weighted_rank_one


def correlated_gram(width: int, rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
    x = x + 0.3 * torch.randn(512, width, generator=generator)
    return x.T @ x / len(x)


def matrix(fit: Fit) -> Tensor:
    return fit.row[:, None] * torch.where(fit.decision >= 0, 1.0, -1.0) * fit.column


def output_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    difference = (weight - approximation).double()
    return ((difference @ gram.double()) * difference).sum().item()


@pytest.mark.parametrize("shape", [(29, 48), (8, 200), (130, 97), (1, 8)])  # 97, 200: panels that are not full
def test_beats_the_signs_of_the_weights(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    gram = correlated_gram(shape[1], max(2, shape[1] // 4))
    row, column = weighted_rank_one(weight.abs(), gram.diagonal(), 8)
    plain = output_error(weight, row[:, None] * weight.sign() * column, gram)
    found = output_error(weight, matrix(compensated_fit(weight, gram, 3, 8)), gram)
    assert found < (
        0.5 * plain if min(shape) > 1 else 1e-9 * output_error(weight, torch.zeros(shape), gram)
    )  # a row's columns are its weights


def test_no_rounds_is_the_plain_fit() -> None:
    weight, gram = torch.randn(12, 16), correlated_gram(16, 4)
    fit = compensated_fit(weight, gram, 0, 8)
    assert torch.equal(fit.decision, weight)
    torch.testing.assert_close((fit.row, fit.column), weighted_rank_one(weight.abs(), gram.diagonal(), 8))


@pytest.mark.parametrize("shape", [(29, 48), (130, 97)])
def test_pieces_and_factors_made_again_are_the_same(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bits, which are those of sums in another order; no sign hangs on them here."""
    weight, gram = torch.randn(shape, generator=torch.Generator().manual_seed(2)), correlated_gram(shape[1], 9)
    whole = compensated_fit(weight, gram, 3, 8)
    monkeypatch.setattr(compensation, "ROWS", 7)
    monkeypatch.setattr(compensation, "KEPT", 8)
    torch.testing.assert_close(compensated_fit(weight, gram, 3, 8), whole, rtol=1e-3, atol=1e-4)


def test_scale_of_the_moments_does_not_matter() -> None:
    weight, gram = torch.randn(20, 24, generator=torch.Generator().manual_seed(2)), correlated_gram(24, 5)
    expected = compensated_fit(weight, gram, 3, 8)
    for factor in (1e-10, 1e6):
        torch.testing.assert_close(compensated_fit(weight, factor * gram, 3, 8), expected, rtol=1e-3, atol=1e-4)


def test_more_rounds_are_never_worse() -> None:
    weight, gram = torch.randn(40, 64, generator=torch.Generator().manual_seed(3)), correlated_gram(64, 9)
    errors = [output_error(weight, matrix(compensated_fit(weight, gram, rounds, 8)), gram) for rounds in range(5)]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors)), errors


def scaled_errors(weight: Tensor, candidates: Tensor, gram: Tensor) -> Tensor:
    """`output_error` of every candidate `[n, out, in]`, times the number that makes it least."""
    scale = torch.einsum("ij,jk,nik->n", weight, gram, candidates) / torch.einsum("nij,jk,nik->n", candidates, gram, candidates)
    off = weight - scale[:, None, None] * candidates
    return torch.einsum("nij,jk,nik->n", off, gram, off)


def test_near_the_best_signs_of_a_small_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every combination of signs under the same scales, each times the number that suits it; little damping: moments are exact."""
    generator = torch.Generator().manual_seed(5)
    gram = correlated_gram(6, 2).double()
    monkeypatch.setattr(compensation, "DAMPING", 0.05)
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=12)), dtype=torch.float64).view(-1, 2, 6)
    left = []
    for _ in range(10):
        weight = torch.randn(2, 6, generator=generator)
        fit = compensated_fit(weight, gram.float(), 4, 8)
        size = (fit.row[:, None] * fit.column).double()

        both = torch.stack([torch.where(w >= 0, 1.0, -1.0).double() for w in (fit.decision, weight)])
        found, plain = scaled_errors(weight.double(), both * size, gram).tolist()
        best = scaled_errors(weight.double(), every * size, gram).min().item()
        assert found >= best - 1e-9
        left.append((found - best) / (plain - best) if plain > 1.01 * best else 0.0)
    assert sum(left) / len(left) < 0.5, left  # more than half of what there is to gain


def test_uncorrelated_inputs_leave_nothing_to_mend() -> None:
    weight = torch.randn(20, 24, generator=torch.Generator().manual_seed(6))
    fit = compensated_fit(weight, torch.eye(24), 3, 8)
    assert torch.equal(fit.decision >= 0, weight >= 0)


def test_scale_of_inputs_and_dead_inputs() -> None:
    weight, gram = torch.randn(20, 24, generator=torch.Generator().manual_seed(7)), correlated_gram(24, 5)
    one, large = (matrix(compensated_fit(weight, factor * gram, 2, 8)) for factor in (1.0, 1e6))
    torch.testing.assert_close(one, large, rtol=1e-3, atol=1e-4)
    gram[:, 3] = gram[3] = 0
    weight[4] = 0
    for moments in (gram, torch.zeros(24, 24)):
        fit = compensated_fit(weight, moments, 2, 8)
        assert all(torch.isfinite(part).all() for part in fit)
        assert (fit.row >= 0).all() and (fit.column >= 0).all()


def test_error_is_that_of_outputs() -> None:
    weight, x = torch.randn(6, 8), torch.randn(32, 8)
    fit = Fit(torch.rand(6), torch.rand(8), torch.randn(6, 8))
    expected = (x @ (weight - matrix(fit)).T).square().sum().item() / 32
    assert _error(weight, fit, x.T @ x / 32) == pytest.approx(expected, rel=1e-4)


def best_rest(weight: Tensor, settled: Tensor, gram: Tensor) -> Tensor:
    """Brute force: the columns behind those that are settled `[out, k]` which minimise `(w - v) H (w - v)^T`, `[out, in - k]`."""
    k = settled.shape[1]
    free = torch.zeros(gram.shape[0], gram.shape[0] - k, dtype=torch.float64)
    free[k:] = torch.eye(gram.shape[0] - k)
    root = torch.linalg.cholesky(gram.double())  # |(w - v) root|^2 is the error
    rest = (weight - torch.cat([settled, torch.zeros(len(weight), gram.shape[0] - k)], 1)).double() @ root
    return torch.linalg.lstsq((free.T @ root).T, rest.T).solution.T.float()


@pytest.mark.parametrize("panel", [1, 3, 8, 96])
def test_a_sweep_rounds_what_is_best_by_then(panel: int) -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(8))
    gram = correlated_gram(8, 3) + 0.1 * torch.eye(8)
    begun: list[int] = []
    values = sweep(weight, inverse_factor(gram), lambda j, value: value.round(), panel, lambda start, columns: begun.append(start))
    for j in range(8):
        torch.testing.assert_close(values[:, j], best_rest(weight, values[:, :j].round(), gram)[:, 0], rtol=1e-4, atol=1e-4)
    assert begun == list(range(0, 8, panel))
    error, plain = (output_error(weight, q, gram) for q in (values.round(), weight.round()))
    assert error < 0.8 * plain


@pytest.mark.parametrize("width", [1, 3, 5])
def test_columns_rounded_at_once_are_made_good_as_well_as_can_be(width: int) -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(9))
    gram = correlated_gram(8, 3) + 0.1 * torch.eye(8)
    moved, factor, settled = weight.clone(), inverse_factor(gram), torch.zeros(5, 0)
    for start in range(0, 8, width):
        torch.testing.assert_close(moved[:, start:], best_rest(weight, settled, gram), rtol=1e-4, atol=1e-4)
        columns = moved[:, start : start + width].clone()
        carry_over(moved, factor, start, columns - columns.sign())
        settled = torch.cat([settled, columns.sign()], 1)


def test_factor_of_statistics() -> None:
    gram = correlated_gram(8, 3)
    order = torch.tensor([3, 1, 0, 7, 6, 5, 4, 2])
    factor = statistics_factor(InputStatistics(gram.diagonal(), torch.zeros(0, 8), gram), 0.02, order)
    damped = (gram + 0.02 * gram.diagonal().mean() * torch.eye(8))[order][:, order] / gram.diagonal().mean()
    torch.testing.assert_close(factor.T @ factor, damped.inverse(), rtol=1e-4, atol=1e-4)
    uninformed = statistics_factor(InputStatistics(torch.arange(8.0), torch.zeros(0, 8)), 0.02)
    torch.testing.assert_close(uninformed, (1 / (torch.arange(8.0) / 3.5 + 0.02).sqrt()).diag())
    assert torch.isfinite(statistics_factor(InputStatistics(torch.zeros(8), torch.zeros(0, 8), torch.zeros(8, 8)), 0.01)).all()
