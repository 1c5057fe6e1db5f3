"""OneBit, arXiv 2402.11295, as the BinaryMoS paper retrains it: one pair of static scales, no router.

    Y = ((X * g) sign(W)^T) * h + bias           g [in], h [out]

This is BinaryMoS with one expert; the softmax over a single expert is 1.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from bimos.errors import BimosError
from bimos.methods.base import TrainableLinear, register
from bimos.methods.binarymos import BinaryMoSConfig, BinaryMoSLinear


@register
@dataclasses.dataclass(frozen=True)
class OneBitConfig(BinaryMoSConfig):
    """Options of OneBit. The authors' start is `iterations=0, compensation=0, latent_magnitude=None`, without `initialise.refit`."""

    name: ClassVar[str] = "onebit"
    summary: ClassVar[str] = "one sign plane, static input and output scales (2402.11295)"
    layer: ClassVar[type[TrainableLinear]] = BinaryMoSLinear

    num_experts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts != 1:
            raise BimosError(f"num_experts={self.num_experts}: onebit has one; with more it is binarymos")
        if self.planes != 1 or self.second_plane:
            given = f"planes={self.planes}" if self.planes != 1 else f"second_plane={self.second_plane}"
            raise BimosError(f"{given}: onebit has one plane; with two it is binarymos")
