"""Teachers: loading them, and which of their linears become binary.

Nothing here knows an architecture by name. Decoder blocks are the longest `ModuleList` of the model whose members
hold linears; every `nn.Linear` inside them is converted, the head and whatever lies outside is not.
"""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import GgufConfig

from bimos.errors import BimosError
from bimos.kernels import native
from bimos.packing.integrity import check_depth, check_readable
from bimos.packing.pack import not_causal

_TOKENIZERS = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken")  # files that one is made of


def _source(model: str | Path) -> tuple[str, dict[str, Any]]:
    """The directory or Hub id to load from, and the keyword arguments for a `.gguf` file.

    Raises:
        BimosError: a path that leads nowhere, or an empty directory.
    """
    text = str(model)
    path = Path(text).expanduser()
    check_readable(path)
    if text.endswith(".gguf"):
        if not path.is_file():
            raise BimosError(f"no such file: '{text}'; give a .gguf file, a model directory or a Hub id")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BimosError(f"'{text}' has no config.json: give a transformers model directory, a .gguf file or a Hub id")
        for file in path.iterdir():
            check_readable(file)
        return str(path), {}
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or path.is_file():
        raise BimosError(f"no such model directory: '{text}'; give one, a .gguf file or a Hub id")
    return text, {}


def _explain(model: str | Path, error: Exception, what: str = "") -> BimosError:
    source = str(model)
    said = str(error).strip()
    first = said.splitlines()[0].strip() if said else type(error).__name__
    if first.endswith(":"):  # what it announces is on the lines behind it
        first = textwrap.shorten(said, 300, placeholder=" ...")
    if not Path(source).expanduser().exists():
        return BimosError(f"cannot load {what}'{source}' from the Hub ({first}); check the name and the network, or give a local directory")
    return BimosError(f"cannot load {what}'{source}': {first}")


def load_config(model: str | Path) -> PretrainedConfig:
    """The config alone: no weights are read. Raises BimosError if there is none."""
    source, extra = _source(model)
    try:
        return AutoConfig.from_pretrained(source, **extra)
    except Exception as error:  # transformers checks values by another library's dataclasses, and some by using them
        raise _explain(model, error) from None


def load_tokenizer(model: str | Path) -> Any:
    """The model's tokenizer. Raises BimosError if there is none."""
    source, extra = _source(model)
    try:
        return AutoTokenizer.from_pretrained(source, **extra)
    except Exception as error:  # the tokenizers library raises bare exceptions
        if (
            not extra
            and Path(source).is_dir()
            and not any(path.match(pattern) for path in Path(source).iterdir() for pattern in _TOKENIZERS)
        ):
            mend = "copy tokenizer.json and tokenizer_config.json of the original model there"
            raise BimosError(f"'{model}' has no tokenizer: {mend}") from None
        raise _explain(model, error, "the tokenizer of ") from None


