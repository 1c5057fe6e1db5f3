"""Libraries that round a model to 2 bits, as rows of a comparison: `hqq`, without data, and `auto-round`, on the text of the other rows.

    w_hat = s (q - z),  q in 0..3, s and z by group of a row

They work on the linears that bimos converts, with defaults of their own but for the options below. What they find is packed as `rtn2` is
(`bimos.methods.rtn2`), evaluated, run and counted like every other row: 2 + 32/group bits. A row that was interrupted begins anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bimos.config import RunConfig
from bimos.errors import BimosError
from bimos.evaluation.versions import provenance, write_json
from bimos.memory import peak_bytes, reset_peak
from bimos.methods import MethodConfig, StoredTensor, available_methods, method_config
from bimos.methods.rtn2 import RTN2Config
from bimos.models import convertible_linears, load_teacher
from bimos.options import build
from bimos.packing.checkpoint import save_packed
from bimos.packing.format import pack_signs
from bimos.packing.linear import PackedLinear
from bimos.packing.pack import pack_model
from bimos.packing.sizes import size_report
from bimos.training.data import TokenStream


class Codes(NamedTuple):
    """What a library makes of a linear: integers from 0 to 3 `[out, in]`; step and zero point of each group `[out, groups]`."""

    code: Tensor
    step: Tensor
    zero: Tensor


@dataclasses.dataclass(frozen=True)
class Peer(RTN2Config):
    """Options of a library. A method to comparisons alone: it is not registered, for nothing but a whole model can be given to it.

    Raises:
        BimosError: options that cannot be.
    """

    package: ClassVar[str]  # to install
    module: ClassVar[str]  # to import
    zero_bits: ClassVar[int] = 16  # of a zero point in the library's own format
    reads: ClassVar[bool] = True  # text

    def packed_layout(self, in_features: int, out_features: int, bias: bool) -> dict[str, StoredTensor]:
        if in_features % self.group_size:
            raise BimosError(
                f"{self.name} with group_size={self.group_size}: not a divisor of in_features={in_features}; "
                f"give another, such as {self.name}:group_size=32, or leave the linear out with skip"
            )
        return super().packed_layout(in_features, out_features, bias)

    def require(self) -> None:
        """Raises BimosError: the library is not installed."""
        if find_spec(self.module) is None:
            raise BimosError(f"{self.name} needs the library {self.package}; install it with: pip install 'bimos[peers]'")

    def codes(
        self, model: PreTrainedModel, tokenizer: Any, linears: Mapping[str, nn.Linear], windows: Tensor | None, seed: int
    ) -> Iterator[tuple[str, Codes]]:
        """What the library makes of each linear, by name; `windows`: int64 `[n, tokens]`, where it reads any. `model` is its to change."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class HQQ(Peer):
    """Half-quadratic quantization: zero points that leave an error with few large weights in it."""

    name: ClassVar[str] = "hqq"
    package: ClassVar[str] = "hqq"
    module: ClassVar[str] = "hqq"
    reads: ClassVar[bool] = False

    def codes(self, model: Any, tokenizer: Any, linears: Mapping[str, nn.Linear], windows: Any, seed: int) -> Iterator[tuple[str, Codes]]:
        from hqq.core.quantize import Quantizer

        for name, linear in linears.items():
            weight = linear.weight.detach().float()
            code, meta = Quantizer.quantize(weight, nbits=2, group_size=self.group_size, axis=1, device="cpu", bitpack=False)
            step, zero = (meta[key].view(len(weight), -1) for key in ("scale", "zero"))
            yield name, Codes(code.view_as(weight), step, zero.half().float())  # which is how it stores them


