"""A run that kills its own process, as `kill -9` would, at a chosen moment. `test_resume.py` starts it in fresh processes.

A moment is a training step, or a change of a file in or beside the output directory (opened for writing, renamed, deleted).
So a kill can fall between any two of them: within a checkpoint, too, and between a checkpoint and what says that it is complete.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from bimos.config import RunConfig
from bimos.quantize import run as quantize
from bimos.training.progress import Progress

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def run(moment: int | None, counted: Path, model: Path, output: Path, config: dict[str, Any], resume: bool) -> None:
    """`bimos.quantize.run` until moment number `moment`; without one to the end. `counted`: a file for the moments there were."""
    torch.set_num_threads(1)
    passed = 0
    below = str(output.parent)

    def pass_one() -> None:
        nonlocal passed
        passed += 1
        if passed == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or not isinstance(arguments[0], str | Path) or not str(arguments[0]).startswith(below):
            return
        if event != "open" or (arguments[1] is not None and set(arguments[1]) & set("wax+")):
            pass_one()

    class Watched(Progress):
        def tick(self, tokens: float, loss: float | None = None) -> None:
            super().tick(tokens, loss)
            pass_one()

    sys.modules["bimos.stages"].Progress = Watched  # type: ignore[attr-defined]
    sys.addaudithook(on_event)
    quantize(model, output, None if resume else RunConfig.from_dict(config), resume=resume)
    counted.write_text(str(passed))
