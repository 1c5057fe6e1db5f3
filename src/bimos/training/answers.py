"""What a teacher's block answers, and how groups of linears are listened to while a block runs."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from bimos.lanes import Lanes
from bimos.training.ondisk import give_back, like
from bimos.training.streams import BlockCall, Stop, batches

KEPT_BYTES = 512 * 2**20  # of the teacher's answers; where they are more, its block runs anew for every group


@dataclasses.dataclass(frozen=True)
class Group:
    """Linears that share one input, and whether what they give is added to the residual stream as it is."""

    names: tuple[str, ...]
    residual: bool

    @property
    def heard(self) -> tuple[str, ...]:
        """The linears that must be listened to: one is enough for the input that all share."""
        return self.names if self.residual else self.names[:1]


class Answers:
    """What the teacher's block does on its stream `[n, T, d]`, `size` rows at a time, as far as some groups of linears need it.

    Of a group that writes to the residual stream, what its linears give; of another, what enters it.

    Attributes:
        behind: the stream behind the block; None where nothing is kept.
    """

    def __init__(self, teacher: nn.Module, groups: list[Group], call: BlockCall, stream: Tensor, size: int, lanes: Lanes) -> None:
        self.teacher, self._call, self._stream = teacher, call, stream
        self._kept: dict[str, Tensor] = {}
        self.behind: Tensor | None = None
        widths = {}
        for group in groups:
            for name in group.heard:
                linear: Any = teacher.get_submodule(name)
                widths[name] = linear.out_features if group.residual else linear.in_features
        if sum(widths.values()) * stream.shape[:-1].numel() * stream.element_size() > KEPT_BYTES:
            return
        # Few large pieces, which go back to the system at once; many small ones would leave holes.
        behind = self.behind = like(stream)
        self._kept = {name: like(stream, width) for name, width in widths.items()}

        def keep(rows: slice) -> None:
            found, behind[rows] = taps.run(call, stream[rows])
            for name, value in found.items():
                kept = self._kept[name][rows]
                kept.copy_(value.view_as(kept))
                give_back(kept)
            give_back(behind[rows])
            give_back(stream[rows])

        with Taps(teacher, groups, whole=True) as taps:
            lanes.map(keep, batches(len(stream), size))

    def forget(self, group: Group) -> None:
        """What was kept for this group alone is not asked for any more."""
        for name in group.heard:
            self._kept.pop(name, None)

    def entering(self, rows: slice) -> Tensor:
        """The stream before the block, `[size, T, d]`."""
        return self._stream[rows]

    def of(self, rows: slice, taps: Taps) -> dict[str, Tensor]:
        """By the linear's name: all that are kept, or those that `taps` listens to."""
        if not self._kept:
            return taps.run(self._call, self._stream[rows])[0]
        return {name: kept[rows] for name, kept in self._kept.items()}


class Taps:
    """Listens to groups of linears of one block while it is called, from any number of threads at once. A context manager.

    Args:
        groups: of which outputs (residual) or inputs (others) are wanted; the block is run until it has them.
        entry: of a linear before which the block is to stop; its input is wanted, too.
        whole: run all of the block.
    """

    def __init__(self, block: nn.Module, groups: Iterable[Group], entry: str | None = None, whole: bool = False) -> None:
        self._block, self._entry, self._whole = block, entry, whole
        self._names = {name: group.residual for group in groups for name in group.heard}
        self._here = threading.local()
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, residual in self._names.items():
            self._handles.append(self._block.get_submodule(name).register_forward_hook(self._record(name, residual)))
        if self._entry is not None:
            self._handles.append(self._block.get_submodule(self._entry).register_forward_pre_hook(self._enter))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, call: BlockCall, hidden: Tensor) -> tuple[dict[str, Tensor], Any]:
        """What is wanted on `hidden [B, T, d]`, by the linear's name; and what enters `entry`, or what the whole block gives."""
        self._here.found, self._here.other = {}, None
        with contextlib.suppress(Stop), torch.no_grad():
            self._here.other = call(self._block, hidden)
        return self._here.found, self._here.other

    def _record(self, name: str, residual: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            self._here.found[name] = output if residual else args[0]
            if self._entry is None and not self._whole and len(self._here.found) == len(self._names):
                raise Stop

        return hook

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self._here.other = args[0]
        raise Stop
