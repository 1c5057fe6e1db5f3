"""Checkpoints of the distillation: which count, and which may go.

One counts only once its `complete.json` is there, which is written last; the one before it is kept until then.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor, nn

COMPLETE = "complete.json"


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path.parent for path in directory.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def continued(directory: Path) -> list[Path]:
    """Complete checkpoints to go on from; what is left of others is taken away."""
    done = checkpoints(directory)
    for partial in directory.glob("checkpoint-*"):
        if partial not in done:
            shutil.rmtree(partial)
    return done
