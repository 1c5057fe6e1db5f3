"""Sizes of tiles for the Triton kernels: a few configurations, and which of them was fastest for a kind of call on a GPU.

The first call of a kind (GPU, dtype, shape, number of tokens up to the next power of two) runs every configuration and keeps the fastest in
`triton.json` in the user's cache directory; later processes read it there. Another choice adds sums up in another order. BIMOS_TUNE=0 takes
the first configuration always, and so does the interpreter, and a CUDA graph that is being captured, in which nothing can be measured.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from bimos.kernels.gpu import FEW

VERSION = 2  # of kernels and configurations; what was measured of others does not count


class Config(NamedTuple):
    """How a product is divided."""

    is_prepared: bool  # gates and scaled inputs are made by a kernel of their own; else by every program of the product
    is_dot: bool  # by `tl.dot`; else inputs are added up with their signs, one token a program
    block_tokens: int
    block_out: int
    block_bytes: int  # of a row of a plane: eight inputs each
    warps: int
    stages: int
    waves: int  # programs wanted for each multiprocessor; where outputs and tokens give fewer, inputs are divided


# Compiled code chose them (no registers spilled, few barriers, for compute capability 9.0), not measurements; the first of each goes where
# nothing is measured. Without `tl.dot`, inputs stay out of shared memory while a tile has fewer bytes a row than a program threads.
ONE = (
    Config(True, False, 1, 32, 64, 4, 3, 4),
    Config(True, False, 1, 16, 64, 4, 4, 4),
    Config(True, False, 1, 32, 128, 8, 3, 2),
    Config(False, False, 1, 16, 128, 4, 3, 4),
    Config(False, False, 1, 16, 256, 8, 3, 2),
    Config(True, True, 16, 64, 32, 4, 3, 2),
)
SEVERAL = (
    Config(True, True, 16, 64, 32, 4, 3, 2),
    Config(True, True, 16, 64, 64, 4, 2, 2),
    Config(True, True, 16, 128, 32, 4, 3, 1),
    Config(False, True, 16, 64, 32, 4, 3, 2),
    Config(True, False, 1, 32, 64, 4, 3, 4),
)
MANY = (
    Config(True, True, 64, 128, 16, 4, 2, 1),
    Config(True, True, 64, 128, 32, 4, 2, 1),
    Config(True, True, 128, 128, 16, 8, 3, 1),
    Config(True, True, 128, 128, 32, 8, 2, 1),
    Config(True, True, 128, 64, 32, 4, 2, 1),
    Config(True, True, 32, 64, 32, 4, 2, 2),
)


def candidates(tokens: int) -> tuple[Config, ...]:
    """The configurations for so many tokens, the one to take unmeasured first."""
    return ONE if tokens == 1 else SEVERAL if tokens <= FEW else MANY


def choose(run: Callable[[Config], Any], x: Tensor, shape: tuple[int, ...]) -> Config | None:
    """The best configuration known for `x [..., in]` and layers like this; where none is, `run` is measured with each. None: it can none.

    Args:
        shape: planes, outputs (of each linear), inputs, experts and inputs of a group of the layer.
    """
    tokens = x.shape[:-1].numel()
    choices = candidates(tokens)
    if not x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("BIMOS_TUNE") == "0":
        return choices[0]
    key = (x.device, x.dtype, shape, triton.next_power_of_2(min(tokens, 4096)))
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return choices[0]
        try:
            _chosen[key] = _best(run, choices, _names(*key))
        except torch.OutOfMemoryError:  # of measuring, which takes more than running: nothing is known, and may be the next time
            return choices[0]
    return _chosen[key]


_chosen: dict[Any, Config | None] = {}


def _names(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], tokens: int) -> tuple[str, str]:
    """GPU, and kind of call, as the file has them."""
    kind = "x".join(map(str, shape))
    return torch.cuda.get_device_name(device), f"v{VERSION} triton {triton.__version__} {str(dtype).removeprefix('torch.')} {kind} {tokens}"


def _best(run: Callable[[Config], Any], choices: tuple[Config, ...], names: tuple[str, str]) -> Config | None:
    gpu, kind = names
    known = read().get(gpu, {}).get(kind)
    if known in choices:
        return known
    times = {config: time for config in choices if (time := measure(functools.partial(run, config))) is not None}
    if not times:
        warnings.warn(f"no tiles of the Triton kernel fit {gpu} for {kind}: such products run in plain torch", stacklevel=2)
        return None
    best = min(times, key=times.__getitem__)
    write(gpu, kind, best)
    return best


def measure(call: Callable[[], Any]) -> float | None:
    """Median milliseconds with nothing in the cache, or None for tiles that this GPU has no room for, or Triton no code."""
    try:
        time: float = triton.testing.do_bench(call, warmup=5, rep=25, return_mode="median")
    except torch.OutOfMemoryError:  # says nothing of the tiles
        raise
    except (TritonError, RuntimeError):
        return None
    return time


def cache_file() -> Path:
    """Where choices are kept: XDG_CACHE_HOME, else where this system's programs keep what can be made again."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "bimos" / "triton.json"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "bimos" / "triton.json"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "bimos" / "triton.json"
    return Path.home() / ".cache" / "bimos" / "triton.json"


def read() -> dict[str, dict[str, Config]]:
    """Choices by GPU and kind of call; what cannot be read, or is none, is left out."""
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a user without a home
        return {}
    if not isinstance(found, dict):
        return {}
    kinds = {gpu: kinds.items() for gpu, kinds in found.items() if isinstance(kinds, dict)}
    return {
        gpu: {kind: Config(*values) for kind, values in items if isinstance(values, list) and len(values) == len(Config._fields)}
        for gpu, items in kinds.items()
    }


def write(gpu: str, kind: str, config: Config) -> None:
    """Adds a choice to those on disk, never leaving half a file; where nothing can be written, later processes measure again."""
    known = read()
    known.setdefault(gpu, {})[kind] = config
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        aside.replace(path)
    except (OSError, RuntimeError):
        pass
