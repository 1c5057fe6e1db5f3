"""Scores on trees of requests against those of every request by itself, as lm_eval's own class finds them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bimos.evaluation.prefixes import Request, Scorer, plant
from tiny_models import CONFIGS

pytest.importorskip("lm_eval")

STEM, ENDS = [7, 3, 9, 4, 11, 60, 2, 8], [[5, 6, 7], [5, 9], [12], [5, 6, 8, 33, 21]]
REQUESTS = [
    *(Request(STEM + end[:-1], end) for end in ENDS),
    Request([90, 91, 92], [92, 17]),
    Request(STEM, [44]),
    Request([90, 91, 92, 17, 20, 21, 22, 23, 24, 25, 26, 27, 28], [29]),
]


def alone(model, requests):
    """Every answer from a forward pass of its own."""
    answers = []
    for request in requests:
        with torch.no_grad():
            found = model(input_ids=torch.tensor([request.tokens])).logits[0, -len(request.targets) :].float().log_softmax(-1)
        targets = torch.tensor(request.targets)
        answers.append((found.gather(1, targets.unsqueeze(1)).sum().item(), bool((found.argmax(-1) == targets).all())))
    return answers


def same(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("batch_tokens", [16, 1000])
def test_answers_are_those_of_every_request_by_itself(dense, kind, batch_tokens):
    model = strong(dense(kind))
    greedy = model(input_ids=torch.tensor([STEM])).logits[0, -1].argmax().item()
    requests = [*REQUESTS, Request(STEM, [greedy])]
    scorer, told = Scorer(model, batch_tokens), []
    assert scorer.covers(32)
    found = scorer(requests, told.append)
    same(found, alone(model, requests))
    assert found[-1][1] and sum(told) == len(requests)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12), st.integers(1, 40))
def test_paths_read_the_requests_and_nodes_are_attended_to_by_their_descendants(sequences, limit):
    trees = plant([Request(tokens, tokens[-1:]) for tokens in sequences], limit)
    seen = []
    for tree, members in trees:
        mask = tree.mask(len(tree.tokens) + 1)
        for path, index in zip(tree.paths, members, strict=True):
            assert [tree.tokens[node] for node in path] == sequences[index]
            assert [tree.positions[node] for node in path] == list(range(len(path)))
            for depth, node in enumerate(path):
                assert mask[node].nonzero().flatten().tolist() == sorted(path[: depth + 1])
        assert mask[-1].nonzero().tolist() == [[len(tree.tokens)]]  # padding
        assert len(tree.paths) == 1 or len(tree.tokens) <= limit
        seen += members
    assert sorted(seen) == list(range(len(sequences)))
    assert [len(tree.tokens) for tree, _ in trees] == sorted((len(tree.tokens) for tree, _ in trees), reverse=True)


def test_what_is_shared_is_read_once():
    trees = [tree for tree, _ in plant(REQUESTS, 100)]
    assert [(len(tree.tokens), len(tree.paths)) for tree in trees] == [(13, 1), (len(STEM) + 4, 5), (3, 1)]


def test_a_model_that_ignores_masks_or_positions_is_not_covered(make_model):
    class Plain(nn.Module):
        """Causal, whatever it is given besides."""

        def __init__(self, model):
            super().__init__()
            self.model, self.config, self.device, self.dtype = model, model.config, model.device, model.dtype

        def get_output_embeddings(self):
            return None

        def forward(self, input_ids, **given):
            kept = {name: given[name] for name in self.kept if name in given}
            return self.model(input_ids=input_ids, **kept)

    model = Plain(make_model())
    for kept, covered in ((("attention_mask", "position_ids"), True), (("attention_mask",), False), (("position_ids",), False)):
        model.kept = kept
        assert Scorer(model, 100).covers(10) is covered


def test_a_window_of_attention_is_not_covered_where_requests_are_longer(make_model):
    scorer = Scorer(make_model("gemma2"), 100)
    assert scorer.head is None  # logits are soft-capped
    assert scorer.covers(64) and not scorer.covers(65)
    same(scorer(REQUESTS), alone(scorer.model, REQUESTS))


@pytest.mark.parametrize("window", [4, None])
def test_the_harness_gives_the_answers_of_its_parent(make_model, tokenizer, window, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    from bimos.evaluation.harness import Harness

    model = make_model()
    if window is not None:
        monkeypatch.setattr(model.config, "sliding_window", window, raising=False)
    harness = Harness(model, tokenizer, 100, None)
    monkeypatch.setattr(type(harness), "max_length", 9)  # the longest are cut on the left
    requests = [(("a", "b"), request.tokens[: len(request.tokens) + 1 - len(request.targets)], request.targets) for request in REQUESTS]
    found = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = HFLM._loglikelihood_tokens(harness, requests, disable_tqdm=True)
    same(found, expected)


def strong(model):
    """Weights large enough for attention to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model.eval()
