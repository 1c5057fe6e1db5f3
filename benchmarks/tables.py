"""Fill the README's results, and docs/results.md, from the JSON under `benchmarks/results/`.

python benchmarks/tables.py            rewrite the part between the markers, and docs/results.md whole
python benchmarks/tables.py --check    exit with 1 if they are not what the JSON says

A folder `compare-NAME` is what `bimos compare -o` has written, its folder `work` left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import claims
from bimos.comparison import paired, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "results.md"
MARKED = re.compile(r"(<!-- results:start -->\n).*?(<!-- results:end -->)", re.DOTALL)


def sizes() -> str:
    path = RESULTS / "sizes.json"
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


def kernels() -> str:
    """Times torch's own product, exact and with sums of 8 bits."""
    path = RESULTS / "kernels.json"
    if not path.exists():
        return ""
    result = json.loads(path.read_text())
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


def peers() -> str:
    """benchmarks/peers.py: a table a model; the engine (exact, and with fewer bits) over the fastest type of llama.cpp first named."""
    path = RESULTS / "peers.json"
    if not path.exists():
        return ""
    result = json.loads(path.read_text())
    parts = []
    for name, measured in result["models"].items():
        rows = measured["rows"]
        theirs = {row: values for row, values in rows.items() if row.startswith("llama.cpp")}
        ours = {row: values for row, values in rows.items() if row.startswith("bimos") and "sequences" not in row}
        keys = ("decode_tokens_per_second", "prefill_tokens_per_second")
        best = [max(theirs, key=lambda row, key=key: theirs[row][key]) for key in keys]
        times, batch = [], []
        for key, row in zip(keys, best, strict=True):
            times.append(f"{' / '.join(f'{values[key] / theirs[row][key]:.1f}' for values in ours.values())} times {row}")
        wide = {row.rpartition(", ")[0]: values for row, values in rows.items() if row.endswith(" sequences")}
        for row, values in wide.items():
            batch.append(f"{values[keys[0]] / ours[row][keys[0]]:.1f}")
        count = next(iter(wide.values()))["sequences"]
        refused = ", ".join(f"{kind}: {reason.partition(': ')[2] or reason}" for kind, reason in measured["refused"].items())
        machine = f"{result['threads']} thread{'s' * (result['threads'] > 1)} of {measured['machine']['cpu']}"
        version = f"llama-cpp-python {result['llama_cpp_python']['version']}"
        options = ", ".join(f"{key}={value}" for values in ours.values() for key, value in values["options"].items())
        lines = [
            f"{name} on {machine}, one process, in turns, medians (`benchmarks/peers.py`, {version}): "
            f"decoding {times[0]}, a prompt of {result['long_prompt']} tokens {times[1]}; {count} sequences at once "
            f"{' / '.join(batch)} times the tokens/s of one. Fewer bits: {options}."
            + (f" Refused by llama.cpp: {refused}." if refused else ""),
            "",
            "| | weights | decode, tokens/s | prompt, tokens/s |",
            "| --- | --- | --- | --- |",
        ]
        for row, values in sorted(rows.items(), key=lambda item: -item[1][keys[0]]):
            size = f"{values['bytes'] / 1e6:,.0f} MB" if "bytes" in values else ""
            prompt = f"{values[keys[1]]:,.0f}" if keys[1] in values else ""
            lines.append(f"| {row} | {size} | {values[keys[0]]:,.0f} | {prompt} |")
        parts.append("\n".join(lines))
    picture = path.with_suffix(".svg").relative_to(ROOT).as_posix()
    return "\n\n".join([*parts, f"![tokens a second of every peer]({picture})"])


def comparisons() -> list[tuple[Path, dict[str, Any]]]:
    """Folders of `bimos compare` and what they hold."""
    paths = sorted(RESULTS.glob("compare-*/comparison.json"))
    found = [(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return [(folder, comparison) for folder, comparison in found if comparison["rows"]]


def comparison(folder: Path, compared: dict[str, Any], picture_from: Path) -> str:
    """What all rows share, the table, and the plot if there is one."""
    name = Path(compared["setting"]["model"]).name
    parts = [f"{name}, `bimos compare`. {table.conditions(compared)}", table.markdown(table.main_table(compared))]
    parts += paired.sentences(compared)
    plot = folder / "pareto.svg"
    if plot.exists():
        parts.append(f"![bits against perplexity]({os.path.relpath(plot, picture_from).replace(os.sep, '/')})")
    return "\n\n".join(parts)


def document() -> str:
    """docs/results.md: every comparison with its zero-shot tasks and where its rows come from; empty where there is none."""
    parts = []
    for folder, compared in comparisons():
        parts += [f"## {folder.name.removeprefix('compare-')}", comparison(folder, compared, DOCUMENT.parent)]
        for metric in ("acc", "acc_norm"):
            if lines := table.task_table(compared, metric):
                parts += [f"Zero-shot, {metric}, %:", table.markdown(lines)]
        if lines := claims.lines(compared):
            parts += ["What is claimed of the methods, at this scale (`benchmarks/claims.py`):", table.markdown(lines)]
        if notes := table.notes(compared):
            parts.append("\n".join(f"- {note}" for note in notes))
        commits = sorted({str(row["commit"])[:12] for row in compared["rows"]})
        versions = sorted({f"{name} {version}" for row in compared["rows"] for name, version in row["versions"].items()})
        parts.append(f"Commit {', '.join(commits)}; {', '.join(versions)}. Recipes of all rows: `{(folder / 'rows').relative_to(ROOT)}`.")
    head = "# Results\n\nMade by `benchmarks/tables.py` from what `bimos compare` left under `benchmarks/results/`; not to be edited."
    return "\n\n".join([head, *parts]) + "\n" if parts else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    compared = [comparison(folder, values, ROOT) for folder, values in comparisons()]
    if compared:
        place = DOCUMENT.relative_to(ROOT).as_posix()
        compared.append(f"All rows, zero-shot tasks where measured, and what becomes of the papers' claims and ours: [{place}]({place}).")
    parts = [*compared, sizes(), kernels(), peers()]
    tables = "\n\n".join(part for part in parts if part)
    filled = MARKED.sub(lambda match: f"{match[1]}\n{tables}\n\n{match[2]}", text)
    wanted = {readme: filled, DOCUMENT: document()}
    if arguments.check:
        stale = [path.name for path, content in wanted.items() if content != (path.read_text(encoding="utf-8") if path.exists() else "")]
        sys.exit(f"not what the JSON says: {', '.join(stale)}; run benchmarks/tables.py" if stale else 0)
    for path, content in wanted.items():
        if content:
            path.write_text(content, encoding="utf-8")
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
