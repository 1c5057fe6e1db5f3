"""BinaryMoS: mixture of scales, arXiv 2406.12311 (NeurIPS 2024), equations 3 to 5.

    G     = softmax(X Wr)                      X [tokens, in], router Wr stored as [e, in], softmax in float32
    s_in  = G S_in,   s_out = G S_out          S_in [e, in], S_out [e, out]: the scaling experts
    Y     = ((X * s_in) sign(W)^T) * s_out + bias

One router per linear drives both mixes. Stored: one plane, `e` pairs of float16 vectors, a float16 router.

With `planes=2`, which the paper has not, a second plane with scaling experts of its own is added to Y; one router drives all mixes.
Both planes come from one latent, whose four levels they are (`bimos.methods.planes`), and are trained on their common error.

With `second_plane=v_proj+layers.0` those linears have two planes whose names contain one of these, and all others one.

With `group_size=g`, which the paper has not either, every g inputs of a row have a float16 scale of their own besides, in each plane:
B_p in the place of sign(W) has the entries s_pik sign(W_pij), k the group of j.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bimos.errors import BimosError
from bimos.methods.base import InputStatistics, MethodConfig, StoredTensor, TrainableLinear, bias_layout, plane_layout, register
from bimos.methods.compensation import Fit, compensated_fit
from bimos.methods.coupled import GroupedFit, coupled_fit, coupled_latents
from bimos.methods.experts import cluster, tune_scales
from bimos.methods.grouped import grouped_sign_linear
from bimos.methods.mixing import mix, route_and_mix
from bimos.methods.names import AT_START, behind, contains
from bimos.methods.planes import Plane, SignPlane, decision
from bimos.methods.rank_one import weighted_rank_one
from bimos.methods.ste import compute_dtype, sign_linear, sign_ste
from bimos.packing.format import pack_signs
from bimos.packing.groups import count_groups


class BinaryMoSLinear(TrainableLinear):
    """Trainable BinaryMoS linear.

    Parameters:
        weight: latent, float32 `[out, in]`; with two planes in steps from level to level.
        scale_in `[e, in]`, scale_out `[e, out]`: the experts.
        router: `[e, in]`, None with one expert.
        scale_in_2, scale_out_2: of the second plane, or None.
        scale_group: `[planes, out, groups]`, or None.
        bias: `[out]` or None.
    """

    config: BinaryMoSConfig

    def __init__(self, in_features: int, out_features: int, bias: bool, config: BinaryMoSConfig) -> None:
        super().__init__(in_features, out_features, bias, config)
        experts = config.num_experts
        groups = count_groups(in_features, config.group_size) if config.group_size else 0
        self.scale_group = nn.Parameter(torch.ones(config.planes, out_features, groups)) if groups else None
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.scale_in = nn.Parameter(torch.ones(experts, in_features))
        self.scale_out = nn.Parameter(torch.ones(experts, out_features))
        self.router = nn.Parameter(torch.zeros(experts, in_features)) if experts > 1 else None
        two = config.planes == 2
        self.scale_in_2 = nn.Parameter(torch.ones(experts, in_features)) if two else None
        self.scale_out_2 = nn.Parameter(torch.ones(experts, out_features)) if two else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: Any, statistics: InputStatistics, generator: torch.Generator) -> Self:
        layer = cls.shaped_like(linear, config)
        weight = linear.weight.detach().float()
        experts = config.num_experts
        sample = statistics.sample
        distinct = config.distinct_experts and experts > 1 and len(sample) >= 8 * experts
        fit: Fit | GroupedFit | None = None
        coupled: list[GroupedFit] = []
        clusters = None
        if config.planes == 2 or config.group_size:
            options = config.planes, config.group_size, config.compensation, config.iterations
            coupled = coupled_fit(weight, statistics.second_moment, statistics.gram, *options)
            fit = coupled[0]
        elif statistics.gram is not None and config.compensation:
            fit = compensated_fit(weight, statistics.gram, config.compensation, config.iterations)
        if fit is not None:
            rows, columns, decided = fit.row.expand(experts, -1), fit.column.expand(experts, -1), fit.decision
        else:
            clusters = cluster(sample, experts, generator) if distinct else None
            fits = []
            for expert in range(experts):
                second_moment = statistics.second_moment
                if clusters is not None:
                    # Half the cluster's own statistics: a small cluster must not forget what all tokens have in common.
                    second_moment = (second_moment + sample[clusters.labels == expert].square().mean(0)) / 2
                fits.append(weighted_rank_one(weight.abs(), second_moment, config.iterations))
            rows, columns, decided = torch.stack([r for r, _ in fits]), torch.stack([c for _, c in fits]), weight
        with torch.no_grad():
            layer.scale_out.copy_(rows)
            layer.scale_in.copy_(columns)
            if layer.scale_group is not None:
                layer.scale_group.copy_(torch.stack([part.group for part in coupled]))
            if len(coupled) < 2:
                expected = coupled[0].scales if coupled else rows.mean(0)[:, None] * columns.mean(0)
                layer.weight.copy_(_latents(decided, expected, config.latent_magnitude))
            else:
                layer.scale_out_2.copy_(coupled[1].row)  # type: ignore[union-attr]
                layer.scale_in_2.copy_(coupled[1].column)  # type: ignore[union-attr]
                layer.weight.copy_(coupled_latents(*coupled))
            if layer.router is not None:
                if clusters is not None:
                    layer.router.copy_(clusters.router)
                else:
                    # The authors' only symmetry breaker: nn.Linear's own random start.
                    bound = linear.in_features**-0.5
                    layer.router.copy_((torch.rand(layer.router.shape, generator=generator) * 2 - 1) * bound)
        if fit is not None and config.scale_steps and len(sample) >= 8 * experts and (distinct or experts == 1):
            tune_scales(layer, weight, statistics, config.scale_steps, generator)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(compute_dtype(x))
        gate = None
        if self.router is None:
            scaled = mix(x, None, self.scale_in)
        else:
            scaled, gate = route_and_mix(x, self.router, self.scale_in)
        if self.scale_in_2 is None or self.scale_out_2 is None:
            return self.plus_bias(mix(self._product(scaled, Plane.ONLY), gate, self.scale_out))
        y = mix(self._product(scaled, Plane.FIRST), gate, self.scale_out)
        y = y + mix(self._product(mix(x, gate, self.scale_in_2), Plane.SECOND), gate, self.scale_out_2)
        return self.plus_bias(y)

    def _product(self, x: Tensor, plane: Plane) -> Tensor:
        if self.scale_group is None:
            return sign_linear(x, self.weight, plane)
        scale = self.scale_group[int(plane is Plane.SECOND)]
        return grouped_sign_linear(x, sign_ste(self.weight, x, plane), scale, self.config.group_size or self.in_features)

    @property
    def group_size(self) -> int | None:
        return self.config.group_size

    def pack(self) -> dict[str, Tensor]:
        tensors = {
            "weight": torch.stack([pack_signs(decision(signs.latent.detach(), signs.plane)) for signs in self.sign_planes()]),
            "scale_in": torch.stack([part.detach().half() for part in self._each(self.scale_in, self.scale_in_2)]),
            "scale_out": torch.stack([part.detach().half() for part in self._each(self.scale_out, self.scale_out_2)]),
        }
        if self.router is not None:
            tensors["router"] = self.router.detach().half()
        if self.scale_group is not None:
            tensors["scale_group"] = self.scale_group.detach().half()
        return tensors | self.packed_bias()

    @staticmethod
    def _each(first: nn.Parameter, second: nn.Parameter | None) -> list[nn.Parameter]:
        return [first] if second is None else [first, second]

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return self.by_role(
            latent=[self.weight],
            scale=[*self._mixed(), *([] if self.scale_group is None else [self.scale_group])],
            router=[] if self.router is None else [self.router],
        )

    def sign_planes(self) -> list[SignPlane]:
        planes = (Plane.ONLY,) if self.scale_in_2 is None else (Plane.FIRST, Plane.SECOND)
        return [SignPlane(self.weight, plane, as_values=self.scale_group is not None) for plane in planes]

    def experts(self) -> list[nn.Parameter]:
        return [] if self.router is None else self._mixed()

    def _mixed(self) -> list[nn.Parameter]:
        return [*self._each(self.scale_in, self.scale_in_2), *self._each(self.scale_out, self.scale_out_2)]


@register
@dataclasses.dataclass(frozen=True)
class BinaryMoSConfig(MethodConfig):
    """Options of BinaryMoS. The defaults start better than the authors' on a small budget; see docs/decisions.md.

    The authors' start is `iterations=0, compensation=0, distinct_experts=False, latent_magnitude=None`, without `initialise.refit`.
    """

    name: ClassVar[str] = "binarymos"
    summary: ClassVar[str] = "one sign plane, scales mixed per token from experts (2406.12311)"
    layer: ClassVar[type[TrainableLinear]] = BinaryMoSLinear

    num_experts: int = 4
    planes: int = 1  # 2: two signs a weight, each plane with scales of its own
    second_plane: str = ""  # parts of names, with + between them: linears that have two planes where others have one
    group_size: int | None = None  # inputs of a row that have a scale of their own in each plane, beside the mixed ones; None: none
    compensation: int = 3  # rounds in which signs make good each other's errors, where inputs are known; 0: signs of the weights
    iterations: int = 8  # of activation-weighted least squares for the scales; 0: rank-1 SVD of |W|
    distinct_experts: bool = True  # experts start apart: by the steps below, or from clusters of tokens
    scale_steps: int = 60  # of gradient, that tune scales and set experts apart where inputs are known
    latent_magnitude: float | None = 0.25  # mean |latent| at the start; None: the teacher's weights as they are

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= 256:
            raise BimosError(f"num_experts={self.num_experts}: must be from 1 to 256")
        if self.planes not in (1, 2):
            raise BimosError(f"planes={self.planes}: must be 1 or 2")
        if self.second_plane and self.planes != 1:
            raise BimosError(f"second_plane={self.second_plane}: all linears have two with planes={self.planes}; leave one of them out")
        if self.second_plane and not all(all(part.split(".")) for part in self._parts()):
            raise BimosError(f"second_plane={self.second_plane}: must be parts of names, with + between them, as v_proj+layers.0")
        if self.group_size is not None and self.group_size < 1:
            raise BimosError(f"group_size={self.group_size}: must be positive, or null for no groups")
        for name in ("iterations", "compensation", "scale_steps"):
            if getattr(self, name) < 0:
                raise BimosError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.latent_magnitude is not None and self.latent_magnitude <= 0:
            raise BimosError(f"latent_magnitude={self.latent_magnitude}: must be positive, or null for the teacher's weights as they are")

    def _parts(self) -> list[str]:
        return self.second_plane.split("+") if self.second_plane else []

    def of_linear(self, name: str) -> BinaryMoSConfig:
        if not self.second_plane:
            return self
        planes = 2 if any(contains(name, part) for part in self._parts()) else 1
        return dataclasses.replace(self, planes=planes, second_plane="")

    def of_block(self, name: str) -> BinaryMoSConfig:
        if any(contains(name, part) for part in self._parts()):
            return dataclasses.replace(self, planes=2, second_plane="")
        within = [rest for part in self._parts() for rest in (part, *behind(name, part))]
        return dataclasses.replace(self, second_plane="+".join(within))

    def check_names(self, names: Collection[str]) -> None:
        for part in self._parts():
            if part.startswith(AT_START) or not any(contains(name, part) for name in names):
                raise BimosError(f"second_plane={self.second_plane}: no linear that is converted has '{part}' in its name")
        if self.second_plane and all(any(contains(name, part) for part in self._parts()) for name in names):
            raise BimosError(f"second_plane={self.second_plane}: that is all linears, which planes=2 is for")

    def lr_latent(self) -> float:
        # Behind the blocks four levels are near the teacher; what turns by chance is then a loss.
        return 1.5e-4 if self.planes == 2 else super().lr_latent()

    def packed_layout(self, in_features: int, out_features: int, bias: bool) -> dict[str, StoredTensor]:
        experts = self.num_experts
        layout = plane_layout(self.planes, in_features, out_features) | {
            "scale_in": StoredTensor((self.planes, experts, in_features), torch.float16),
            "scale_out": StoredTensor((self.planes, experts, out_features), torch.float16),
        }
        if experts > 1:
            layout["router"] = StoredTensor((experts, in_features), torch.float16)
        if self.group_size is not None:
            groups = count_groups(in_features, self.group_size)
            layout["scale_group"] = StoredTensor((self.planes, out_features, groups), torch.float16)
        return layout | bias_layout(out_features, bias)


def _latents(decided: Tensor, expected: Tensor, magnitude: float | None) -> Tensor:
    """Latents `[out, in]` of what signs were taken of, and of the sizes that scales give them."""
    if magnitude is None:
        return decided
    # Divided by what the scales expect of it, every latent is as likely to flip as any other.
    latents = decided / expected.abs().clamp_min(1e-8)
    # Errors carried over make some decisions extreme; all should stay possible to undo.
    most = 6 * latents.abs().median()
    latents.clamp_(-most, most)
    return latents.mul_(magnitude / latents.abs().mean().clamp_min(1e-8))
