"""Sizes and speed in Markdown, from the JSON of `sizes.py`, `products.py` and `peers.py`: for `tables.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DECODE, PROMPT = "decode_tokens_per_second", "prefill_tokens_per_second"


def sizes(results: Path) -> str:
    path = results / "sizes.json"
    if not path.exists():
        return ""
    lines = [
        "Sizes with 4 experts, from the config alone (`bimos quantize --dry-run`; `benchmarks/sizes.py`):",
        "",
        "| model | embeddings | weight files | 16 bits | smaller | bits per body weight | bits per parameter |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in json.loads(path.read_text())["models"].items():
        unit, divisor = ("GB", 1e9) if row["total_bytes"] > 1e9 else ("MB", 1e6)
        total, original = (f"{row[key] / divisor:.4g} {unit}" for key in ("total_bytes", "original_bytes"))
        bits = f"{row['body_bits_per_weight']:.3f} | {row['bits_per_parameter']:.2f}"
        lines.append(f"| {name} | {row['embedding_bits']} bits | {total} | {original} | {row['compression']:.2f}x | {bits} |")
    return "\n".join(lines)


def machines(results: Path, name: str) -> list[dict[str, Any]]:
    """What `name.json` holds, and then `name-MACHINE.json` of others."""
    return [json.loads(path.read_text()) for path in [*results.glob(f"{name}.json"), *sorted(results.glob(f"{name}-*.json"))]]


def products(results: Path) -> str:
    """Times torch's own product, exact and with sums of 8 bits; a table a machine."""
    return "\n\n".join(map(product_table, machines(results, "kernels")))


def product_table(result: dict[str, Any]) -> str:
    shown = ("1", "4", "128", "512")
    lines = [
        f"A packed linear with {result['experts']} experts against torch's bfloat16 `F.linear` of the same shape, {result['threads']} "
        f"threads of {result['machine']['cpu']}, {result['level']}, router, scales and the call included: times as fast, exact / `int8` "
        "(`benchmarks/products.py`).",
        "",
        "| in x out | " + " | ".join(f"{tokens} token{'s' if tokens != '1' else ''}" for tokens in shown) + " |",
        "| --- " * (1 + len(shown)) + "|",
    ]
    for shape, rows in result["hot"].items():
        lines.append(f"| {shape} | " + " | ".join(f"{rows[n]['speedup']:.1f} / {rows[n]['int8_speedup']:.1f}" for n in shown) + " |")
    return "\n".join(lines)


def peers(results: Path, whole: bool) -> list[str]:
    """benchmarks/peers.py: a sentence a model, and if `whole` its table."""
    parts = []
    for result in machines(results, "peers"):
        for name, measured in result["models"].items():
            parts.append(against_llama_cpp(name, measured, result))
            if whole:
                refused = ", ".join(f"{kind}: {reason.partition(': ')[2] or reason}" for kind, reason in measured["refused"].items())
                parts += [f"Refused by llama.cpp: {refused}."] if refused else []
                parts.append(peer_table(measured["rows"]))
    return parts


def against_llama_cpp(name: str, measured: dict[str, Any], result: dict[str, Any]) -> str:
    """The engine (exact, and with fewer bits) over the fastest type of llama.cpp, which is named."""
    rows = measured["rows"]
    theirs = {row: values for row, values in rows.items() if row.startswith("llama.cpp")}
    ours = {row: values for row, values in rows.items() if row.startswith("bimos") and "sequences" not in row}
    times = []
    for key in (DECODE, PROMPT):
        best = max(theirs, key=lambda row, key=key: theirs[row][key])
        times.append(f"{' / '.join(f'{values[key] / theirs[best][key]:.1f}' for values in ours.values())} times {best}")
    wide = {row.rpartition(", ")[0]: values for row, values in rows.items() if row.endswith(" sequences")}
    batch = " / ".join(f"{values[DECODE] / ours[row][DECODE]:.1f}" for row, values in wide.items())
    count = next(iter(wide.values()))["sequences"]
    machine = f"{result['threads']} thread{'s' * (result['threads'] > 1)} of {measured['machine']['cpu']}, {result['level']}"
    options = ", ".join(f"`{key}={value}`" for values in ours.values() for key, value in values["options"].items())
    return (
        f"{name} on {machine}, one process, in turns, medians (`benchmarks/peers.py`, llama-cpp-python "
        f"{result['llama_cpp_python']['version']}), exact / with fewer bits ({options}): decoding {times[0]}, a prompt of "
        f"{result['long_prompt']} tokens {times[1]}; {count} sequences at once {batch} times the tokens/s of one."
    )


def peer_table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| | weights | decode, tokens/s | prompt, tokens/s |", "| --- | --: | --: | --: |"]
    for row, values in sorted(rows.items(), key=lambda item: -item[1][DECODE]):
        size = f"{values['bytes'] / 1e6:,.0f} MB" if "bytes" in values else ""
        prompt = f"{values[PROMPT]:,.0f}" if PROMPT in values else ""
        lines.append(f"| {row} | {size} | {values[DECODE]:,.0f} | {prompt} |")
    return "\n".join(lines)
