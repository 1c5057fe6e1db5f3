"""Damage to checkpoints, chosen by bytes: config, header, shapes or bytes change; checksums are then made anew."""

from __future__ import annotations

import copy
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bimos.packing.layout import description_sum

ABSURD: list[Any] = [
    *(0, -1, 1, 2, 3, 7, 33, 64, 4096, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63, 2**64, 10**30, 0.5, -0.0, 1e-320, 1e308),
    *(
        math.inf,
        math.nan,
        None,
        True,
        False,
        "",
        "x",
        "float16",
        "int64",
        "yarn",
        "llama3",
        "dynamic",
        "silu",
        [],
        {},
        [[]],
        {"a": 1},
        [1, 2],
    ),
    *("bool", "sliding_attention", ["sliding_attention"] * 2, {"rope_type": "linear", "rope_theta": 0, "factor": 0}, "\ud800", "9" * 5000),
]
DTYPES = ("F16", "BF16", "F32", "U8", "I8", "I64", "BOOL", "F64", "F8_E4M3", "X")
TORCH = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "U8": "uint8",
    "I8": "int8",
    "I64": "int64",
    "BOOL": "bool",
    "F64": "float64",
}


class Choices:
    """Decisions out of bytes: the same bytes, the same checkpoint. Zero when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, bound: int) -> int:
        part = self._data[self._at : self._at + 2]
        self._at += 2
        return int.from_bytes(part, "little") % bound

    def of(self, values: Any) -> Any:
        return values[self.below(len(values))]


class Checkpoint:
    """A directory's files, the weights in parts: header and bytes."""

    def __init__(self, directory: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".json", ".safetensors")}
        self.jsons = {name: json.loads(data) for name, data in self.files.items() if name in ("config.json", "generation_config.json")}
        weights = self.files.pop("model.safetensors")
        size = int.from_bytes(weights[:8], "little")
        self.header, self.body = json.loads(weights[8 : 8 + size]), bytearray(weights[8 + size :])
        self.raw: Callable[[bytes], bytes] = bytes
        self.sums = True

    def write(self, directory: Path) -> None:
        for name, data in self.files.items():
            (directory / name).write_bytes(data)
        for name, values in self.jsons.items():
            (directory / name).write_text(json.dumps(values), encoding="utf-8")
        if self.sums:
            metadata = self.header.get("__metadata__")
            if isinstance(metadata, dict):
                description = self.jsons.get("config.json", {})
                description = description.get("quantization_config") if isinstance(description, dict) else None
                if isinstance(description, dict):  # what a writer of such a config would say
                    metadata["bimos.description"] = description_sum(description)
                metadata["bimos.crc32"] = "".join(self._sum(name) for name in sorted(set(self.header) - {"__metadata__"}))
        head = json.dumps(self.header).encode()
        head += b" " * (-len(head) % 8)
        (directory / "model.safetensors").write_bytes(self.raw(len(head).to_bytes(8, "little") + head + bytes(self.body)))

    def _sum(self, name: str) -> str:
        entry = self.header[name]
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            text = f"{name} torch.{TORCH.get(dtype, dtype)} {shape} ".encode()
            return f"{zlib.crc32(self.body[begin:end], zlib.crc32(text)):08x}"
        except (KeyError, TypeError, ValueError, UnicodeError):
            return "0" * 8


def mutate(checkpoint: Checkpoint, choices: Choices) -> None:
    """One to three changes."""
    for _ in range(1 + choices.below(3)):
        choices.of([_value, _value, _value, _entry, _resize, _bytes, _file])(checkpoint, choices)
    checkpoint.sums = choices.below(8) != 7


