"""Several linears of one input in one launch of the Triton kernels: each gives what it gives by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (the extra 'gpu')")

from bimos.kernels import triton as kernels
from bimos.kernels import triton_tuning
from bimos.kernels.triton import Stored
from bimos.kernels.triton_tuning import MANY, ONE, SEVERAL, Config
from on_triton import DEVICE, assert_right, make

if not kernels.INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU, and Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)


@pytest.mark.parametrize(("dtype", "group"), [(torch.float32, None), (torch.bfloat16, 12)], ids=str)
@pytest.mark.parametrize(("tokens", "config"), [(1, ONE[0]), (1, ONE[3]), (5, SEVERAL[0]), (5, SEVERAL[3]), (19, MANY[0])], ids=str)
@pytest.mark.parametrize("widths", [(70, 33, 1), (64, 130)], ids=str)
@pytest.mark.parametrize(
    ("planes", "experts", "scales"), [(1, 3, ("scale_in", "scale_out")), (2, 1, ("scale_in",)), (1, 2, ("scale_out",))]
)
def test_linears_of_one_input_in_one_launch(
    widths: tuple[int, ...],
    planes: int,
    experts: int,
    scales: tuple[str, ...],
    tokens: int,
    config: Config,
    dtype: torch.dtype,
    group: int | None,
) -> None:
    torch.manual_seed(0)
    linears = [make(planes, experts, 80, width, group, scales) for width in widths]
    x = torch.randn(tokens, 80).to(DEVICE, dtype)
    for divided in (config, config._replace(waves=0, block_bytes=min(config.block_bytes, 16 if config.is_dot else 64))):
        products = kernels.launch(x, [Stored(**tensors) for tensors in linears], group or 0, divided)
        for y, tensors in zip(products, linears, strict=True):
            assert y.is_contiguous()
            assert_right(y, x, tensors, group or 0)


@pytest.mark.parametrize("tokens", [1, 5, 19])
@pytest.mark.parametrize("widths", [(9, 20), (9, 20, 1)], ids=str)
def test_linears_of_one_input_that_is_divided(widths: tuple[int, ...], tokens: int) -> None:
    torch.manual_seed(0)
    linears = [make(1, 2, 2048, width, None) for width in widths]
    x, config = torch.randn(tokens, 2048, device=DEVICE), triton_tuning.candidates(tokens)[0]
    assert kernels.divide(config, tokens, sum(widths), 256, x.device)[1][2] > 1
    for y, tensors in zip(kernels.launch(x, [Stored(**tensors) for tensors in linears], 0, config), linears, strict=True):
        assert_right(y, x, tensors)


def test_which_linears_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    launch = kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda x, linears, *rest: counts.append(len(linears)) or launch(x, linears, *rest))
    first, second, other = make(1, 2, 64, 9, None), make(1, 2, 64, 20, None), make(1, 3, 64, 9, None)
    x = torch.randn(2, 3, 64, device=DEVICE)

    def together(*linears: dict[str, Any]) -> list[Tensor]:
        columns = {name: [tensors[name] for tensors in linears] for name in first}
        return kernels.packed_linears(x, **{name: [] if column[0] is None else column for name, column in columns.items()})

    for linears, expected in (((first, second), [2]), ((first, other), [1, 1]), ((first, second, first), [3]), ((first,) * 4, [1] * 4)):
        counts.clear()
        for y, tensors in zip(together(*linears), linears, strict=True):
            assert_right(y, x, tensors)
        assert counts == expected
    counts.clear()
    assert [y.shape for y in together(first, make(1, 2, 64, 0, None))] == [(2, 3, 9), (2, 3, 0)] and counts == [1]
