"""What the linears of one block get to see in the student, and what they should answer: sums over both streams.

The teacher's answers are the same for every group of linears: made once, where they fit in memory. Batches go side by side in two lanes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from bimos.lanes import Lanes
from bimos.methods.base import InputStatistics
from bimos.methods.symmetric import add_product, mirror, solve_
from bimos.processes import ALONE, Processes
from bimos.training.answers import Answers, Group, Taps
from bimos.training.mapped import replace_weight, rest
from bimos.training.ondisk import give_back
from bimos.training.streams import BlockCall, batches

RIDGE = 0.2  # of the mean second moment: what holds a refit weight to the teacher's
SAMPLES = 256  # input vectors kept of every batch, at most
MOST_SAMPLES = 8192  # and of all


class Measurement:
    """Second moments of what one group sees in the student, and its products with what the group should answer.

    A group that writes nothing to the residual stream should answer what the teacher's linears answer, on the teacher's inputs. There
    products with those inputs say as much, and one of them does for all linears.

    Args:
        writers: groups before this one that write to the residual stream.
        processes: between which every batch of the streams is divided.
    """

    def __init__(
        self, answers: Answers, student: nn.Module, group: Group, writers: list[Group], call: BlockCall, processes: Processes = ALONE
    ) -> None:
        self._answers, self._student, self._group, self._writers, self._call = answers, student, group, writers, call
        self._processes = processes
        self._sums = _Sums()
        self._samples: tuple[Tensor, Tensor]

    def run(self, stream: Tensor, size: int, lanes: Lanes, refit: bool = True) -> None:
        """The student's stream `[n, T, d]` through its block, `size` rows at a time; without `refit` there is nothing for that."""
        group = self._group
        wanted = [*self._writers, group] if group.residual else [group] if refit else []
        theirs, mine = Taps(self._answers.teacher, wanted), Taps(self._student, self._writers, group.names[0])
        rows, count = list(batches(len(stream), size)), lanes.side_by_side
        most = max(1, min(SAMPLES, MOST_SAMPLES // len(rows)) // self._processes.count)
        shares = [rows[start::count] for start in range(min(count, len(rows)))]
        linear: Any = self._student.get_submodule(group.names[0])
        samples = _Samples([part for share in shares for part in share], stream, linear.in_features, most)

        def lane(rows: list[slice]) -> _Sums:
            sums = _Sums()
            for part in rows:
                written, x = mine.run(self._call, stream[part])
                answers = self._answers.of(part, theirs) if wanted else {}
                self._add(sums, _tokens(x), written, answers, part, stream, refit, samples)
                for hidden in (stream[part], self._answers.entering(part), *answers.values()):
                    give_back(hidden)
            return sums

        with theirs, mine:
            for part in lanes.map(lane, shares):
                self._sums.add(part)
        self._sums.gather(self._processes)
        self._sums.finish()
        self._samples = samples.gathered(self._processes)
        rest(self._answers.teacher)

    def _add(
        self,
        sums: _Sums,
        x: Tensor,
        written: dict[str, Tensor],
        answers: dict[str, Tensor],
        rows: slice,
        stream: Tensor,
        refit: bool,
        samples: _Samples,
    ) -> None:
        group = self._group
        weight = torch.ones(len(x), 1, device=x.device)
        weighted, targets = x, {}
        if group.residual:
            names = [name for writer in self._writers for name in writer.names]
            before = _tokens(self._answers.entering(rows)) + sum(_tokens(answers[name]) for name in names)
            error = before - _tokens(stream[rows]) - sum(_tokens(written[name]) for name in names)
            given = {name: _tokens(answers[name]) for name in group.names}
            # Relative to the stream's size: the norm that follows takes that out again (see `relative_error`).
            weight = 1 / (before + sum(given.values())).square().sum(-1, keepdim=True).clamp_min(1e-6)
            weighted = x * weight
            targets = {name: answer + error - _bias(self._teacher(name)) for name, answer in given.items()}
        elif refit:
            targets = {group.names[0]: _tokens(answers[group.names[0]])}
        sums.moments(weighted, x)
        sums.weight += weight.sum().item()
        for name, target in targets.items() if refit else ():
            sums.products(name, target, weighted)
        samples.put(rows, x, weight[:, 0])

    def _teacher(self, name: str) -> Any:
        return self._answers.teacher.get_submodule(name)

    def refit(self, name: str) -> None:
        """Give the student's linear the weight that answers best, held a little to the teacher's."""
        linear: Any = self._student.get_submodule(name)
        gram, cross, weight = self._sums.gram, self._sums.cross, linear.weight.detach().float()
        ridge = RIDGE * gram.diagonal().mean().item()
        # Of this one alone, to be written to; the products of a group with its teacher's inputs are all its linears'.
        answers = cross.pop(name) if self._group.residual else self._teacher(name).weight.detach().float() @ cross[self._group.names[0]]
        held = gram.clone()
        held.diagonal().add_(ridge)
        replace_weight(linear, solve_(held, answers.add_(weight, alpha=ridge).mT).mT)

    def statistics(self) -> InputStatistics:
        gram = self._sums.gram
        return InputStatistics(gram.diagonal().clone(), self._samples[0], gram, self._samples[1])


@dataclasses.dataclass
class _Sums:
    """Over tokens, of one lane or of all. Until `finish`, `gram` is no more than its upper triangle.

    Second moments are in float32 even where inputs were bfloat16: rounded, inputs that always come together would leave no Cholesky factor.

    Attributes:
        gram: of inputs, weighted, `[in, in]`.
        cross: of what a linear should answer (or what enters it in the teacher) and inputs, weighted, `[out, in]`, by its name.
    """

    gram: Any = None
    weight: float = 0.0
    cross: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def moments(self, weighted: Tensor, x: Tensor) -> None:
        """Of `x [tokens, in]`."""
        if self.gram is None:
            self.gram = x.new_zeros(x.shape[1], x.shape[1])
        add_product(self.gram, weighted, x)

    def products(self, name: str, target: Tensor, weighted: Tensor) -> None:
        """Of `target [tokens, out]` and inputs."""
        if name not in self.cross:
            self.cross[name] = target.new_zeros(target.shape[1], weighted.shape[1])
        self.cross[name].addmm_(target.T, weighted)

    def add(self, other: _Sums) -> None:
        if self.gram is None:
            self.gram, self.cross = other.gram, other.cross
        else:
            self.gram.add_(other.gram)
            for name, cross in other.cross.items():
                self.cross[name].add_(cross)
        self.weight += other.weight

    def finish(self) -> None:
        """Means."""
        mirror(self.gram).div_(self.weight)
        for cross in self.cross.values():
            cross.div_(self.weight)

    def gather(self, processes: Processes) -> None:
        """Those of all processes."""
        if processes.count == 1:
            return
        weight = torch.tensor(self.weight, dtype=torch.float64, device=self.gram.device)
        processes.add([self.gram, weight, *self.cross.values()])
        self.weight = weight.item()


class _Samples:
    """Some input vectors of every batch, `[n, in]`, and their weights `[n]`.

    Room for all of them is taken at once: many small pieces, which stay among what comes and goes, would leave holes in memory.

    Args:
        parts: rows of `stream [.., T, d]` in each batch, in the order in which samples are to lie.
        most: vectors of a batch.
    """

    def __init__(self, parts: list[slice], stream: Tensor, width: int, most: int) -> None:
        tokens = [stream[part].shape[:-1].numel() for part in parts]
        self._every = {part.start: max(1, math.ceil(count / most)) for part, count in zip(parts, tokens, strict=True)}
        counts = [math.ceil(count / self._every[part.start]) for part, count in zip(parts, tokens, strict=True)]
        ends = list(itertools.accumulate(counts))
        self._slots = {part.start: slice(end - count, end) for part, end, count in zip(parts, ends, counts, strict=True)}
        self._values = torch.empty(ends[-1], width, device=stream.device)
        self._weights = torch.empty(ends[-1], device=stream.device)

    def put(self, part: slice, x: Tensor, weight: Tensor) -> None:
        """Those of the batch of rows `part`, with inputs `x [tokens, in]` and their weights `[tokens]`."""
        every, slot = self._every[part.start], self._slots[part.start]
        self._values[slot] = x[::every]
        self._weights[slot] = weight[::every]

    def gathered(self, processes: Processes) -> tuple[Tensor, Tensor]:
        """Those of all processes: in the order in which one process would have taken them."""
        if processes.count == 1:
            return self._values, self._weights
        # Batches have the same size in all of them: [process, batch, ...].
        pieces = (torch.stack([values[slot] for slot in self._slots.values()]) for values in (self._values, self._weights))
        values, weights = (processes.together(piece).transpose(0, 1).flatten(0, 2) for piece in pieces)
        return values, weights


def _bias(linear: Any) -> Any:
    return 0.0 if linear.bias is None else linear.bias.detach().float()


def _tokens(output: Tensor) -> Tensor:
    """`[tokens, out]`, float32."""
    return output.flatten(0, -2).float()
