"""transformers loads and saves packed checkpoints through the two classes that `import bimos` registers here.

Loading: `BimosQuantizer` checks the files, replaces modules of the empty model by packed ones, and transformers' own
loader fills them. Saving: it adds checksums to the headers. Modules hold buffers of fixed dtypes, so that neither
`dtype=` nor weight initialisation touches them.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bimos.errors import BimosError
from bimos.packing.embedding import quantize_embeddings
from bimos.packing.integrity import (
    DESCRIPTION_KEY,
    DTYPES,
    METADATA_KEY,
    check_same_description,
    checksums,
    named_in_full,
    read_headers,
    verify_files,
)
from bimos.packing.layout import Layout, check_description, compare, description_sum, layout_of
from bimos.packing.linear import PackedLinear
from bimos.packing.together import join_siblings

FLOATS = ("F16", "BF16", "F32")  # which a loader may widen or narrow


@register_quantization_config("bimos")
class BimosConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint.

    Attributes:
        format_version: the lowest that has what the checkpoint has; newer ones than this version knows are refused.
        method: name of the binarization method, for people and reports: loading does not depend on it.
        options: of the method.
        planes, experts, group_size, tensors: the layout that most linears share (`bimos.packing.layout.Layout`); so is `sparse`, if there.
        modules: layouts of linears that differ from it, by name.
        modules_to_not_convert: names of the linears that are not packed.
        embedding_bits: 8 or 16.
        card: what the model card says: base model, recipe, budget, perplexity.
    """

    def __init__(
        self,
        format_version: int = 1,
        method: str = "",
        options: dict[str, Any] | None = None,
        planes: int = 1,
        experts: int = 1,
        group_size: int | None = None,
        tensors: dict[str, str] | None = None,
        modules: dict[str, dict[str, Any]] | None = None,
        modules_to_not_convert: list[str] | None = None,
        embedding_bits: int = 16,
        card: dict[str, Any] | None = None,
        quant_method: str = "bimos",
        **extra: Any,
    ) -> None:
        """Raises BimosError: a newer format, or layouts that this version cannot read."""
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.method = method
        self.options = options or {}
        self.planes, self.experts, self.group_size, self.tensors = planes, experts, group_size, tensors or {}
        self.modules = modules or {}
        self.modules_to_not_convert = modules_to_not_convert or []
        self.embedding_bits = embedding_bits
        self.card = card or {}
        self.__dict__.update(extra)  # a key that we do not know must survive a re-save
        check_description(self.__dict__)

    def layout(self, name: str | None, bias: bool) -> Layout:
        """The layout of linear `name`, which has a bias in the original model or not."""
        return layout_of(self.__dict__, name, bias)


@register_quantizer("bimos")
class BimosQuantizer(HfQuantizer):
    """Puts packed modules into the empty model before weights are loaded, and checksums into what is saved."""

    quantization_config: BimosConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise BimosError("BimosConfig cannot binarize a model while it loads; use bimos.quantize, then load the result")

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> Any:
        headers = None
        if checkpoint_files is not None:
            verify_files(checkpoint_files)
            headers = named_in_full(model.base_model_prefix, read_headers(checkpoint_files))
        install_packed_modules(model, self.quantization_config, headers)
        if checkpoint_files is not None and headers is not None:
            check_complete(model, headers)
            check_same_description(checkpoint_files, description_sum(self.quantization_config.__dict__))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        save_with_cards(type(model))
        join_siblings(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Checksums of exactly the tensors that `save_pretrained` is about to write."""
        tensors = {name: t for name, t in model.state_dict().items() if name not in (model._keys_to_ignore_on_save or ())}
        sums = checksums(remove_tied_weights_from_state_dict(tensors, model))
        return None, {METADATA_KEY: sums, DESCRIPTION_KEY: description_sum(self.quantization_config.__dict__)}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Files have the modules' own names: what fuses or renames dense weights must not touch planes."""
        return []

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


_WITH_CARDS: set[type] = set()


def save_with_cards(kind: type) -> None:
    """Let `kind.save_pretrained` write a model card for packed models, which `transformers` has no place for.

    The class's, not a model's own: one that is bound to a model would keep it alive.
    """
    if kind in _WITH_CARDS:
        return
    _WITH_CARDS.add(kind)
    save = kind.save_pretrained  # type: ignore[attr-defined]

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, is_main_process: bool = True, *arguments: Any, **options: Any) -> None:
        from bimos.packing.card import write_card  # which knows this module

        save(self, save_directory, is_main_process, *arguments, **options)
        config = getattr(self.config, "quantization_config", None)
        if is_main_process and isinstance(config, BimosConfig):
            write_card(save_directory, config)

    kind.save_pretrained = save_pretrained  # type: ignore[attr-defined]


