"""Stage 1: the layers of one block, each from what it gets to see and from what it should answer.

Linears are taken in the order in which the block runs them, so that each sees inputs as the layers before it, binarized
already, make them. Its weight is first refit to what the teacher's linear answers on the teacher's inputs (least squares on the
student's, as in GPTAQ, 2504.02692); where its output is added to the residual stream, it is also asked to take away the
error that the stream carries by then. The method then binarizes that weight, knowing the second moments of the inputs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bimos.config import InitialiseConfig, decided
from bimos.methods.base import InputStatistics, MethodConfig
from bimos.training.streams import BlockCall, Stop, batches
from bimos.training.student import binarize

RIDGE = 0.2  # of the mean second moment: what holds a refit weight to the teacher's
SAMPLES = 256  # input vectors kept of every batch


@dataclasses.dataclass(frozen=True)
class Group:
    """Linears that share one input, and whether what they give is added to the residual stream as it is."""

    names: tuple[str, ...]
    residual: bool


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
) -> float:
    """Replace the linears `names` of the block `student`, a copy of `teacher`, by trainable layers.

    Args:
        streams: what enters the block in the teacher and in the student, `[n, T, d]` each.
        size: rows of a batch.

    Returns:
        Seconds of the work that takes as long for any number of sequences: all but sending them through the block.
    """
    start = time.monotonic()
    if not config.activation_aware:
        binarize(student, names, method, {}, generator)
        return time.monotonic() - start
    reading = 0.0
    refit = decided(config.refit, method.trained)
    rows = max(size, config.sequences - config.sequences % size)
    short = (streams[0][:rows], streams[1][:rows])
    groups = execution_groups(teacher, names, call, short[0][:size])
    writers: list[str] = []
    for group in groups:
        measured = _Measurement(teacher, student, group, list(writers), call)
        before = time.monotonic()
        measured.run(*short, size, answers=refit)
        reading += time.monotonic() - before
        if refit:
            for name in group.names:
                measured.refit(name)
        statistics = measured.statistics()
        binarize(student, list(group.names), method, dict.fromkeys(group.names, statistics), generator)
        if group.residual:
            writers += group.names
    unseen = [name for name in names if not any(name in group.names for group in groups)]
    binarize(student, unseen, method, {}, generator)
    return time.monotonic() - start - reading


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


class _Measurement:
    """Second moments of what one group sees in the student, and its products with what the group should answer."""

    def __init__(self, teacher: nn.Module, student: nn.Module, group: Group, writers: list[str], call: BlockCall) -> None:
        self._teacher, self._student, self._group, self._writers, self._call = teacher, student, group, writers, call
        self._gram: Any = 0.0
        self._cross: dict[str, Any] = dict.fromkeys(group.names, 0.0)
        self._weight = 0.0
        self._sample: list[Tensor] = []
        self._importance: list[Tensor] = []

    def run(self, stream: Tensor, student_stream: Tensor, size: int, answers: bool = True) -> None:
        """Both streams through the block, `size` rows at a time; without `answers` there is nothing for `refit`."""
        for rows in batches(len(stream), size):
            theirs: dict[str, Tensor] = {}
            if answers or self._group.residual:
                theirs, _ = self._outputs(self._teacher, stream[rows], stop_before=False)
            mine, x = self._outputs(self._student, student_stream[rows], stop_before=True)
            x = _tokens(x)
            weight = torch.ones(len(x), 1, device=x.device)
            error: Any = 0.0
            if self._group.residual:
                before = _tokens(stream[rows]) + sum(_tokens(theirs[name]) for name in self._writers)
                error = before - _tokens(student_stream[rows]) - sum(_tokens(mine[name]) for name in self._writers)
                after = before + sum(_tokens(theirs[name]) for name in self._group.names)
                # Relative to the stream's size: the norm that follows takes that out again (see `relative_error`).
                weight = 1 / after.square().sum(-1, keepdim=True).clamp_min(1e-6)
            weighted = x * weight
            self._gram = self._gram + weighted.T @ x
            for name in self._group.names if answers else ():
                linear: Any = self._teacher.get_submodule(name)
                answer = _tokens(theirs[name]) + error
                if linear.bias is not None:
                    answer = answer - linear.bias.float()
                self._cross[name] = self._cross[name] + weighted.T @ answer
            self._weight += weight.sum().item()
            every = max(1, len(x) // SAMPLES)
            self._sample.append(x[::every].clone())
            self._importance.append(weight[::every, 0].clone())

    def _outputs(self, block: nn.Module, hidden: Tensor, stop_before: bool) -> tuple[dict[str, Tensor], Tensor]:
        """What the writers (and the group, unless stopped before it) give in `block`, and the group's input."""
        outputs: dict[str, Tensor] = {}
        inputs: list[Tensor] = []

        def record(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
                outputs[name] = output
                if name == self._group.names[-1]:
                    raise Stop

            return hook

        def enter(module: nn.Module, args: tuple) -> None:
            inputs.append(args[0])
            if stop_before:
                raise Stop

        hooks = [block.get_submodule(name).register_forward_hook(record(name)) for name in (*self._writers, *self._group.names)]
        hooks.append(block.get_submodule(self._group.names[0]).register_forward_pre_hook(enter))
        try:
            with torch.no_grad(), _Hooks(hooks):
                self._call(block, hidden)
        except Stop:
            pass
        return outputs, inputs[0]

    def refit(self, name: str) -> None:
        """Give the student's linear the weight that answers best, held a little to the teacher's."""
        linear: Any = self._student.get_submodule(name)
        ridge = RIDGE * self._gram.diagonal().mean()
        identity = torch.eye(len(self._gram), dtype=self._gram.dtype, device=self._gram.device)
        right = self._cross[name] + ridge * linear.weight.float().T
        with torch.no_grad():
            linear.weight.copy_(torch.linalg.solve(self._gram + ridge * identity, right, left=True).T)

    def statistics(self) -> InputStatistics:
        gram = self._gram / self._weight
        return InputStatistics(gram.diagonal().clone(), torch.cat(self._sample), gram, torch.cat(self._importance))


def _tokens(output: Tensor) -> Tensor:
    """`[tokens, out]`, float32."""
    return output.flatten(0, -2).float()


class _Hooks:
    """Removes hooks when its block ends."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
