"""The end of `bimos quantize` and `bimos eval` in the terminal: sizes, bits, perplexity, stages, and what the model says."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bimos.evaluation import formatting
from bimos.evaluation.formatting import is_number, ratio


def print_summary(result: dict[str, Any], console: Console) -> None:
    """Print the parts that `result` (the JSON of `bimos quantize` or `bimos eval`) has; see `bimos.evaluation.report`."""
    title = Text(str(result.get("model") or "model"), style="bold")
    if result.get("method"):
        title.append(f"  {result['method']}", style="default")
    if is_number(result.get("seconds")):
        title.append(f"  {formatting.duration(result['seconds'])}", style="dim")
    parts = [_figures(result), _stages(result), _tasks(result), *_samples(result)]
    console.print()
    console.print(title)
    for part in parts:
        if part is not None:
            console.print()
            console.print(Padding(part, (0, 0, 0, 2), expand=False))
    console.print()


def _table(*columns: str, header: bool = True) -> Table:
    rule = box.SIMPLE_HEAD if header else None
    table = Table(box=rule, show_header=header, show_edge=False, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if header and index else "left", no_wrap=index == 0)
    return table


def _figures(result: dict[str, Any]) -> Table | None:
    table = _table("name", "value", "note", header=False)
    total, original = result.get("total_bytes"), result.get("original_bytes")
    if is_number(total):
        smaller = result.get("compression") or ratio(original, total)
        note = f"{formatting.factor(smaller)} smaller than {formatting.size(original)}" if smaller else ""
        table.add_row(Text("size", style="dim"), Text(formatting.size(total), style="bold"), Text(note))
    body, model = result.get("body_bits_per_weight"), result.get("bits_per_parameter")
    if is_number(body) or is_number(model):  # never one without the other
        table.add_row(
            Text("body", style="dim"), Text(formatting.bits(body), style="bold"), Text("bits per weight of the binarized linears")
        )
        table.add_row(Text("whole model", style="dim"), Text(formatting.bits(model), style="bold"), Text("bits per parameter"))
    for name, entry in (result.get("perplexity") or {}).items():
        if not isinstance(entry, dict) or not is_number(entry.get("value")):
            continue
        value = Text(formatting.significant(entry["value"]), style="bold")
        if is_number(entry.get("stderr")):
            value.append(f" ± {formatting.significant(entry['stderr'], 2)}", style="not bold dim")
        times = ratio(entry["value"], entry.get("teacher"))
        note = f"on {entry.get('text') or name}"
        if times:
            note += f", {formatting.factor(times)} the teacher's {formatting.significant(entry['teacher'])}"
        table.add_row(Text("perplexity", style="dim"), value, Text(note))
    return table if table.row_count else None


def _stages(result: dict[str, Any]) -> Table | None:
    table = _table("stage", "tokens", "time", "tokens/s", "peak memory", "loss")
    for stage in result.get("stages") or []:
        first, last = stage.get("loss_first"), stage.get("loss_last")
        rose = is_number(first) and is_number(last) and last > first
        loss = f"{formatting.significant(first)} → {formatting.significant(last)}" if is_number(last) else formatting.DASH
        table.add_row(
            Text(str(stage.get("name", ""))),
            formatting.count(stage.get("tokens")),
            formatting.duration(stage.get("seconds")),
            formatting.significant(stage.get("tokens_per_second")),
            formatting.size(stage.get("peak_memory_bytes")),
            Text(f"{loss} (rose)" if rose else loss, style="yellow" if rose else ""),
        )
    return table if table.row_count else None


def _tasks(result: dict[str, Any]) -> Table | None:
    table = _table("zero-shot", "documents", "acc", "acc_norm")
    for name, scores in (result.get("tasks") or {}).items():
        acc, acc_norm = _percent(scores, "acc", "stderr"), _percent(scores, "acc_norm", "acc_norm_stderr")
        table.add_row(Text(str(name)), str(scores.get("n", formatting.DASH)), acc, acc_norm)
    return table if table.row_count else None


def _percent(scores: dict[str, Any], metric: str, error: str) -> Text:
    if not is_number(scores.get(metric)):
        return Text(formatting.DASH)
    text = Text(f"{100 * scores[metric]:.1f} %")
    if is_number(scores.get(error)):
        text.append(f" ± {100 * scores[error]:.1f}", style="dim")
    return text


def _samples(result: dict[str, Any]) -> list[Group]:
    shown = []
    for sample in result.get("samples") or []:
        lines = _table("who", "text", header=False)
        for who in ("teacher", "student"):
            if sample.get(who) is not None:
                lines.add_row(Text(who, style="dim"), Text(sample[who] or "(nothing)"))
        shown.append(Group(Text(str(sample.get("prompt", "")), style="italic"), lines))
    return shown
