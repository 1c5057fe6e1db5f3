"""One of several processes of a run, as a launcher would start it. `test_processes.py` starts them."""

from __future__ import annotations

import copy
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from bimos import BimosError
from bimos.config import InitialiseConfig, RunConfig
from bimos.methods import method_config
from bimos.models import decoder_blocks, load_teacher
from bimos.processes import current
from bimos.quantize import run as quantize
from bimos.training import initialise
from bimos.training.progress import Progress
from bimos.training.streams import capture, embed


def join(rank: int, count: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)


def run(
    rank: int, count: int, port: int, model: Path, output: Path, config: dict[str, Any] | None, moment: tuple[int, int] | None, said: Path
) -> None:
    """`bimos.quantize.run`; without a config it resumes. `moment`: the rank that is killed, and at which of its steps.

    What ends it in one line is left in the folder `said`.
    """
    join(rank, count, port)
    passed = 0

    class Watched(Progress):
        def tick(self, tokens: float, loss: float | None = None) -> None:
            nonlocal passed
            super().tick(tokens, loss)
            passed += 1
            if (rank, passed) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.modules["bimos.quantize"].Progress = Watched  # type: ignore[attr-defined]
    try:
        quantize(model, output, None if config is None else RunConfig.from_dict(config), resume=config is None)
    except BimosError as error:
        (said / str(rank)).write_text(str(error))
        sys.exit(2)


def measure(rank: int, count: int, port: int, model: Path, windows: torch.Tensor, found: Path) -> None:
    """What the linears of a first block get to see, of windows that are divided; the first process leaves it in a file."""
    join(rank, count, port)
    processes = current()
    teacher, _ = load_teacher(model)
    teacher.float()
    block = decoder_blocks(teacher)[1][0]
    size = processes.divided(4, "size")
    mine = processes.share(windows, 4)
    stream = embed(teacher, mine)
    call = capture(teacher, mine[:size])[1][0]
    statistics: dict[str, dict[str, torch.Tensor]] = {}

    def binarize(module: object, names: list[str], method: object, seen: dict[str, Any], generator: object) -> None:
        for name in names:
            statistics[name] = {key: getattr(seen[name], key) for key in ("gram", "second_moment", "sample", "importance")}

    initialise.binarize = binarize  # type: ignore[assignment]
    names = [name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
    options = InitialiseConfig(sequences=len(windows), refit=False)
    arguments = names, call, (stream, stream.clone()), size, method_config("sign", {}), options, torch.Generator().manual_seed(0)
    initialise.initialise_block(block, copy.deepcopy(block), *arguments, processes=processes)
    if processes.is_first:
        torch.save(statistics, found)