def install_packed_modules(model: Any, config: BimosConfig, headers: dict[str, tuple[tuple[int, ...], str]] | None = None) -> None:
    """Replace modules of a model on the meta device by the packed ones that `config` describes.

    Args:
        headers: shapes and dtypes in the files, to be compared with the config's where given.

    Raises:
        BimosError: config and files disagree.
    """
    # Names in the config are those of the model with its head; a bare base model has no prefix.
    prefix = "" if hasattr(model, model.base_model_prefix) else model.base_model_prefix + "."
    kept = set(config.modules_to_not_convert)
    base = model.base_model_prefix + "." if model.base_model_prefix else ""  # a classifier's own head, say, is not packed
    linears = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and prefix + name not in kept]
    linears = [(name, m) for name, m in linears if (prefix + name).startswith(base)]
    with torch.device("meta"):
        for name, linear in linears:
            layout = config.layout(prefix + name, linear.bias is not None)
            shapes = layout.shapes(linear.in_features, linear.out_features)
            if headers is not None:
                compare(prefix + name, shapes, headers)
            model.set_submodule(name, PackedLinear.empty(shapes, layout.group_size))
        replaced = [name for name, _ in linears]
        if config.embedding_bits == 8:
            replaced += quantize_embeddings(model)
    for name in replaced:
        model.get_submodule(name)._is_hf_initialized = True  # weight initialisation is to leave it alone


def check_complete(model: Any, headers: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Files and model have the same tensors, but for heads that are not a language model's.

    Raises:
        BimosError: the files lack one, which would be drawn at random, have it in another shape or kind of dtype, or hold one that the
            model that config.json describes has no place for.
    """
    base = model.base_model_prefix + "."
    prefix = "" if hasattr(model, model.base_model_prefix) else base
    head = model.get_output_embeddings()
    heads = tuple(f"{name}." for name, module in model.named_modules() if head is not None and module is head)
    places = set()
    for name, tensor in model.state_dict().items():
        own = prefix + name
        places.add(own)
        if own.startswith((base, *heads)) and name not in (model.all_tied_weights_keys or {}):
            expected, found = (tuple(tensor.shape), DTYPES.get(tensor.dtype)), headers.get(own)
            alike = found is not None and (found[1] == expected[1] or (tensor.is_floating_point() and found[1] in FLOATS))
            if found is None or found[0] != expected[0] or not alike:
                raise BimosError(f"config.json and weights disagree on '{own}' ({expected} and {found}); copy the checkpoint again")
    if head is not None:
        ignored = [*(model._keys_to_ignore_on_load_unexpected or ())]
        left = sorted(name for name in headers.keys() - places if not any(re.search(pattern, name) for pattern in ignored))
        if left:
            raise BimosError(f"config.json has no place for '{left[0]}', which is among the weights; copy the checkpoint again")


def attach(model: Any, config: BimosConfig) -> None:
    """Make an in-memory packed model one that transformers knows to be quantized, so that `save_pretrained` works."""
    quantizer = BimosQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model._weight_conversions = []  # see update_weight_conversions
    quantizer.postprocess_model(model)
