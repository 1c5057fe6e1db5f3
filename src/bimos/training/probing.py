"""What a method's layers hold while they train: asked of a small one."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from bimos.methods.base import InputStatistics, MethodConfig, TrainableLinear
from bimos.methods.ste import SharedSigns, tables_pay

TOKENS, IN, OUT = 64, 256, 128  # of the smallest probe; inputs are then as many as whole groups of the method have


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes of one linear: what autograd keeps beside its parameters and its input, and signs.

    Attributes:
        of_input, of_output: for a token and an input, and for a token and an output.
        of_token: for a token.
        of_weight: for a weight, in every lane: a weight made for the product.
        planes: of signs, that lanes share, a weight.
        of_signs: for a weight, of those planes: values, or bits and their tiles where products go by tables.
        of_signs_alone: the same where no lanes share them, of what one pass keeps until its gradients.
    """

    of_input: float
    of_output: float
    of_token: float
    of_weight: float
    planes: int
    of_signs: int
    of_signs_alone: int

    def bytes_a_token(self, in_features: int, out_features: int) -> float:
        return self.of_input * in_features + self.of_output * out_features + self.of_token


def kept_by(method: MethodConfig, dtype: torch.dtype, on_cpu: bool = True) -> Kept:
    """Of a layer whose inputs have `dtype`, on this machine's CPU or a GPU, from three sizes and two numbers of tokens."""
    n = math.lcm(IN, getattr(method, "group_size", None) or 1)
    once = {(n_in, n_out): _held(method, TOKENS, n_in, n_out, dtype) for n_in, n_out in ((n, OUT), (2 * n, OUT), (n, 2 * OUT))}
    more = {size: _held(method, 2 * TOKENS, *size, dtype) - held for size, held in once.items()}  # of TOKENS tokens alone
    small = more[n, OUT]
    of_input = (more[2 * n, OUT] - small) / (TOKENS * n)
    of_output = (more[n, 2 * OUT] - small) / (TOKENS * OUT)
    of_token = small / TOKENS - of_input * n - of_output * OUT
    planes = _layer(method, n, OUT).sign_planes()
    by_tables = [on_cpu and tables_pay(plane.latent, dtype) and not plane.as_values for plane in planes]
    shared = sum(1 if tables else dtype.itemsize for tables in by_tables)
    alone = sum(1 if tables else dtype.itemsize * plane.as_values for tables, plane in zip(by_tables, planes, strict=True))
    return Kept(of_input, of_output, of_token, (once[n, OUT] - small) / (n * OUT), len(planes), shared, alone)


def _layer(method: MethodConfig, n_in: int, n_out: int) -> TrainableLinear:
    return method.layer.from_linear(nn.Linear(n_in, n_out, bias=False), method, InputStatistics.uninformed(n_in), torch.Generator())


def _held(method: MethodConfig, tokens: int, n_in: int, n_out: int, dtype: torch.dtype) -> int:
    layer = _layer(method, n_in, n_out)
    x = torch.zeros(1, tokens, n_in, dtype=dtype, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    planes = layer.sign_planes()
    with SharedSigns(planes, dtype):
        shared = [signs.leaf for plane in planes for signs in plane.latent.shared_signs.values()]  # type: ignore[attr-defined]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=dtype == torch.bfloat16):
            y = layer(x)
        known = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters(), *layer.buffers(), *shared)}
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    del y
    return sum(size for place, size in storages.items() if place not in known)
