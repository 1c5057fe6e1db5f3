"""Checksums of packed weights, kept in the header of every safetensors file of a checkpoint.

    metadata["bimos.crc32"]   eight hex digits for each tensor of the checkpoint, in the order of their names

One sum covers a tensor's name, dtype, shape and bytes. Every shard carries all sums, so that a missing shard shows.
CRC-32 finds every flipped bit and is read at more than 1 GB/s; it is no protection against forgery.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bimos.errors import BimosError

FORMAT_VERSION = 2  # 1 has neither offsets of groups nor a last group that is shorter; a checkpoint without them still says 1
METADATA_KEY = "bimos.crc32"
DESCRIPTION_KEY = "bimos.description"  # in the header, too: a sum over what config.json says of packed linears (`layout.description_sum`)
DTYPES = {  # names that safetensors headers use; it stores tensors from the last of these to the first
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_CHUNK = 64 * 2**20


def checksum(name: str, tensor: Tensor) -> str:
    """Eight hex digits over name, dtype, shape and bytes of a tensor."""
    crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, data.numel(), _CHUNK):  # from an accelerator a part at a time
        crc = zlib.crc32(data[start : start + _CHUNK].cpu().numpy().data, crc)
    return f"{crc:08x}"


def checksums(tensors: Mapping[str, Tensor]) -> str:
    """The metadata value for a checkpoint of these tensors."""
    return "".join(checksum(name, tensors[name]) for name in sorted(tensors))


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, shards in order.

    Raises:
        BimosError: there are none, or the index is not readable.
    """
    directory = Path(directory)
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise BimosError(f"'{directory}' has no model.safetensors: not a checkpoint, or an incomplete one; copy it again")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise BimosError(f"'{index}' is corrupt; copy the checkpoint again") from None
    return [directory / str(name) for name in names]


def read_headers(files: Iterable[str | Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and safetensors dtype (`U8`, `F16`, ...) of every tensor, by name; no weights are read.

    Raises:
        BimosError: a file is missing, truncated or not safetensors.
    """
    headers = {}
    for file in files:
        with _open(file) as weights:
            for name in weights.keys():  # noqa: SIM118  (safe_open is not a mapping)
                part = weights.get_slice(name)
                headers[name] = (tuple(part.get_shape()), part.get_dtype())
    return headers


def named_in_full(base: str, headers: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Headers by the names that tensors have in a model with its head: a base model, saved by itself, has no prefix `base`."""
    if not base or any(name.startswith(f"{base}.") for name in headers):
        return headers
    return {f"{base}.{name}": header for name, header in headers.items()}


def verify_files(paths: Iterable[str | Path]) -> None:
    """Compare every tensor with its checksum.

    Raises:
        BimosError: a file is missing, truncated or corrupt, or has no checksums.
    """
    tensors_of(paths)


def tensors_of(paths: Iterable[str | Path]) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, compared with their checksums: views of the mapped files, not to be written to.

    Raises:
        BimosError: see `verify_files`.
    """
    files = [Path(path) for path in paths]
    expected: str | None = None
    tensors: dict[str, Tensor] = {}
    origin: dict[str, Path] = {}
    for file in files:
        with _open(file) as weights:
            stored = (weights.metadata() or {}).get(METADATA_KEY)
            if stored is None:
                raise BimosError(f"'{file}' carries no checksums: it is corrupt, or bimos did not write it; copy the checkpoint again")
            if expected is not None and stored != expected:
                raise BimosError(f"'{file}' does not belong to the files beside it; copy the checkpoint again")
            expected = stored
            try:
                tensors.update((name, weights.get_tensor(name)) for name in weights.keys())  # noqa: SIM118
            except SafetensorError as error:
                raise _corrupt(file, error) from None
            origin.update(dict.fromkeys(weights.keys(), file))
    if expected is None or len(expected) != 8 * len(tensors):
        where = files[0].parent if files else "the checkpoint"
        raise BimosError(f"'{where}' holds {len(tensors)} tensors where {len(expected or '') // 8} were saved; copy the checkpoint again")
    for position, (name, value) in enumerate(zip(sorted(tensors), _sums(tensors), strict=True)):
        if value != expected[8 * position : 8 * position + 8]:
            raise BimosError(f"'{origin[name]}' is corrupt: the checksum of '{name}' does not match; copy the checkpoint again")
    return tensors


def check_same_description(paths: Iterable[str | Path], description: str) -> None:
    """Raises BimosError: weights were saved with another description than config.json has; files of earlier versions do not say."""
    for file in paths:
        with _open(file) as weights:
            if (weights.metadata() or {}).get(DESCRIPTION_KEY, description) != description:
                raise BimosError(f"config.json does not describe the weights of '{file}' as they were saved; copy the checkpoint again")


def _sums(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Checksums in the order of the names, made by as many threads as torch has: zlib lets others run meanwhile."""
    names = sorted(tensors)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield from pool.map(lambda name: checksum(name, tensors[name]), names)


def check_readable(path: str | Path) -> None:
    """Raises BimosError: a file or folder is there, and closed to this user. Libraries say that it is missing, or damaged."""
    if os.path.lexists(path) and not os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0)):
        raise BimosError(f"cannot read '{path}': permission denied; have its owner allow it (chmod a+rX)")