@dataclasses.dataclass(frozen=True)
class AutoRound(Peer):
    """Roundings and ranges learnt block by block with the signs of their gradients, arXiv 2309.05516."""

    name: ClassVar[str] = "auto-round"
    package: ClassVar[str] = "auto-round"
    module: ClassVar[str] = "auto_round"
    zero_bits: ClassVar[int] = 2

    iters: int = 200  # steps a block
    batch_size: int = 8  # sequences a step

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("iters", "batch_size"):
            if getattr(self, name) < 1:
                raise BimosError(f"{name}={getattr(self, name)}: must be positive")

    def codes(
        self, model: PreTrainedModel, tokenizer: Any, linears: Mapping[str, nn.Linear], windows: Any, seed: int
    ) -> Iterator[tuple[str, Codes]]:
        from auto_round import AutoRound as Rounding

        others = {name for name, module in model.named_modules() if type(module) is nn.Linear} - set(linears)
        rounding = Rounding(
            model,
            tokenizer=tokenizer,
            scheme="W2A16",
            group_size=self.group_size,
            sym=False,
            dataset=[window[None] for window in windows],
            nsamples=len(windows),
            seqlen=windows.shape[1],
            iters=self.iters,
            batch_size=min(self.batch_size, len(windows)),
            layer_config={name: {"bits": 16} for name in others},
            device_map="cpu",
            enable_torch_compile=False,
            seed=seed,
        )
        rounded, _ = rounding.quantize()
        for name in linears:
            found: Any = rounded.get_submodule(name)
            if not hasattr(found, "scale"):
                raise BimosError(f"auto-round leaves '{name}' as it is; leave it out with skip")
            weight = found.weight.detach().float()
            step, zero = (getattr(found, key).detach().float().view(len(weight), -1) for key in ("scale", "zp"))
            # Weights are dequantised already; steps are stored in float16.
            code = (weight.unflatten(1, (step.shape[1], -1)) / step[..., None] + zero[..., None]).round().clamp(0, 3)
            yield name, Codes(code.flatten(1), step, zero)


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (HQQ, AutoRound)}


def row_methods() -> dict[str, type[MethodConfig]]:
    """All that a row may be named by: methods, and libraries."""
    return {**available_methods(), **PEERS}


def row_config(config: RunConfig) -> MethodConfig:
    """Options of a row's method or library. Raises BimosError: see `method_config`."""
    if config.method not in PEERS:
        return method_config(config.method, config.options)
    peer = PEERS[config.method]
    known = {field.name for field in dataclasses.fields(peer)}
    if unknown := sorted(set(config.options) - known):
        raise BimosError(f"{peer.name} has no option '{', '.join(unknown)}'; its options: {', '.join(sorted(known))}")
    return build(peer, config.options, peer.name)


def run(model: str | Path, output: Path, config: RunConfig) -> None:
    """Round `model` with a library into the directory `output`: a packed checkpoint, and `result.json` as `bimos quantize` leaves it.

    Raises:
        BimosError: the library is not installed or fails, or bad input.
    """
    peer: Any = row_config(config)
    peer.require()
    student, tokenizer = load_teacher(model)
    linears = convertible_linears(student, config.skip)
    reset_peak()
    began, windows = time.monotonic(), None
    if peer.reads:
        with tempfile.TemporaryDirectory(prefix="bimos-") as folder:
            stream = TokenStream(config.data, tokenizer, config.sequence_length, config.seed, folder, teacher=student)
            windows = stream.batch(0, config.initialise.sequences)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print, and stdout is for the command's JSON
            found = dict(peer.codes(student, tokenizer, linears, windows, config.seed))
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise BimosError(f"{peer.package} {version(peer.package)} failed: {' '.join(str(error).split())[:200]}") from error
    for name, codes in found.items():
        student.set_submodule(name, packed(codes, linears[name].bias, peer.group_size))
    seconds, tokens = time.monotonic() - began, 0 if windows is None else windows.numel()
    stages = [{"name": "library", "tokens": tokens, "seconds": seconds, "peak_memory_bytes": peak_bytes()}]
    pack_model(student, method=peer.name, options=peer.to_dict(), embedding_bits=config.embedding_bits, dtype=torch.bfloat16)
    save_packed(student, tokenizer, output, overwrite=True, card={"base_model": str(model)})
    own = {
        "library": peer.package,
        "version": version(peer.package),
        "own_body_bits_per_weight": 2 + (16 + peer.zero_bits) / peer.group_size,
    }
    facts = {"model": str(model), "method": peer.name, "config": config.to_dict(), **size_report(output), "stages": stages, "peer": own}
    write_json(output / "result.json", facts | provenance() | {"seconds": seconds})


def packed(codes: Codes, bias: Tensor | None, group_size: int) -> PackedLinear:
    """The linear `s (q - z)` in the tensors of `rtn2`: with `q = 2 b1 + b0` and `B = 2 b - 1` it is `s/2 (B0 + 2 B1) + s (3/2 - z)`."""
    code, step = codes.code.to(torch.uint8), codes.step.half().float()
    tensors = {
        "weight": pack_signs(torch.stack([code & 1, code >> 1]).float() - 0.5),
        "scale_group_int": (step / 2).half(),
        "offset_group": (step * (1.5 - codes.zero)).half(),
    }
    return PackedLinear(tensors if bias is None else tensors | {"bias": bias.detach().half()}, group_size)
