"""Teachers larger than memory: their weights stay in the files that they were mapped from, and come into memory by the block.

What a block is read for is done on a copy of it; the pages of the file are then given back. A page that was never written to is
read anew from the file wherever it is needed again.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bimos.errors import BimosError
from bimos.models import decoder_blocks, load_teacher

SUFFIX, HUB = ".safetensors", "/blobs/"  # of files, and where those of the Hub lie that links with names lead to
KEPT = torch.bfloat16  # what weights are rounded to, as a teacher's in memory are (`load_teacher`)


def load_mapped(model: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """Teacher and tokenizer, weights as they are in the files; what is neither in a block nor an embedding in `dtype`.

    Raises:
        BimosError: see `load_teacher`; or a file that is not mapped.
    """
    if str(model).endswith(".gguf"):
        raise BimosError(f"'{model}' has to be dequantised as a whole: leave out --low-memory, or save it as safetensors first")
    teacher, tokenizer = load_teacher(model, "auto")
    _, blocks = decoder_blocks(teacher)
    large = [*blocks.parameters(), *(e.weight for e in (teacher.get_input_embeddings(), teacher.get_output_embeddings()) if e is not None)]
    stays = {id(parameter) for parameter in large}
    for parameter in teacher.parameters():
        if id(parameter) not in stays:
            parameter.data = parameter.data.to(KEPT).to(dtype)
    return teacher, tokenizer


def mapped_ranges() -> list[tuple[int, int]]:
    """Addresses `[first, last)` at which this process has mapped weights; none where the system does not tell (anything but Linux)."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            addresses, *_, name = line.split(maxsplit=5)
            if name.rstrip("\n").endswith(SUFFIX) or HUB in name:
                first, last = (int(address, 16) for address in addresses.split("-"))
                found.append((first, last))
    return found


def release(module: nn.Module) -> int:
    """Give back the memory of the parameters of `module` that are mapped; how many bytes they have.

    They must be as they were in their file: what was written to them is lost.
    """
    ranges, freed = mapped_ranges(), 0
    for parameter in module.parameters():
        first = parameter.data_ptr()
        last = first + parameter.numel() * parameter.element_size()
        if any(low <= first and last <= high for low, high in ranges):
            freed += last - first
            give_back_pages(first, last)
    return freed


def give_back_pages(first: int, last: int) -> None:
    """Whole pages between two addresses: of those at its ends others have a part, which is read again, too, where it is needed."""
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is None or sys.platform != "linux":  # elsewhere it may write zeros
        return
    first -= first % mmap.PAGESIZE
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(advice))


class MappedLinear(nn.Linear):
    """A linear whose weight stays where it was mapped from, and is in memory in the dtype of the work while it is looked at."""

    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        stored = self._parameters["weight"]
        assert stored is not None
        return stored.detach().to(KEPT).to(self.dtype)


def replace_weight(linear: nn.Linear, weight: Tensor) -> None:
    """Give `linear` a weight `[out, in]` of its own, in the dtype of the one before."""
    dtype = linear.dtype if isinstance(linear, MappedLinear) else linear.weight.dtype
    if isinstance(linear, MappedLinear):
        linear.__class__ = nn.Linear  # type: ignore[assignment]
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)


def working_copy(block: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """`block` again, floating point values in `dtype`. On a CPU its linears keep `block`'s weights, which come into memory when used."""
    if device.type != "cpu":
        return copy.deepcopy(block).to(device, KEPT).to(dtype)
    stays = [module.weight for module in block.modules() if type(module) is nn.Linear]
    memo: dict[int, Any] = {id(weight): nn.Parameter(weight.data, requires_grad=False) for weight in stays}
    result = copy.deepcopy(block, memo)
    linears = [module for module in result.modules() if type(module) is nn.Linear]
    weights = [linear._parameters.pop("weight") for linear in linears]
    result.to(KEPT).to(dtype)
    for linear, weight in zip(linears, weights, strict=True):
        linear._parameters["weight"] = weight
        linear.__class__, linear.dtype = MappedLinear, dtype  # type: ignore[assignment]
    return result


def rest(block: nn.Module) -> None:
    """A working copy is not used for a while: give back what its linears have been read from."""
    if any(isinstance(module, MappedLinear) for module in block.modules()):
        release(block)


@contextmanager
def entering_in(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Within it, hidden states are in `dtype` on `device` from the embedding on, whatever and wherever the weights of `model` are."""

    def cast(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.to(device, KEPT).to(dtype)

    hook = model.get_input_embeddings().register_forward_hook(cast)  # type: ignore[operator]
    try:
        yield
    finally:
        hook.remove()
