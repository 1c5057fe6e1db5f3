"""The table of a comparison: what a row of it says, in the terminal, in Markdown and on the page."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from bimos.comparison import TEACHER
from bimos.evaluation.formatting import DASH, bits, factor, is_number, ratio, significant, size

UNDISTILLED = "Not distilled, and not held to the budget"
Texts = dict[str, str]  # labels by name


def texts(comparison: dict[str, Any]) -> Texts:
    """Evaluation texts that any row was measured on, and what readers call them."""
    return {name: measured["text"] for row in comparison["rows"] for name, measured in row["perplexity"].items()}


def tasks(comparison: dict[str, Any]) -> list[str]:
    """Zero-shot tasks that any row was measured on, their mean last."""
    names = list(dict.fromkeys(name for row in comparison["rows"] for name in row["tasks"]))
    return sorted(names, key=lambda name: name == "zeroshot6")


def ordered(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows by perplexity on the first text, the best first; then those without."""
    first = next(iter(texts(comparison)), "")

    def key(row: dict[str, Any]) -> tuple[bool, float, str]:
        value = row["perplexity"].get(first, {}).get("value")
        return (not is_number(value), value if is_number(value) else 0.0, row["row"])

    return sorted(comparison["rows"], key=key)


def main_table(comparison: dict[str, Any]) -> list[list[str]]:
    """Header and rows: bits, size, perplexities, mean accuracies where measured, tokens distilled, minutes, peak memory, speed."""
    named, means = texts(comparison), "zeroshot6" in tasks(comparison)
    teacher: dict[str, Any] = next((row["perplexity"] for row in comparison["rows"] if row["row"] == TEACHER), {})
    header = ["row", "body bits", "model bits", "size", *named.values()]
    header += ["acc, %", "acc_norm, %"] * means
    lines = [[*header, "tokens", "minutes", "peak memory", "decode, tokens/s"]]
    for row in ordered(comparison):
        cells = [row["row"], bits(row["body_bits_per_weight"]), bits(row["bits_per_parameter"]), size(row["total_bytes"])]
        of = {} if row["row"] == TEACHER else teacher
        cells += [perplexity(row["perplexity"].get(name), of.get(name)) for name in named]
        if means:
            mean = row["tasks"].get("zeroshot6", {})
            cells += [accuracy(mean, "acc", "stderr"), accuracy(mean, "acc_norm", "acc_norm_stderr")]
        minutes, tokens, peak = trained(row)
        cells += [f"{tokens:,}" if tokens else DASH, DASH if minutes is None else f"{minutes:.1f}", size(peak), decoding(row)]
        lines.append(cells)
    return lines


def task_table(comparison: dict[str, Any], metric: str = "acc") -> list[list[str]]:
    """Header and rows: `metric` of every task, of the rows that have any."""
    names, error = tasks(comparison), "stderr" if metric == "acc" else "acc_norm_stderr"
    lines = [["row", *("mean of six" if name == "zeroshot6" else name for name in names)]]
    for row in ordered(comparison):
        if row["tasks"]:
            lines.append([row["row"], *(accuracy(row["tasks"].get(name, {}), metric, error) for name in names)])
    return lines if len(lines) > 1 and any(cell != DASH for line in lines[1:] for cell in line[1:]) else []


def perplexity(measured: dict[str, Any] | None, teacher: dict[str, Any] | None = None) -> str:
    """`150 ± 0.50 (7.50×)`: value, standard error, times the teacher's."""  # noqa: RUF002
    if not measured:
        return DASH
    error, times = measured.get("stderr"), ratio(measured["value"], (teacher or {}).get("value"))
    parts = [significant(measured["value"]), *([f"± {significant(error, 2)}"] if is_number(error) else [])]
    return " ".join([*parts, *([f"({factor(times)})"] if times else [])])


def accuracy(scores: dict[str, Any], metric: str, error: str) -> str:
    if not is_number(scores.get(metric)):
        return DASH
    return f"{100 * scores[metric]:.1f}" + (f" ± {100 * scores[error]:.1f}" if is_number(scores.get(error)) else "")


