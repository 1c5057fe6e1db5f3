"""Text from a model, a piece at a time: continuing a prompt, and conversations through the chat template.

A model is an `Engine` (`bimos.engine`), or anything that `transformers.generate` takes: packed, original or from a `.gguf` file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bimos.errors import BimosError

OnText = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Raises:
        BimosError: a value outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.7  # 0: always the likeliest token
    top_p: float = 0.9  # sampled from the likeliest tokens that together have this probability
    repetition_penalty: float = 1.1  # small models, binary or not, run in circles without
    top_k: int = 0  # sampled from so many of the likeliest tokens; 0: all
    seed: int | None = None  # of the engine's choices; transformers takes the process's (`transformers.set_seed`)
    min_p: float = 0.0  # sampled from tokens with at least this share of the likeliest one's probability

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise BimosError(f"--max-new-tokens {self.max_new_tokens}: must be at least 1")
        if not (self.temperature == 0 or self.temperature >= 1e-3):  # scores are divided by it
            raise BimosError(f"--temperature {self.temperature}: must be 0 (greedy), or 0.001 or more")
        if not 0 < self.top_p <= 1:
            raise BimosError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.top_k < 2**31:
            raise BimosError(f"--top-k {self.top_k}: must be 0 (all tokens) or more, and below 2**31")
        if not 0 <= self.min_p <= 1:
            raise BimosError(f"--min-p {self.min_p}: must be from 0 to 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise BimosError(f"--seed {self.seed}: must be from 0 to 2**63 - 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise BimosError(f"--repetition-penalty {self.repetition_penalty}: must be from 0.01 to 100; 1 is none")

    def arguments(self) -> dict[str, Any]:
        """For `transformers.generate`. `top_k=0`: its own default of 50 would act behind the user's back."""
        common = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        if self.temperature == 0:
            return common | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p or None}
        return common | {"do_sample": True} | chosen


def continue_text(model: Any, tokenizer: Any, prompt: str, sampling: Sampling, on_text: OnText | None = None) -> str:
    """What follows `prompt`, without the prompt. `on_text` gets it piece by piece as it comes.

    Raises:
        BimosError: the prompt has no tokens, or too many for the model; its scores are no numbers.
    """
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    room = _room(model, sampling)
    if tokens.shape[1] == 0:
        raise BimosError("the prompt is empty: give some text to continue")
    if room is not None and tokens.shape[1] > room:
        raise BimosError(
            f"the prompt has {tokens.shape[1]} tokens: with --max-new-tokens {sampling.max_new_tokens} the model has room for {room}"
        )
    return _generate(model, tokenizer, tokens, sampling, on_text or (lambda text: None))


class Conversation:
    """Turns of a user and a model. Without a chat template, one text that both add to.

    When the model's context is full, the oldest turns are forgotten.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.turns: list[dict[str, str]] = []

    def reset(self) -> None:
        self.turns.clear()

    def reply(self, message: str, on_text: OnText) -> str:
        """The model's answer to `message`, given to `on_text` piece by piece; both become part of the conversation.

        On KeyboardInterrupt, what was said so far stays in the conversation.

        Raises:
            BimosError: `message` alone is longer than the model's context, or scores are no numbers; the conversation is then as before.
        """
        before = list(self.turns)
        self.turns.append({"role": "user", "content": message})
        try:
            tokens = self._fitting()
        except BaseException:  # an interruption or a template's own error, too: no question stays without its answer
            self.turns[:] = before
            raise
        said: list[str] = []

        def keep(text: str) -> None:
            said.append(text)
            on_text(text)

        answer = {"role": "assistant", "content": ""}
        self.turns.append(answer)
        try:
            _generate(self.model, self.tokenizer, tokens, self.sampling, keep)
        except BimosError:
            self.turns[:] = before
            raise
        finally:
            answer["content"] = "".join(said)
        return answer["content"]

    def _fitting(self) -> Tensor:
        """The conversation as tokens `[1, T]` that leave room for an answer."""
        room = _room(self.model, self.sampling)
        while True:
            tokens = self._tokens()
            if room is None or tokens.shape[1] <= room:
                return tokens
            if len(self.turns) <= 1:
                raise BimosError(f"this message has {tokens.shape[1]} tokens; the model has room for {room}")
            del self.turns[:2]

    def _tokens(self) -> Tensor:
        if not self.has_template:
            return self.tokenizer("".join(turn["content"] for turn in self.turns), return_tensors="pt")["input_ids"]
        text = self.tokenizer.apply_chat_template(self.turns, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


class Streamer:
    """Hands text on as soon as it forms whole words. As `transformers.TextStreamer` cuts it, whose import takes seconds."""

    def __init__(self, tokenizer: Any, on_text: OnText) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] = []
        self._shown = 0
        self._begun = False

    def put(self, value: Tensor) -> None:
        """The prompt first, which is skipped; then tokens as they come."""
        if not self._begun:
            self._begun = True
            return
        self._ids += value.flatten().tolist()
        text = self._text()
        whole = text.endswith("\n") or (text and _is_word_by_itself(text[-1]))
        self._show(text[self._shown : None if whole else text.rfind(" ") + 1])
        if text.endswith("\n"):
            self._ids, self._shown = [], 0

    def end(self) -> None:
        self._show(self._text()[self._shown :])
        self._ids, self._shown = [], 0

    def _text(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True) if self._ids else ""
        return text

    def _show(self, text: str) -> None:
        self._shown += len(text)
        if text:
            self._on_text(text)


def _is_word_by_itself(character: str) -> bool:
    """Of the scripts without spaces: CJK ideographs."""
    blocks = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))
    return any(first <= ord(character) <= last for first, last in blocks)


def _room(model: Any, sampling: Sampling) -> int | None:
    """Tokens that a prompt may have; None where the model sets no limit. Raises BimosError where there is no room at all."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 1:
        return None
    if limit <= sampling.max_new_tokens:
        raise BimosError(f"--max-new-tokens {sampling.max_new_tokens} leaves no room for a prompt: the model's context is {limit} tokens")
    return limit - sampling.max_new_tokens


def _check_scores(tokens: Tensor, scores: Tensor) -> Tensor:
    """Raises BimosError where there is nothing to choose by; transformers would take the first token, or end in the generator's words."""
    if not scores.amax(-1).isfinite().all():  # NaN and infinity win; minus infinity is what other rules forbid with
        raise BimosError("the model's scores are NaN or infinite, there is nothing to choose by: fetch the model again")
    return scores


@torch.inference_mode()
def _generate(model: Any, tokenizer: Any, tokens: Tensor, sampling: Sampling, on_text: OnText) -> str:
    if hasattr(model, "stream"):  # an engine
        said: list[str] = []
        for piece in model.stream(tokens[0].tolist(), sampling):
            said.append(piece)
            on_text(piece)
        return "".join(said)
    tokens = tokens.to(model.get_input_embeddings().weight.device)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    pieces: list[str] = []

    def collect(text: str) -> None:
        pieces.append(text)
        on_text(text)

    arguments = sampling.arguments() | {"pad_token_id": padding, "attention_mask": torch.ones_like(tokens)}
    model.generate(tokens, streamer=Streamer(tokenizer, collect), logits_processor=[_check_scores], **arguments)
    return "".join(pieces)
