"""The pictures of `bimos inspect`, each a PNG."""

from __future__ import annotations

import io
from typing import Any

import torch

from bimos.analysis.experts import Point
from bimos.analysis.routing import Routing

CHANNELS = 96  # of a linear that are drawn
SIDES = {"scale_in": "input scales", "scale_out": "output scales"}


def gates(routing: Routing, layer: str, shown: int) -> bytes:
    """Heat map: experts by the first `shown` tokens of the text."""
    gate = routing.gates[layer][:shown]
    figure, axis = _figure(max(6.0, 0.24 * len(gate) + 1.8), 1.6 + 0.3 * gate.shape[1])
    image = axis.imshow(gate.T.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    pieces = [piece.replace("\n", "\\n").replace("\t", "\\t").replace("$", r"\$") for piece in routing.pieces[: len(gate)]]
    axis.set_xticks(range(len(gate)), pieces, rotation=90, fontsize=8)
    axis.set_yticks(range(gate.shape[1]), [str(expert + 1) for expert in range(gate.shape[1])])
    axis.set(ylabel="expert")
    figure.colorbar(image, ax=axis, label="gate", fraction=0.03, pad=0.01)
    return _png(figure)


def scales(routing: Routing, layer: str) -> bytes:
    """Scales over the text's tokens as multiples of a static scale, the mean over tokens. A row for every plane, channels by spread."""
    sides = {side: found for side in SIDES if (found := routing.scales(layer, side)) is not None}
    planes = max(found.shape[0] for found in sides.values())
    figure, axes = _figure(5.2 * len(sides), 3.2 * planes + 0.4, planes, len(sides))
    for column, (side, found) in enumerate(sides.items()):
        for plane in range(planes):
            axis, values = axes[plane][column], found[plane]
            static = values.mean(0)
            values = values[:, static.abs() > 0.01 * static.abs().mean()]  # multiples of next to nothing say nothing
            ratio = values / values.mean(0)
            ratio = ratio[:, ratio.std(0).argsort()]
            picked = torch.linspace(0, ratio.shape[1] - 1, min(CHANNELS, ratio.shape[1])).round().long()
            xs = 100 * (picked + 0.5).numpy() / ratio.shape[1]
            low, first, third, high = torch.quantile(ratio[:, picked], torch.tensor([0.05, 0.25, 0.75, 0.95]), dim=0).numpy()
            axis.fill_between(xs, low, high, color="#b9d0e0", linewidth=0, label="5 to 95 % of tokens")
            axis.fill_between(xs, first, third, color="#5b9dc9", linewidth=0, label="25 to 75 % of tokens")
            axis.axhline(1.0, color="black", linewidth=1, label="static")
            title = SIDES[side] + (f", plane {plane + 1}" if planes > 1 else "")
            axis.set(title=title, xlabel="channels by spread, %", ylabel="scale, times the static one", xlim=(0, 100))
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper left")
    return _png(figure)


def layers(routing: Routing) -> bytes:
    """Mean entropy of the gate, and load of each expert, of every linear in the order of the forward pass."""
    names = list(routing.gates)
    experts = max(gate.shape[1] for gate in routing.gates.values())
    figure, axes = _figure(max(7.0, 0.045 * len(names) + 3), 3.2 + 1.2 + 0.22 * experts, 2, 1, height_ratios=[3.2, 1.2 + 0.22 * experts])
    above, below = axes[0][0], axes[1][0]
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    for kind in kinds:
        places = [index for index, name in enumerate(names) if name.rpartition(".")[2] == kind]
        above.plot(places, [routing.entropy(names[index]).mean().item() for index in places], ".-", linewidth=0.7, markersize=5, label=kind)
    starts = _block_starts(names)
    for axis in (above, below):
        axis.set_xticks(list(starts.values()), [str(block) for block in starts])
    above.set(ylabel="entropy of the gate,\nshare of the most", xlim=(-0.5, len(names) - 0.5))
    above.legend(frameon=False, fontsize=8, ncols=min(7, len(kinds)), loc="lower left", bbox_to_anchor=(0, 1))
    load = torch.zeros(experts, len(names))
    for index, name in enumerate(names):
        found = routing.load(name)
        load[: len(found), index] = found
    image = below.imshow(load.numpy(), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    below.set_yticks(range(experts), [str(expert + 1) for expert in range(experts)])
    below.set(ylabel="load of expert", xlabel="decoder block; its linears in the order of the forward pass")
    figure.colorbar(image, ax=below, label="mean gate", fraction=0.03, pad=0.01)
    return _png(figure)


def _block_starts(names: list[str]) -> dict[int, int]:
    """Places of the first linears of at most 16 decoder blocks, by number of the block."""
    starts: dict[int, int] = {}
    for place, name in enumerate(names):
        numbers = [part for part in name.split(".") if part.isdecimal()]
        if numbers:
            starts.setdefault(int(numbers[0]), place)
    every = -(-len(starts) // 16) or 1
    return dict(list(starts.items())[::every])


def experts(series: dict[str, dict[str, list[Point]]]) -> bytes:
    """Perplexity against the number of experts, a panel for every text; bars are the standard errors of `experts.py`."""
    figure, axes = _figure(4.6 * len(series), 3.6, 1, len(series))
    for axis, (label, lines) in zip(axes[0], series.items(), strict=True):
        counts = sorted({count for points in lines.values() for count, *_ in points})
        for name, points in lines.items():
            errors = [error or 0.0 for _, _, error in points]
            axis.errorbar([p[0] for p in points], [p[1] for p in points], yerr=errors, marker="o", capsize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set(title=label, xlabel="scaling experts", ylabel="perplexity")
        axis.grid(True, color="0.93")
        axis.legend(frameon=False, fontsize=8)
    return _png(figure)


def _figure(width: float, height: float, rows: int = 0, columns: int = 0, **grid: Any) -> tuple[Any, Any]:
    """A figure in inches, and its one pair of axes, or with `rows` and `columns` an array of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False, **grid) if rows else figure.subplots()
    for axis in axes.flat if rows else [axes]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=150)
    return target.getvalue()
