"""Stage 1: the layers of one block, each from what it gets to see and from what it should answer.

Linears are taken in the order in which the block runs them, so that each sees inputs as the layers before it, binarized
already, make them. Its weight is first refit to what the teacher's linear answers on the teacher's inputs (least squares on the
student's, as in GPTAQ, 2504.02692); where its output is added to the residual stream, it is also asked to take away the
error that the stream carries by then. The method then binarizes that weight, knowing the second moments of the inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bimos.config import InitialiseConfig, decided
from bimos.lanes import Lanes
from bimos.memory import trim
from bimos.methods.base import MethodConfig
from bimos.processes import ALONE, Processes
from bimos.training.answers import Answers, Group
from bimos.training.measuring import Measurement
from bimos.training.streams import BlockCall
from bimos.training.student import binarize


def initialise_block(
    teacher: nn.Module,
    student: nn.Module,
    names: list[str],
    call: BlockCall,
    streams: tuple[Tensor, Tensor],
    size: int,
    method: MethodConfig,
    config: InitialiseConfig,
    generator: torch.Generator,
    lanes: Lanes | None = None,
    processes: Processes = ALONE,
) -> tuple[float, Tensor | None]:
    """Replace the linears `names` of the block `student`, a copy of `teacher`, by trainable layers.

    Args:
        streams: what enters the block in the teacher and in the student, `[n, T, d]` each.
        size: rows of a batch.
        lanes: in which batches, and linears with one input, go side by side; None for none.
        processes: between which batches are divided: streams and `size` are this one's.

    Returns:
        Seconds of the work that takes as long for any number of sequences: all but sending them through the block; and what comes
        out of the teacher's block, `[n, T, d]`, where that was made along the way.
    """
    start = time.monotonic()
    refit = decided(config.refit, method.trained)
    if not config.activation_aware or not (refit or method.uses_inputs):
        binarize(student, names, method, {}, generator)
        _same(student, names, processes)
        return time.monotonic() - start, None
    lanes = lanes or Lanes(1, streams[0].device)
    every = size * processes.count
    rows = max(every, config.sequences - config.sequences % every) // processes.count
    stream, student_stream = streams[0][:rows], streams[1][:rows]
    groups = processes.first(lambda: execution_groups(teacher, names, call, stream[:size]))
    before = time.monotonic()
    answers = Answers(teacher, [group for group in groups if refit or group.residual], call, stream, size, lanes)
    reading = time.monotonic() - before
    writers: list[Group] = []
    for group in groups:
        measured = Measurement(answers, student, group, list(writers), call, processes)
        before = time.monotonic()
        measured.run(student_stream, size, lanes, refit)
        reading += time.monotonic() - before
        _begin(measured, student, group, method, refit, generator, lanes)
        _same(student, list(group.names), processes)
        if group.residual:
            writers.append(group)  # whose answers later ones need
        else:
            answers.forget(group)
        del measured  # not to be held beside the next group's
        trim()
    unseen = [name for name in names if not any(name in group.names for group in groups)]
    binarize(student, unseen, method, {}, generator)
    _same(student, unseen, processes)
    behind = answers.behind if len(stream) == len(streams[0]) else None
    return time.monotonic() - start - reading, behind


def _same(student: nn.Module, names: list[str], processes: Processes) -> None:
    """The first process's layers in all: another machine's last bits would be other signs."""
    for name in names:
        layer = student.get_submodule(name)
        processes.spread([tensor.data for tensor in (*layer.parameters(), *layer.buffers())])


def _begin(
    measured: Measurement, student: nn.Module, group: Group, method: MethodConfig, refit: bool, generator: torch.Generator, lanes: Lanes
) -> None:
    """Refit and binarize the linears of a group, those that share an input side by side."""
    statistics = measured.statistics()

    def begin(item: tuple[str, int]) -> None:
        name, seed = item
        if refit:
            measured.refit(name)
        binarize(student, [name], method, {name: statistics}, torch.Generator().manual_seed(seed))

    seeds = torch.randint(2**62, (len(group.names),), generator=generator).tolist()
    items = list(zip(group.names, seeds, strict=True))
    if len(items) > 1:
        lanes.map(begin, items)
    else:
        begin(items[0])  # alone it has all cores


def execution_groups(block: nn.Module, names: list[str], call: BlockCall, hidden: Tensor) -> list[Group]:
    """The linears that `block` runs on every token of `hidden [B, T, d]`, in order; those in a row with the same input together."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            inputs[name], outputs[name] = args[0], output

        return hook

    with torch.no_grad(), _Hooks([block.get_submodule(name).register_forward_hook(record(name)) for name in names]):
        result = call(block, hidden)
    tokens = hidden.shape[:-1].numel()
    groups: list[Group] = []
    for name, value in inputs.items():
        if value.shape[:-1].numel() != tokens:
            continue  # run on some of the tokens: what teacher and student give cannot be paired
        same = outputs[name].numel() == hidden.numel() and outputs[name].shape[-1] == hidden.shape[-1]  # OPT flattens its tokens
        residual = same and _is_added(block, name, outputs, call, hidden, result)
        last = groups[-1] if groups else None
        if last is not None and inputs[last.names[-1]] is value and last.residual == residual:
            groups[-1] = Group((*last.names, name), residual)
        else:
            groups.append(Group((name,), residual))
    return groups


def _is_added(block: nn.Module, name: str, outputs: dict[str, Tensor], call: BlockCall, hidden: Tensor, result: Tensor) -> bool:
    """Whether a change of this linear's output comes out of the block unchanged, all other linears giving what they gave."""
    noise = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result)
    noise = noise * result.float().square().mean(-1, keepdim=True).sqrt().to(result.dtype)

    def give(other: str) -> Callable[..., Tensor]:
        return lambda module, args, output: outputs[other] + noise.view_as(outputs[other]) if other == name else outputs[other]

    with torch.no_grad(), _Hooks([block.get_submodule(other).register_forward_hook(give(other)) for other in outputs]):
        moved = call(block, hidden)
    difference = (moved - result).float() - noise.float()
    return bool(difference.norm() < 0.1 * noise.float().norm())


class _Hooks:
    """Removes hooks when its block ends."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
