"""How many sequences the blocks still to come can see in the time that stages 1 and 2 have left."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import nn

from bimos.config import RunConfig

LATE = 1.5  # times its share that a start may take before later blocks see fewer sequences
TRAINED = 16384  # tokens without which a block is not trained, unless the config asks for fewer: steps on so few would fit them alone
PASSES = 3  # through a block that a step of training takes, before some were timed
STARTING = 8  # passes through a block that take as long as its start, and both streams' way through it
TRIED = 512  # tokens of the product that tells how fast this machine is


class Pace(NamedTuple):
    """Seconds that a block takes: whatever it sees; more for a sequence in the start; more for a sequence in an epoch of training."""

    solving: float
    reading: float
    training: float

    def seconds(self, sequences: int) -> float:
        """Of a block that is started on so many, and not trained."""
        return self.solving + self.reading * sequences


def sequences_ahead(
    index: int,
    blocks: int,
    count: int,
    size: int,
    seconds: float,
    worked: float,
    pace: Pace,
    config: RunConfig,
    before: Pace | None,
) -> int:
    """How many of `count` sequences the blocks behind block `index` shall see, in whole batches of `size`.

    What is cut away does not come back, and what a start sees decides more than some steps of distillation. So the second block decides,
    for the first one also warms up. Later ones may take half as long again, for a machine is fast and slow by turns; and it takes two that
    are late, one behind the other.

    Args:
        seconds: for all blocks.
        worked: seconds until now.
        before: the pace of the block before; None where it is not known (the first block that a process does also warms up).
    """
    each = (seconds - worked) / (blocks - index - 1)
    few = math.ceil(TRAINED / config.sequence_length / size) * size
    if index > 1:
        needed = 0.0 if before is None else min(pace.seconds(count), before.seconds(count))
        is_late = needed > each and worked + needed * (blocks - index - 1) > LATE * seconds
        half = max(size, (count // 2) // size * size)
        return (few if half < few < count else half) if is_late else count
    trained = affordable_sequences(each, pace.solving, pace.reading + config.blocks.epochs * pace.training, count, size)
    affordable = trained
    if trained < min(count, few):  # not even so many: that many, trained for as long as there is time; or what a start alone can see
        affordable = min(affordable_sequences(each, pace.solving, pace.reading, count, size), max(trained, few))
    return min(count, 2 * affordable) if index == 0 else affordable


def affordable_sequences(seconds: float, solving: float, each: float, count: int, size: int) -> int:
    """How many sequences, `each` of so many seconds, fit into `seconds` beside `solving`: whole batches, from one to `count`."""
    affordable = int((seconds - solving) / max(1e-9, each))
    return max(size, min(count, affordable - affordable % size))


def seconds_a_token(block: nn.Module, dtype: torch.dtype) -> float:
    """Of one pass through the linears of `block`: from the largest of them, which is read and multiplied twice to see."""
    sizes = [m for m in block.modules() if isinstance(m, nn.Linear)]
    largest = max(sizes, key=lambda linear: linear.weight.numel())
    weight = largest.weight.detach().to(dtype)
    x = torch.ones(TRIED, largest.in_features, dtype=dtype, device=weight.device)
    for _ in range(2):
        began = time.perf_counter()
        nn.functional.linear(x, weight)
        seconds = time.perf_counter() - began
    return seconds / TRIED * sum(linear.weight.numel() for linear in sizes) / weight.numel()
