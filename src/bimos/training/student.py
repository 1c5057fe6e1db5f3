"""The student: the teacher's model with trainable layers in the place of its linears."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bimos.errors import BimosError
from bimos.methods.base import InputStatistics, MethodConfig, TrainableLinear
from bimos.models import convertible_linears


def trainable_layers(model: nn.Module) -> Iterator[tuple[str, TrainableLinear]]:
    """The layers in training, by name."""
    for name, module in model.named_modules():
        if isinstance(module, TrainableLinear):
            yield name, module


def binarize(
    module: nn.Module, names: list[str], config: MethodConfig, statistics: dict[str, InputStatistics], generator: torch.Generator
) -> None:
    """Replace the linears `names` of `module` by trainable layers, in place.

    Args:
        statistics: of each linear's inputs; those not named start uninformed.
    """
    for name in names:
        linear = module.get_submodule(name)
        known = statistics.get(name) or InputStatistics.uninformed(linear.in_features, linear.weight.device)  # type: ignore[arg-type]
        own = config.of_linear(name)
        layer = own.layer.from_linear(linear, own, known, generator)  # type: ignore[arg-type]
        module.set_submodule(name, layer)


def uninitialised_student(teacher: nn.Module, config: MethodConfig, skip: list[str], device: torch.device | None = None) -> nn.Module:
    """A copy of the teacher whose layers wait for `load_trained`. Frozen parts share the teacher's memory.

    Args:
        device: of these layers; None: where the teacher is.
    """
    names = list(convertible_linears(teacher, skip))
    # Parameters of its own, on the same memory: what one trains (a norm, say) is taken out of the teacher's.
    memo: dict[int, object] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in teacher.parameters()}
    memo |= {id(buffer): buffer for buffer in teacher.buffers()}
    student = copy.deepcopy(teacher, memo)
    replace_empty(student, names, config, device)
    return student


def replace_empty(module: nn.Module, names: list[str], config: MethodConfig, device: torch.device | None = None) -> None:
    """Replace the linears `names` of `module`, in place, by trainable layers that wait for their values."""
    for name in names:
        linear = module.get_submodule(name)
        own = config.of_linear(name)
        layer = own.layer(linear.in_features, linear.out_features, linear.bias is not None, own)  # type: ignore[arg-type]
        module.set_submodule(name, layer.to(device or next(linear.parameters()).device))


def load_trained(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put saved parameters and buffers into `module`, in the dtype in which they were saved.

    Raises:
        BimosError: a name or shape that the module does not have.
    """
    parameters = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise BimosError(f"the work saved does not fit this model ('{name}'); start anew with --overwrite")
        # Of a file that is mapped, a vector that stays (a norm's) would keep all in memory when latents have been packed.
        parameters[name].data = (tensor.clone() if tensor.dim() == 1 else tensor).to(parameters[name].device)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that under its name there is the whole of it or what was there before."""
    aside = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, aside, metadata)
    with aside.open("rb+") as file:
        os.fsync(file.fileno())
    aside.replace(path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - not a dict
