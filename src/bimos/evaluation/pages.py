"""HTML pages that need nothing else: no scripts, fonts or requests. One style sheet for all, pictures inside."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bimos.evaluation import formatting

HERE = Path(__file__).parent  # of what pages share


def render(template: Path, **values: Any) -> str:
    """A page from a template file; what `style.html.jinja` and its like hold can be included by name."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, HERE]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    names = ("significant", "bits", "count", "size", "duration", "factor", "embedding_change")
    environment.filters |= {name: getattr(formatting, name) for name in names}
    return environment.get_template(template.name).render(**values)


def picture(data: bytes, kind: str, label: str) -> Markup:
    """An image as part of the page. `kind`: `svg+xml` or `png`."""
    return Markup('<img class="picture" alt="{}" src="data:image/{};base64,{}">').format(label, kind, base64.b64encode(data).decode())


def origin(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Versions, commit and machine of a result as (name, value)."""
    versions = result.get("versions") or {}
    rows = [(str(name), str(value)) for name, value in versions.items() if value]
    if result.get("commit"):
        rows.append(("commit", str(result["commit"])))
    machine = result.get("machine") or {}
    if machine.get("cpu"):
        rows.append(("CPU", f"{machine['cpu']}, {machine['cores']} cores" if machine.get("cores") else str(machine["cpu"])))
    if machine.get("accelerator"):
        rows.append(("accelerator", str(machine["accelerator"])))
    return rows
