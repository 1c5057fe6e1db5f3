"""The registry of binarization methods.

Every module of this folder is imported, so a new file is a new method. Third parties add theirs through the
entry-point group `bimos.methods`.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from bimos.errors import BimosError
from bimos.methods.base import _REGISTRY, InputStatistics, MethodConfig, StoredTensor, TrainableLinear, register
from bimos.options import build

__all__ = ["InputStatistics", "MethodConfig", "StoredTensor", "TrainableLinear", "available_methods", "method_config", "register"]


@cache
def _discover() -> None:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    for entry in entry_points(group="bimos.methods"):
        entry.load()


def available_methods() -> dict[str, type[MethodConfig]]:
    """Every known method's config class, by name, sorted."""
    _discover()
    return dict(sorted(_REGISTRY.items()))


def method_config(name: str, options: dict[str, Any] | None = None) -> MethodConfig:
    """The config of method `name` with `options` set.

    Raises:
        BimosError: no such method, it has no such option, or the option no such value.
    """
    methods = available_methods()
    if name not in methods:
        raise BimosError(f"unknown method '{name}'; known methods: {', '.join(methods)}")
    known = {field.name for field in dataclasses.fields(methods[name])}
    unknown = sorted(map(str, set(options or {}) - known))
    if unknown:
        raise BimosError(f"method '{name}' has no option '{', '.join(unknown)}'; its options: {', '.join(sorted(known)) or 'none'}")
    return build(methods[name], options or {}, f"method '{name}'")
