"""Parts of names of linears: whole names between dots, as `v_proj` or `layers.0.mlp`."""

from __future__ import annotations


def contains(name: str, part: str) -> bool:
    """Whether `part`, whole names between dots, is in `name`."""
    return f".{part}." in f".{name}."


def behind(block: str, part: str) -> list[str]:
    """What is left of a `part` that begins in the name of a block and goes on in those of its linears."""
    names = part.split(".")
    return [".".join(names[k:]) for k in range(1, len(names)) if f".{block}".endswith("." + ".".join(names[:k]))]
