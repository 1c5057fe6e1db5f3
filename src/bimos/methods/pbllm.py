"""PB-LLM without training, arXiv 2310.00034, section 3.2: a share of the weights at 8 bits, the signs of all others.

    w_hat = a_i sign(w)                       a_i = mean |w| over the row's weights that are not salient
    w_hat = a_i sign(w) + r_i code            salient: the tenth with the largest w^2 / U_jj^2, codes from -127 to 127

U: upper Cholesky factor of (H + damping)^-1. Columns are rounded in order, each column's error made good by those behind it (GPTQ).
The paper's 8 bits span a row from its least weight to its largest; here they span what the sign leaves, which no plane need leave room for.

Stored: weight [1, out, in/8], scale_out, and a sparse matrix besides: sparse_mask uint8 [out, in/8], a bit a weight, sparse_code int8
[salient weights], row by row, sparse_scale float16 [out]. Bits: 2 + 8 * share + 32/in; the paper's 1.7 leave out the mask and the signs of
salient weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimos.errors import BimosError
from bimos.methods.base import InputStatistics, MethodConfig, StoredTensor, TrainableLinear, bias_layout, plane_layout, register
from bimos.methods.compensation import signs_of, statistics_factor, sweep
from bimos.methods.planes import SignPlane
from bimos.methods.ste import compute_dtype, sign_linear
from bimos.packing.format import pack_signs

LARGEST = 127
LEAST_SCALE = 2.0**-14  # the smallest normal float16


class PBLLMLinear(TrainableLinear):
    """A linear partially binarized. Gradients go straight through signs and rounding; which weights are salient stays.

    Parameters:
        weight: latent of the signs, float32 `[out, in]`.
        residual: latent of the codes, what the sign leaves of each salient weight, float32 `[salient]`, row by row.
        scale: of the signs, `[out]`.
        scale_salient: a step of the codes, `[out]`.
        bias: `[out]` or None.

    Buffers:
        salient: bool `[out, in]`.
    """

    config: PBLLMConfig
    salient: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, config: PBLLMConfig) -> None:
        super().__init__(in_features, out_features, bias, config)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.residual = nn.Parameter(torch.empty(config.count(in_features, out_features)))
        self.scale = nn.Parameter(torch.ones(out_features))
        self.scale_salient = nn.Parameter(torch.ones(out_features))
        self.register_buffer("salient", torch.zeros(out_features, in_features, dtype=torch.bool))

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: Any, statistics: InputStatistics, generator: torch.Generator) -> Self:
        layer = cls.shaped_like(linear, config)
        weight = linear.weight.detach().float()
        factor = statistics_factor(statistics, config.damping)
        saliency = (weight / factor.diagonal()).square().flatten()
        salient = torch.zeros_like(saliency, dtype=torch.bool)
        salient[saliency.topk(len(layer.residual)).indices] = True
        salient = salient.view_as(weight)
        scale = ((weight.abs() * ~salient).sum(1) / (~salient).sum(1).clamp_min(1)).half().float()
        left = (weight - scale[:, None] * signs_of(weight)) * salient
        step = (left.abs().amax(1) / LARGEST).clamp_min(LEAST_SCALE).half().float()

        def rounded(j: int, value: Tensor) -> Tensor:
            sign = scale * signs_of(value)
            return sign + torch.where(salient[:, j], step * codes_of(value - sign, step), 0.0)

        weight = sweep(weight, factor, rounded)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.residual.copy_((weight - scale[:, None] * signs_of(weight))[salient])
            layer.scale.copy_(scale)
            layer.scale_salient.copy_(step)
            layer.salient.copy_(salient)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(compute_dtype(x))
        step = self.scale_salient[self.salient.nonzero()[:, 0]]
        within = self.residual.detach().abs() <= LARGEST * step.detach()
        sparse = step * codes_of(self.residual.detach(), step.detach()) + (self.residual - self.residual.detach()) * within
        y = sign_linear(x, self.weight) * self.scale.to(x.dtype)
        y = y + F.linear(x, torch.zeros_like(self.weight).masked_scatter(self.salient, sparse).to(x.dtype))
        return self.plus_bias(y)

    def pack(self) -> dict[str, Tensor]:
        step = self.scale_salient.detach()[self.salient.nonzero()[:, 0]]
        codes = codes_of(self.residual.detach(), step)
        if codes.isnan().any():
            raise BimosError("weights with NaN cannot be packed; check the model or lower the learning rate")
        return {
            "weight": pack_signs(self.weight.detach())[None],
            "scale_out": self.scale.detach().half()[None, None],
            "sparse_mask": pack_signs(self.salient.float() - 0.5),
            "sparse_code": codes.to(torch.int8),
            "sparse_scale": self.scale_salient.detach().half(),
        } | self.packed_bias()

    def sign_planes(self) -> list[SignPlane]:
        return [SignPlane(self.weight)]

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return self.by_role(latent=[self.weight, self.residual], scale=[self.scale, self.scale_salient])


@register
@dataclasses.dataclass(frozen=True)
class PBLLMConfig(MethodConfig):
    """Options of PB-LLM: the share of salient weights, and `damping`, a share of the mean of H's diagonal."""

    name: ClassVar[str] = "pbllm"
    summary: ClassVar[str] = "a tenth of the weights at 8 bits, the signs of the others (2310.00034); not trained"
    layer: ClassVar[type[TrainableLinear]] = PBLLMLinear
    trained: ClassVar[bool] = False

    salient: float = 0.1
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.salient < 1 or not (10_000 * self.salient - round(10_000 * self.salient)) ** 2 < 1e-12:
            raise BimosError(f"salient={self.salient}: must be a share between 0 and 1 with four decimals at most")
        if not 0 < self.damping < float("inf"):
            raise BimosError(f"damping={self.damping}: must be positive")

    def count(self, in_features: int, out_features: int) -> int:
        """Salient weights of a linear."""
        return in_features * out_features * round(10_000 * self.salient) // 10_000

    def packed_layout(self, in_features: int, out_features: int, bias: bool) -> dict[str, StoredTensor]:
        layout = plane_layout(1, in_features, out_features) | {
            "scale_out": StoredTensor((1, 1, out_features), torch.float16),
            "sparse_mask": StoredTensor((out_features, in_features // 8), torch.uint8),
            "sparse_code": StoredTensor((self.count(in_features, out_features),), torch.int8),
            "sparse_scale": StoredTensor((out_features,), torch.float16),
        }
        return layout | bias_layout(out_features, bias)


def codes_of(residual: Tensor, step: Tensor) -> Tensor:
    """The whole numbers of steps nearest to what signs leave, as int8 holds them."""
    return (residual / step).round().clamp(-LARGEST, LARGEST)
