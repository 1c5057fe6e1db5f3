"""The picture of benchmarks/peers.py: bars of tokens/s, decoding and prompts, of every model.

python benchmarks/peer_plot.py benchmarks/results/peers.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "bimos"  # the same figures give the same file

import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {"bimos": "#2a6f97", "torch": "#9a9a9a", "llama.cpp": "#d4a373"}


def plot(result: dict[str, Any], path: Path) -> None:
    """One row of pictures a model; `result` as peers.json has it."""
    kinds = {"decode_tokens_per_second": "decoding, tokens/s", "prefill_tokens_per_second": "prompt of 512, tokens/s"}
    models = result["models"]
    figure, axes = plt.subplots(len(models), 2, figsize=(10, 2.8 * len(models)), squeeze=False, layout="constrained")
    for line, (name, measured) in zip(axes, models.items(), strict=True):
        for axis, (key, title) in zip(line, kinds.items(), strict=True):
            values = {row: entry[key] for row, entry in measured["rows"].items() if key in entry}
            ordered = sorted(values.items(), key=lambda item: item[1])
            colours = [next(colour for start, colour in COLOURS.items() if row.startswith(start)) for row, _ in ordered]
            bars = axis.barh([row for row, _ in ordered], [value for _, value in ordered], color=colours)
            axis.bar_label(bars, [f"{value:,.0f}" for _, value in ordered], padding=3, fontsize=8)
            axis.set_title(f"{name}: {title}", fontsize=10)
            axis.tick_params(labelsize=8)
            axis.margins(x=0.12)
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(json.loads(source.read_text()), source.with_suffix(".svg"))
