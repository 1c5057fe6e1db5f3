"""`--data self`: training text sampled from the teacher, as in LLM-QAT (arXiv 2305.17888, section 3.1).

A sample opens with BOS (where the tokenizer uses one) and a random token, goes on greedily for three to five tokens, then is
drawn from the teacher's full distribution at temperature 1. After an end of text it opens again, without sight of what came
before, so every sample fills its sequence and nothing is padded.

A teacher with a chat template gives every other sample as a chat: the template opens the user's turn, the teacher writes it;
when the teacher ends it the template opens the answer; after the answer the next chat begins. Nothing is greedy there, since
all chats open alike.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bimos.errors import BimosError
from bimos.training.tokencache import Cursor, digest, random_generator

KEY_VALUE_BYTES = 2**30  # of the generation's cache, which limits the batch
MAX_BATCH = 32
GREEDY_TOKENS = (3, 5)


class SelfSamples:
    """The token producer of `self`: samples of `sequence_length` tokens, a batch at a time.

    Args:
        teacher: the model to sample from, wherever it is.
        tokenizer: its tokenizer.
        sequence_length: tokens of a sample.
        seed: of the sampling. On another kind of device the same seed may give other text, since logits round differently.
        vocabulary: only tokens below it are sampled (models pad their vocabulary).

    Raises:
        BimosError: the teacher cannot see that many tokens.
    """

    def __init__(
        self, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequence_length: int, seed: int, vocabulary: int
    ) -> None:
        config = teacher.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and sequence_length > longest:
            raise BimosError(f"data 'self': the teacher sees only {longest} tokens; set sequence_length={sequence_length} to that or less")
        self.teacher = teacher
        self.sequence_length = sequence_length
        self.seed = seed
        self.vocabulary = min(vocabulary, config.vocab_size)
        self.batch = _batch_size(config, sequence_length)
        self.ends = _end_tokens(teacher, tokenizer)
        bos = tokenizer.bos_token_id
        self.bos = [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []
        special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
        self.ordinary = [token for token in range(self.vocabulary) if token not in special]
        self.chat = chat_turns(tokenizer, self.ends)
        self.identity = {
            "source": "self",
            "teacher": teacher_digest(teacher),
            "sequence_length": sequence_length,
            "seed": seed,
            "batch": self.batch,
            "vocabulary": digest([self.vocabulary, self.bos, self.ordinary]),
            "ends": sorted(self.ends),
            "chat": self.chat,
        }

    def produce(self, cursor: Cursor) -> tuple[np.ndarray, Cursor]:
        """One batch of samples, flattened: int64 `[batch * sequence_length]`."""
        batch = cursor.get("batch", 0)
        scripts = []
        for row in range(batch * self.batch, (batch + 1) * self.batch):
            rng = random_generator(self.seed, "self", row)
            scripts.append(_Script(self.chat if row % 2 else None, self.bos, self.ordinary, self.ends, rng))
        return self._sample(scripts, batch).flatten().numpy(), {"batch": batch + 1}

    @torch.no_grad()
    def _sample(self, scripts: list[_Script], batch: int) -> torch.Tensor:
        device = self.teacher.device
        generator = torch.Generator(device)
        generator.manual_seed(int(random_generator(self.seed, "self batch", batch).integers(2**63)))
        tokens = torch.empty(len(scripts), self.sequence_length, dtype=torch.long)
        tokens[:, 0] = torch.tensor([script.take(0, 0) for script in scripts])  # every script begins with forced tokens
        training, cache = self.teacher.training, None
        self.teacher.eval()
        try:
            for position in range(1, self.sequence_length):
                starts = torch.tensor([[script.start] for script in scripts], device=device)
                seen = (torch.arange(position, device=device) >= starts).long()
                inputs = tokens[:, position - 1 : position].to(device)
                output = self.teacher(inputs, attention_mask=seen, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits = output.logits[:, -1, : self.vocabulary].float()
                sampled, likeliest = _draw(logits, generator).tolist(), logits.argmax(-1).tolist()
                taken = [script.take(*said) for script, *said in zip(scripts, sampled, likeliest, strict=True)]
                tokens[:, position] = torch.tensor(taken)
        finally:
            self.teacher.train(training)
        return tokens


class _Script:
    """Decides each token of one sample: forced, the likeliest, or the sampled one."""

    def __init__(self, chat: list[list[int]] | None, bos: list[int], ordinary: list[int], ends: set[int], rng: np.random.Generator) -> None:
        self.chat = chat
        self.turns = itertools.chain(chat[:1], itertools.cycle(chat[1:])) if chat else iter(())
        self.bos = bos
        self.ordinary = ordinary
        self.ends = ends
        self.rng = rng
        self.taken = 0
        self.start = 0  # of the text that the next token belongs to
        self.greedy = 0
        self.forced: deque[int] = deque()
        self._open()

    def _open(self) -> None:
        if self.chat:
            turn = next(self.turns)
            if turn is self.chat[-1]:
                self.start = self.taken
            self.forced.extend(turn)
        else:
            self.start = self.taken
            self.forced.extend([*self.bos, self.ordinary[int(self.rng.integers(len(self.ordinary)))]])
            self.greedy = int(self.rng.integers(GREEDY_TOKENS[0], GREEDY_TOKENS[1] + 1))

    def take(self, sampled: int, likeliest: int) -> int:
        """The next token, given what the teacher would say."""
        self.taken += 1
        if self.forced:
            return self.forced.popleft()
        token = likeliest if self.greedy else sampled
        self.greedy = max(0, self.greedy - 1)
        if token in self.ends:
            self.greedy = 0
            self._open()
        return token


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token of each row, drawn by softmax: `[batch, vocabulary]` to `[batch]`.

    By inverting the distribution function: `multinomial` draws a random number for every entry of the vocabulary, which takes a
    quarter of a small teacher's time.
    """
    distribution = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    level = torch.rand(len(logits), 1, generator=generator, device=logits.device, dtype=torch.float64) * distribution[:, -1:]
    return torch.searchsorted(distribution, level, right=True).flatten().clamp(max=logits.shape[1] - 1)


