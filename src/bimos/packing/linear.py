"""The one module that runs every method: sign planes and the scales around them.

    y = sum_p  s_out_p(x) * (B_p @ (s_in_p(x) * x))  +  bias

Methods differ only in which tensors a layer stores (DESIGN, sections 2 and 6); the kernels take any subset. What has scales by group may
have offsets, too (`bimos.packing.groups`), and some of the weights can have more than the planes (`bimos.packing.salient`): both are
added here, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimos.errors import BimosError
from bimos.kernels import gpu, native, packed_linear
from bimos.packing.groups import GROUPED, check_groups, group_sums, product_form
from bimos.packing.salient import SALIENT, SPARSE, Parts, check_salient, make_parts, parts_product

if TYPE_CHECKING:
    from bimos.packing.together import Together

ACTIVATIONS = ("exact", "int8")

_Form = tuple[Tensor | None, Tensor | None, Tensor | None, Parts | None]


class PackedLinear(nn.Module):
    """A linear whose weights are bits.

    The tensors are buffers, not parameters: nothing here is trained, and the dtype that transformers reads off a
    model's parameters must stay that of its activations. They keep their dtypes under `model.to(dtype)`.

    Attributes:
        weight: uint8 `[planes, out, in/8]`.
        scale_in: `[planes, e, in]` or None.
        scale_out: `[planes, e, out]` or None.
        router: `[e, in]`, or None where e = 1.
        scale_group, scale_group_01, scale_group_int, offset_group: see `bimos.packing.groups`; or None.
        salient, scale_salient, sparse_mask, sparse_code, sparse_scale: see `bimos.packing.salient`; or None.
        bias: `[out]` or None.
        group_size: inputs of a group, of which the last of a row may have fewer; None without groups.
        int8: whether kernels may round sums of four inputs to 8 bits (`bimos.kernels.packed_linear`); not stored.
        together: with which other linears it is multiplied on a GPU, if any (`bimos.packing.together`); not stored, nor copied.
    """

    NAMES = ("weight", "scale_in", "scale_out", "router", *GROUPED, *SALIENT, *SPARSE, "bias")

    weight: Tensor
    scale_in: Tensor | None
    scale_out: Tensor | None
    router: Tensor | None
    scale_group: Tensor | None
    scale_group_01: Tensor | None
    scale_group_int: Tensor | None
    offset_group: Tensor | None
    salient: Tensor | None
    scale_salient: Tensor | None
    sparse_mask: Tensor | None
    sparse_code: Tensor | None
    sparse_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor], group_size: int | None = None) -> None:
        """Args: `group_size` is needed where the last group is shorter than the others.

        Raises:
            BimosError: the tensors do not fit together.
        """
        super().__init__()
        _check(tensors)
        check_salient(tensors)
        self.group_size = check_groups(tensors, group_size)
        for name in self.NAMES:
            tensor = tensors.get(name)
            self.register_buffer(name, None if tensor is None else tensor.detach().contiguous())
        self.out_features = self.weight.shape[1]
        self.in_features = 8 * self.weight.shape[2]
        self.int8 = False
        # What it was made of; scales of the signs, offsets, tiles for the product, and parts besides.
        self._form: tuple[Any, _Form] = (None, (None, None, None, None))
        self.together: Together | None = None
        self._beside = [name for name in (*SALIENT, *SPARSE) if name in tensors]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], group_size: int | None = None) -> Self:
        """The layer that holds these tensors (not copies), as a trainable layer's `pack()` and `group_size` give them."""
        return cls(tensors, group_size)

    @classmethod
    def empty(
        cls,
        layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        group_size: int | None = None,
        device: torch.device | str = "meta",
    ) -> Self:
        """A layer of this layout with uninitialised tensors, to load a checkpoint into."""
        return cls({name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in layout.items()}, group_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.together is not None and pays_together(x):
            y = self.together.product(self, x)
            if y is not None:
                return y
        # Not by attribute: a module looks for those three times before it finds a buffer, at a third of the cost of a small product.
        buffers: Any = self._buffers
        planes, bias, size = buffers["weight"], buffers["bias"], self.group_size or 0
        scales = buffers["scale_in"], buffers["scale_out"], buffers["router"]
        group, offset, tiles, parts = self._make_form(False) if torch.compiler.is_compiling() else self._product_form()
        if offset is None and parts is None:
            return packed_linear(x, planes, *scales, group, bias, tiles, self.int8, size)
        # Terms may be larger than their sum: it is rounded, they are not.
        wide = x if x.dtype == torch.float64 else x.float()
        rest = wide if parts is None or parts.rest is None else wide * parts.rest
        y = packed_linear(rest, planes, *scales, group, bias, tiles, self.int8, size)
        if offset is not None:
            y = y + F.linear(group_sums(wide, size), offset.to(wide.dtype))
        if parts is not None:
            y = y + parts_product(wide, planes, parts, self.int8, size)
        return y.to(x.dtype)

    def tiles(self) -> Tensor | None:
        """The planes in the order in which this CPU's kernels read them, made at the first call; None where nothing reads them so.

        Made anew when a plane or a scale was replaced or written to. Tensors made in inference mode do not tell who writes to them: of
        those, only `load_state_dict` is noticed.
        """
        return self._product_form()[2]

    def _product_form(self) -> _Form:
        buffers: Any = self._buffers
        weight = buffers["weight"]
        source = [native.isa(), weight.data_ptr(), _version(weight)]
        if self.group_size is not None:
            source += [(t.data_ptr(), _version(t)) for name in GROUPED if (t := buffers[name]) is not None]
        source += [(buffers[name].data_ptr(), _version(buffers[name])) for name in self._beside]
        if self._form[0] != source:
            self._form = source, self._make_form(weight.device.type == "cpu" and native.isa() is not None)
        return self._form[1]

    def _make_form(self, is_tiled: bool) -> _Form:
        buffers: Any = self._buffers
        size = self.group_size or 0
        group, offset = product_form(buffers)
        tiles = native.tile(buffers["weight"], group, size) if is_tiled else None
        return group, offset, tiles, make_parts(buffers, size, is_tiled) if self._beside else None

    @property
    def has_parts(self) -> bool:
        """Whether some of its weights have more than planes (`bimos.packing.salient`)."""
        return bool(self._beside)

    @property
    def format_version(self) -> int:
        """The first version of the format that has layers like this."""
        is_short = self.group_size is not None and self.in_features % self.group_size
        return 2 if is_short or self._beside or any(self._buffers[name] is not None for name in GROUPED[1:]) else 1

    def __getstate__(self) -> dict[str, Any]:
        # Copies make their own: nothing is lost, and torch cannot copy a sparse matrix.
        return self.__dict__ | {"_form": (None, (None, None, None, None)), "together": None}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._form = (None, (None, None, None, None))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {name: tensor for name in self.NAMES if (tensor := getattr(self, name)) is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keeping_dtype(fn), recurse)

    def extra_repr(self) -> str:
        experts = 1 if self.router is None else self.router.shape[0]
        return f"in_features={self.in_features}, out_features={self.out_features}, planes={self.weight.shape[0]}, experts={experts}"


def pays_together(x: Tensor) -> bool:
    """Whether linears of one input `x` are multiplied together: few tokens on a GPU with kernels, no gradients, no compiler at work."""
    if not x.is_cuda or torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return 0 < x.shape[:-1].numel() <= gpu.FEW and not gpu.problem(x.device)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def set_activation(model: nn.Module, activation: str) -> None:
    """How a packed model's linears treat their inputs on a CPU.

    Args:
        activation: "exact", or "int8": sums of four inputs are rounded to 8 bits (`bimos.kernels.packed_linear`), which is faster.

    Raises:
        BimosError: another name, or a model without packed linears.
    """
    if activation not in ACTIVATIONS:
        raise BimosError(f"activation '{activation}' is not known; known: {', '.join(ACTIVATIONS)}")
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    if not layers and activation != ACTIVATIONS[0]:
        raise BimosError(f"activation '{activation}' is for packed models; this one has no packed linears")
    for layer in layers:
        layer.int8 = activation == "int8"


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` as `nn.Module._apply` takes it, but moving tensors only: stored precision is part of the format."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


def _check(tensors: Mapping[str, Tensor]) -> None:
    unknown = sorted(set(tensors) - set(PackedLinear.NAMES))
    if unknown or "weight" not in tensors:
        raise BimosError(f"a packed linear stores {', '.join(PackedLinear.NAMES)}; got {', '.join(tensors)}")
    weight = tensors["weight"]
    if weight.dtype != torch.uint8 or weight.ndim != 3:
        raise BimosError(f"'weight' of a packed linear must be uint8 [planes, out, in/8]; got {weight.dtype} {list(weight.shape)}")
    planes, out_features, in_features = weight.shape[0], weight.shape[1], 8 * weight.shape[2]
    router: Any = tensors.get("router")
    experts = 1 if router is None else router.shape[0]
    expected = {
        "scale_in": (planes, experts, in_features),
        "scale_out": (planes, experts, out_features),
        "router": (experts, in_features),
        "bias": (out_features,),
    }
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise BimosError(f"'{name}' of a packed linear {list(weight.shape)} must have shape {list(shape)}; got {list(tensor.shape)}")
