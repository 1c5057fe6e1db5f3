"""BiLLM: its equations once more, its bits by the formula, and what it is worth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bimos import BimosError
from bimos.methods import InputStatistics, method_config
from bimos.methods.billm import MOST_SALIENT, BiLLMLinear, binarize_block, break_point, salient_count
from bimos.methods.compensation import inverse_factor
from bimos.packing.linear import PackedLinear
from bimos.packing.unpack import dense_weight
from correlated import correlated_inputs, linear, relative_output_error, statistics_of


def started(original: Any, statistics: InputStatistics, **options: Any) -> BiLLMLinear:
    config = method_config("billm", options)
    layer = config.layer.from_linear(original, config, statistics, torch.Generator())
    assert isinstance(layer, BiLLMLinear)
    return layer


def binarized(w: Tensor) -> Tensor:
    """Signs times the mean magnitude, of every row of a list of weights."""
    return torch.stack([row.abs().mean() * torch.where(row >= 0, 1.0, -1.0) if len(row) else row for row in w])


def split(w: Tensor, point: float) -> Tensor:
    """Each row's weights in two classes by magnitude, each class binarized for itself."""
    result = torch.zeros_like(w)
    for i, row in enumerate(w):
        for chosen in (row.abs() >= point, row.abs() < point):
            result[i, chosen] = binarized(row[None, chosen])[0]
    return result


def residual(w: Tensor) -> Tensor:
    first = binarized(w)
    return first + binarized(w - first)


def test_a_block_is_the_equations() -> None:
    w, u = torch.randn(7, 24, generator=torch.Generator().manual_seed(0)), torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.1
    block = binarize_block(w, u)
    saliency = (w**2 / u**2).sum(0)
    count = int(block.salient.sum())
    assert 1 <= count <= 12 and set(block.salient.nonzero().flatten().tolist()) == set(saliency.topk(count).indices.tolist())
    rest, weight = w[:, ~block.salient], block.weight()
    torch.testing.assert_close(weight[:, block.salient], residual(w[:, block.salient]), rtol=0, atol=3e-3)
    candidates = [split(rest, point) for point in rest.abs().flatten().sort().values.tolist()]
    best = min((rest - q).square().sum().item() for q in candidates)
    found = (rest - weight[:, ~block.salient]).square().sum().item()
    assert found < 1.02 * best  # of every break point there is; 81 of them were tried
    assert all(len(row.unique()) <= 4 for row in weight[:, ~block.salient])


def test_search_for_salient_columns() -> None:
    w = torch.randn(9, 20, generator=torch.Generator().manual_seed(2)) * torch.cat([torch.full((4,), 5.0), torch.ones(16)])
    errors = [(w - torch.cat([residual(w[:, :c]), residual(w[:, c:])], 1)).square().sum().item() for c in range(1, 11)]
    assert salient_count(w.abs()) == 1 + errors.index(min(errors)) == 4
    assert salient_count(torch.rand(3, 256)) <= MOST_SALIENT


def test_break_point_between_two_sizes() -> None:
    magnitude = torch.tensor([[0.1, 0.12, 0.9, 1.1, 0.11], [0.1, 1.0, 0.95, 0.1, 0.1]])
    assert 0.12 < break_point(magnitude) <= 0.95


@pytest.mark.parametrize("width", [24, 40])
def test_blocks_behind_make_good_what_is_lost(width: int) -> None:
    """Algorithm 1 with the inverse of H itself."""
    original, x = linear(width, 6), correlated_inputs(width, 7)
    statistics = statistics_of(x)
    assert statistics.gram is not None
    hessian = statistics.gram.double() / statistics.gram.diagonal().mean() + 0.01 * torch.eye(width)
    w, u = original.weight.detach().double().clone(), inverse_factor(hessian).diagonal()
    expected = []
    for start in range(0, width, 16):
        end = min(width, start + 16)
        block = binarize_block(w[:, start:end].float(), u[start:end].float())
        expected.append(block.weight())
        inverse = hessian[start:, start:].inverse()  # of what is left
        lost = w[:, start:end] - block.weight()
        w[:, end:] -= lost @ inverse[: end - start, : end - start].inverse() @ inverse[: end - start, end - start :]
    layer = started(original, statistics, block_size=16)
    actual = dense_weight(PackedLinear.from_tensors(layer.pack(), layer.group_size))
    torch.testing.assert_close(actual, torch.cat(expected, 1), rtol=0, atol=1e-3)


def test_bits_on_disk_are_the_formula(tmp_path: Path) -> None:
    for n, m, k in ((96, 256, 128), (40, 320, 128), (33, 64, 16)):
        layer = started(linear(m, n), statistics_of(correlated_inputs(m, 20)), block_size=k)
        path = tmp_path / "layer.safetensors"
        save_file(layer.pack(), path)
        content = path.read_bytes()
        bits = 8 * (len(content) - 8 - int.from_bytes(content[:8], "little"))
        blocks = math.ceil(m / k)
        assert bits == 2 * n * m + m + 64 * n * blocks
        assert int(layer.salient.sum()) >= blocks


def test_far_better_than_signs_on_correlated_inputs() -> None:
    for seed in range(3):
        original, x = linear(160, 64, seed), correlated_inputs(160, 40, seed=seed)
        signs = relative_output_error(method_config("sign"), original, x)
        assert relative_output_error(method_config("billm"), original, x) < 0.35 * signs


def test_zeros_and_a_single_value() -> None:
    original = linear(32, 4)
    with torch.no_grad():
        original.weight[0], original.weight[1] = 0, 0.25
    layer = started(original, InputStatistics.uninformed(32), block_size=16)
    weight = dense_weight(PackedLinear.from_tensors(layer.pack(), layer.group_size))
    assert torch.isfinite(weight).all()
    assert not weight[0].any() and torch.equal(weight[1], torch.full((32,), 0.25))


@pytest.mark.parametrize(
    ("options", "fragment"), [({"block_size": 0}, "block_size=0"), ({"block_size": 20}, "block_size=20"), ({"damping": -1}, "damping=-1")]
)
def test_options_that_cannot_be(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(BimosError, match=fragment):
        method_config("billm", options)
