"""Fill the README's results from the JSON under `benchmarks/results/`.

python benchmarks/tables.py            rewrite the part between the markers
python benchmarks/tables.py --check    exit with 1 if it is not what the JSON says
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
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


def quality() -> str:
    rows = []
    for path in sorted(RESULTS.glob("quality-*/*.json")):
        result = json.loads(path.read_text())
        if "stages" not in result:
            continue
        cells = []
        for name in ("wikitext2", "c4"):
            measured = result["perplexity"].get(name)
            cells.append("" if not measured else f"{measured['value']:.1f} ({measured['value'] / measured['teacher']:.1f}x)")
        minutes = sum(stage["seconds"] for stage in result["stages"]) / 60
        tokens = sum(stage["tokens"] for stage in result["stages"])
        rows.append((result["perplexity"]["wikitext2"]["value"], path.stem, result, minutes, tokens, cells))
    if not rows:
        return ""
    first = rows[0][2]
    windows = first["perplexity"]["wikitext2"]["windows"]
    lines = [
        f"Perplexity of SmolLM2-135M-Instruct with all 210 body linears binarized, {windows} windows of 2048 tokens, in brackets times the "
        f"teacher's; {first['machine']['cores']} cores of {first['machine']['cpu']} (`benchmarks/quality.py`):",
        "",
        "| recipe | minutes | tokens | bits per body weight | WikiText-2 | C4 (train sample b) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for _, name, result, minutes, tokens, cells in sorted(rows, key=lambda row: row[0]):
        lines.append(f"| {name} | {minutes:.0f} | {tokens / 1000:.0f} k | {result['body_bits_per_weight']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    tables = "\n\n".join(part for part in (quality(), sizes()) if part)
    filled = MARKED.sub(lambda match: f"{match[1]}\n{tables}\n\n{match[2]}", text)
    if arguments.check:
        sys.exit(filled != text)
    readme.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
