"""Dataclasses of options from mappings, checked key by key: those of a run and those of a method."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal

from bimos.errors import BimosError


def build(cls: type, values: Any, source: str, prefix: str = "") -> Any:
    """An instance of the dataclass `cls` from a mapping. Raises BimosError naming `source`: unknown key, wrong type."""
    if not isinstance(values, dict):
        raise BimosError(f"{source}: '{prefix.rstrip('.')}' must be a section of keys and values")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise BimosError(f"{source}: unknown key '{prefix}{key}'; known here: {', '.join(hints)}")
        arguments[key] = _convert(hints[key], value, source, prefix + key)
    return cls(**arguments)


def _convert(hint: Any, value: Any, source: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, source, key + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in arguments:
            return value
        raise BimosError(f"{source}: {key}={value!r}: must be one of {', '.join(map(str, arguments))}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, source, key)
    if origin is list:
        if isinstance(value, list) and all(isinstance(entry, arguments[0]) for entry in value):
            return value
    elif origin is dict:
        if isinstance(value, dict):
            return value
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is str:
        if isinstance(value, str):
            return value
    elif not isinstance(value, bool):  # int or float; YAML 1.1 reads 1e-3 as a string
        try:
            number = float(value)
            if hint is float and math.isnan(number):
                raise BimosError(f"{source}: {key}={value!r}: must be a number")
            if hint is float:
                return number
            if hint is int and number == int(number):
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise BimosError(f"{source}: {key}={value!r}: must be of type {hint.__name__ if isinstance(hint, type) and not arguments else hint}")
