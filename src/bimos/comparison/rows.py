"""Which rows a comparison has: `binarymos`, `binarymos:num_experts=8`, `sign:untrained`, `fp16`, `recipe.yaml`.

A row is a method, a library (`bimos.comparison.peers`), or a file with a recipe, and options behind colons. An option with a dot in its
name is one of the run (`distill.lr_latent=1e-3`), any other one of the method. What all rows must share replaces what a recipe says of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bimos.comparison import TEACHER
from bimos.comparison.peers import row_config, row_methods
from bimos.config import DEFAULT_MINUTES, RunConfig, override, read_yaml
from bimos.errors import BimosError

UNTRAINED = "untrained"  # neither blocks nor distillation: what a method makes of weights and calibration text alone


@dataclasses.dataclass(frozen=True)
class Row:
    """One row to be run.

    Attributes:
        name: as it was asked for, but without the folder and ending of a recipe's file.
        config: None for the teacher itself.
    """

    name: str
    config: RunConfig | None

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^\w.=+-]+", "-", self.name)


def parse_rows(specifications: Sequence[str], base: dict[str, Any], shared: dict[str, Any]) -> list[Row]:
    """The rows, in the order given.

    Args:
        base: keys and values of a config that rows named by their method start from.
        shared: what all rows have in common, whatever their recipe says: `data`, `tokens`, `minutes`, `seed`, `embedding_bits`.

    Raises:
        BimosError: no rows, an unknown method or option, or two rows that are the same.
    """
    rows = [_row(specification, base, shared) for specification in specifications]
    if not rows:
        raise BimosError(f"no rows to compare; name some with --methods, such as --methods {TEACHER},binarymos,onebit,sign:{UNTRAINED}")
    for index, row in enumerate(rows):
        for other in rows[:index]:
            if row.slug == other.slug:
                raise BimosError(f"row '{row.name}' is given twice; leave one out")
            if _whole(row) == _whole(other):
                raise BimosError(f"rows '{other.name}' and '{row.name}' are the same run; leave one out")
    return rows


def _whole(row: Row) -> dict[str, Any] | None:
    """The config with every option of the method, also those that are as they are by default."""
    if row.config is None:
        return None
    return row.config.to_dict() | {"options": row_config(row.config).to_dict()}


def _row(specification: str, base: dict[str, Any], shared: dict[str, Any]) -> Row:
    head, *options = specification.split(":")
    if head == TEACHER:
        if options:
            raise BimosError(f"row '{specification}': {TEACHER} is the teacher as it is and has no options")
        return Row(TEACHER, None)
    if head.endswith((".yaml", ".yml")):
        name, values = Path(head).stem, read_yaml(head)
    elif head in row_methods():
        name, values = head, base | {"method": head, "options": {}}
    else:
        known = ", ".join((TEACHER, *row_methods()))
        raise BimosError(f"row '{specification}': unknown method '{head}'; known: {known}, or a .yaml file with a recipe")
    try:
        config = _config(values, options, shared, specification)
    except BimosError as error:
        raise BimosError(f"row '{specification}': {error}") from None
    return Row(":".join((name, *options)), config)


def _config(values: dict[str, Any], options: list[str], shared: dict[str, Any], source: str) -> RunConfig:
    assignments = []
    for option in options:
        key, equals, _ = option.partition("=")
        if option == UNTRAINED:
            assignments += ["blocks.enabled=false", "distill.enabled=false"]
        elif not equals or not key:
            raise BimosError(f"'{option}' is no option; write key=value, for example num_experts=8, or {UNTRAINED}")
        else:
            assignments.append(option if "." in key else f"options.{option}")
    values = override(values, assignments) | shared
    if not _distills(values):
        values["tokens"] = None  # which are those of distillation
    if values["tokens"] is None and values["minutes"] is None:
        values["minutes"] = DEFAULT_MINUTES
    config = RunConfig.from_dict(values, source)
    method = row_config(config)
    if config.distill.lr_latent is None:  # so that the row says what it was run with
        config = dataclasses.replace(config, distill=dataclasses.replace(config.distill, lr_latent=method.lr_latent()))
    return config


def _distills(values: dict[str, Any]) -> bool:
    """Whether a run of these options ends with distillation: as they say, else if the method is one that is trained."""
    section = values.get("distill")
    enabled = section.get("enabled") if isinstance(section, dict) else None
    method = row_methods().get(str(values.get("method", RunConfig.method)))
    return getattr(method, "trained", True) if enabled is None else enabled is not False
