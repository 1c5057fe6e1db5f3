"""Stage 2 of one block: its latents and scales trained on the relative error of the block's output."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from bimos.config import RunConfig, decided
from bimos.errors import BimosError
from bimos.lanes import Lanes
from bimos.methods.ste import SharedSigns
from bimos.processes import Clock, Processes
from bimos.training.budget import Budget, schedule
from bimos.training.losses import relative_error
from bimos.training.ondisk import give_back
from bimos.training.optimizer import build_optimizer, moments_to_disk, set_rate, sign_planes, step_in_turn
from bimos.training.progress import Progress
from bimos.training.streams import BlockCall, batches
from bimos.training.student import trainable_layers

WARM_STEPS = 10  # until rates may be what they should: Adam's first steps know little, and the time may be over soon


def reconstruct(
    block: nn.Module,
    index: int,
    lanes: Lanes,
    call: BlockCall,
    inputs: Tensor,
    targets: Tensor,
    config: RunConfig,
    generator: torch.Generator,
    seconds: float | None,
    start: float,
    progress: Progress,
    processes: Processes,
    directory: Path,
) -> dict[str, float]:
    """Train one block in place; the errors of its first and last steps, and the tokens that it saw.

    Args:
        call: with the rows of one lane.
        directory: for what is not kept in memory.
    """
    options, length = config.blocks, inputs.shape[1]
    layers = [layer for _, layer in trainable_layers(block)]
    trains = bool(layers) and decided(options.enabled, layers[0].config.trained)
    size = min(options.batch_size // processes.count, len(inputs))
    rows_of_lane = size // lanes.count
    if not trains:
        error = processes.mean(_error(block, call, inputs, targets, rows_of_lane))
        return {"loss_first": error, "loss_last": error, "tokens": 0.0}
    optimizer = build_optimizer(
        block, {"latent": options.lr_latent, "scale": options.lr_scale, "router": options.lr_router}, (0.9, 0.95), 0.0
    )
    if config.low_memory and inputs.device.type == "cpu":
        moments_to_disk(optimizer, directory)
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    together = size * processes.count
    total = options.epochs * processes.count * len(inputs) * length
    left = None if seconds is None else processes.agreed(seconds - (time.monotonic() - start))
    clock = Clock(processes)
    budget = Budget(tokens=total if left is None else None, seconds=left, clock=clock)
    budget.start()
    losses: list[float] = []
    is_bfloat16 = inputs.dtype == torch.bfloat16
    signs = SharedSigns(sign_planes(block), torch.bfloat16 if is_bfloat16 else torch.float32)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=is_bfloat16):
            output = call(block, inputs)
        return relative_error(output, targets)

    while (left is None or left > 0) and budget.progress() < 1 and budget.spent_tokens < total:
        order = shuffled(len(inputs), size, processes, generator)
        for rows in batches(len(inputs), size):
            clock.tick()
            rate = schedule("cosine", 0.05, max(budget.progress(), budget.spent_tokens / total))
            set_rate(optimizer, min(rate, (len(losses) + 1) / WARM_STEPS))
            with signs:
                loss = lanes.backward(loss_of, {"inputs": inputs[order[rows]], "targets": targets[order[rows]]})
            _average(trained, processes)
            if config.low_memory:
                step_in_turn(optimizer)
            else:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            give_back(inputs)
            give_back(targets)
            budget.spent_tokens += together * length
            losses.append(processes.mean(loss.item()))
            if not math.isfinite(losses[-1]):
                raise BimosError(f"block {index}: the loss is not finite; lower blocks.lr_latent and blocks.lr_scale; start anew")
            progress.tick(together * length, loss=losses[-1])
            if budget.progress() >= 1:
                break
    if not losses:  # the start took all the time
        losses.append(processes.mean(_error(block, call, inputs, targets, rows_of_lane)))
    tail = max(1, len(losses) // 10)
    return {"loss_first": losses[0], "loss_last": sum(losses[-tail:]) / tail, "tokens": float(budget.spent_tokens)}


def _average(parameters: list[nn.Parameter], processes: Processes) -> None:
    """Gradients over all processes, in place; a process that has none of a parameter (a linear that saw no token) counts as zero."""
    if processes.count == 1:
        return
    used = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=parameters[0].device)
    processes.add([used])
    for parameter, count in zip(parameters, used.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    processes.average(parameter.grad for parameter in parameters if parameter.grad is not None)


def shuffled(count: int, size: int, processes: Processes, generator: torch.Generator) -> Tensor:
    """An order `[count]` of this process's rows, batches of `size`.

    Every row keeps its place in its batch, which decides whose it is: batches are the same for any number of processes.
    """
    orders = [torch.randperm(count // size, generator=generator) for _ in range(size * processes.count)]
    first = processes.rank * size
    mine = [place + size * order for place, order in enumerate(orders[first : first + size])]
    return torch.stack(mine, 1).flatten()


def _error(block: nn.Module, call: BlockCall, inputs: Tensor, targets: Tensor, size: int) -> float:
    rows = slice(0, size)
    with torch.no_grad():
        return relative_error(call(block, inputs[rows]), targets[rows]).item()