def trained(row: dict[str, Any]) -> tuple[float | None, int, int | None]:
    """Minutes of work, tokens distilled, and the most memory of any stage; None for what was not made here."""
    stages = row["stages"]
    if not stages:
        return None, 0, None
    minutes = sum(stage["seconds"] for stage in stages) / 60
    tokens = sum(stage["tokens"] for stage in stages if stage["name"] == "distill")
    return minutes, tokens, max(stage.get("peak_memory_bytes") or 0 for stage in stages) or None


def decoding(row: dict[str, Any]) -> str:
    """Tokens/s, and where: `533 (engine)`."""
    return f"{significant(row['speed']['decode_tokens_per_second'])} ({row['speed']['runs_in'].partition(',')[0]})"


def markdown(lines: list[list[str]]) -> str:
    """A table as GitHub draws it; numbers to the right."""
    if not lines:
        return ""
    header, *rows = lines
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (header, rule, *rows))


def budget(comparison: dict[str, Any]) -> str:
    """What every row was given, and on what: `A budget of 15 min of work a row, on 2 cores of a CPU (avx2)`."""
    rows = comparison["rows"]
    machines = sorted({f"{row['machine']['cores']} cores of {row['machine']['cpu']}" for row in rows})
    levels = sorted({level for row in rows if (level := row["speed"]["runs_in"].partition(", ")[2])})
    kernels = f" ({', '.join(levels)})" if levels else ""
    where = f", on {' and '.join(machines)}{kernels}" if machines else ""
    return f"A budget of {given(comparison)} a row{where}"


def given(comparison: dict[str, Any]) -> str:
    """The budget alone: `15 min of work`, `98,304 tokens distilled`."""
    setting = comparison["setting"]
    return f"{setting['minutes']:g} min of work" if setting["minutes"] is not None else f"{setting['tokens']:,} tokens distilled"


def conditions(comparison: dict[str, Any], without: Container[str] = ()) -> str:
    """What all rows have in common, in a sentence or two; nothing of columns that are left out."""
    setting, rows = comparison["setting"], comparison["rows"]
    measured = {name: row["perplexity"][name] for row in rows for name in row["perplexity"]}
    windows = ", ".join(f"{entry['windows']} of {entry['text']}" for entry in measured.values())
    limit = f" Zero-shot: the first {setting['limit']} documents of each task." if setting["limit"] and tasks(comparison) else ""
    context = ", ".join(sorted({str(entry["context"]) for entry in measured.values()}))
    evaluated = (
        f" Perplexity on windows of {context} tokens ({windows}), ± one standard error, in brackets times the teacher's."
        if measured
        else ""
    )
    threads = ", ".join(sorted({str(row["speed"]["threads"]) for row in rows}))
    means = " acc and acc_norm are means over the six zero-shot tasks." if "zeroshot6" in tasks(comparison) else ""
    return (
        f"{budget(comparison)}, seed {setting['seed']}, embeddings in {setting['embedding_bits']} bits; "
        f"text `{setting['data']}`. Bits: of the body a weight of the binarized linears, scales and all; of the model a parameter."
        f"{evaluated}{means}{limit} {'' if 'peak memory' in without else 'Peak memory is that of training. '}"
        f"Decoding is one sequence, threads: {threads}."
    )


def notes(comparison: dict[str, Any]) -> list[str]:
    """What readers must know of single rows: what does not run in the engine, whose work it is, how a perplexity was measured."""
    rows = comparison["rows"]
    whys: dict[str, list[str]] = {}
    for row in rows:
        if row["speed"]["why"]:
            whys.setdefault(row["speed"]["why"], []).append(row["row"])
    decoded = [f"Decoded by transformers: {', '.join(names)} ({why})." for why, names in whys.items()]
    said = {f"{entry['text']}: {entry['note']}." for row in rows for entry in row["perplexity"].values() if entry.get("note")}
    untrained = [row["row"] for row in rows if row["stages"] and not any(s["tokens"] for s in row["stages"] if s["name"] != "library")]
    rounded = [f"{UNDISTILLED}: {', '.join(untrained)}."] if untrained else []
    return rounded + decoded + [_library(row) for row in rows if "peer" in row] + sorted(said)


def _library(row: dict[str, Any]) -> str:
    peer = row["peer"]
    own = f"{bits(peer['own_body_bits_per_weight'])} bits a body weight in its own format"
    return f"{row['row']}: rounded by {peer['library']} {peer['version']} ({own}), packed and run here."
