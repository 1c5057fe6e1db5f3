"""bimos: language models with about one bit per weight.

`import bimos` registers the packed format with transformers; `AutoModelForCausalLM.from_pretrained` then loads it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from bimos.errors import BimosError
from bimos.packing import registration

__version__ = "0.1.0"

__all__ = ["BimosError", "Engine", "Sampling", "__version__", "available_methods", "quantize"]


def __getattr__(name: str) -> Any:
    """The rest of the public API, imported when first used: `quantize`, `Engine`, `Sampling`, `available_methods`, methods' configs."""
    if name == "quantize":
        return import_module("bimos.quantize").quantize
    if name == "Engine":
        return import_module("bimos.engine").Engine
    if name == "Sampling":
        return import_module("bimos.generation").Sampling
    if name == "available_methods":
        return import_module("bimos.methods").available_methods
    if name.endswith("Config"):
        for config in import_module("bimos.methods").available_methods().values():
            if config.__name__ == name:
                return config
    raise AttributeError(f"module 'bimos' has no attribute '{name}'")


class _Package(ModuleType):
    """Importing the submodule `bimos.quantize` must not hide the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "quantize" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
registration.register()
