"""Results as people read them. The same figures go to `--json` unrounded."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bimos.evaluation.formatting import DASH, bits, duration, embedding_change, factor, significant, size


def split(names: str | None) -> list[str]:
    """`a, b` as `["a", "b"]`."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def _table(*columns: str, numbers: int = 0) -> Table:
    """A table whose last `numbers` columns are right-aligned."""
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index >= len(columns) - numbers else "left", overflow="fold")
    return table


def sizes(out: Console, result: dict[str, Any]) -> None:
    """Components of a model, and the two bit figures that only mean something together."""
    table = _table("component", "tensors", "bytes", "", numbers=3)
    for part in result["components"]:
        table.add_row(part["name"], str(part["tensors"]), f"{part['bytes']:,}", size(part["bytes"]))
    out.print(table)
    out.print(f"{size(result['total_bytes'])} in all, {size(result['original_bytes'])} in 16 bits: {factor(result['compression'])} smaller")
    body = result["body_bits_per_weight"]
    figures = "no linear is packed" if body is None else f"{bits(body)} bits per body weight"
    out.print(f"{figures}; {bits(result['bits_per_parameter'])} bits per parameter of the whole model")


def planes(out: Console, result: dict[str, Any]) -> None:
    """The key `planes` of a result, if there is one."""
    if "planes" not in result:
        return
    found = result["planes"]
    shares = " and ".join(f"{share:.1%}" for share in found["share_of_ones"])
    out.print(f"planes of zeros and ones: {shares} are ones, {found['additions_skipped']:.1%} of the additions are skipped;")
    operations, dense = found["operations_per_weight"], found["dense_operations_per_weight"]
    out.print(f"{operations:.2f} operations a weight, a dense 2-bit product has {dense:.2f}: {found['operations']:.0%}")


def plan(out: Console, result: dict[str, Any]) -> None:
    """What `--dry-run` says."""
    sizes(out, result)
    each = " in each process" if result.get("processes", 1) > 1 else ""
    for stage, peak in result.get("peak_memory_bytes", {}).items():
        out.print(f"peak memory of {stage}{each}: about {size(peak)}")


def perplexities(out: Console, result: dict[str, Any]) -> None:
    """The key `perplexity` of a result, if there is anything, beside the teacher's where that was measured too."""
    measured = result.get("perplexity")
    if not measured:
        return
    compared = any(value.get("teacher") for value in measured.values())
    table = _table(
        "perplexity", "value", "±", *(["teacher", "ratio"] if compared else []), "windows", "context", numbers=6 if compared else 4
    )
    for name, value in measured.items():
        teacher = value.get("teacher")
        shown = [significant(value["value"]), significant(value["stderr"], 2)]
        shown += [significant(teacher), factor(value["value"] / teacher) if teacher else ""] if compared else []
        table.add_row(value.get("text", name), *shown, str(value["windows"]), str(value["context"]))
    out.print(table)
    for value in measured.values():
        if value.get("note"):
            out.print(f"note: {value['text']}: {value['note']}")
    if result.get("embedding"):
        out.print(f"embeddings in {result['embedding']['bits']} bits: {embedding_change(result['embedding'])}")


def tasks(out: Console, result: dict[str, Any]) -> None:
    """The key `tasks` of a result, if there is one; accuracies in percent."""
    if not result.get("tasks"):
        return
    table = _table("task", "acc", "±", "acc_norm", "±", "n", "time", numbers=6)
    for name, score in result["tasks"].items():
        keys = ("acc", "stderr", "acc_norm", "acc_norm_stderr")
        shares = [f"{100 * score[key]:.1f}" if score.get(key) is not None else "" for key in keys]
        table.add_row(name, *shares, str(score.get("n", "")), duration(score.get("seconds")))
    out.print(table)


def comparison(out: Console, lines: list[list[str]]) -> None:
    """Header and rows of `bimos.comparison.table.main_table`."""
    table = _table(*lines[0], numbers=len(lines[0]) - 1)
    for line in lines[1:]:
        table.add_row(*line)
    out.print(table)


