"""Stage 3: end-to-end distillation until its budget is used."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import TrainingArguments

from bimos.config import DistillConfig, LossConfig
from bimos.lanes import Lanes
from bimos.methods.base import LR_LATENT
from bimos.processes import ALONE, Clock, Processes
from bimos.training.budget import Budget, schedule
from bimos.training.checkpoints import COMPLETE, continued
from bimos.training.distillation import Distillation
from bimos.training.fused import fused
from bimos.training.integers import integer_products
from bimos.training.optimizer import adamw, experts_together, narrow_latents, select
from bimos.training.progress import Progress
from bimos.training.recomputing import checkpointed
from bimos.training.sharding import shard
from bimos.training.student import load_tensors, load_trained
from bimos.training.teacher import TopKCache
from bimos.training.trainer import BudgetClock, DistillTrainer


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
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Train the student in place until the budget is used; continues from the newest complete checkpoint in `directory`.

    Args:
        dataset: windows `{"input_ids": [T], "window": []}`, in the order in which they are to be seen.
        processes: between which batches and both models are divided. With several, neither model can be used afterwards; the newest
            checkpoint in `directory` holds what was trained.

    Returns:
        The stage's report, without its peak memory.
    """
    rates = {"scale": config.lr_scale, "router": config.lr_router}
    if config.train == "all":
        rates["latent"] = LR_LATENT if config.lr_latent is None else config.lr_latent
    if config.train_norms:
        rates["norm"] = config.lr_scale
    select(student, rates)
    if config.latents == "bfloat16":
        narrow_latents(student)
    tokens_per_step = config.batch_size * config.accumulate * sequence_length
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=processes.divided(config.batch_size, "distill.batch_size"),
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
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # the Trainer would copy the model to all GPUs that it sees; several are for as many processes
    time_of_all = Clock(processes)
    budget.clock = time_of_all
    clock = BudgetClock(budget, time_of_all, tokens_per_step, config.checkpoint_minutes, progress)
    distillation = Distillation(student, teacher, config, cache, loss, processes)
    done = processes.first(lambda: continued(directory))
    if done:
        facts = json.loads((done[-1] / COMPLETE).read_text())
        budget.spent_tokens, budget.spent_seconds = facts["tokens"], facts["seconds"]
        clock.losses = [tuple(entry) for entry in facts["losses"]]
        load_trained(distillation, load_tensors(done[-1] / "trained.safetensors")[0])
    progress.begin("distillation", 1)
    if budget.progress() < 1:
        is_sharded = processes.count > 1
        lanes = Lanes(1 if is_sharded else config.batch_size, next(student.parameters()).device)
        models = [model for model in (student, teacher) if model is not None]
        frozen = [module for module in (teacher, student.get_output_embeddings()) if module is not None]  # type: ignore[operator]
        in_integers = integer_products(*frozen) if config.int8_teacher and not is_sharded else nullcontext()
        with lanes, fused(*models), in_integers:  # in this order: `fused` asks modules what they answer
            if is_sharded:
                shard(distillation, student, teacher)
            betas = config.beta1, config.beta2
            optimizer = adamw(student, rates, betas, config.weight_decay, config.optimizer == "adamw8bit", config.epsilon, True)
            scheduler = LambdaLR(optimizer, lambda _: schedule(config.schedule, config.warmup, budget.progress()))
            given: Any = {"train_dataset": dataset, "optimizers": (optimizer, scheduler), "callbacks": [clock]}
            trainer = DistillTrainer(clock, lanes, processes, distillation, arguments, **given)
            for callback in list(trainer.callback_handler.callbacks):
                if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                    trainer.remove_callback(callback)
            recomputed = checkpointed(student) if config.checkpointing else nullcontext()
            with experts_together(student, config.expert_share), recomputed:
                trainer.train(resume_from_checkpoint=str(done[-1]) if done else None)
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
