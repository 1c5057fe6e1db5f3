"""What fewer bits in the engine's head and cache cost: perplexity of the engine's own logits.

    python benchmarks/bits.py DIR --text wikitext2-validation.parquet -o benchmarks/results/bits.json

Windows of 1024 tokens from the text's beginning. "same" is the share of positions where the likeliest token stays what it is with
the head as stored and a cache of 16 bits; "error" how far logits move, relative to their norm.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from bimos.engine import Engine
from bimos.evaluation.texts import load_text
from bimos.evaluation.versions import provenance, write_json
from bimos.models import load_model, load_tokenizer

WINDOW = 1024
CASES: list[dict[str, Any]] = [{}, {"head_bits": 8}, {"head_bits": 4}, {"cache_bits": 8}, {"head_bits": 4, "cache_bits": 8}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True, help="a name or file that `bimos eval --ppl` takes")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    ids = tokenizer(load_text(arguments.text).text[: 16 * arguments.tokens])["input_ids"][: arguments.tokens]
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    engines = [Engine(model, tokenizer, **case) for case in CASES]
    sums = [{"nll": 0.0, "same": 0.0, "error": 0.0} for _ in CASES]
    for window in windows:
        stored = engines[0].logits(window)
        for engine, case, total in zip(engines, CASES, sums, strict=True):
            logits = engine.logits(window) if case else stored
            chosen = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(window[1:]).unsqueeze(1))
            total["nll"] -= chosen.sum().item()
            total["same"] += (logits.argmax(-1) == stored.argmax(-1)).float().mean().item() / len(windows)
            total["error"] += ((logits - stored).norm() / stored.norm()).item() / len(windows)
    count = sum(len(window) - 1 for window in windows)
    rows = []
    for case, total in zip(CASES, sums, strict=True):
        rows.append(case | {"perplexity": math.exp(total["nll"] / count), "same": total["same"], "error": total["error"]})
        print(rows[-1])
    if arguments.output:
        write_json(arguments.output, {"tokens": count, "text": Path(arguments.text).name, "rows": rows, **provenance()})


if __name__ == "__main__":
    main()
