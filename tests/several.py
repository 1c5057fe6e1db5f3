"""One of several processes of a run, as a launcher would start it. `test_processes.py` starts them."""

from __future__ import annotations

import copy
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from bimos import BimosError
from bimos.config import DistillConfig, InitialiseConfig, RunConfig
from bimos.kernels import native
from bimos.methods import method_config, ste
from bimos.models import convertible_linears, decoder_blocks, load_teacher
from bimos.processes import current
from bimos.quantize import run as quantize
from bimos.training import initialise
from bimos.training.distillation import Distillation
from bimos.training.optimizer import adamw, experts_together, select
from bimos.training.progress import Progress
from bimos.training.sharding import divided_state, shard, whole, whole_state
from bimos.training.streams import capture, embed
from bimos.training.student import binarize


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
    rank: int,
    count: int,
    port: int,
    model: Path,
    output: Path,
    config: dict[str, Any] | None,
    moment: tuple[int, int] | None,
    said: Path,
    tables: bool = True,
) -> None:
    """`bimos.quantize.run`; without a config it resumes. `moment`: the rank that is killed, and at which of its steps.

    `tables`: products by sums of 8 bits where they pay, which a last bit rounds up or down; without, and in float32 where a matrix
    unit multiplies bfloat16, numbers of processes can be compared.

    What ends it in one line is left in the folder `said`.
    """
    join(rank, count, port)
    if not tables:
        ste.tables_pay = lambda *_: False
        if native._has_matrix_unit():  # torch's products by it are rounded otherwise for other numbers of rows
            native._multiplies_bfloat16 = lambda: False  # type: ignore[assignment]
    passed = 0

    class Watched(Progress):
        def tick(self, tokens: float, loss: float | None = None) -> None:
            nonlocal passed
            super().tick(tokens, loss)
            passed += 1
            if (rank, passed) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.modules["bimos.stages"].Progress = Watched  # type: ignore[attr-defined]
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

    def record(module: object, names: list[str], method: object, seen: dict[str, Any], generator: object) -> None:
        for name in names:
            statistics[name] = {key: getattr(seen[name], key) for key in ("gram", "second_moment", "sample", "importance")}

    initialise.binarize = record  # type: ignore[assignment]
    names = [name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
    options = InitialiseConfig(sequences=len(windows), refit=False)
    arguments = names, call, (stream, stream.clone()), size, method_config("sign", {}), options, torch.Generator().manual_seed(0)
    initialise.initialise_block(block, copy.deepcopy(block), *arguments, processes=processes)
    if processes.is_first:
        torch.save(statistics, found)


def step(rank: int, count: int, port: int, model: Path, batches: torch.Tensor, found: Path) -> None:
    """Gradients of two accumulated batches `[2, B, T]`, divided; what the optimizer then holds, and again once that was loaded."""
    join(rank, count, port)
    processes = current()
    teacher, _ = load_teacher(model)
    teacher.float()
    student = copy.deepcopy(teacher)
    names = list(convertible_linears(student, []))
    binarize(student, names, method_config("binarymos", {"num_experts": 2}), {}, torch.Generator().manual_seed(0))
    rates = {"latent": 1e-3, "scale": 1e-3, "router": 1e-3, "norm": 1e-3}
    select(student, rates)
    distillation = Distillation(student, teacher, DistillConfig(hidden_weight=0.1), None, None, processes)
    if count > 1:
        shard(distillation, student, teacher)
    optimizer, again = (adamw(student, rates, (0.9, 0.95), 0.0) for _ in range(2))
    with experts_together(student, 0.1):
        for batch in batches:
            mine = processes.share(batch, len(batch))
            distillation(mine, torch.arange(len(mine)))["loss"].backward()
    if count > 1:
        divided = [parameter for block in decoder_blocks(teacher)[1] for parameter in block.parameters()]
        assert all(isinstance(parameter, DTensor) for parameter in divided), "the teacher is whole again"
    gradients = {name: whole(p.grad, True).clone() for name, p in student.named_parameters() if p.requires_grad}
    optimizer.step()
    state = whole_state(optimizer, True)
    again.load_state_dict(divided_state(again, state))
    if processes.is_first:
        torch.save({"gradients": gradients, "state": state["state"]}, found)
    restored = whole_state(again, True)["state"]
    for key, values in state["state"].items():
        assert all(torch.equal(value, restored[key][name]) for name, value in values.items())
