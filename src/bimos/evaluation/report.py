"""One run of `bimos quantize` as a single HTML page that needs nothing else: no scripts, fonts or requests.

`report.html.jinja` is the page, `head.html.jinja` its style sheet, `charts` draws, and this file decides what is shown: a part whose
numbers are missing from the result is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bimos.evaluation import charts, formatting
from bimos.evaluation.formatting import is_number, ratio
from bimos.evaluation.pages import origin, render
from bimos.evaluation.versions import plain, write_text


def write_report(path: str | Path, result: dict[str, Any]) -> None:
    """Write the report of `result`, the JSON of `bimos quantize` or `bimos eval`, to `path`.

    Raises:
        OSError: the file cannot be written; a report that was there before is then still there.
    """
    write_text(path, render_report(result))


def render_report(result: dict[str, Any]) -> str:
    """The report as HTML text. Any key of `result` may be missing or null."""
    return render(
        Path(__file__).parent / "report.html.jinja",
        model=Path(str(result.get("model") or "model")).name,
        method=result.get("method"),
        seconds=result.get("seconds"),
        figures=_figures(result),
        sizes=_sizes(result),
        perplexities=_perplexities(result),
        embedding=result["embedding"] if isinstance(result.get("embedding"), dict) else None,
        tasks=[(name, scores) for name, scores in (result.get("tasks") or {}).items() if isinstance(scores, dict)],
        stages=_stages(result),
        samples=[sample for sample in result.get("samples") or [] if isinstance(sample, dict)],
        config=yaml.safe_dump(plain(result["config"]), sort_keys=False, allow_unicode=True) if result.get("config") else "",
        origin=origin(result),
    )


def _figures(result: dict[str, Any]) -> list[dict[str, str]]:
    """The headline: size, both bit figures (never one without the other), perplexity."""
    figures = []
    if is_number(result.get("total_bytes")):
        smaller = result.get("compression") or ratio(result.get("original_bytes"), result["total_bytes"])
        note = f"{formatting.factor(smaller)} smaller than {_unbroken(formatting.size(result.get('original_bytes')))}" if smaller else ""
        figures.append(_figure("Weight files", formatting.size(result["total_bytes"]), note))
    body, model = result.get("body_bits_per_weight"), result.get("bits_per_parameter")
    if is_number(body) or is_number(model):
        figures.append(_figure("Body", formatting.bits(body), "bits per weight", "of the binarized linears, scales included"))
        figures.append(_figure("Whole model", formatting.bits(model), "bits per parameter", "embeddings and head included"))
    for entry in _perplexities(result)[:1]:
        teacher = _unbroken(f"the teacher\N{RIGHT SINGLE QUOTATION MARK}s {formatting.significant(entry['teacher'])}")
        note = f"{formatting.factor(entry['ratio'])} {teacher}" if entry["ratio"] else ""
        figures.append(_figure("Perplexity", formatting.significant(entry["value"]), note, entry["label"]))
    return figures


def _figure(name: str, value: str, note: str, more: str = "") -> dict[str, str]:
    number, _, unit = value.partition(" ")
    return {"name": name, "number": number, "unit": unit, "note": note, "more": more}


def _unbroken(text: str) -> str:
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _sizes(result: dict[str, Any]) -> dict[str, Any] | None:
    """Bars of the file before and after, on one scale, and the parts of the latter, largest first."""
    total, original = result.get("total_bytes"), result.get("original_bytes")
    if not is_number(total) or not total:
        return None
    known = [part for part in result.get("components") or [] if isinstance(part, dict) and is_number(part.get("bytes"))]
    parts = sorted(known, key=lambda part: -part["bytes"])
    whole = max(total, original if is_number(original) else 0)
    names = [(str(part.get("name")), part["bytes"]) for part in parts] or [("all", total)]
    return {
        "total": total,
        "original": original if is_number(original) else None,
        "before": charts.bar([("original", float(original))], whole, "size of the original", series=False) if is_number(original) else None,
        "after": charts.bar(names, whole, "size of the packed model, by part"),
        "parts": [
            {
                "name": part.get("name"),
                "tensors": part.get("tensors"),
                "bytes": part["bytes"],
                "share": f"{100 * part['bytes'] / total:.1f} %",
                "tone": f"part{index % charts.SERIES}",
            }
            for index, part in enumerate(parts)
        ],
    }


def _perplexities(result: dict[str, Any]) -> list[dict[str, Any]]:
    entries = []
    for name, entry in (result.get("perplexity") or {}).items():
        if isinstance(entry, dict) and is_number(entry.get("value")):
            known = {key: entry.get(key) for key in ("value", "stderr", "windows", "context", "teacher", "note")}
            entries.append({**known, "label": entry.get("text") or name, "ratio": ratio(entry["value"], entry.get("teacher"))})
    return entries


def _stages(result: dict[str, Any]) -> list[dict[str, Any]]:
    stages = []
    for number, stage in enumerate(entry for entry in result.get("stages") or [] if isinstance(entry, dict)):
        name = str(stage.get("name") or f"stage {number + 1}")
        first, last = stage.get("loss_first"), stage.get("loss_last")
        stages.append(
            {
                "name": name,
                **{key: stage.get(key) for key in ("tokens", "seconds", "tokens_per_second", "peak_memory_bytes")},
                "loss_first": first,
                "loss_last": last,
                "rose": is_number(first) and is_number(last) and last > first,
                "charts": _stage_charts(stage),
            }
        )
    return stages


def _stage_charts(stage: dict[str, Any]) -> list[dict[str, Any]]:
    drawn = []
    points = [(float(point[0]), float(point[1])) for point in stage.get("history") or [] if len(point) == 2 and all(map(is_number, point))]
    if len(points) > 1:
        # a history is over tokens or over steps; only tokens reach the stage's token count
        tokens = is_number(stage.get("tokens")) and max(x for x, _ in points) > 0.5 * stage["tokens"]
        unit = "tokens" if tokens else "steps"
        drawn.append({"title": "Loss", "note": f"over {unit}", "picture": charts.line_chart(points, unit, "loss")})
    rows = [
        (str(row.get("block")), float(row["loss_first"]), float(row["loss_last"]))
        for row in stage.get("blocks") or []
        if isinstance(row, dict) and is_number(row.get("loss_first")) and is_number(row.get("loss_last"))
    ]
    if rows:
        note = f"of decoder blocks {rows[0][0]} to {rows[-1][0]}, from the first step down to the last"
        drawn.append({"title": "Reconstruction error", "note": note, "picture": charts.range_chart(rows, "reconstruction error")})
    return drawn