def chat_turns(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> list[list[int]] | None:
    """The tokens that a template puts around a chat, or None without a (usable) template.

    Returns:
        First what opens the first user's turn; then, in turn, what follows each end token that the teacher says. Where the template
        closes the user's turn with an end token that is what opens the answer, and then what opens the next chat;
        elsewhere (`[/INST]`) the teacher itself goes on to the answer, and only the next chat follows.
    """
    if tokenizer.chat_template is None:
        return None
    user, answer = "USERTEXT", "ANSWERTEXT"
    try:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": user}, {"role": "assistant", "content": answer}], tokenize=False)
    except Exception:  # templates raise what they like; without a usable one samples are plain
        return None
    opening, _, rest = str(chat).partition(user)
    middle, _, closing = rest.partition(answer)
    first, between, last = (tokenizer(text, add_special_tokens=False).input_ids if text else [] for text in (opening, middle, closing))
    if not first:
        return None
    again = (last[1:] if last[:1] and last[0] in ends else []) + first
    return [first, between[1:], again] if between[:1] and between[0] in ends else [first, again]


def teacher_digest(teacher: PreTrainedModel) -> str:
    """Stands for the teacher's weights: 64 values of every parameter, in their dtype's precision."""
    sha = hashlib.sha256()
    for name, parameter in teacher.named_parameters():
        values = parameter.detach().flatten()
        sha.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        sha.update(values[:: max(1, values.numel() // 64)].float().cpu().numpy().tobytes())
    return sha.hexdigest()[:20]


def _end_tokens(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends = {tokenizer.eos_token_id}
    if teacher.generation_config is not None:
        configured: Any = teacher.generation_config.eos_token_id
        ends.update(configured if isinstance(configured, list) else [configured])
    return {end for end in ends if end is not None}


def _batch_size(config: Any, sequence_length: int) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_sequence = 2 * config.num_hidden_layers * heads * width * 2 * sequence_length
    return max(1, min(MAX_BATCH, KEY_VALUE_BYTES // per_sequence))
