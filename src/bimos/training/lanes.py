"""The two halves of a batch side by side, each on half of the cores.

Operators of a small model are short, and most are not matrix products: split over cores one by one, they wait for each other
thousands of times a step. A thread for each half of the batch waits once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

LANES = 2  # the sum of two gradients is the same in either order, so that runs stay reproducible


class Lanes:
    """Runs the backward pass of a loss that is a mean over rows. A context manager: on leaving, its threads end.

    Args:
        rows: of every batch.
        device: where it is; anything but a CPU keeps batches whole.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._cores = torch.get_num_threads()
        wide = device.type == "cpu" and self._cores >= LANES and rows >= LANES
        self.count = LANES if wide else 1
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.count > 1:
            started = threading.Barrier(self.count)

            def start() -> None:
                torch.get_num_threads()  # a thread's first look takes the process's number; its own is to stay
                torch.set_num_threads(self._cores // self.count)
                started.wait()

            self._pool = ThreadPoolExecutor(self.count, "bimos-lane", initializer=start)
            for future in [self._pool.submit(int) for _ in range(self.count)]:
                future.result()
            torch.set_num_threads(self._cores)  # what later threads of others begin with
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def backward(self, loss_of: Callable[..., Tensor], batch: dict[str, Tensor], factor: float = 1.0) -> Tensor:
        """Add the gradient of `factor * loss_of(**batch)` to every parameter's; returns the loss, without its graph or `factor`."""

        def lane(part: dict[str, Tensor], share: float) -> Tensor:
            loss = loss_of(**part)
            (loss * (share * factor)).backward()
            return loss.detach() * share

        if self._pool is None:
            return lane(batch, 1.0)
        rows = len(next(iter(batch.values())))
        pieces = {name: tensor.chunk(self.count) for name, tensor in batch.items()}
        parts = [dict(zip(pieces, values, strict=True)) for values in zip(*pieces.values(), strict=True)]
        shares = [len(next(iter(part.values()))) / rows for part in parts]
        return torch.stack(list(self._pool.map(lane, parts, shares))).sum()