def routing(out: Console, result: dict[str, Any]) -> None:
    """What `bimos inspect` says: gates and scales by kind of linear."""
    table = _table("linears", "entropy of the gate", "load of experts, least to most", "spread of scales, in", "out", numbers=4)
    for kind, row in result["kinds"].items():
        load = f"{100 * row['least_load']:.0f} to {100 * row['most_load']:.0f} %"
        spreads = [DASH if row[key] is None else f"{100 * row[key]:.1f} %" for key in ("spread_in", "spread_out")]
        table.add_row(kind, f"{row['entropy']:.3f}", load, *spreads)
    out.print(table)
    out.print(f"{result['tokens']} tokens; entropy as a share of the most there is; looked at closely: {result['layer']}", markup=False)


def speed(out: Console, result: dict[str, Any]) -> None:
    """What `bimos bench` says."""
    why = f" ({result['why']})" if result["why"] else ""
    out.print(f"in {result['runs_in']}{why}; {result['threads']} threads, medians of {result['repeats']} rounds", markup=False)
    table = _table("prompt", "batch", "prefill tokens/s", "first token", "decode tokens/s", "GB/s", "of memory", "of cache", numbers=8)
    for row in result["runs"]:
        shares = [row[f"share_of_{name}_bandwidth"] for name in ("memory", "cache")]
        rate = row["bytes_per_second"]
        table.add_row(
            *(str(row["prompt"]), str(row["batch"]), significant(row["prefill_tokens_per_second"])),
            *(f"{significant(1000 * row['first_token_seconds'])} ms", significant(row["decode_tokens_per_second"])),
            significant(rate and rate / 1e9),
            *(DASH if share is None else f"{share:.0%}" for share in shares),
        )
    out.print(table)
    if result["runs"][0]["bytes_per_step"] is None:
        out.print("bytes read a token are not known: every token sees other weights of a mixture-of-experts model")
    if result["parts"]:
        total = sum(result["parts"].values())
        parts = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in result["parts"].items())
        out.print(f"a step of one sequence, {1000 * total:.2f} ms in one of the threads: {parts}", markup=False)
    bandwidth, memory = result["bandwidth"], result["memory"]
    for name, where in (("memory", "memory"), ("cache", "the last cache")):
        read = bandwidth[name]
        if read is not None:
            rate = significant(read["bytes_per_second"] / 1e9)
            out.print(f"read bandwidth of {where}: {rate} GB/s ({size(read['bytes'])}, {bandwidth['by']})", markup=False)
    out.print(
        f"weights {size(memory['weights'])}, keys and values {size(memory['cache'])} ({size(memory['cache_per_position'])} a position)"
    )
    out.print(f"process: {size(memory['peak'])} at its peak, {size(memory['before_loading'])} before loading")


def diagnosis(out: Console, report: dict[str, Any]) -> None:
    """What `bimos doctor` says."""
    cpu, memory, torch = report["cpu"], report["memory"], report["torch"]
    table = Table.grid(padding=(0, 2))
    rows = {
        "bimos": report["bimos"],
        "python": report["python"],
        "system": report["system"],
        "cpu": f"{cpu['model']}, {cpu['cores']} cores, {' '.join(cpu['features']) or 'features unknown'}",
        "memory": f"{size(memory['available_bytes'])} available of {size(memory['total_bytes'])}",
        "disk": f"{size(report['disk']['free_bytes'])} free in {report['disk']['folder']}",
        "torch": f"{torch['build']} build, {torch['cpu_capability']}, {torch['threads']} threads",
        "gpu": ", ".join(torch["gpus"]) or "none",
        "packages": ", ".join(f"{name} {version}" for name, version in report["packages"].items()),
        "evaluation data": report["evaluation_data"] or "from the Hub (BIMOS_DATA names a local folder)",
    }
    rows |= {f"kernel {op}": kernel for op, kernel in report["kernels"].items()}
    rows |= {f"no {name}": use for name, use in report["missing"].items()}
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(table)
    for problem in report["problems"]:
        out.print(Text.assemble(("problem", "bold red"), f": {problem}"))
    if not report["problems"]:
        out.print("nothing to mend")
