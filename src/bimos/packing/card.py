"""The model card of a packed checkpoint: its README, written with every save."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCardData

from bimos.errors import BimosError
from bimos.packing.hf import BimosConfig
from bimos.packing.sizes import size_report

MARK = "<!-- Written by bimos with every save; without this line the file stays as it is. -->"


def write_card(directory: str | Path, config: BimosConfig) -> None:
    """Write the card of the checkpoint in `directory`, if it has no README but one of ours. None where files have names of their own."""
    path = Path(directory) / "README.md"
    if not path.parent.is_dir():  # transformers has said so
        return
    with suppress(BimosError):  # the model is saved, which is what was asked for
        if not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace"):
            path.write_text(f"{model_card(config, size_report(directory))}\n{MARK}\n", encoding="utf-8")


def model_card(config: BimosConfig, sizes: dict[str, Any]) -> str:
    """The README of a checkpoint.

    Args:
        config: whose `card` may have `base_model` (a Hub id or a name), `recipe` and `budget` (text, or names and
            values), `perplexity` (text name to a number or to names and values), `versions`; anything else is listed.
        sizes: from `size_report`.
    """
    from bimos import __version__

    facts = dict(config.card)
    base = str(facts.pop("base_model", "") or "")
    local = not base or Path(base).expanduser().exists() or base.count("/") != 1
    data = ModelCardData(
        base_model=None if local else base, base_model_relation=None if local else "quantized",
        library_name="transformers", pipeline_tag="text-generation", tags=["bimos", "1-bit", *([config.method] if config.method else [])],
    )  # fmt: skip
    name = Path(base).name if local else base
    versions = {"bimos": __version__, "torch": torch.__version__, "transformers": transformers.__version__, **facts.pop("versions", {})}
    size = {
        "method": " ".join([config.method, *(f"{key}={value}" for key, value in config.options.items())]),
        "bits": f"{sizes['body_bits_per_weight']:.3f} per body weight, {sizes['bits_per_parameter']:.3f} per parameter of the whole model",
        "size": f"{sizes['total_bytes'] / 1e6:.1f} MB, {sizes['compression']:.1f} times smaller than in 16 bits",
        "embeddings": f"{config.embedding_bits} bits",
    }
    sections = [
        f"---\n{data.to_yaml()}\n---\n\n# {name or 'A model'} in about one bit per weight\n",
        f"{name or 'A language model'}, binarized with bimos.\n\n" + _table(size),
        "## Use\n\n```python\nimport bimos  # teaches transformers the format\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")\n```\n',
        "## Perplexity\n\n" + (_table(facts.pop("perplexity", None)) or "Not measured; run `bimos eval` on this directory.\n"),
    ]
    for title in ("recipe", "budget"):
        if facts.get(title):
            sections.append(f"## {title.capitalize()}\n\n" + _table(facts.pop(title)))
    if facts:
        sections.append("## Also recorded\n\n" + _table(facts))
    sections.append("## Versions\n\n" + _table(versions))
    return "\n".join(sections)


def _table(values: Any) -> str:
    if not isinstance(values, dict) or not values:
        return f"{values}\n" if values else ""
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {_number(v)}" for k, v in value.items())
        text = " ".join(_number(value).replace("|", "\\|").split())
        rows.append(f"| {key} | {text} |")
    return "\n".join(["| | |", "| --- | --- |", *rows, ""])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
