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
import speed_tables
from bimos.comparison import paired, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "results.md"
ONLY_IN_DOCUMENT = ("tokens", "peak memory")
BITS, PEERS = "bits against perplexity", "tokens a second of every peer"
MARKED = re.compile(r"(<!-- results:start -->\n).*?(<!-- results:end -->)", re.DOTALL)


def comparisons() -> list[tuple[Path, dict[str, Any]]]:
    """Folders of `bimos compare` and what they hold."""
    paths = sorted(RESULTS.glob("compare-*/comparison.json"))
    found = [(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return [(folder, comparison) for folder, comparison in found if comparison["rows"]]


def picture(path: Path, said: str, shown_in: Path) -> list[str]:
    """A picture for the document in the folder `shown_in`, if there is one."""
    return [f"![{said}]({os.path.relpath(path, shown_in).replace(os.sep, '/')})"] if path.exists() else []


def comparison(folder: Path, compared: dict[str, Any]) -> list[str]:
    """All that docs/results.md says of one comparison."""
    name = Path(compared["setting"]["model"]).name
    parts = [f"## {table.given(compared)} a row", f"{name}, `bimos compare`. {table.conditions(compared)}"]
    parts.append(table.markdown(table.main_table(compared)))
    if notes := table.notes(compared):
        parts.append("\n".join(f"- {note}" for note in notes))
    parts += picture(folder / "pareto.svg", BITS, DOCUMENT.parent)
    if lines := claims.lines(compared):
        parts += ["What is claimed of the methods, at this scale (`benchmarks/claims.py`):", table.markdown(lines)]
    parts += paired.sentences(compared)
    for metric in ("acc", "acc_norm"):
        if lines := table.task_table(compared, metric):
            parts += [f"Zero-shot, {metric}, %:", table.markdown(lines)]
    commits = sorted({str(row["commit"])[:12] for row in compared["rows"]})
    versions = sorted({f"{name} {version}" for row in compared["rows"] for name, version in row["versions"].items()})
    parts.append(f"Commit {', '.join(commits)}; {', '.join(versions)}. Recipes of all rows: `{(folder / 'rows').relative_to(ROOT)}`.")
    return parts


def document() -> str:
    """docs/results.md: every comparison with its zero-shot tasks and where its rows come from, and speed against peers."""
    parts = [part for folder, compared in comparisons() for part in comparison(folder, compared)]
    speed = [speed_tables.products(RESULTS), *speed_tables.peers(RESULTS, whole=True)]
    if any(speed):
        parts += ["## Speed", *speed, *picture(RESULTS / "peers.svg", PEERS, DOCUMENT.parent)]
    head = "# Results\n\nMade by `benchmarks/tables.py` from the JSON under `benchmarks/results/`; not to be edited."
    return "\n\n".join([head, *(part for part in parts if part)]) + "\n" if parts else ""


def summary() -> str:
    """The README's part: the largest comparison as a table, a sentence for each of the others, sizes, speed."""
    parts, compared = [], comparisons()
    if compared:
        place = DOCUMENT.relative_to(ROOT).as_posix()
        folder, largest = max(compared, key=lambda found: len(found[1]["rows"]))
        lines = table.main_table(largest)
        kept = [index for index, title in enumerate(lines[0]) if title not in ONLY_IN_DOCUMENT]
        parts += [
            "### Quality",
            f"{Path(largest['setting']['model']).name}, `bimos compare`. {table.conditions(largest, ONLY_IN_DOCUMENT)}",
        ]
        parts.append(table.markdown([[line[index] for index in kept] for line in lines]))
        parts += [note for note in table.notes(largest) if note.startswith(table.UNDISTILLED)]
        parts += picture(folder / "pareto.svg", BITS, ROOT)
        parts += [said for _, other in compared if other is not largest for said in in_a_sentence(other)]
        parts.append(f"Window by window, task by task, and what becomes of the papers' claims and ours: [{place}]({place}).")
    if said := speed_tables.sizes(RESULTS):
        parts += ["### Size", said]
    if said := speed_tables.peers(RESULTS, whole=False):
        parts += ["### Speed", *said, *picture(RESULTS / "peers.svg", PEERS, ROOT)]
    return "\n\n".join(parts)


def in_a_sentence(compared: dict[str, Any]) -> list[str]:
    """Budget, and every row's perplexity on the first text."""
    texts, (header, *lines) = table.texts(compared), table.main_table(compared)
    if not texts:
        return []
    label = next(iter(texts.values()))
    column = header.index(label)
    return [f"{table.budget(compared)}, {label}: {', '.join(f'`{line[0]}` {line[column]}' for line in lines)}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    wanted = {readme: MARKED.sub(lambda match: f"{match[1]}\n{summary()}\n\n{match[2]}", text), DOCUMENT: document()}
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
