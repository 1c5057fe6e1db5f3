"""How long a stage may work: tokens or seconds, counted across restarts, and the learning rate that follows from it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable


@dataclasses.dataclass
class Budget:
    """Work done out of work allowed.

    Exactly one of `tokens` and `seconds` is set. Time spent before a restart counts (`spent_seconds`), time between does not.
    `clock` gives seconds.
    """

    tokens: int | None = None
    seconds: float | None = None
    spent_tokens: int = 0
    spent_seconds: float = 0.0
    clock: Callable[[], float] = time.monotonic
    _since: float | None = None

    def start(self) -> None:
        self._since = self.clock()

    @property
    def elapsed(self) -> float:
        """Seconds of work, earlier runs included."""
        return self.spent_seconds + (0.0 if self._since is None else self.clock() - self._since)

    def progress(self) -> float:
        """Share of the budget that is used, in [0, 1]."""
        used = self.spent_tokens / self.tokens if self.tokens else self.elapsed / (self.seconds or 1e-9)
        return min(1.0, used)

    def eta(self) -> float:
        """Seconds to go at the rate so far; infinite before there is one."""
        if self.seconds is not None:
            return max(0.0, self.seconds - self.elapsed)
        done = self.progress()
        return self.elapsed * (1 - done) / done if done else math.inf


def schedule(kind: str, warmup: float, progress: float) -> float:
    """Factor of the learning rate at `progress` of a stage: linear warm-up over its first `warmup`, then the decay to 0."""
    if progress < warmup:
        return max(progress / warmup, 0.02)
    rest = (progress - warmup) / max(1e-9, 1 - warmup)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, rest)))
    return 1.0 - min(1.0, rest) if kind == "linear" else 1.0
