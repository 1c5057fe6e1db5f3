"""From a packed model and a text to pictures and a page; the work behind `bimos inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bimos.analysis import figures
from bimos.analysis.experts import by_experts
from bimos.analysis.routing import Routing, observe, read_text, routed_linears
from bimos.comparison.run import read
from bimos.errors import BimosError, disk_full, no_space
from bimos.evaluation.pages import origin, picture, render
from bimos.evaluation.versions import provenance, write_bytes, write_json, write_text
from bimos.models import load_model, load_tokenizer


def inspect(
    model: str | Path,
    text: str,
    output: str | Path,
    *,
    layer: str | None = None,
    tokens: int = 512,
    shown: int = 48,
    comparison: str | Path | None = None,
) -> dict[str, Any]:
    """Write `index.html`, `inspect.json` and a PNG for every picture to `output`.

    Args:
        text: a file, a text known by name, or the text itself.
        layer: end of the name of the linear whose gates and scales are drawn. None: one in the middle.
        tokens: of the text that are run.
        shown: of those, in the heat map.
        comparison: directory of `bimos compare`, for perplexity against the number of experts.

    Returns:
        `layer`, `tokens`; `linears`: of each `load` `[e]`, mean `entropy` of the gate as a share of the most, `spread_in` and `spread_out`
        (see `Routing.spread`); `kinds`: the same by the last part of the name, loads as `least_load` and `most_load`; `pictures`.

    Raises:
        BimosError: an output that holds something else, no such model or text, a model without routers, a linear that is not there,
            or a comparison without two rows to draw.
    """
    output = Path(output).expanduser()
    if shown < 1:
        raise BimosError(f"--shown {shown}: must be at least 1")
    given = read_text(text)
    series = None if comparison is None else by_experts(read(Path(comparison).expanduser()), str(comparison))
    _check_place(output)
    loaded = load_model(model)
    routed_linears(loaded, str(model))
    routing = observe(loaded, load_tokenizer(model), given, tokens, str(model))
    name = routing.layer(layer)
    drawn = {
        "gates": figures.gates(routing, name, shown),
        "scales": figures.scales(routing, name),
        "layers": figures.layers(routing),
    }
    if series is not None:
        drawn["experts"] = figures.experts(series)
    linears = {linear: _facts(routing, linear) for linear in routing.gates}
    result = {
        "model": str(model),
        "text": given.label,
        "tokens": len(routing.pieces),
        "layer": name,
        "kinds": _kinds(linears),
        "linears": linears,
        "pictures": [f"{key}.png" for key in drawn],
        **provenance(),
    }
    try:
        for key, data in drawn.items():
            write_bytes(output / f"{key}.png", data)
        write_json(output / "inspect.json", result)
        write_text(output / "index.html", _page(result, drawn))
    except OSError as error:
        reason = no_space(error) if disk_full(error) else f"{error.strerror}; name another output directory"
        raise BimosError(f"cannot write to '{output}': {reason}") from None
    return result


def _check_place(output: Path) -> None:
    """Raises BimosError: `output` is a file, or holds something that this has not written."""
    if output.exists() and not output.is_dir():
        raise BimosError(f"output '{output}' is a file; name a directory")
    if output.is_dir() and not (output / "inspect.json").exists() and any(output.iterdir()):
        raise BimosError(f"output directory '{output}' is not empty and holds nothing of bimos inspect; name another")


def _facts(routing: Routing, name: str) -> dict[str, Any]:
    return {
        "load": routing.load(name).tolist(),
        "entropy": routing.entropy(name).mean().item(),
        "spread_in": routing.spread(name, "scale_in"),
        "spread_out": routing.spread(name, "scale_out"),
    }


def _kinds(linears: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over the linears of a kind, such as all `q_proj`."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, facts in linears.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(facts)

    def mean(values: list[Any]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return {
        kind: {
            "least_load": mean([min(facts["load"]) for facts in members]),
            "most_load": mean([max(facts["load"]) for facts in members]),
            **{key: mean([facts[key] for facts in members]) for key in ("entropy", "spread_in", "spread_out")},
        }
        for kind, members in kinds.items()
    }


def _page(result: dict[str, Any], drawn: dict[str, bytes]) -> str:
    labels = {
        "gates": "gates of the experts by token",
        "scales": "scales over tokens against static ones",
        "layers": "entropy of the gate and load of the experts by linear",
        "experts": "perplexity against the number of experts",
    }
    return render(
        Path(__file__).parent / "inspect.html.jinja",
        model=Path(result["model"]).name,
        result=result,
        pictures={key: picture(data, "png", labels[key]) for key, data in drawn.items()},
        origin=origin(result),
    )
