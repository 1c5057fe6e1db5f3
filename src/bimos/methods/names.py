"""Parts of names of linears: whole names between dots, as `v_proj` or `layers.0.mlp`."""

from __future__ import annotations

AT_START = "^"  # before a part that must begin a name; within a block alone


def contains(name: str, part: str) -> bool:
    """Whether `part` is in `name`."""
    if part.startswith(AT_START):
        return f"{name}.".startswith(part.removeprefix(AT_START) + ".")
    return f".{part}." in f".{name}."


def behind(block: str, part: str) -> list[str]:
    """What is left, for the names of a block's linears, of a `part` that begins in the name of the block."""
    names = part.split(".")
    return [AT_START + ".".join(names[k:]) for k in range(1, len(names)) if f".{block}".endswith("." + ".".join(names[:k]))]