def load_model(model: str | Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A model in evaluation mode, from a directory, a `.gguf` file (dequantised) or the Hub. Packed ones too.

    Raises:
        BimosError: it is not there or cannot be read.
    """
    source, extra = _source(model)
    if extra:
        extra["quantization_config"] = GgufConfig(dequantize=True)
    elif Path(source).is_dir():
        check_depth(source)
    try:
        outcome: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **extra)
    except BimosError:
        raise
    except Exception as error:  # safetensors, json and torch each have their own; all mean that it cannot be read
        if isinstance(error, MemoryError):
            raise
        raise _explain(model, error) from error
    loaded, found = outcome
    if missing := sorted(found["missing_keys"]):  # transformers draws them at random, with a warning
        raise BimosError(f"cannot load '{model}': its files lack {len(missing)} tensors, such as '{missing[0]}'; fetch it again")
    if extra and hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
        loaded.is_quantized = False
        loaded.hf_quantizer = None
    result: PreTrainedModel = loaded.eval()
    return result


def load_to_measure(model: str | Path) -> PreTrainedModel:
    """A model as it is, to read much text with: what is kept in 16 bits in float32 on a CPU that is slow in them.

    Raises:
        BimosError: see `load_model`.
    """
    stored = getattr(load_config(model), "dtype", None)
    return load_model(model, native.fast_dtype(stored) if isinstance(stored, torch.dtype) else "auto")


def refuse_quantized(config: PretrainedConfig, model: str | Path) -> None:
    """Raises BimosError: the model of this config is no original."""
    if getattr(config, "quantization_config", None) is not None and not str(model).endswith(".gguf"):
        raise BimosError(f"'{model}' is quantized already; start from the original model")


def load_teacher(model: str | Path, dtype: torch.dtype | str | None = None) -> tuple[PreTrainedModel, Any]:
    """Teacher and tokenizer.

    Args:
        dtype: of the weights; `auto`: as they are in the files, which stay mapped. None: bfloat16, what the matrix units of CPUs and
            GPUs share, or float32 on a slow CPU.

    Raises:
        BimosError: it cannot be loaded, is quantized already, or has no linears to convert.
    """
    config = load_config(model)
    refuse_quantized(config, model)
    teacher = load_model(model, dtype or torch.bfloat16)
    if dtype is None and native.fast_dtype(torch.bfloat16) != torch.bfloat16:
        # Widened, not read in float32: the same weights wherever it is loaded. Never narrowed so: that would round rotary frequencies.
        teacher.to(native.fast_dtype(torch.bfloat16))  # type: ignore[arg-type]
    convertible_linears(teacher)
    teacher.requires_grad_(False)
    return teacher, load_tokenizer(model)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device: shapes without memory. Raises BimosError if it is no causal language model."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except Exception as error:
        raise not_causal(config, error) from None


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks.

    Raises:
        BimosError: the model has no list of blocks with linears in them.
    """
    best: tuple[str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and _linears(module[0]) and (best is None or len(module) > len(best[1])):
            if best is not None and name.startswith(best[0] + "."):
                continue  # a list inside a block (experts, say) is not the list of blocks
            best = name, module
    if best is None:
        kind = " (its linears are transformers Conv1D modules)" if any(isinstance(m, Conv1D) for m in model.modules()) else ""
        raise BimosError(f"{type(model).__name__} has no decoder blocks with nn.Linear modules{kind}; there is nothing to binarize")
    return best


def _linears(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) or hasattr(child, "pack") or hasattr(child, "scale_out") for child in module.modules())


def convertible_linears(model: nn.Module, skip: Iterable[str] = ()) -> dict[str, nn.Linear]:
    """The linears that become binary, by full name, in the order of the forward pass as far as the modules tell.

    Args:
        skip: endings of names to leave alone, such as `down_proj` or `layers.0.mlp.up_proj`.

    Raises:
        BimosError: a mixture-of-experts model, an ending that matches nothing, or nothing left to convert.
    """
    skip = list(skip)
    prefix, blocks = decoder_blocks(model)
    if has_experts(model, blocks):
        raise BimosError(f"{type(model).__name__} is a mixture-of-experts model; bimos converts dense models only")
    linears = {f"{prefix}.{name}": module for name, module in blocks.named_modules() if type(module) is nn.Linear}
    for ending in skip:
        if not any(_ends(name, ending) for name in linears):
            raise BimosError(f"skip: no linear's name ends in '{ending}'; names are like '{next(iter(linears))}'")
    linears = {name: module for name, module in linears.items() if not any(_ends(name, ending) for ending in skip)}
    if not linears:
        raise BimosError(f"{type(model).__name__} has no linears to convert")
    return linears


def has_experts(model: nn.Module, blocks: nn.Module) -> bool:
    """Whether it is a mixture-of-experts model, of whose weights a token sees a part: by its config, or by fused weights in `blocks`."""
    config = getattr(model, "config", None)
    named = any((getattr(config, key, None) or 0) > 1 for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    return named or any(parameter.dim() == 3 for parameter in blocks.parameters())


def check_finite(module: nn.Module, prefix: str) -> None:
    """Raises BimosError: a parameter of `module` itself, whose name is `prefix`, holds NaN or infinity. None on the meta device does."""
    for name, parameter in module.named_parameters(prefix, recurse=False):
        if not parameter.is_meta and not parameter.isfinite().all():
            raise BimosError(f"'{name}' of the model holds NaN or infinite values: fetch the model again")


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)
