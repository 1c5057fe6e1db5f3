"""Perplexity against a few independent lines, and the protocol's corners."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from bimos.errors import BimosError
from bimos.evaluation import perplexity as module
from bimos.evaluation.perplexity import Perplexity, cut_windows, perplexity, plain_head
from bimos.evaluation.texts import EvaluationText

TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 12


def window_losses(model, tokenizer, context, text=TEXT):
    """transformers' own loss of every whole window: an independent path through labels and the model's own logits."""
    tokens = tokenizer(text, return_tensors="pt").input_ids
    starts = range(0, tokens.shape[1] - context + 1, context)
    with torch.no_grad():
        return [model(tokens[:, start : start + context], labels=tokens[:, start : start + context]).loss.item() for start in starts]


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_agrees_with_the_models_own_loss(make_model, tokenizer, architecture, batch_size, monkeypatch):
    monkeypatch.setattr(module, "LOGIT_ELEMENTS", 7 * 260)  # chunks of 7 rows: 99 predictions do not divide evenly
    model = make_model(architecture)
    losses = window_losses(model, tokenizer, 100)
    result = perplexity(model, tokenizer, EvaluationText("t", "a text", TEXT), context=100, batch_size=batch_size)
    value = math.exp(statistics.fmean(losses))
    assert result.value == pytest.approx(value, rel=1e-5)
    assert result.stderr == pytest.approx(value * statistics.stdev(losses) / math.sqrt(len(losses)), rel=1e-3)
    said = result.to_dict()
    assert said.pop("losses") == pytest.approx(losses, rel=1e-5)
    assert said == {"value": result.value, "stderr": result.stderr, "windows": len(losses), "context": 100, "text": "a text"}
    assert len(losses) == 10


def test_bfloat16_model_keeps_its_precision_and_losses_are_float32(make_model, tokenizer):
    model = make_model().to(torch.bfloat16)
    losses = []
    for start in range(0, 900, 100):
        window = tokenizer(TEXT, return_tensors="pt").input_ids[:, start : start + 100]
        with torch.no_grad():
            logits = model(window).logits
        assert logits.dtype == torch.bfloat16
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1].double(), window[0, 1:]).item())
    result = perplexity(model, tokenizer, TEXT, context=100, windows=9)
    assert result.value == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-4)
    assert next(model.parameters()).dtype == torch.bfloat16


def test_head_is_applied_in_chunks_only_where_it_makes_the_logits(make_model, tokenizer, monkeypatch):
    tokens = torch.arange(1, 40)[None]
    llama, gemma = make_model(), make_model("gemma2")
    assert plain_head(llama, tokens) is llama.lm_head
    assert plain_head(gemma, tokens) is None

    monkeypatch.setattr(module, "LOGIT_ELEMENTS", 10 * 260)
    rows = []
    llama.lm_head.register_forward_hook(lambda _, inputs, output: rows.append(output.shape[:-1].numel()))
    perplexity(llama, tokenizer, TEXT, context=200, windows=2)
    # after the probe, which is short, no call sees more than a chunk, and each prediction is made once
    assert rows[:2] == [module.PROBE_TOKENS] * 2
    assert max(rows[2:]) == 10 and sum(rows[2:]) == 2 * 199


def test_windows_limit_takes_the_first(make_model, tokenizer):
    model = make_model()
    losses = window_losses(model, tokenizer, 100)
    result = perplexity(model, tokenizer, TEXT, context=100, windows=2)
    assert result.windows == 2
    assert result.value == pytest.approx(math.exp(statistics.fmean(losses[:2])), rel=1e-5)
    assert result.value != pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-4)


def test_context_of_a_shorter_model_is_its_maximum(make_model, tokenizer):
    result = perplexity(make_model(max_position_embeddings=64), tokenizer, TEXT)
    assert result.context == 64 and "64" in result.note
    assert result.to_dict()["note"] == result.note


def test_short_text_is_one_short_window_and_says_so(make_model, tokenizer):
    model = make_model()
    result = perplexity(model, tokenizer, "hello world")
    assert (result.windows, result.context, result.stderr) == (1, 11, None)
    assert "11 tokens" in result.note
    assert result.value == pytest.approx(math.exp(window_losses(model, tokenizer, 11, "hello world")[0]), rel=1e-5)


@pytest.mark.parametrize("text", ["", "x"])
def test_too_short_a_text_is_refused(make_model, tokenizer, text):
    with pytest.raises(BimosError, match="at least 2"):
        perplexity(make_model(), tokenizer, text)


@pytest.mark.parametrize("options", [{"context": 1}, {"windows": 0}, {"batch_size": 0}])
def test_numbers_that_measure_nothing_are_refused(make_model, tokenizer, options):
    with pytest.raises(BimosError, match=next(iter(options))):
        perplexity(make_model(), tokenizer, TEXT, **options)


def test_max_tokens_of_the_text_counts(tokenizer):
    assert cut_windows(tokenizer, EvaluationText("t", "t", TEXT, max_tokens=250), 100).shape == (2, 100)


def test_progress_ends_at_the_result_and_the_mode_is_kept(make_model, tokenizer, threads):
    model = make_model().train()
    seen = []
    result = perplexity(model, tokenizer, TEXT, context=100, windows=5, batch_size=2, progress=lambda *state: seen.append(state))
    assert [(done, total) for done, total, _ in seen] == ([(2, 5), (4, 5), (5, 5)] if threads == 1 else [(4, 5), (5, 5)])
    assert seen[-1][2] == pytest.approx(result.value)
    assert model.training


def test_a_broken_model_gives_infinity_not_an_overflow(make_model, tokenizer):
    model = make_model()
    model.lm_head.weight.data.mul_(1e6)
    assert perplexity(model, tokenizer, TEXT, context=100).value == math.inf
    assert isinstance(Perplexity(1.0, None, 1, 2, "t").to_dict(), dict)


def test_two_lanes_measure_the_same(make_model, tokenizer):
    model, found = make_model(), []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append(perplexity(model, tokenizer, TEXT, context=100, windows=7))
    torch.set_num_threads(1)
    assert found[1].value == pytest.approx(found[0].value, rel=1e-6) and found[1].stderr == pytest.approx(found[0].stderr, rel=1e-4)
