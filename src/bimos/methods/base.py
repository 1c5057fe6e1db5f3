"""What a binarization method is: a config, a trainable layer, and the tensors that it stores.

A method is one file in this folder (or in a package that declares the entry-point group `bimos.methods`):

1. a frozen dataclass derived from `MethodConfig`, decorated with `@register`, that names the method;
2. a `TrainableLinear` that replaces `nn.Linear` while training.

Everything else (initialisation, block reconstruction, distillation, packing, loading, size reports, contract tests)
works through the few methods declared here and never asks for a method's name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from bimos.errors import BimosError
from bimos.methods.planes import SignPlane


class StoredTensor(NamedTuple):
    """Shape and dtype of one tensor of a packed linear."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bits(self) -> int:
        return 8 * self.dtype.itemsize * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """What is known of a linear's inputs when its scales are initialised.

    Attributes:
        second_moment: `E[x_j^2]`, float32 `[in]`.
        sample: some input vectors, float32 `[n, in]`, from which experts find their clusters. May be empty.
        gram: `E[x x^T]`, float32 `[in, in]`, of which `second_moment` is the diagonal; None where it is not known.
        importance: what each vector of the sample counts in `gram`, float32 `[n]`; None where all count the same.
    """

    second_moment: Tensor
    sample: Tensor
    gram: Tensor | None = None
    importance: Tensor | None = None

    @classmethod
    def uninformed(cls, in_features: int, device: torch.device | None = None) -> Self:
        """Statistics of white noise: initialisation then minimises the plain weight error."""
        return cls(torch.ones(in_features, device=device), torch.zeros(0, in_features, device=device))


LR_LATENT = 7.0e-4


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """Options of one method. Subclasses add fields; every field has a default.

    `trained` says whether a run trains the method's layers unless its config says otherwise; post-training methods end with the start.
    `uses_inputs` says whether `from_linear` looks at the statistics of inputs: where it does not, they are not measured.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    trained: ClassVar[bool] = True
    uses_inputs: ClassVar[bool] = True
    layer: ClassVar[type[TrainableLinear]]

    def packed_layout(self, in_features: int, out_features: int, bias: bool) -> dict[str, StoredTensor]:
        """The tensors that a packed linear of this method stores, by name (see `bimos.packing.linear`).

        Raises:
            BimosError: this method cannot store a linear of that shape.
        """
        raise NotImplementedError

    def of_linear(self, name: str) -> MethodConfig:
        """The options of one linear, by its name in the model, or in the block that `of_block` was asked for."""
        return self

    def of_block(self, name: str) -> MethodConfig:
        """The options within the block of this name (`model.layers.3`): linears go by what follows it."""
        return self

    def check_names(self, names: Collection[str]) -> None:
        """Raises BimosError: an option names linears, and there are no such ones among `names`."""

    def layout_of(self, name: str, in_features: int, out_features: int, bias: bool) -> dict[str, StoredTensor]:
        """`packed_layout` of the linear `name`."""
        return self.of_linear(name).packed_layout(in_features, out_features, bias)

    def lr_latent(self) -> float:
        """Of latents in the distillation, unless a run's config gives one."""
        return LR_LATENT

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class TrainableLinear(nn.Module):
    """A linear in training: a latent weight and whatever scales it. Interface for the trainers and the packer.

    `forward` takes `[..., in]` and returns `[..., out]`, and equals `PackedLinear` with the tensors of `pack()`
    up to the rounding of the scales to their stored precision. Two threads call it at once, each with a part of the batch: it keeps
    nothing on `self`, and does not write to what `sign_ste` gives it.

    Parameters are trained and kept in float32; what the start settles for good (which weights are salient, say) is a persistent buffer.
    """

    uses_signs: ClassVar[bool] = True  # whether latents are used as signs: those are made once for both threads

    def __init__(self, in_features: int, out_features: int, bias: bool, config: Any) -> None:
        """Parameters of the right shapes; their values do not matter. The bias is made here, zero."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.config = config
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def shaped_like(cls, linear: nn.Linear, config: Any) -> Self:
        """A layer with the shape, the device and the bias of `linear`.

        Raises:
            BimosError: the method cannot store a linear of that shape.
        """
        config.packed_layout(linear.in_features, linear.out_features, False)
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, config).to(linear.weight.device)
        if layer.bias is not None:
            layer.bias.data.copy_(linear.bias.detach())
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: MethodConfig, statistics: InputStatistics, generator: torch.Generator) -> Self:
        """The trainable layer that starts closest to `linear` on inputs with these statistics."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def pack(self) -> dict[str, Tensor]:
        """The stored tensors, with exactly the names, shapes and dtypes of `config.packed_layout`."""
        raise NotImplementedError

    @property
    def group_size(self) -> int | None:
        """Inputs of a group of what `pack` gives; None without groups, or where their number divides the inputs."""
        return None

    def roles(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter, once, by its role: `latent`, `scale`, `router` or `bias`. Roles get learning rates."""
        raise NotImplementedError

    def sign_planes(self) -> list[SignPlane]:
        """The planes that `forward` multiplies by, with `sign_linear` if not said otherwise."""
        return [SignPlane(latent) for latent in self.roles()["latent"]] if self.uses_signs else []

    def experts(self) -> list[nn.Parameter]:
        """Scales `[e, n]` of which a router mixes the rows, if there are any."""
        return []

    def plus_bias(self, y: Tensor) -> Tensor:
        """`y [..., out]` and the bias, if there is one, in the dtype of `y`."""
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def packed_bias(self) -> dict[str, Tensor]:
        """The last of the stored tensors, if there is a bias."""
        return {} if self.bias is None else {"bias": self.bias.detach().half()}

    def by_role(
        self, latent: list[nn.Parameter], scale: list[nn.Parameter], router: Sequence[nn.Parameter] = ()
    ) -> dict[str, list[nn.Parameter]]:
        """What `roles` returns, with the bias added."""
        return {"latent": latent, "scale": scale, "router": list(router), "bias": [] if self.bias is None else [self.bias]}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, config={self.config}"


MethodConfigT = TypeVar("MethodConfigT", bound=MethodConfig)

_REGISTRY: dict[str, type[MethodConfig]] = {}


def register(config_class: type[MethodConfigT]) -> type[MethodConfigT]:
    """Class decorator: make a method known by its `name`."""
    known = _REGISTRY.setdefault(config_class.name, config_class)
    if known.__qualname__ != config_class.__qualname__ or known.__module__ != config_class.__module__:
        raise BimosError(f"two methods are called '{config_class.name}': {known} and {config_class}; rename one")
    return config_class


def plane_layout(planes: int, in_features: int, out_features: int) -> dict[str, StoredTensor]:
    """The layout of sign planes: `weight`, eight weights a byte.

    Raises:
        BimosError: `in_features` is not a multiple of 8.
    """
    if in_features % 8:
        raise BimosError(
            f"a linear with in_features={in_features} cannot be packed: planes need a multiple of 8; exclude it with --set skip=[...]"
        )
    return {"weight": StoredTensor((planes, out_features, in_features // 8), torch.uint8)}


def bias_layout(out_features: int, bias: bool) -> dict[str, StoredTensor]:
    """The layout of a bias, or of none."""
    return {"bias": StoredTensor((out_features,), torch.float16)} if bias else {}
