"""One engine: its model's weights in C++, its sequences, and what it says."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from bimos.engine.fit import check_options, load, refusal
from bimos.engine.weights import table_of, weights
from bimos.errors import BimosError
from bimos.generation import Sampling, Streamer
from bimos.kernels import native
from bimos.tokens import load_tokenizer

PARTS = ("products", "tables", "scales", "router", "attention", "head", "rest", "waiting")  # csrc/spent.h
MOST = 7 / 8  # of what is kept of a text, which another must share to take it over and not copy it
KEPT = 4  # sequences whose beginnings later prompts may share
PIECE = 512  # tokens of a prompt that are read before the interpreter hears of a Ctrl-C; a multiple of csrc/engine/ops.cpp's kChunk
NO_LOGITS, ALL_LOGITS = 0, 2  # of engine_read


class Engine:
    """A packed model ready to decode. Several threads may use it: their calls take turns."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        threads: int | None = None,
        head_bits: int | None = None,
        cache_bits: int = 16,
        activation: str = "exact",
    ) -> None:
        """Takes what it needs out of a model that transformers or `load` loaded.

        Args:
            head_bits: 8 or 4 bits a weight of the head, whatever the checkpoint has; None: as it is there. The embedding stays as it is.
            cache_bits: of keys and values: 16 (bfloat16) or 8 (int8 with a scale for every position of a head).
            activation: "exact", or "int8": see `bimos.kernels.packed_linear`.

        Raises:
            BimosError: the engine does not cover this model.
        """
        reason = refusal(model)
        if reason:
            raise BimosError(f"the engine does not run this model ({reason}); use transformers' generate")
        if threads is not None and not 1 <= threads <= 1024:
            raise BimosError(f"threads={threads}: must be from 1 to 1024")
        check_options(head_bits, cache_bits, activation)
        self.tokenizer = tokenizer
        self.config = model.config
        stop = model.generation_config.eos_token_id
        self.stop = set(stop if isinstance(stop, list) else [] if stop is None else [stop])
        tensors, numbers = weights(model, head_bits)
        epsilon, scale = float(model.config.rms_norm_eps), float(getattr(model.model.rotary_emb, "attention_scaling", 1.0))
        options = threads or torch.get_num_threads(), cache_bits, activation == "int8", head_bits == 4
        try:
            self._id = torch.ops.bimos.engine_new(tensors, numbers, epsilon, scale, *options)
        except RuntimeError as error:  # sizes that no model of `refusal` has
            raise BimosError(f"the engine does not take this model: {str(error).splitlines()[0]}") from None
        weakref.finalize(self, torch.ops.bimos.engine_free, self._id)
        if head_bits == 4:
            self._quantize_head(model.get_output_embeddings())
        self._kept: list[int] = []
        self._choosing = threading.Lock()

    @classmethod
    def from_pretrained(cls, directory: str | Path, threads: int | None = None, **options: Any) -> Self:
        """An engine for a packed checkpoint, whose files are mapped: nothing but what decoding reads in another order is copied.

        `options` are `head_bits`, `cache_bits` and `activation`.

        Raises:
            BimosError: no such checkpoint, a corrupt one, or one that the engine does not cover.
        """
        return cls(load(directory), load_tokenizer(directory), threads, **options)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits `[len(ids), vocabulary]`, float32, behind every token of a text.

        Raises:
            BimosError: a token that the model does not know, or too many.
        """
        self._check(ids)
        sequence = torch.ops.bimos.engine_open(self._id)
        try:
            logits: Tensor = torch.ops.bimos.engine_read(self._id, list(ids), [sequence] * len(ids), ALL_LOGITS)
            return logits
        finally:
            torch.ops.bimos.engine_close(self._id, sequence)

    def tokens(self, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: bool = True) -> Iterator[list[int | None]]:
        """Continue several prompts at once: at every step the next token of each, None where one has ended.

        What a prompt shares with one of the last few, or with one beside it, is not computed again.

        Args:
            prompts: token ids; none empty.
            sampling: prompt i has `sampling.seed + i`.
            stop: whether the model's end-of-text tokens end a sequence.

        Raises:
            BimosError: an empty prompt, or one that leaves no room for new tokens.
        """
        for prompt in prompts:
            if not prompt:
                raise BimosError("the prompt is empty: give some text to continue")
            self._check(prompt, sampling.max_new_tokens)
        seed = int(torch.randint(2**31, ())) if sampling.seed is None else sampling.seed
        options = [sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty]
        opened: list[int] = []
        try:
            for prompt in prompts:
                self._begin(list(prompt), opened)
            last = [prompt[-1] for prompt in prompts]
            active = list(range(len(prompts)))
            for _ in range(sampling.max_new_tokens):
                reading = [last[i] for i in active], [opened[i] for i in active]
                picked = torch.ops.bimos.engine_next(self._id, *reading, options, sampling.top_k, [(seed + i) % 2**63 for i in active])
                if -1 in picked:
                    raise BimosError("the model's logits are not finite: its weights are damaged; get the checkpoint again")
                step: list[int | None] = [None] * len(prompts)
                for i, token in zip(active, picked, strict=True):
                    if not (stop and token in self.stop):
                        step[i] = last[i] = token
                active = [i for i in active if step[i] is not None]
                if not active:
                    return
                yield step
        except Exception:  # no memory, say: the next try needs it more. An interrupted text is kept.
            for sequence in opened:
                torch.ops.bimos.engine_close(self._id, sequence)
            opened.clear()
            raise
        finally:
            self._keep(opened)

    def spent(self, go_on: bool) -> dict[str, float]:
        """Seconds that one of the engine's threads spent on every part of its work, counted since the last call that asked to `go_on`.

        Waiting is for other threads. Counting costs some hundredths of a step.
        """
        seconds = torch.ops.bimos.engine_spent(self._id, go_on)
        return dict(zip(PARTS, seconds, strict=True))

    def stream(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Iterator[str]:
        """What follows `prompt`, piece by piece, each as soon as it forms whole words.

        Raises:
            BimosError: see `tokens`.
        """
        ids = self._ids(prompt) if isinstance(prompt, str) else list(prompt)
        pieces: list[str] = []
        streamer = Streamer(self._words(), pieces.append)
        streamer.put(torch.tensor(ids))  # which it skips
        for (token,) in self.tokens([ids], sampling or Sampling()):
            streamer.put(torch.tensor([token]))
            yield from pieces
            pieces.clear()
        streamer.end()
        yield from pieces

    def generate(self, prompt: str | list[str], sampling: Sampling | None = None) -> str | list[str]:
        """What follows a prompt; or, of several, what follows each, decoded side by side.

        Raises:
            BimosError: see `tokens`.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        continued: list[list[int]] = [[] for _ in prompts]
        for step in self.tokens([self._ids(text) for text in prompts], sampling or Sampling()):
            for ids, token in zip(continued, step, strict=True):
                if token is not None:
                    ids.append(token)
        texts: list[str] = [self._words().decode(ids, skip_special_tokens=True) for ids in continued]
        return texts[0] if isinstance(prompt, str) else texts

    def chat(self, messages: list[dict[str, str]], sampling: Sampling | None = None) -> Iterator[str]:
        """The answer to a conversation `[{"role": ..., "content": ...}]` by the model's chat template, piece by piece."""
        text = self._words().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.stream(self.tokenizer(text, add_special_tokens=False)["input_ids"], sampling)

    def _quantize_head(self, head: Any) -> None:
        """To 4 bits. A few of its inputs are much larger than the others whatever the text: tokens from all over the vocabulary tell."""
        ops, size = torch.ops.bimos, self.config.vocab_size
        ids = torch.linspace(0, size - 1, min(64, self.config.max_position_embeddings)).long().tolist()
        importance = ops.engine_squares(self._id, ids) if len(ids) > 1 else None
        weight, scale = table_of(head, None)
        ops.engine_head(self._id, *native.quantize_int4(weight, scale if scale.numel() else None, importance))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._words()(text)["input_ids"]
        return ids

    def _words(self) -> Any:
        if self.tokenizer is None:
            raise BimosError("this engine has no tokenizer: give it one, or token ids to `tokens`")
        return self.tokenizer

    def _check(self, ids: Sequence[int], more: int = 0) -> None:
        """Raises BimosError: a token that is not in the vocabulary, or more tokens than the model has positions."""
        limit, size = self.config.max_position_embeddings, self.config.vocab_size
        for token in ids:
            if not 0 <= token < size:
                raise BimosError(f"token {token} is not in the model's vocabulary of {size}: use the model's own tokenizer")
        if len(ids) + more > limit:
            follow = f", and {more} are to follow" if more else ""
            raise BimosError(f"the prompt has {len(ids)} tokens{follow}: the model has {limit} positions")

    def _begin(self, prompt: list[int], opened: list[int]) -> None:
        """Add to `opened` a sequence that has read all of `prompt` but its last token."""
        ops, wanted = torch.ops.bimos, prompt[:-1]
        with self._choosing:
            shared = {sequence: _common(ops.engine_tokens(self._id, sequence), wanted) for sequence in (*self._kept, *opened)}
            best = max(shared, key=lambda sequence: shared[sequence], default=None)
            known = shared[best] if best is not None else 0
            # A text that goes on takes over what is kept of it; one that begins as others do (a system prompt) leaves it to them.
            if known and best in self._kept and known >= MOST * len(ops.engine_tokens(self._id, best)):
                self._kept.remove(best)
                sequence = best
            else:
                sequence = ops.engine_open(self._id)
            opened.append(sequence)  # before it reads: whoever interrupts that finds it there
            if known:
                ops.engine_keep(self._id, sequence, best, known)
        for start in range(known, len(wanted), PIECE):
            piece = wanted[start : start + PIECE]
            ops.engine_read(self._id, piece, [sequence] * len(piece), NO_LOGITS)

    def _keep(self, sequences: list[int]) -> None:
        """Of the last sequences as many as have no more tokens together than one alone may have, but always one."""
        ops, kept, left, room = torch.ops.bimos, list[int](), list[int](), self.config.max_position_embeddings
        with self._choosing:
            for sequence in reversed([*self._kept, *sequences]):
                room -= len(ops.engine_tokens(self._id, sequence))
                (kept if len(kept) < KEPT and (room >= 0 or not kept) else left).append(sequence)
            self._kept = kept[::-1]  # first: an interruption must not leave what is closed among them
            for sequence in left:
                ops.engine_close(self._id, sequence)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
