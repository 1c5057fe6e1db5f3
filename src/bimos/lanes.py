"""Two halves of the work side by side, each on half of the cores.

Operators of a small model are short, and most are not matrix products: split over cores one by one, they wait for each other
thousands of times a pass. A thread for each half of a batch waits once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Self, TypeVar

import torch
from torch import Tensor

LANES = 2  # the sum of two gradients is the same in either order, so that runs stay reproducible

Item = TypeVar("Item")
Result = TypeVar("Result")


class Lanes:
    """Runs a function on several items, or the backward pass of a loss that is a mean over rows, in two threads.

    A context manager: on leaving, the threads end.

    Args:
        rows: that can be divided; below two there is one lane, which is the caller's own thread.
        device: where they are; anything but a CPU means one lane.
        in_turn: one lane after the other, each on all cores: what one has in memory is gone when the other begins. For blocks whose
            operators are long enough to be shared.
    """

    def __init__(self, rows: int, device: torch.device, in_turn: bool = False) -> None:
        self._cores = torch.get_num_threads()
        wide = device.type == "cpu" and (in_turn or self._cores >= LANES) and rows >= LANES
        self.count = LANES if wide else 1
        self.in_turn = in_turn and wide
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.count > 1 and not self.in_turn:
            started = threading.Barrier(self.count)

            def start() -> None:
                torch.get_num_threads()  # a thread's first look takes the process's number; its own is to stay
                torch.set_num_threads(self._cores // self.count)
                started.wait(60)

            self._pool = ThreadPoolExecutor(self.count, "bimos-lane", initializer=start)
            for future in [self._pool.submit(int) for _ in range(self.count)]:
                future.result()
            torch.set_num_threads(self._cores)  # what later threads of others begin with
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    @property
    def side_by_side(self) -> int:
        """How many run at the same time."""
        return 1 if self.in_turn else self.count

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`function` of every item, in order. Gradient mode and autocast are those of a new thread: `function` sets its own."""
        if self._pool is None:
            return list(map(function, items))
        futures = [self._pool.submit(function, item) for item in items]
        wait(futures)  # all of them, whatever one raises: nothing goes on behind the caller's back
        return [future.result() for future in futures]

    def backward(self, loss_of: Callable[..., Tensor], batch: dict[str, Tensor], factor: float = 1.0) -> Tensor:
        """Add the gradient of `factor * loss_of(**batch)` to every parameter's; returns the loss, without its graph or `factor`."""

        rows = len(next(iter(batch.values())))

        def lane(part: dict[str, Tensor]) -> Tensor:
            share = len(next(iter(part.values()))) / rows
            loss = loss_of(**part)
            (loss * (share * factor)).backward()
            return loss.detach() * share

        if self._pool is None and not self.in_turn:
            return lane(batch)
        pieces = {name: tensor.chunk(self.count) for name, tensor in batch.items()}
        parts = [dict(zip(pieces, values, strict=True)) for values in zip(*pieces.values(), strict=True)]
        return torch.stack(self.map(lane, parts)).sum()