def _value(checkpoint: Checkpoint, choices: Choices) -> None:
    """Somewhere in a config an absurd value, another's value, or none."""
    node: Any = checkpoint.jsons.get(choices.of(["config.json", "config.json", "config.json", "generation_config.json"]))
    while isinstance(node, dict) and node:
        key = choices.of(sorted(node))
        if isinstance(node[key], dict) and node[key] and choices.below(4):
            node = node[key]
            continue
        action = choices.below(8)
        if action == 0:
            del node[key]
        elif action == 1:
            node[key] = copy.deepcopy(node[choices.of(sorted(node))])
        else:
            node[key] = copy.deepcopy(choices.of(ABSURD))  # later changes may go into it
        return


def _entry(checkpoint: Checkpoint, choices: Choices) -> None:
    """A tensor's header says something else than the bytes."""
    if not checkpoint.header:
        return
    name = choices.of(sorted(checkpoint.header))
    entry = checkpoint.header[name]
    action = choices.below(6)
    if action == 0 or "shape" not in entry:
        del checkpoint.header[name]
    elif action == 1:
        entry["dtype"] = choices.of(DTYPES)
    elif action == 2:
        entry["shape"] = [*entry["shape"][:-1], copy.deepcopy(choices.of(ABSURD))]
    elif action == 3:
        entry["data_offsets"][choices.below(2)] = choices.of([0, 1, -1, 2**40, 2**64, len(checkpoint.body), None])
    elif action == 4:
        checkpoint.header[choices.of(sorted(checkpoint.header))] = copy.deepcopy(entry)
    else:
        checkpoint.header[f"{name}x"] = checkpoint.header.pop(name)


def _resize(checkpoint: Checkpoint, choices: Choices) -> None:
    """A tensor of another shape or dtype with bytes to match: a file that is right, and wrong for the config."""
    name = choices.of(sorted(set(checkpoint.header) - {"__metadata__"}) or [""])
    entry = checkpoint.header.get(name)
    try:
        (begin, end), shape = entry["data_offsets"], list(entry["shape"])
        unit = (end - begin) // max(1, math.prod(shape))
        if choices.below(3) == 0:
            entry["shape"] = shape[::-1] if choices.below(2) else [math.prod(shape)]
            return
        shape[choices.below(len(shape))] = choices.of([0, 1, 2, 3, 8, 40])
        size = math.prod(shape) * unit
        self_bytes = (checkpoint.body[begin:end] * (size // max(1, end - begin) + 1))[:size]
    except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError, OverflowError):
        return
    checkpoint.body[begin:end] = self_bytes
    entry["shape"], entry["data_offsets"] = shape, [begin, begin + size]
    for other in checkpoint.header.values():
        offsets = other.get("data_offsets") if isinstance(other, dict) else None
        if other is not entry and offsets and all(isinstance(value, int) for value in offsets) and offsets[0] >= end:
            other["data_offsets"] = [value + size - (end - begin) for value in offsets]


def _bytes(checkpoint: Checkpoint, choices: Choices) -> None:
    """The file truncated, longer, or with other bytes in its header or its tensors."""
    action, at, value = choices.below(5), choices.below(65536), choices.below(256)

    def change(data: bytes) -> bytes:
        if action == 0:
            return data[: at % len(data)]
        if action == 1:
            return data + bytes(at % 100)
        if action == 2:
            return at.to_bytes(8, "little") + data[8:]
        changed = bytearray(data)
        changed[at % (200 if action == 3 else len(data))] = value
        return bytes(changed)

    if action == 4 and checkpoint.body:
        checkpoint.body[at % len(checkpoint.body)] = value  # with a checksum that is right
    else:
        checkpoint.raw = change


def _file(checkpoint: Checkpoint, choices: Choices) -> None:
    """A file that is gone, empty, or no JSON."""
    name = choices.of(sorted(checkpoint.files) or [""])
    if not name:
        return
    action, data = choices.below(4), checkpoint.files[name]
    if name in checkpoint.jsons and action:
        del checkpoint.jsons[name]
    if action == 1:
        del checkpoint.files[name]
    elif action > 1:
        checkpoint.files[name] = [b"", b"[" * 100_000, b"\xff\xfe", data[: len(data) // 2]][choices.below(4)]
