"""The processes that work on one run, as `torchrun` or `accelerate launch` starts them; by default this one alone.

A batch is divided between them, so that a run does not depend on how many there are. What hangs on the time or on a file is decided by the
first and told to the others: they would wait for each other for ever if one went another way.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bimos.errors import BimosError

PATIENCE = datetime.timedelta(days=7)  # while one reads text or measures, the others wait; that one has ended, its connection tells
LOST = "another process of this run has ended; checkpoints are kept: start all of them again with --resume"
TOLD = "told to end, as launchers do when another process of the run has; checkpoints are kept: start all of them again with --resume"
GRACE = 10.0  # seconds in which a process that is told to end may do so by itself; torchrun kills after 30
BROKEN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL")  # of errors without a type of their own

Result = TypeVar("Result")


class Processes:
    """Process `rank` of `count`. Every method but `share` and `divided` is called by all of them, in the same order."""

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.count, self.device = rank, count, device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def divided(self, size: int, key: str) -> int:
        """What a process has of a batch of `size`. Raises BimosError: it cannot be divided."""
        if size % self.count:
            above = f"--set {key}={self.count * -(-size // self.count)}"
            raise BimosError(f"{key}={size} cannot be divided between {self.count} processes: start as many as divide it, or {above}")
        return size // self.count

    def share(self, rows: Tensor, size: int) -> Tensor:
        """This process's rows of every batch of `size`, one batch after the other."""
        part = size // self.count
        return rows if self.count == 1 else rows.unflatten(0, (-1, size))[:, self.rank * part : (self.rank + 1) * part].flatten(0, 1)

    def first(self, function: Callable[[], Result]) -> Result:
        """What `function` gives in the first process, where alone it is called; so is the BimosError that it raises."""
        if self.count == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = function()
            except BimosError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, 0, device=self.device)
        if answer[1] is not None:
            raise BimosError(answer[1])
        return answer[0]

    def agreed(self, value: float) -> float:
        """The first one's."""
        return value if self.count == 1 else self._number(value, lambda tensor: dist.broadcast(tensor, 0))

    def mean(self, value: float) -> float:
        return value if self.count == 1 else self._number(value, dist.all_reduce) / self.count

    def any(self, value: bool) -> bool:
        return value if self.count == 1 else self._number(float(value), dist.all_reduce) > 0

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Sums over all processes, in place, the same bits in each."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Means over all processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor.div_(self.count)

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """The first one's values, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def together(self, tensor: Tensor) -> Tensor:
        """`[count, ..]`: that of every process, in order."""
        if self.count == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def wait(self) -> None:
        """For all of them to come here."""
        if self.count > 1:
            dist.barrier()

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Within it, the end of another process is a BimosError, and so is the launcher's word to end for that reason."""
        if self.count == 1:
            yield
            return

        def told(*_: object) -> None:
            raise BimosError(TOLD)

        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, told) if is_main else None
        try:
            with _watched() if is_main else contextlib.nullcontext():
                yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or any(sign in str(error) for sign in BROKEN):
                raise BimosError(LOST) from error
            raise
        finally:
            if is_main:
                signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def _number(self, value: float, collective: Callable[[Tensor], Any]) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        collective(tensor)
        return tensor.item()


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Within it, a process that is told to end does so even if it waits for another one in foreign code, where no Python handler runs."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    ended = threading.Event()

    def watch() -> None:
        while number := os.read(reading, 1):
            if number[0] == signal.SIGTERM and not ended.wait(GRACE):
                print(f"error: {TOLD}", file=sys.stderr, flush=True)
                os._exit(2)
        os.close(reading)

    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="bimos-watch", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(writing)  # ends the thread


ALONE = Processes()


class Clock:
    """Seconds; with several processes the first one's, as of the last `tick`, so that what follows from them is the same in all."""

    def __init__(self, processes: Processes = ALONE) -> None:
        self._processes, self._now = processes, 0.0
        self.tick()

    def __call__(self) -> float:
        return self._now if self._processes.count > 1 else time.monotonic()

    def tick(self) -> None:
        if self._processes.count > 1:
            self._now = self._processes.agreed(time.monotonic())


def are_several() -> bool:
    """Whether a launcher has started this process as one of several; waits for none of them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def check_launcher() -> None:
    """Raises BimosError: a launcher was asked for several processes, and this one would work as if it were alone."""
    mend = "start them with torchrun --nproc-per-node N -m bimos ..."
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and "RANK" not in os.environ:
        raise BimosError(f"accelerate launch starts one process on a CPU, however many it is asked for; {mend}")
    if any(int(os.environ.get(size, "1")) > 1 for size in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")) and "RANK" not in os.environ:
        raise BimosError(f"processes that MPI starts do not find each other here; {mend}")


@functools.cache
def current(device: str = "cpu") -> Processes:
    """The processes that this one was started with; the first call waits for all of them.

    Args:
        device: on which they train; each has a GPU of its own on `cuda`.
    """
    if not are_several():
        check_launcher()
        return ALONE
    for engine in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):  # of a launcher's config: models are sharded here
        os.environ.pop(engine, None)
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes, state.device)
