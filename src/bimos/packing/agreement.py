"""Whether the config of a packed checkpoint and its weights agree, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bimos.errors import BimosError
from bimos.packing.hf import BimosConfig, check_complete, install_packed_modules
from bimos.packing.integrity import check_depth, check_same_description, named_in_full, read_config, read_headers, weight_files
from bimos.packing.layout import description_sum
from bimos.packing.pack import load_dense_config, skeleton


def check_headers(directory: str | Path) -> None:
    """What loading compares before it reads weights; checksums are of weights, and are not looked at.

    Raises:
        BimosError: config and files disagree, or are of a version that is not known.
    """
    check_depth(directory)
    files = weight_files(directory)
    description = BimosConfig(**read_config(directory)["quantization_config"])
    model: Any = skeleton(load_dense_config(directory))
    base, stored = model.base_model_prefix, read_headers(files)
    headers = named_in_full(base, stored)
    model = model if headers is stored else model.base_model
    try:
        install_packed_modules(model, description, headers)
        check_complete(model, headers)
    except ArithmeticError as error:  # of a size that is zero
        raise BimosError(f"config.json of '{directory}' describes no model ({error}); copy the checkpoint again") from None
    check_same_description(files, description_sum(description.__dict__))
