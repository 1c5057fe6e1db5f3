"""Answers on trees of requests against those of every request by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bimos.evaluation.likelihoods import Scorer
from bimos.evaluation.prefixes import Scored
from tiny_models import CONFIGS

pytest.importorskip("lm_eval")

STEM, ENDS = [7, 3, 9, 4, 11, 60, 2, 8], [[5, 6, 7], [5, 9], [12], [5, 6, 8, 33, 21]]
REQUESTS = [
    *(Scored(STEM + end[:-1], end) for end in ENDS),
    Scored([*STEM, 30, 31], [30, 31, 9]),
    Scored([90, 91, 92], [92, 17]),
    Scored(STEM, [44]),
    Scored([90, 91, 92, 17, 20, 21, 22, 23, 24, 25, 26, 27, 28], [29]),
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


def same(found, expected, rel=1e-4):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=rel)


def strong(model):
    """Weights large enough for attention to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model.eval()


@pytest.fixture
def masks():
    """Passes with a mask, of models that are watched."""
    seen = []

    def watch(model):
        model.base_model.register_forward_pre_hook(
            lambda _, __, given: seen.append(given.get("attention_mask") is not None), with_kwargs=True
        )
        return seen

    return watch


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("batch_tokens", [16, 1000])
def test_answers_are_those_of_every_request_by_itself(dense, masks, kind, batch_tokens):
    model = strong(dense(kind))
    greedy = model(input_ids=torch.tensor([STEM])).logits[0, -1].argmax().item()
    requests = [*REQUESTS, Scored(STEM, [greedy])]
    scorer, told, masked = Scorer(model, batch_tokens), [], masks(model)
    found = scorer(requests, told.append)
    assert sum(masked) > 1  # the tree was tried, and used
    same(found, alone(model, requests))
    assert found[-1][1] and sum(told) == len(requests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_models_read_trees_in_every_dtype(packed, masks, dtype):
    model = packed("llama", dtype=dtype)
    scorer, masked = Scorer(model, 100), masks(model)
    found = scorer(REQUESTS)
    assert sum(masked) > 1
    wanted = alone(model, REQUESTS)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], rel=1e-4 if dtype == torch.float32 else 2e-2)


def test_two_lanes_answer_in_order(dense):
    torch.set_num_threads(2)  # the next test has one again
    model = strong(dense("llama"))
    same(Scorer(model, 16)(REQUESTS), alone(model, REQUESTS))


class Plain(nn.Module):
    """Causal, and of what it is given besides takes the names in `kept`."""

    def __init__(self, model, kept):
        super().__init__()
        self.model, self.kept, self.config, self.device, self.dtype = model, kept, model.config, model.device, model.dtype

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, use_cache=False, **given):
        if "refuses" in self.kept and given:
            raise AttributeError("no masks here")
        return self.model(input_ids=input_ids, **{name: given[name] for name in self.kept if name in given})


@pytest.mark.parametrize("kept", [("attention_mask", "position_ids"), ("attention_mask",), ("position_ids",), (), ("refuses",)])
def test_a_model_that_ignores_masks_or_positions_gets_chains(make_model, monkeypatch, kept):
    model, found = Plain(make_model(), kept), []
    reads = Scorer.reads
    monkeypatch.setattr(Scorer, "reads", lambda self, tree: found.append(reads(self, tree)) or found[-1])
    same(Scorer(model, 100)(REQUESTS), alone(model, REQUESTS))
    assert found == [len(kept) == 2]


@pytest.mark.parametrize("window", [14, 4])
def test_no_tree_is_larger_than_a_window_of_attention(make_model, masks, window):
    model = make_model("gemma2", sliding_window=window)
    scorer, masked = Scorer(model, 100), masks(model)
    assert scorer.head is None  # logits are soft-capped
    same(scorer(REQUESTS), alone(model, REQUESTS))
    assert any(masked) == (window == 14)  # as many nodes as the largest tree has


def test_flash_attention_gets_no_masks(make_model, monkeypatch):
    model = make_model()
    assert Scorer(model, 100).limit == 100
    monkeypatch.setattr("bimos.evaluation.likelihoods.plain_head", lambda *_: None)  # which would ask for a library that is not there
    monkeypatch.setattr(type(model.config), "_attn_implementation", "flash_attention_2")
    assert Scorer(model, 100).limit == 0


def test_the_harness_gives_the_answers_of_its_parent(make_model, tokenizer, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    from bimos.evaluation.harness import Harness

    harness, kept = Harness(make_model(), tokenizer, 100, None), []
    monkeypatch.setattr(type(harness), "max_length", 9)  # the longest are cut on the left
    monkeypatch.setattr(harness.cache_hook, "add_partial", lambda *entry: kept.append(entry))
    requests = [
        (("context", str(number)), request.tokens[: len(request.tokens) + 1 - len(request.targets)], request.targets)
        for number, request in enumerate(REQUESTS)
    ]
    found = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    assert kept == [("loglikelihood", text, answer) for (text, _, _), answer in zip(requests, found, strict=True)]
    same(found, HFLM._loglikelihood_tokens(harness, requests, disable_tqdm=True))
    harness._loglikelihood_tokens([(None, *requests[0][1:])], disable_tqdm=True)
    assert len(kept) == 2 * len(requests)  # the parent's, and none of a rolling window
