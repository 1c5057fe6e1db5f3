"""Where training happens: the CPU, or a GPU that torch sees."""

from __future__ import annotations

import torch

from bimos.errors import BimosError
from bimos.processes import Processes


def check_device(name: str) -> None:
    """Raises BimosError: training runs on no device of this name."""
    if name not in ("cpu", "cuda"):
        raise BimosError(f"training runs on cpu or cuda, not on '{name}'; which GPU is cuda: CUDA_VISIBLE_DEVICES=...")


def chosen_device(name: str, processes: Processes) -> torch.device:
    """The device `cpu` or `cuda`: of several GPUs the first, or with several processes each its own.

    Raises:
        BimosError: it is called something else, or is not here.
    """
    check_device(name)
    if name == "cuda" and not torch.cuda.is_available():
        raise BimosError("torch sees no GPU here (it takes a torch that is built for CUDA, and the GPU's driver); leave --device out")
    if processes.count > 1 and processes.device is not None:
        return processes.device
    return torch.device(name, 0) if name == "cuda" else torch.device(name)
