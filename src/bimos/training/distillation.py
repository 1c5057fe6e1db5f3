"""What distillation computes: windows of text in order, and the loss of a student against its teacher in one module."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bimos.config import DistillConfig, LossConfig
from bimos.processes import ALONE, Processes
from bimos.training.losses import Deviation, hidden_state_loss, kl_from_hidden, kl_from_top_k, relative_error
from bimos.training.teacher import TopKCache, hidden_states, logit_head


class NumberedWindows(Dataset):
    """`{"input_ids": [T], "window": []}`: windows of a stream, each with its number, shuffled within stretches.

    Neighbours in a stream come from one document; a small batch of neighbours would be a batch of one document.
    After `distinct` windows the same ones come again in another order, so that a cache of what the teacher says pays.
    """

    STRETCH = 256

    def __init__(self, windows: Dataset, count: int, distinct: int | None, seed: int) -> None:
        self._windows, self._count, self._distinct, self._seed = windows, count, min(distinct or count, count), seed
        self._key: tuple[int, int] = (-1, -1)
        self._order = torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        turn, place = divmod(index, self._distinct)
        stretch, offset = divmod(place, self.STRETCH)
        if self._key != (turn, stretch):
            generator = torch.Generator().manual_seed(((self._seed * 1_000_003 + turn) * 1_000_003 + stretch) % 2**63)
            self._key = (turn, stretch)
            self._order = torch.randperm(min(self.STRETCH, self._distinct - stretch * self.STRETCH), generator=generator)
        number = stretch * self.STRETCH + int(self._order[offset])
        return {"input_ids": self._windows[number]["input_ids"], "window": torch.tensor(number)}


class Distillation(nn.Module):
    """Student and loss in one module, so that whatever wraps a model (DDP, FSDP) wraps the whole computation."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        config: DistillConfig,
        cache: TopKCache | None,
        loss: LossConfig | None = None,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__()
        self._deviation = Deviation(loss.dad_gamma, loss.dad_lambda) if loss is not None and loss.dad else None
        self.student = student
        self._teacher = (teacher,)  # in a tuple: not a submodule, neither trained nor saved
        self._config, self._cache, self._processes = config, cache, processes
        self.is_distributed_loading_by_transformers = processes.count > 1  # the Trainer's word for: is sharded, not to be wrapped in DDP
        self.config = student.config  # the Trainer looks here

    def train(self, mode: bool = True) -> Self:
        """Never: a student that drops units (OPT's config asks for it) cannot say what its teacher says."""
        return super().train(False)

    def forward(self, input_ids: Tensor, window: Tensor) -> dict[str, Tensor]:
        """Loss per token of `input_ids [B, T]`; `window [B]` are the windows' numbers in the token stream."""
        config, student, teacher = self._config, self.student, self._teacher[0]
        vocabulary: int = student.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        every = config.hidden_weight > 0 or config.relative_weight > 0
        student_head = logit_head(student)
        states: tuple[Tensor, ...] = ()
        last: Tensor | None = None
        found = None if self._cache is None or every else [self._cache.get(int(number)) for number in window]
        if found is None or self._processes.any(any(entry is None for entry in found)):  # a sharded teacher answers all processes or none
            assert teacher is not None
            with torch.no_grad():
                last, states = hidden_states(teacher, input_ids, every)
            if found is not None and self._cache is not None:
                head = logit_head(teacher)
                found = [entry or self._cache.put(int(number), row, head) for number, entry, row in zip(window, found, last, strict=True)]
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=is_bfloat16(student)):
            mine, student_states = hidden_states(student, input_ids, every)
            if found is not None:
                pairs = [entry for entry in found if entry is not None]
                top, index = (torch.stack(parts).to(mine.device) for parts in zip(*pairs, strict=True))
                loss = kl_from_top_k(mine, top, index, student_head, vocabulary, self._deviation)
            else:
                assert teacher is not None and last is not None
                heads = student_head, logit_head(teacher)
                loss = kl_from_hidden(mine, last, *heads, vocabulary, config.temperature, self._deviation)
            if config.relative_weight:
                errors = [relative_error(state, target) for state, target in zip(student_states, states, strict=True)]
                loss = loss + config.relative_weight * torch.stack(errors).mean()
            if config.hidden_weight:
                loss = loss + config.hidden_weight / input_ids.shape[1] * hidden_state_loss(student_states, states)
        return {"loss": loss}


def is_bfloat16(model: nn.Module) -> bool:
    return model.get_input_embeddings().weight.dtype == torch.bfloat16  # type: ignore[operator]
