"""A `transformers.Trainer` that distils.

Checkpoints hold the trained parameters, the optimizer, the scheduler and the generators' states.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from bimos.errors import BimosError
from bimos.lanes import Lanes
from bimos.methods.ste import SharedSigns, by_tables
from bimos.processes import Clock, Processes
from bimos.training.budget import Budget
from bimos.training.checkpoints import COMPLETE, checkpoints, trained_state
from bimos.training.distillation import Distillation, is_bfloat16
from bimos.training.optimizer import sign_planes
from bimos.training.progress import Progress
from bimos.training.sharding import divided_state, whole, whole_state
from bimos.training.student import save_tensors
from bimos.training.tokencache import sync


class BudgetClock(TrainerCallback):
    """Counts the budget, stops when it is used up, asks for checkpoints by the clock, shows progress."""

    def __init__(self, budget: Budget, clock: Clock, tokens_per_step: int, minutes: float, progress: Progress) -> None:
        self.budget, self.tokens_per_step, self.seconds, self.progress = budget, tokens_per_step, 60 * minutes, progress
        self.clock = clock
        self.losses: list[tuple[int, float]] = []
        self._saved = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.tick()
        self.budget.start()
        self._saved = self.budget.elapsed

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the scheduler looks at the budget for the next step's rate."""
        self.clock.tick()
        self.budget.spent_tokens += self.tokens_per_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.budget.elapsed - self._saved >= self.seconds:
            control.should_save = True
            self._saved = self.budget.elapsed
        if self.budget.progress() >= 1:
            control.should_training_stop = True
            control.should_save = True

    def step(self, loss: float) -> None:
        self.losses.append((self.budget.spent_tokens, loss))
        self.progress.tick(self.tokens_per_step, loss)
        self.progress.set(self.budget.progress(), eta=self.budget.eta())


class DistillTrainer(Trainer):
    """`Trainer` that distils, in the order of the token stream, and saves what is trained and nothing else."""

    def __init__(
        self, clock: BudgetClock, lanes: Lanes, processes: Processes, model: Distillation, args: TrainingArguments, **kwargs: Any
    ) -> None:
        super().__init__(model=model, args=args, **kwargs)
        self._clock, self._lanes, self._processes = clock, lanes, processes
        self._signs: AbstractContextManager[Any] | None = None
        if lanes.count > 1:
            planes = sign_planes(model.student)
            signed = {id(signs.latent) for signs in planes}
            self._others = [p for p in model.parameters() if p.requires_grad and id(p) not in signed]
            self._signs = SharedSigns(planes, torch.bfloat16 if is_bfloat16(model.student) else torch.float32)
        self._pending: list[float] = []

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss = model(**inputs)["loss"]
        self._count(loss)
        return (loss, {}) if return_outputs else loss  # the Trainer divides it by the steps that it accumulates

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's own, but on a CPU with the batch in two lanes and the signs made once for both."""
        if self._signs is None:
            with by_tables():
                return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        factor = 1 / self.args.gradient_accumulation_steps
        # Sums of an earlier batch are set aside: that of three gradients would depend on which lane comes first.
        earlier = [(parameter, parameter.grad) for parameter in self._others if parameter.grad is not None]
        for parameter, _ in earlier:
            parameter.grad = None
        with self._signs:
            loss = self._lanes.backward(lambda **part: model(**part)["loss"], self._prepare_inputs(inputs), factor)
        for parameter, grad in earlier:
            parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)
        self._count(loss)
        return loss * factor

    def _count(self, loss: Tensor) -> None:
        self._pending.append(self._processes.mean(loss.item()))
        if not math.isfinite(self._pending[-1]):
            raise BimosError(
                "the loss is not finite; go on with lower rates (the blocks that are done are kept): delete "
                f"'{self.args.output_dir}', then --resume with --set distill.lr_latent=... --set distill.lr_scale=..."
            )
        if len(self._pending) == self.args.gradient_accumulation_steps:
            self._clock.step(sum(self._pending) / len(self._pending))
            self._pending.clear()

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Gradients of several processes are divided behind every batch of those that are summed up: until the last, they would be whole.

        The Trainer's own asks the config of a model that `transformers` has divided.
        """
        return nullcontext()

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]  # the stream is shuffled already

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        is_first = self._processes.is_first
        state = {name: whole(parameter, is_first) for name, parameter in trained_state(self.model).items()}  # type: ignore[arg-type]
        if is_first:
            save_tensors(state, directory / "trained.safetensors")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._processes.count == 1:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_state(self.optimizer, self._processes.is_first)  # type: ignore[arg-type]
        if self._processes.is_first:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")  # type: ignore[union-attr]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._processes.wait()  # for what each has written
        if self._processes.is_first:
            self._complete()
        self._processes.wait()

    def _complete(self) -> None:
        """Let the newest checkpoint count, and take away the others."""
        directory = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        for path in [*directory.iterdir(), directory]:  # all of it, before it counts and the one before it goes
            sync(path)
        budget = self._clock.budget
        facts = {"tokens": budget.spent_tokens, "seconds": budget.elapsed, "losses": self._clock.losses}
        with (directory / f"{COMPLETE}.partial").open("w") as file:
            json.dump(facts, file)
            file.flush()
            os.fsync(file.fileno())
        (directory / f"{COMPLETE}.partial").replace(directory / COMPLETE)
        for old in checkpoints(directory.parent)[:-1]:
            shutil.rmtree(old, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: `distill` has loaded it, before the model was divided."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._processes.count == 1:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
        self.optimizer.load_state_dict(divided_state(self.optimizer, state))  # type: ignore[union-attr, arg-type]
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))  # type: ignore[union-attr]