def read_config(directory: str | Path) -> dict[str, Any]:
    """`config.json` of a checkpoint directory.

    Raises:
        BimosError: no such directory or file, not to be read, or not JSON.
    """
    path = Path(directory) / "config.json"
    check_readable(directory)
    check_readable(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    except OSError:
        if not Path(directory).is_dir():
            raise BimosError(f"no such model directory: '{directory}'; check the path") from None
        raise BimosError(f"'{directory}' has no config.json: not a model, or a save that was interrupted") from None
    except (ValueError, RecursionError):
        pass
    raise BimosError(f"'{path}' is corrupt; copy the checkpoint again")


def is_packed(directory: str | Path) -> bool:
    """Whether a directory holds a checkpoint that bimos packed. Raises BimosError: it holds no model at all."""
    quantization = read_config(directory).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "bimos"


def check_depth(directory: str | Path) -> None:
    """Raises BimosError: a packed checkpoint's config has more blocks than its files can hold, which could take for ever to build.

    Or it has lost its description of packed linears.
    """
    if not is_packed(directory):
        if any(METADATA_KEY in _metadata(file) for file in Path(directory).glob("*.safetensors")):
            raise BimosError(f"the weights of '{directory}' are packed, which config.json does not say; copy the checkpoint again")
        return
    config, tensors = read_config(directory), len(read_headers(weight_files(directory)))
    for key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        value = config.get(key)
        if isinstance(value, int) and value > tensors:
            raise BimosError(f"config.json says {key} {value:.4g}, and the weights are {tensors} tensors; copy the checkpoint again")


def verify(directory: str | Path) -> None:
    """Check a packed checkpoint's config, format version, files and checksums.

    Raises:
        BimosError: whatever is wrong, in one line.
    """
    if not is_packed(directory):
        raise BimosError(f"'{directory}' is not a packed checkpoint; make one with `bimos quantize`")
    check_format_version(read_config(directory)["quantization_config"].get("format_version"))
    verify_files(weight_files(directory))


def check_format_version(version: Any) -> None:
    """Raises BimosError: written by a newer bimos, or not a version."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BimosError(f"format_version {version!r} in config.json is not a version; get the checkpoint again")
    if version > FORMAT_VERSION:
        raise BimosError(f"this checkpoint has format_version {version} and this bimos reads up to {FORMAT_VERSION}; upgrade bimos")


def _metadata(file: Path) -> dict[str, str]:
    """What a header says besides tensors; nothing where it cannot be read, for others to tell why."""
    try:
        with safe_open(file, framework="pt") as weights:
            return weights.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _open(file: str | Path) -> Any:
    check_readable(file)
    if not Path(file).is_file():
        raise BimosError(f"'{file}' is missing; copy the checkpoint again")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _corrupt(file, error) from None


def _corrupt(file: str | Path, error: Exception) -> BimosError:
    return BimosError(f"'{file}' is truncated or corrupt ({' '.join(str(error).split())}); copy the checkpoint again")
