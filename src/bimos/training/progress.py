"""What a user sees while a stage works: loss, tokens a second, time to go, peak memory."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from bimos.memory import peak_bytes


class Progress:
    """A bar on a terminal, a line every half minute elsewhere. Context manager; `console=None` is silent."""

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._name, self._done, self._total = "", 0.0, 1.0
        self._started = self._printed = time.monotonic()
        self._recent: deque[tuple[float, float]] = deque(maxlen=50)
        self._tokens, self._loss = 0.0, math.nan
        self._eta: float | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def begin(self, name: str, total: float) -> None:
        """A new stage of `total` units."""
        self.end()
        self._name, self._done, self._total = name, 0.0, total
        self._started = self._printed = time.monotonic()
        self._recent.clear()
        self._tokens, self._loss, self._eta = 0.0, math.nan, None
        if self._console is not None and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
            )
            whole = columns if total > 1 else (columns[0], columns[1], *columns[3:])
            self._bar = RichProgress(*whole, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(name, total=total, facts="")
        elif self._console is not None:
            self._console.print(f"{name} ...")

    def tick(self, tokens: float, loss: float | None = None) -> None:
        """Work inside a unit."""
        self._tokens += tokens
        self._recent.append((time.monotonic(), self._tokens))
        self._loss = self._loss if loss is None else loss
        self._show()

    def advance(self, units: float, loss: float | None = None) -> None:
        """`units` are done."""
        self.set(self._done + units, loss=loss)

    def set(self, done: float, loss: float | None = None, eta: float | None = None) -> None:
        """`done` units are done in all; `eta` in seconds where the caller knows it better than the rate tells."""
        self._done, self._eta = done, eta
        self._loss = self._loss if loss is None else loss
        self._show()

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False)

    def end(self) -> None:
        """The stage is over."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _facts(self) -> str:
        facts = [] if math.isnan(self._loss) else [f"loss {self._loss:.4g}"]
        if len(self._recent) > 1:
            (t0, n0), (t1, n1) = self._recent[0], self._recent[-1]
            facts.append(f"{(n1 - n0) / max(t1 - t0, 1e-9):,.0f} tokens/s")
        eta = self._eta
        if eta is None and self._done:
            eta = (time.monotonic() - self._started) * (self._total - self._done) / self._done
        if eta is not None and math.isfinite(eta):
            facts.append(f"ETA {int(eta) // 60}:{int(eta) % 60:02d}")
        facts.append(f"peak {peak_bytes() / 2**30:.2f} GiB")
        return ", ".join(facts)

    def _show(self) -> None:
        if self._console is None:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, facts=self._facts())
        elif now - self._printed > 30:
            self._printed = now
            self._console.print(f"{self._name}: {100 * self._done / self._total:.0f} %, {self._facts()}", highlight=False)
