"""Dense checkpoints of transformers, read and made without a model in between."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from bimos.errors import BimosError
from bimos.packing.pack import skeleton


def materialise(source: str | Path, config: PretrainedConfig, tensors: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` with exactly these tensors. Raises BimosError: `source` lacks some."""
    model_class: Any = type(skeleton(config))
    quiet = [name for name in tensors if name.endswith(("rotary_emb.inv_freq", ".position_ids"))]  # buffers of old checkpoints
    given = {k: v for k, v in tensors.items() if k not in quiet}
    try:
        model, info = model_class.from_pretrained(None, config=config, state_dict=given, dtype=dtype, output_loading_info=True)
    except RuntimeError as error:
        if "size" not in str(error):  # no memory, say
            raise
        raise BimosError(
            f"config.json and weights of '{source}' disagree ({' '.join(str(error).split())[:200]}); download it again"
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise BimosError(f"'{source}' lacks {len(missing)} tensors of the model, such as '{missing[0]}'; download it again")
    return model


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a dense checkpoint. Raises BimosError: no weights, or unreadable ones."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = directory / f"{stem}.{ending}.index.json"
        files = [directory / f"{stem}.{ending}"]
        if not files[0].is_file() and index.is_file():
            try:
                files = [
                    directory / str(name) for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                ]
            except (OSError, ValueError, KeyError, AttributeError, TypeError):
                raise BimosError(f"'{index}' is corrupt; download it again") from None
        if not files[0].is_file():
            continue
        for file in files:
            try:
                if ending == "bin":
                    yield from _pickled(file).items()
                else:
                    with safe_open(file, framework="pt") as weights:
                        yield from ((name, weights.get_tensor(name)) for name in weights.keys())  # noqa: SIM118
            except (OSError, SafetensorError, RuntimeError, UnpicklingError, ValueError) as error:
                raise BimosError(f"'{file}' is missing, truncated or corrupt ({' '.join(str(error).split())}); download it again") from None
        return
    raise BimosError(f"'{directory}' has no weights (model.safetensors or pytorch_model.bin)")


def _pickled(file: Path) -> dict[str, Tensor]:
    """Raises ValueError, or what torch does: not a file of tensors by name."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # of torch before 1.6, which cannot be mapped
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError("no tensors by name")
    return tensors


class Companions:
    """What lies beside the weights of a checkpoint (tokenizer, generation config), saved as it is."""

    def __init__(self, source: str | Path) -> None:
        self.source = Path(source)

    def save_pretrained(self, directory: Any) -> None:
        for path in self.source.iterdir():
            weights = path.name in ("config.json", "result.json") or path.name.endswith(".index.json")
            if path.is_file() and path.suffix in (".json", ".model", ".txt", ".jinja") and not weights:
                shutil.copyfile(path, Path(directory) / path.name)
            elif path.name == "additional_chat_templates":
                shutil.copytree(path, Path(directory) / path.name)
