"""Methods and recipes compared: same teacher, text, seed and minutes, one run after another, perplexity of each at the end.

    python benchmarks/quality.py MODEL --data MIX --minutes 60 --rows default -o benchmarks/results/quality-60
    python benchmarks/quality.py MODEL --data MIX --minutes 15 --rows default,onebit,paper,sign -o benchmarks/results/quality-15

One JSON a row, so that an interrupted comparison goes on where it stopped (`--resume` is implied). Rows:
default (binarymos), onebit and sign-trained (the default recipe with another method), paper and onebit-paper (the shipped configs), sign
(round-to-nearest: no training at all), and the baselines without training: rtn2, rtn2-128, gptq2, gptq2-128 (groups of 64 and 128), billm,
pbllm. Texts are those of `bimos eval --ppl`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from bimos.config import RunConfig, override, read_yaml
from bimos.evaluation.perplexity import perplexity
from bimos.evaluation.texts import load_text
from bimos.evaluation.versions import provenance, write_json
from bimos.models import load_model, load_teacher, load_tokenizer
from bimos.quantize import run

CONFIGS = Path(__file__).parents[1] / "configs"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default", {}),
    "onebit": ("default", {"method": "onebit"}),
    "sign-trained": ("default", {"method": "sign"}),
    "sign": (
        "default",
        {"method": "sign", "initialise": {"activation_aware": False}, "blocks": {"enabled": False}, "distill": {"enabled": False}},
    ),
    **{name: ("default", {"method": name}) for name in ("rtn2", "gptq2", "billm", "pbllm")},
    **{f"{name}-128": ("default", {"method": name, "options": {"group_size": 128}}) for name in ("rtn2", "gptq2")},
    # Their step of 4 x 2048 tokens in two halves: the same gradient in half the memory.
    "paper": ("binarymos-paper", {"distill": {"batch_size": 2, "accumulate": 2}}),
    "onebit-paper": ("onebit-paper", {"distill": {"batch_size": 2, "accumulate": 2}}),
}


def config_of(row: str, arguments: argparse.Namespace) -> RunConfig:
    name, changes = ROWS[row]
    values = read_yaml(CONFIGS / f"{name}.yaml")
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    values |= {"data": arguments.data, "minutes": arguments.minutes, "tokens": None, "seed": arguments.seed, "embedding_bits": 8}
    if "distill" in values:
        values["distill"]["distinct_tokens"] = None  # the budget ends before any text repeats
    return RunConfig.from_dict(override(values, arguments.set), row)


def teacher_perplexity(arguments: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    """Measured once, kept beside the rows."""
    path = arguments.output / "teacher.json"
    known = json.loads(path.read_text()) if path.exists() else {"model": arguments.model, "perplexity": {}}
    missing = [name for name in texts if name not in known["perplexity"]]
    if missing:
        teacher, tokenizer = load_teacher(arguments.model)
        for name in missing:
            known["perplexity"][name] = perplexity(teacher, tokenizer, load_text(name), windows=arguments.windows).to_dict()
        write_json(path, known | provenance())
    return known["perplexity"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--rows", default="default", help=", ".join(ROWS))
    parser.add_argument("--ppl", default="wikitext2,c4")
    parser.add_argument("--windows", type=int, help="of every text; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="where checkpoints are left")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    console = Console()
    texts = [name for name in arguments.ppl.split(",") if name]
    rows = arguments.rows.split(",")
    if len(rows) > 1:
        for row in rows:  # a process each: none works in memory that another has left behind
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--rows", row], check=True)
        return
    row = rows[0]
    path = arguments.output / f"{row}.json"
    if path.exists():
        console.print(f"{row}: done already, {path}")
        return
    folder = arguments.work / arguments.output.name / row
    console.rule(f"{row}, {arguments.minutes:g} minutes")
    unfinished = (folder / "work" / "run.json").exists()
    if not (folder / "result.json").exists():
        run(arguments.model, folder, config_of(row, arguments), resume=unfinished, overwrite=not unfinished, console=console)
    result = json.loads((folder / "result.json").read_text())
    student, tokenizer = load_model(folder), load_tokenizer(folder)
    for name in texts:
        measured = perplexity(student, tokenizer, load_text(name), windows=arguments.windows).to_dict()
        result["perplexity"][name] = measured
        console.print(f"{row}, {name}: {measured['value']:.1f} ± {measured['stderr'] or 0:.1f} over {measured['windows']} windows")
    for name, measured in teacher_perplexity(arguments, texts).items():
        if name in result["perplexity"]:
            result["perplexity"][name]["teacher"] = measured["value"]
    write_json(path, result)
    shutil.copy(path, folder / "result.json")


if __name__ == "__main__":
    main()
