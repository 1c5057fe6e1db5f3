"""Stage 3: end-to-end distillation as a `transformers.Trainer`.

Checkpoints hold the trained parameters, the optimizer, the scheduler and the generators' states. One counts only once its
`complete.json` is there, which is written last; the one before it is kept until then.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from bimos.config import DistillConfig, LossConfig
from bimos.errors import BimosError
from bimos.lanes import Lanes
from bimos.methods.ste import SharedSigns
from bimos.training.budget import Budget, schedule
from bimos.training.fused import fused
from bimos.training.int8 import int8_products
from bimos.training.losses import Deviation, hidden_state_loss, kl_from_hidden, kl_from_top_k, relative_error
from bimos.training.optimizer import build_optimizer, experts_together, signed_latents
from bimos.training.progress import Progress
from bimos.training.student import load_tensors, load_trained, save_tensors
from bimos.training.teacher import TopKCache, hidden_states, logit_head

COMPLETE = "complete.json"


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
        self, student: nn.Module, teacher: nn.Module | None, config: DistillConfig, cache: TopKCache | None, loss: LossConfig | None = None
    ) -> None:
        super().__init__()
        self._deviation = Deviation(loss.dad_gamma, loss.dad_lambda) if loss is not None and loss.dad else None
        self.student = student
        self._teacher = (teacher,)  # in a tuple: not a submodule, neither trained nor saved
        self._config, self._cache = config, cache
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
        if found is None or any(entry is None for entry in found):
            assert teacher is not None
            with torch.no_grad():
                last, states = hidden_states(teacher, input_ids, every)
            if found is not None and self._cache is not None:
                head = logit_head(teacher)
                found = [entry or self._cache.put(int(number), row, head) for number, entry, row in zip(window, found, last, strict=True)]
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=_is_bfloat16(student)):
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


def _is_bfloat16(model: nn.Module) -> bool:
    return model.get_input_embeddings().weight.dtype == torch.bfloat16  # type: ignore[operator]


class _Clock(TrainerCallback):
    """Counts the budget, stops when it is used up, asks for checkpoints by the clock, shows progress."""

    def __init__(self, budget: Budget, tokens_per_step: int, minutes: float, progress: Progress) -> None:
        self.budget, self.tokens_per_step, self.seconds, self.progress = budget, tokens_per_step, 60 * minutes, progress
        self.losses: list[tuple[int, float]] = []
        self._saved = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.budget.start()
        self._saved = self.budget.elapsed

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.budget.spent_tokens += self.tokens_per_step
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

    def __init__(self, clock: _Clock, lanes: Lanes, model: Distillation, args: TrainingArguments, **kwargs: Any) -> None:
        super().__init__(model=model, args=args, **kwargs)
        self._clock, self._lanes = clock, lanes
        self._signs: AbstractContextManager[Any] = nullcontext()
        if lanes.count > 1:
            latents = signed_latents(model.student)
            signed = {id(latent) for latent in latents}
            self._others = [p for p in model.parameters() if p.requires_grad and id(p) not in signed]
            self._signs = SharedSigns(latents, torch.bfloat16 if _is_bfloat16(model.student) else torch.float32)
        self._pending: list[float] = []

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss = model(**inputs)["loss"]
        self._count(loss)
        return (loss, {}) if return_outputs else loss  # the Trainer divides it by the steps that it accumulates

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's own, but on a CPU with the batch in two lanes and the signs made once for both."""
        if self._lanes.count == 1 or self.args.world_size > 1:
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
        self._pending.append(loss.item())
        if not torch.isfinite(loss):
            raise BimosError(
                "the loss is not finite; go on with lower rates (the blocks that are done are kept): delete "
                f"'{self.args.output_dir}', then --resume with --set distill.lr_latent=... --set distill.lr_scale=..."
            )
        if len(self._pending) == self.args.gradient_accumulation_steps:
            self._clock.step(sum(self._pending) / len(self._pending))
            self._pending.clear()

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]  # the stream is shuffled already

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        save_tensors(trained_state(self.model), directory / "trained.safetensors")  # type: ignore[arg-type]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        directory = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
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
        tensors, _ = load_tensors(Path(resume_from_checkpoint) / "trained.safetensors")
        load_trained(self.model, tensors)  # type: ignore[arg-type]


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path.parent for path in directory.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    dataset: Dataset,
    sequence_length: int,
    config: DistillConfig,
    budget: Budget,
    directory: Path,
    progress: Progress,
    cache: TopKCache | None = None,
    seed: int = 0,
    loss: LossConfig | None = None,
) -> dict[str, Any]:
    """Train the student in place until the budget is used; continues from the newest complete checkpoint in `directory`.

    Args:
        dataset: windows `{"input_ids": [T], "window": []}`, in the order in which they are to be seen.

    Returns:
        The stage's report, without its peak memory.
    """
    rates = {"scale": config.lr_scale, "router": config.lr_router}
    if config.train == "all":
        rates["latent"] = config.lr_latent
    if config.train_norms:
        rates["norm"] = config.lr_scale
    optimizer = build_optimizer(student, rates, (config.beta1, config.beta2), config.weight_decay)
    scheduler = LambdaLR(optimizer, lambda _: schedule(config.schedule, config.warmup, budget.progress()))
    tokens_per_step = config.batch_size * config.accumulate * sequence_length
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        max_steps=len(dataset) // (config.batch_size * config.accumulate),  # type: ignore[arg-type]
        max_grad_norm=config.clip,
        save_strategy="no",  # the clock says when
        logging_strategy="steps",
        logging_steps=10,
        report_to=config.report_to,
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=next(student.parameters()).device.type == "cpu",  # the teacher is there too, and is not moved
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    clock = _Clock(budget, tokens_per_step, config.checkpoint_minutes, progress)
    lanes = Lanes(config.batch_size, next(student.parameters()).device)
    trainer = DistillTrainer(
        clock,
        lanes,
        Distillation(student, teacher, config, cache, loss),
        arguments,
        train_dataset=dataset,
        optimizers=(optimizer, scheduler),
        callbacks=[clock],
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    done = checkpoints(directory)
    for partial in directory.glob("checkpoint-*"):
        if partial not in done:
            shutil.rmtree(partial)
    if done:
        facts = json.loads((done[-1] / COMPLETE).read_text())
        budget.spent_tokens, budget.spent_seconds = facts["tokens"], facts["seconds"]
        clock.losses = [tuple(entry) for entry in facts["losses"]]
    progress.begin("distillation", 1)
    if budget.progress() < 1:
        models = [model for model in (student, teacher) if model is not None]
        frozen = [module for module in (teacher, student.get_output_embeddings()) if module is not None]  # type: ignore[operator]
        in_int8 = int8_products(*frozen) if config.int8_teacher else nullcontext()
        together = experts_together(student, config.expert_share)
        with lanes, together, fused(*models), in_int8:  # in this order: `fused` asks modules what they answer
            trainer.train(resume_from_checkpoint=str(done[-1]) if done else None)
    elif done:
        trainer._load_from_checkpoint(str(done[-1]))
    losses = [loss for _, loss in clock.losses]
    edge = max(1, len(losses) // 50)
    seconds = max(budget.elapsed, 1e-9)  # read once: the clock goes on
    return {
        "name": "distill",
        "tokens": budget.spent_tokens,
        "seconds": seconds,
        "tokens_per_second": budget.spent_tokens / seconds,
        "loss_first": sum(losses[:edge]) / edge,
        "loss_last": sum(losses[-edge:]) / edge,
        "history": clock.losses[:: max(1, len(losses) // 500)],
    }
