"""BiLLM: binary weights after training, arXiv 2402.04291, equations 3 to 9 and algorithm 1.

By blocks of 128 columns, each row of a block with scales of its own, B = sign(W):

    salient columns        W ~ a1 B + a2 sign(W - a1 B)                            residual binarization
    the others             W ~ a_s B where |W| >= p,  a_c B elsewhere              p: a break point searched for the block

Salient are the columns with the largest sum of w^2 / U_jj^2 (U: the upper Cholesky factor of (H + damping)^-1); how many is searched
for, too. What a block loses is made good by the columns behind it. a = mean |W| over what it scales, without the means that the
authors' code subtracts first.

Both parts are two sign planes with two scales, which is what is stored: off the salient columns, with M = +1 where |W| >= p and -1
elsewhere,

    W ~ (a_s + a_c)/2 B + (a_s - a_c)/2 (B M)      weight [2, out, in/8], scale_group and scale_salient float16 [2, out, blocks]

and `salient` uint8 [in/8], a bit a column. For n rows and m columns in blocks of k, c of them salient, that makes
(2 n m + m + 64 n ceil(m/k)) / (n m) bits. The formula in use for BiLLM, (n (2 m + c) + m + 112 n ceil(m/k)) / (n m), has a third bit
for salient weights, whose membership bit goes unused there and is the second plane here, and three means of 16 bits a row and block.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimos.errors import BimosError
from bimos.methods.base import InputStatistics, MethodConfig, StoredTensor, TrainableLinear, bias_layout, plane_layout, register
from bimos.methods.compensation import carry_over, signs_of, statistics_factor
from bimos.methods.ste import compute_dtype, sign_ste
from bimos.packing.format import pack_signs
from bimos.packing.groups import by_input, count_groups

MOST_SALIENT = 50  # columns of a block, and never more than half of it
QUANTILES = 81  # of |w|, from 10 to 90 %, that are tried as break points


class Block(NamedTuple):
    """What stands for the columns of a block."""

    latent: Tensor  # [2, out, n], of which the planes are the signs
    scale: Tensor  # [2, out] of the columns that are not salient
    scale_salient: Tensor  # [2, out]
    salient: Tensor  # bool [n]

    def weight(self) -> Tensor:
        scale = torch.where(self.salient, self.scale_salient[..., None], self.scale[..., None])
        return (signs_of(self.latent) * scale).sum(0)


class BiLLMLinear(TrainableLinear):
    """A linear binarized by BiLLM. Gradients go straight through the signs of both planes; which columns are salient stays.

    Parameters:
        weight: latents, float32 `[2, out, in]`.
        scale, scale_salient: `[2, out, blocks]`.
        bias: `[out]` or None.

    Buffers:
        salient: bool `[in]`.
    """

    config: BiLLMConfig
    salient: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, config: BiLLMConfig) -> None:
        super().__init__(in_features, out_features, bias, config)
        blocks = count_groups(in_features, config.block_size)
        self.weight = nn.Parameter(torch.empty(2, out_features, in_features))
        self.scale = nn.Parameter(torch.ones(2, out_features, blocks))
        self.scale_salient = nn.Parameter(torch.ones(2, out_features, blocks))
        self.register_buffer("salient", torch.zeros(in_features, dtype=torch.bool))

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: Any, statistics: InputStatistics, generator: torch.Generator) -> Self:
        layer = cls.shaped_like(linear, config)
        weight = linear.weight.detach().float().clone()
        factor = statistics_factor(statistics, config.damping)
        with torch.no_grad():
            for index, start in enumerate(range(0, linear.in_features, config.block_size)):
                columns = weight[:, start : start + config.block_size]
                inputs = slice(start, start + columns.shape[1])
                block = binarize_block(columns, factor.diagonal()[inputs])
                carry_over(weight, factor, start, columns - block.weight())
                layer.weight[:, :, inputs], layer.salient[inputs] = block.latent, block.salient
                layer.scale[:, :, index], layer.scale_salient[:, :, index] = block.scale, block.scale_salient
        return layer

    @property
    def group_size(self) -> int:
        return self.config.block_size

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(compute_dtype(x))
        salient, others = (by_input(scale, self.group_size, self.in_features) for scale in (self.scale_salient, self.scale))
        weight = sign_ste(self.weight, x) * torch.where(self.salient, salient, others).to(x.dtype)
        y = F.linear(x, weight.sum(0))
        return self.plus_bias(y)

    def pack(self) -> dict[str, Tensor]:
        return {
            "weight": pack_signs(self.weight.detach()),
            "scale_group": self.scale.detach().half(),
            "salient": pack_signs(self.salient.float() - 0.5),
            "scale_salient": self.scale_salient.detach().half(),
        } | self.packed_bias()

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return self.by_role(latent=[self.weight], scale=[self.scale, self.scale_salient])


@register
@dataclasses.dataclass(frozen=True)
class BiLLMConfig(MethodConfig):
    """Options of BiLLM: columns of a block, and `damping`, a share of the mean of H's diagonal."""

    name: ClassVar[str] = "billm"
    summary: ClassVar[str] = "signs in two classes by a break point, salient columns in two planes (2402.04291); not trained"
    layer: ClassVar[type[TrainableLinear]] = BiLLMLinear
    trained: ClassVar[bool] = False

    block_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.block_size < 8 or self.block_size % 8:
            raise BimosError(f"block_size={self.block_size}: must be a positive multiple of 8")
        if not 0 < self.damping < float("inf"):
            raise BimosError(f"damping={self.damping}: must be positive")

    def packed_layout(self, in_features: int, out_features: int, bias: bool) -> dict[str, StoredTensor]:
        scales = StoredTensor((2, out_features, count_groups(in_features, self.block_size)), torch.float16)
        layout = plane_layout(2, in_features, out_features) | {
            "scale_group": scales,
            "salient": StoredTensor((in_features // 8,), torch.uint8),
            "scale_salient": scales,
        }
        return layout | bias_layout(out_features, bias)


def binarize_block(weight: Tensor, factor: Tensor) -> Block:
    """What BiLLM puts in the place of the weights `[out, n]` of a block; `factor [n]`: the diagonal of U there."""
    order = (weight / factor).square().sum(0).argsort(descending=True, stable=True)
    count = salient_count(weight[:, order].abs())
    salient = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    salient[order[:count]] = True
    magnitude = weight.abs()
    point = break_point(magnitude[:, ~salient])
    signs = signs_of(weight)

    is_large = magnitude >= point
    small, large = (_means(magnitude, chosen & ~salient) for chosen in (~is_large, is_large))
    scale = torch.stack([large + small, large - small]).div(2).half().float()
    margin = (magnitude - point).abs().clamp_min(1e-8)  # a latent of 0 would be +1 whatever it stands for

    first = _means(magnitude, salient.expand_as(weight)).half().float()
    residual = weight - first[:, None] * signs
    second = _means(residual.abs(), salient.expand_as(weight)).half().float()
    latent = torch.stack([weight, torch.where(salient, residual, torch.where(is_large, margin, -margin) * signs)])
    return Block(latent, scale, torch.stack([first, second]), salient)


def salient_count(magnitude: Tensor) -> int:
    """How many columns from the first on are to be salient: those and the others, in two planes each, leave the least squared error.

    As the authors count: with one plane for the others more salient columns would nearly always be better.

    Args:
        magnitude: |w| `[out, n]`, the most salient columns first.
    """
    n = magnitude.shape[1]
    errors = [
        _residual_error(magnitude[:, :count]) + _residual_error(magnitude[:, count:]) for count in range(1, min(MOST_SALIENT, n // 2) + 1)
    ]
    return 1 + min(range(len(errors)), key=errors.__getitem__)


def break_point(magnitude: Tensor) -> Tensor:
    """The `p` between the two classes of `|w| [out, n]`, each with one scale a row, that leaves the least squared error: a scalar."""
    shares = torch.linspace(0.1, 0.9, QUANTILES, device=magnitude.device)
    ordered = magnitude.flatten().sort().values  # torch.quantile stops at 16 million
    points = ordered[(shares * (len(ordered) - 1)).round().long()]
    total, count = magnitude.sum(1), magnitude.shape[1]

    def kept(point: Tensor) -> float:
        """Of the sum of squares, what the scales keep: n a^2 for each class."""
        is_large = magnitude >= point
        large, number = (magnitude * is_large).sum(1), is_large.sum(1)
        return (large.square() / number.clamp_min(1) + (total - large).square() / (count - number).clamp_min(1)).sum().item()

    return max(points, key=kept)


def _means(values: Tensor, mask: Tensor) -> Tensor:
    """Of each row, over the mask; 0 where it is empty."""
    return (values * mask).sum(1) / mask.sum(1).clamp_min(1)


def _residual_error(magnitude: Tensor) -> float:
    """Squared error of two planes with two scales a row, the second for what the first leaves."""
    rest = (magnitude - magnitude.mean(1, keepdim=True)).abs()
    return (rest - rest.mean(1, keepdim=True)).square().sum().item()
