"""What the engine keeps of texts that it has read: taken over, copied, bounded, given back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bimos.engine import Engine
from bimos.kernels import native
from test_engine import GREEDY, Packed, text

pytestmark = pytest.mark.skipif(native.isa() is None, reason=f"no C++ kernels: {native.problem}")


@pytest.mark.parametrize("bits", [16, 8])
def test_prompts_side_by_side_and_beginnings_that_are_shared(bits: int, packed: Packed) -> None:
    model = packed("llama", num_hidden_layers=3, max_position_embeddings=512)
    long, other = text(40), text(9, 1)
    prompts = [long, long[:30] + other, other, long[:30] + other]
    alone = [[step[0] for step in Engine(model, threads=1, cache_bits=bits).tokens([prompt], GREEDY, stop=False)] for prompt in prompts]
    engine = Engine(model, threads=2, cache_bits=bits)
    for _ in range(3):  # the second time from what is kept
        together = list(engine.tokens(prompts, GREEDY, stop=False))
        assert [[step[i] for step in together] for i in range(4)] == alone
    assert len(engine._kept) == 4


def test_what_is_shared_is_not_read_again(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(packed("llama"), threads=1)
    read: list[int] = []
    original = torch.ops.bimos.engine_read
    monkeypatch.setattr(torch.ops.bimos, "engine_read", lambda e, ids, *rest: (read.append(len(ids)), original(e, ids, *rest))[1])
    list(engine.tokens([text(40)], GREEDY, stop=False))
    list(engine.tokens([[*text(40)[:35], 7, 8]], GREEDY, stop=False))
    assert read == [39, 1]


def test_a_text_that_begins_alike_does_not_take_over_what_is_kept_of_another(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(packed("llama", max_position_embeddings=256), threads=1)
    read: list[int] = []
    original = torch.ops.bimos.engine_read
    monkeypatch.setattr(torch.ops.bimos, "engine_read", lambda e, ids, *rest: (read.append(len(ids)), original(e, ids, *rest))[1])
    few = dataclasses.replace(GREEDY, max_new_tokens=2)
    first, second = text(40), [text(40)[0], *text(30, 1)]
    for prompt in (first, second, [*first, 7], [*second, 7]):
        list(engine.tokens([prompt], few, stop=False))
    assert read == [39, 29]  # the last token of a prompt is read by the step behind it, and kept like the others
    assert len(engine._kept) == 2
    read.clear()
    shared = text(50, 2)  # most of both, a system prompt say
    for turn in range(3):
        for seed in (3, 4):
            list(engine.tokens([[*shared, *text(20, seed), *([7] * turn)]], few, stop=False))
    assert read == [69, 19]


def test_what_is_kept_is_bounded(packed: Packed) -> None:
    """By the tokens of one sequence of full length."""
    engine = Engine(packed("llama"), threads=1)  # of 64 positions
    list(engine.tokens([text(40, seed) for seed in range(4)], dataclasses.replace(GREEDY, max_new_tokens=2), stop=False))
    assert len(engine._kept) == 1
    list(engine.tokens([text(10, seed) for seed in range(4)], dataclasses.replace(GREEDY, max_new_tokens=2), stop=False))
    assert len(engine._kept) == 4


def test_an_error_gives_memory_back_and_an_interruption_keeps(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(packed("llama"), threads=1)
    opened: list[int] = []
    original = torch.ops.bimos.engine_open
    monkeypatch.setattr(torch.ops.bimos, "engine_open", lambda engine: (opened.append(original(engine)), opened[-1])[1])
    for error, kept in ((RuntimeError, 0), (KeyboardInterrupt, 1)):

        def fail(*_: Any, error: type[BaseException] = error) -> None:
            raise error

        with monkeypatch.context() as patched, pytest.raises(error):
            patched.setattr(torch.ops.bimos, "engine_next", fail)
            list(engine.tokens([text(10)], GREEDY))
        assert len(engine._kept) == kept
        if not kept:
            with pytest.raises(RuntimeError, match="no sequence"):
                torch.ops.bimos.engine_tokens(engine._id, opened[-1])
