"""Sampling, streaming and conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bimos.errors import BimosError
from bimos.generation import Conversation, Sampling, continue_text
from bimos.models import load_model

GREEDY = Sampling(max_new_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def model(teacher_directory: Path) -> Any:
    return load_model(teacher_directory)


class Script:
    """A model that says what it is told to, and keeps what it was given."""

    def __init__(self, model: Any, tokenizer: Any, words: str) -> None:
        self.config, self.tokenizer, self.words = model.config, tokenizer, words
        self.embeddings, self.seen = model.get_input_embeddings(), []

    def get_input_embeddings(self) -> Any:
        return self.embeddings

    def generate(self, tokens: torch.Tensor, streamer: Any, **arguments: Any) -> None:
        self.seen.append(self.tokenizer.decode(tokens[0]))
        streamer.put(tokens)
        for token in self.tokenizer(self.words, add_special_tokens=False)["input_ids"]:
            streamer.put(torch.tensor([token]))
        streamer.end()


def test_streamed_pieces_are_the_text(model: Any, tokenizer: Any) -> None:
    pieces: list[str] = []
    text = continue_text(model, tokenizer, "The ferry", GREEDY, pieces.append)
    assert "".join(pieces) == text
    expected = model.generate(**tokenizer("The ferry", return_tensors="pt"), max_new_tokens=8, do_sample=False, repetition_penalty=1.1)
    assert text == tokenizer.decode(expected[0], skip_special_tokens=True).removeprefix("The ferry")


def test_conversation_goes_through_the_template_and_grows(model: Any, tokenizer: Any) -> None:
    script = Script(model, tokenizer, "It is wide.")
    conversation = Conversation(script, tokenizer, GREEDY)
    assert conversation.reply("The river?", lambda text: None) == "It is wide."
    conversation.reply("And the bridge?", lambda text: None)
    assert script.seen[0] == "<|user|>The river?</s><|assistant|>"
    assert script.seen[1] == "<|user|>The river?</s><|assistant|>It is wide.</s><|user|>And the bridge?</s><|assistant|>"
    conversation.reset()
    conversation.reply("Who?", lambda text: None)
    assert script.seen[2] == "<|user|>Who?</s><|assistant|>"


def test_without_a_template_the_text_is_continued(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    script = Script(model, tokenizer, " is wide.")
    conversation = Conversation(script, tokenizer, GREEDY)
    for message in ("The river", " The bridge"):
        conversation.reply(message, lambda text: None)
    assert script.seen == ["The river", "The river is wide. The bridge"]


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(model: Any, tokenizer: Any) -> None:
    script = Script(model, tokenizer, "In winter the wind comes from the north.")
    conversation = Conversation(script, tokenizer, GREEDY)
    for number in range(12):
        conversation.reply(f"Question {number}: what does the wind do in winter?", lambda text: None)
    assert "Question 0" not in script.seen[-1] and "Question 11" in script.seen[-1]
    assert all(
        len(tokenizer(seen, add_special_tokens=False)["input_ids"]) <= model.config.max_position_embeddings - 8 for seen in script.seen
    )


def test_a_message_longer_than_the_context_leaves_the_conversation_alone(model: Any, tokenizer: Any) -> None:
    conversation = Conversation(model, tokenizer, GREEDY)
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    conversation.turns += turns
    with pytest.raises(BimosError, match="has room for 248"):
        conversation.reply("wind and rain " * 200, lambda text: None)
    assert conversation.turns == turns


def test_an_interrupted_answer_stays_in_the_conversation(model: Any, tokenizer: Any) -> None:
    conversation = Conversation(Script(model, tokenizer, "one two three"), tokenizer, GREEDY)

    def stop(text: str) -> None:
        if "two" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.reply("Count!", stop)
    assert conversation.turns[-1] == {"role": "assistant", "content": "one two "}


def test_an_answer_that_cannot_be_leaves_the_conversation_alone(model: Any, tokenizer: Any) -> None:
    conversation = Conversation(Script(model, tokenizer, "one two three"), tokenizer, GREEDY)
    conversation.reply("Count!", lambda text: None)
    before = list(conversation.turns)

    def fail(text: str) -> None:
        raise BimosError("no numbers")

    with pytest.raises(BimosError, match="no numbers"):
        conversation.reply("Again!", fail)
    assert conversation.turns == before and len(before) == 2


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperature": -0.1}, "--temperature"),
        ({"temperature": 1e-4}, "--temperature"),
        ({"repetition_penalty": 1e-40}, "--repetition-penalty"),
        ({"top_p": 0}, "--top-p"),
        ({"top_p": 1.5}, "--top-p"),
        ({"repetition_penalty": 0}, "--repetition-penalty"),
    ],
)
def test_sampling_out_of_range(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(BimosError, match=name):
        Sampling(**changes)


@pytest.mark.parametrize(
    ("prompt", "count", "message"), [("wind " * 400, 8, "room for 248"), ("", 8, "empty"), ("wind", 256, "leaves no room")]
)
def test_prompts_that_do_not_fit(model: Any, tokenizer: Any, prompt: str, count: int, message: str) -> None:
    with pytest.raises(BimosError, match=message):
        continue_text(model, tokenizer, prompt, Sampling(max_new_tokens=count))
