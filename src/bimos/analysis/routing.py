"""Gates and scales of a packed model, token by token.

gate = softmax(router x)      s = gate S       for every token, in every linear with more than one scaling expert
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bimos.errors import BimosError
from bimos.evaluation.mode import evaluating
from bimos.evaluation.perplexity import cut_windows, maximum_context
from bimos.evaluation.texts import EvaluationText, available_texts, is_file, load_text
from bimos.packing.linear import PackedLinear


@dataclasses.dataclass(frozen=True)
class Routing:
    """What the routers did with a text.

    Attributes:
        pieces: its tokens as text, `T` of them.
        gates: float32 `[T, e]` of every linear with a router, by name, in the order of the forward pass.
        linears: these linears.
    """

    pieces: list[str]
    gates: dict[str, Tensor]
    linears: dict[str, PackedLinear]

    def load(self, name: str) -> Tensor:
        """Mean gate of each expert, `[e]`; sums to 1."""
        return self.gates[name].mean(0)

    def entropy(self, name: str) -> Tensor:
        """Of each token's gate, `[T]`, as a share of the most there is: 0 where one expert decides alone, 1 where all count the same."""
        gate = self.gates[name]
        return -torch.special.xlogy(gate, gate).sum(-1) / math.log(gate.shape[1])

    def scales(self, name: str, side: str) -> Tensor | None:
        """Mixed scales of every token, float32 `[planes, T, features]`; `side` is `scale_in` or `scale_out`. None where there are none."""
        experts = getattr(self.linears[name], side)
        return None if experts is None else self.gates[name] @ experts.float()

    def spread(self, name: str, side: str) -> float | None:
        """How far a token's scales are from static ones: standard deviation over tokens by absolute mean, the median over channels."""
        scales = self.scales(name, side)
        if scales is None:
            return None
        return (scales.std(1) / scales.mean(1).abs().clamp_min(1e-12)).median().item()

    def layer(self, ending: str | None) -> str:
        """The one linear whose name ends so; without an ending the first of the middle block's.

        Raises:
            BimosError: none or several are called so.
        """
        names = list(self.gates)
        if ending is None:
            middle = names[len(names) // 2]
            block = middle.rpartition(".")[0].rpartition(".")[0]
            return next(name for name in names if name.startswith(block + "."))
        found = [name for name in names if name == ending or name.endswith("." + ending)]
        if len(found) != 1:
            many = f"{len(found)} linears' names end so" if found else "no linear with a router is called so"
            raise BimosError(f"--layer {ending}: {many}; names are like '{names[0]}'")
        return found[0]


def routed_linears(model: Any, source: str) -> dict[str, PackedLinear]:
    """Packed linears with a router, by name. Raises BimosError, naming `source`: there are none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear) and module.router is not None}
    if not found:
        packing: Any = getattr(model.config, "quantization_config", None)
        kind = f"its method, {packing.method}, mixes no scales" if getattr(packing, "quant_method", None) == "bimos" else "not packed"
        raise BimosError(f"'{source}' has no routers to look at ({kind}); give a packed model with more than one scaling expert")
    return found


@torch.no_grad()
def observe(model: Any, tokenizer: Any, text: EvaluationText, tokens: int, source: str = "model") -> Routing:
    """Run the first `tokens` tokens of `text` (as many as the model takes at once) through the model and note every gate.

    Raises:
        BimosError: a model without routers, fewer than two tokens, or a number below that.
    """
    linears = routed_linears(model, source)
    if tokens < 2:
        raise BimosError(f"--tokens {tokens}: must be at least 2")
    ids = cut_windows(tokenizer, text, min(tokens, maximum_context(model) or tokens))[:1].to(model.device)
    gates: dict[str, Tensor] = {}

    def note(name: str, router: Tensor) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)  # one text; some architectures flatten tokens themselves
            gates[name] = F.softmax(F.linear(x.float(), router.float()), dim=-1).cpu()

        return hook

    handles = [linear.register_forward_pre_hook(note(name, linear.router)) for name, linear in linears.items()]  # type: ignore[arg-type]
    try:
        with evaluating(model):
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    pieces = [tokenizer.decode([token]) for token in ids[0].tolist()]
    return Routing(pieces, gates, {name: linears[name] for name in gates})


def read_text(given: str) -> EvaluationText:
    """`--text`: a file, a text known by name, or else the text itself.

    Raises:
        BimosError: one word of ASCII that is neither a file nor a known name: more likely a slip in one of these than a text.
    """
    if given in available_texts() or is_file(given):
        return load_text(given)
    if re.fullmatch(r"[!-~]*", given.strip()):
        raise BimosError(f"--text '{given}' is no file and none of {', '.join(available_texts())}; a text itself has more than one word")
    return EvaluationText("text", "text", given)
