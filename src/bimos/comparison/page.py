"""What a comparison leaves for readers: its JSON, a Markdown table, the Pareto plot, and a page that stands alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bimos.comparison import TEACHER, paired, table
from bimos.comparison.pareto import draw, frontier, points
from bimos.evaluation.formatting import factor, ratio
from bimos.evaluation.pages import origin, picture, render
from bimos.evaluation.versions import write_bytes, write_json, write_text
from bimos.resume import flat


def write_pages(output: Path, comparison: dict[str, Any]) -> None:
    """`comparison.json`, and where a row is finished `table.md`, `pareto.svg`, `pareto.png` and `index.html`."""
    write_json(output / "comparison.json", {"setting": comparison["setting"], "rows": [_brief(row) for row in comparison["rows"]]})
    if not comparison["rows"]:
        return
    parts = [table.markdown(table.main_table(comparison)), *paired.sentences(comparison)]
    for title, lines in _task_tables(comparison):
        parts += [f"{title}:", table.markdown(lines)]
    write_text(output / "table.md", "\n\n".join([table.conditions(comparison), *parts]) + "\n")
    vector = draw(comparison, "svg")
    for name, data in (("pareto.svg", vector), ("pareto.png", draw(comparison, "png"))):
        write_bytes(output / name, data)
    write_text(output / "index.html", _page(comparison, vector))


def _page(comparison: dict[str, Any], plot: bytes) -> str:
    rows = comparison["rows"]
    origins = {row["row"]: origin(row) for row in rows}
    first = next(iter(origins.values()))
    return render(
        Path(__file__).parent / "comparison.html.jinja",
        model=Path(comparison["setting"]["model"]).name,
        conditions=table.conditions(comparison).replace("`", ""),
        main=table.main_table(comparison),
        task_tables=_task_tables(comparison),
        plot=picture(plot, "svg+xml", "bits per body weight against perplexity, a mark for every row"),
        verdicts=_verdicts(comparison),
        notes=paired.sentences(comparison) + table.notes(comparison),
        origin=first,
        others=[name for name, entries in origins.items() if entries != first],
        recipes=[(row["row"], _recipe(row)) for row in table.ordered(comparison) if row["config"]],
    )


def _task_tables(comparison: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    titles = {"acc": "Zero-shot accuracy, %", "acc_norm": "Zero-shot accuracy normalised by length, %"}
    tables = [(title, table.task_table(comparison, metric)) for metric, title in titles.items()]
    return [(title, lines) for title, lines in tables if lines]


def _verdicts(comparison: dict[str, Any]) -> list[str]:
    """For every text: the rows on the frontier, and the best of all against the teacher."""
    teacher = next((row for row in comparison["rows"] if row["row"] == TEACHER), None)
    said = []
    for text, label in table.texts(comparison).items():
        rows = points(comparison, text)
        if not rows:
            continue
        front = [rows[index] for index in frontier([row[1:] for row in rows])]
        name, _, value = min(rows, key=lambda row: row[2])
        level = teacher and teacher["perplexity"].get(text, {}).get("value")
        times = ratio(value, level)
        against = f", {factor(times)} the teacher's" if times else ""
        beaten = f"No row beats these in both bits and perplexity: {', '.join(row[0] for row in front)}."
        said.append(f"{label}: lowest with {name}{against}. {beaten}")
    return said


def _recipe(row: dict[str, Any]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in flat(row["config"]).items())


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the courses of its losses, which are in its own file."""
    stages = [{key: value for key, value in stage.items() if key not in ("history", "blocks")} for stage in row["stages"]]
    return row | {"stages": stages}
