"""Teach transformers the packed format when `import bimos` runs, without importing transformers there.

Importing torch and transformers takes seconds, and `bimos --help` needs neither. So where transformers is not loaded
yet, registration waits until its `modeling_utils` is, which every way of loading a model goes through.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TRIGGER = "transformers.modeling_utils"
_REGISTERS = "bimos.packing.hf"


def register() -> None:
    """Register now if transformers' model classes are loaded, else right after they are."""
    if _is_loaded():
        importlib.import_module(_REGISTERS)
    else:
        sys.meta_path.insert(0, _AfterImport())


def _is_loaded() -> bool:
    """Whether the trigger is, and not only begun: what it imports on its way may import bimos."""
    module = sys.modules.get(_TRIGGER)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _AfterImport(MetaPathFinder):
    """Finds the trigger once, as the other finders would, and imports the registering module after it.

    Where the trigger was half loaded before this finder was there, that is done after the first module to be found once it is whole.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _TRIGGER and not _is_loaded():
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None or isinstance(spec.loader, type):  # a class finds modules of Python's own, and many
            sys.meta_path.insert(0, self)
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(_REGISTERS)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
