"""Weights, gradients and optimizer states divided between processes: FSDP2, block by block.

Checkpoints are the same files for any number of processes: tensors are put together on the way to them, and divided on the way back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from bimos.models import decoder_blocks


def shard(distillation: nn.Module, student: nn.Module, teacher: nn.Module | None) -> None:
    """Divide the parameters of both, in place: they are whole while their block runs.

    The teacher's embeddings and head, which are used outside its `forward`, stay whole.
    """
    for model in (student, teacher):
        if model is not None:
            for block in decoder_blocks(model)[1]:
                fully_shard(block, reshard_after_forward=True)  # the teacher's are roots, which would stay whole
    fully_shard(distillation)
    reduce_all: Any = getattr(distillation, "set_reduce_scatter_unused_params", None)  # torch 2.13
    if reduce_all is not None:  # a linear that saw no token in one process has a gradient in others
        reduce_all(True)


def whole(value: Any, keep: bool) -> Any:
    """All of a tensor, of which each process may hold a part; None where it is not to be kept. Anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if keep else None


def whole_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """`optimizer.state_dict()` as one process would have it, where it is to be kept; called by all of them."""
    state = optimizer.state_dict()
    return state | {"state": {key: {name: whole(value, keep) for name, value in values.items()} for key, values in state["state"].items()}}


def divided_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """`state`, which is whole, as this process's `optimizer.load_state_dict` takes it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def divide(parameter: Tensor, value: Any) -> Any:
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
        return value

    divided = {key: {name: divide(parameters[key], value) for name, value in values.items()} for key, values in state["state"].items()}
    return state | {"state": divided}
