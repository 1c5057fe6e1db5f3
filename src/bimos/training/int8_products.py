"""Products of a frozen model in int8, which processors with VNNI do twice as fast as bfloat16: for the teacher of a distillation.

    y = (round(x / s) round(w / r)^T) * s * r + bias       s = max |x| / 127 of each token, r = max |w| / 127 of each row

What the teacher then says differs from what it says in bfloat16 by far less than any student does (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bimos.kernels import native

ROWS = 16  # fewer tokens go as they went: torch's product of integers wants more


class Int8Linear(nn.Linear):
    """A linear that multiplies rounded inputs with rounded weights where there are enough tokens and no gradient is asked for."""

    rounded: tuple[Tensor, Tensor]  # int8 `[in, out]`, a view of rows; float32 `[out]`

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.numel() // self.in_features
        if torch.is_grad_enabled() or tokens <= ROWS or x.device.type != "cpu" or x.dtype != self.weight.dtype:
            return super().forward(x)
        weight, column = self.rounded
        values, row = torch.ops.bimos.round_rows(x)
        bias = None if self.bias is None else self.bias.float()
        y: Tensor = torch.ops.bimos.scale_sums(torch._int_mm(values, weight), row, column, bias, x)
        return y.view(*x.shape[:-1], self.out_features)


@contextmanager
def int8_products(model: nn.Module | None) -> Iterator[None]:
    """Within it, linears of `model` multiply in int8, where that is the faster way; its head stays as it is.

    Each holds a second copy of its weight, a byte each, meanwhile.
    """
    changed: list[nn.Linear] = []
    if model is not None and pays():
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        for module in model.modules():
            if type(module) is nn.Linear and module is not head and _is_covered(module):
                rows, scale = torch.ops.bimos.round_rows(module.weight.detach())
                module.__class__ = Int8Linear
                module.rounded = (rows.T, scale)  # type: ignore[assignment]
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            module.__class__ = nn.Linear
            del module.rounded


def pays() -> bool:
    """Whether int8 is faster than bfloat16: AVX-512 with VNNI, measured without a matrix unit."""
    return native.isa() == "avx512" and not torch.cpu._is_amx_tile_supported()


def _is_covered(linear: nn.Linear) -> bool:
    weight: Any = linear.weight
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.shape[0] % 8 == 0 and weight.shape[1] % 8 == 0
