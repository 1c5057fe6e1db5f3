"""Perplexity as the papers of the field measure it.

The text is tokenised once (special tokens as the tokenizer adds them, so at most one at the very start), cut into
non-overlapping windows of `context` tokens, the tail dropped. Every window is fed on its own and its tokens but the
first are predicted: `exp(mean cross-entropy)` over all predictions, as in GPTQ, OneBit and BinaryMoS. This is not the
word perplexity of lm_eval's `wikitext`, nor a sliding window.

Standard error: the windows' mean losses are taken as independent samples, `se(loss) = std / sqrt(windows)`, and
`se(ppl) = ppl * se(loss)` to first order (delta method). Windows, not tokens: neighbouring tokens are correlated.

What it costs: the logits of a window, `[context, vocab]` in float32, can outweigh the model. So the head is applied to
a few rows of the last hidden state at a time, if a first look at the model shows that its logits are nothing more than
that; else (soft-capped or scaled logits: Gemma 2, Cohere, Granite) the model's own logits are used as they come, and
only their float32 copies are cut up. The model runs in the precision that it has; losses are float32, sums float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bimos.errors import BimosError
from bimos.evaluation.mode import evaluating
from bimos.evaluation.texts import EvaluationText
from bimos.lanes import Lanes

LOGIT_ELEMENTS = 2**23  # held at a time in float32, by each lane: 32 MiB
PROBE_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity of one model on one text.

    Attributes:
        value: exp(mean cross-entropy in nats).
        stderr: its standard error; None from a single window.
        windows: how many were evaluated.
        context: tokens a window.
        text: label of the text.
        note: what differs from the usual protocol, empty if nothing does.
        losses: of every window, mean cross-entropy in nats: two models are compared by what these differ by, which varies
            less than they do.
    """

    value: float
    stderr: float | None
    windows: int
    context: int
    text: str
    note: str = ""
    losses: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form: `{value, stderr, windows, context, text, losses}`, and `note` if there is one; losses to six digits."""
        values = dataclasses.asdict(self) | {"losses": [float(f"{loss:.6g}") for loss in self.losses]}
        return values if self.note else {key: value for key, value in values.items() if key != "note"}


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str | EvaluationText,
    *,
    context: int = 2048,
    windows: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Perplexity of `model` on `text`; see this module's docstring for the protocol.

    Args:
        model: a causal language model of transformers, in any precision, on any device.
        context: tokens a window; a model with a shorter maximum gets windows of that length.
        windows: only the first so many. None: all.
        batch_size: windows a forward pass. On a CPU two passes run side by side.
        progress: called now and then with windows done, windows in all, and the perplexity so far.

    Raises:
        BimosError: fewer than two tokens, or a number that must be positive is not.
    """
    for name, number in (("context", context - 1), ("windows", 1 if windows is None else windows), ("batch_size", batch_size)):
        if number <= 0:
            raise BimosError(f"perplexity: {name} must be {'at least 2' if name == 'context' else 'positive'}")
    if isinstance(text, str):
        text = EvaluationText("text", "text", text)
    notes = []
    limit = maximum_context(model)
    if limit is not None and limit < context:
        notes.append(f"windows of {limit} tokens, the model's maximum, not {context}")
        context = limit
    tokens = cut_windows(tokenizer, text, context)[:windows]
    if tokens.shape[1] < context:
        context = tokens.shape[1]
        notes.append(f"the text has only {context} tokens: one window of that length")
    losses = _losses(model, tokens, batch_size, progress)
    mean = losses.mean().item()
    stderr = None
    if len(losses) > 1:
        stderr = _exp(mean) * losses.std(unbiased=True).item() / math.sqrt(len(losses))
    return Perplexity(_exp(mean), stderr, len(losses), context, text.label, "; ".join(notes), tuple(losses.tolist()))


def cut_windows(tokenizer: Any, text: EvaluationText, context: int) -> Tensor:
    """`text` as int64 `[windows, context]`; a text shorter than that is one window, as long as it is.

    Raises:
        BimosError: fewer than two tokens.
    """
    tokens = torch.tensor(tokenizer(text.text, verbose=False)["input_ids"], dtype=torch.int64)[: text.max_tokens]
    if len(tokens) < 2:
        raise BimosError(f"evaluation text '{text.name}' has {len(tokens)} token(s): perplexity needs at least 2")
    context = min(context, len(tokens))
    return tokens[: len(tokens) // context * context].view(-1, context)


def maximum_context(model: Any) -> int | None:
    """The longest sequence that the model's config allows, None if it does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 1 else None


def _losses(model: Any, tokens: Tensor, batch_size: int, progress: Callable[[int, int, float], None] | None) -> Tensor:
    """Mean loss of every window, float64 `[windows]`."""
    vocab = model.config.get_text_config().vocab_size
    losses: list[Tensor] = []

    @torch.no_grad()
    def losses_of(batch: Tensor) -> list[Tensor]:
        if head is None:
            rows = model(input_ids=batch, use_cache=False).logits
        else:
            rows = model.base_model(input_ids=batch, use_cache=False).last_hidden_state
        return [_summed_loss(row[:-1], window[1:], head, vocab) / (len(window) - 1) for row, window in zip(rows, batch, strict=True)]

    with evaluating(model):
        head = plain_head(model, tokens[:1, :PROBE_TOKENS].to(model.device))
    # All logits of a window at a time are more than one should hold of two windows.
    with evaluating(model), Lanes(1 if head is None else len(tokens), model.device) as lanes:
        for batches in tokens.to(model.device).split(batch_size * lanes.count):
            for found in lanes.map(losses_of, batches.split(batch_size)):
                losses += found
            if progress is not None:
                progress(len(losses), len(tokens), _exp(torch.stack(losses).mean().item()))
    return torch.stack(losses)


def _summed_loss(rows: Tensor, targets: Tensor, head: nn.Module | None, vocab: int) -> Tensor:
    """Summed cross-entropy, float64 scalar, of `targets` [T] given logits, or hidden states and their head, `rows` [T, *]."""
    chunk = max(1, LOGIT_ELEMENTS // vocab)
    total = torch.zeros((), dtype=torch.float64)
    for part, target in zip(rows.split(chunk), targets.split(chunk), strict=True):
        logits = part if head is None else head(part)
        total += functional.cross_entropy(logits.float(), target.to(logits.device), reduction="sum").double().cpu()
    return total


@torch.no_grad()
def plain_head(model: Any, tokens: Tensor) -> nn.Module | None:
    """The model's head if `logits == head(last hidden state)`, bit for bit, on `tokens` [1, T]; else None.

    Asked of the model instead of looked up by architecture: what a model does to its logits after the head is in its
    `forward` only.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return None
    hidden = getattr(model.base_model(input_ids=tokens, use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != getattr(head, "in_features", hidden.shape[-1]):
        return None
    return head if torch.equal(head(hidden), model(input_ids=tokens, use_cache=False).logits) else None


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700.0 else math.inf
