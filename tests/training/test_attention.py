"""Attention of training against its equation in float64, and in models against `sdpa`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bimos.kernels import native
from bimos.training import attention
from bimos.training.attention import attend, fast_attention

ERRORS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # its gradients see the rounded result

pytestmark = pytest.mark.skipif(native.isa() is None, reason="the kernels are not built")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attention_pays", lambda dtype: True)


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    shared = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(shared, 1).transpose(2, 3) * scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value.repeat_interleave(shared, 1)).transpose(1, 2)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected).norm() <= ERRORS[actual.dtype] * expected.norm()


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "tokens", "n"),
    [(1, 1, 1, 1, 8), (2, 4, 2, 3, 16), (1, 9, 3, 65, 64), (3, 2, 2, 64, 20), (1, 6, 1, 130, 80), (2, 3, 3, 200, 128)],
)
def test_values_and_gradients(level: str, batch: int, heads: int, key_heads: int, tokens: int, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    # As models have them: queries and keys in order of heads, values a view of [B, T, heads, n].
    query = torch.randn(batch, heads, tokens, n).to(dtype).requires_grad_()
    key = (torch.randn(batch, key_heads, tokens, n) * 3).to(dtype).requires_grad_()
    value = torch.randn(batch, tokens, key_heads, n).to(dtype).requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (query, key, value)]
    slope = torch.randn(batch, tokens, heads, n).to(dtype)
    expected = exact(wide[0], wide[1], wide[2].transpose(1, 2), 0.3)
    expected.backward(slope.double())

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        out = attend(query, key, value.transpose(1, 2), 0.3)
        out.backward(slope)
    finally:
        torch.set_num_threads(threads)
    assert out.dtype == dtype
    assert_near(out, expected)
    for leaf, wanted in zip((query, key, value), wide, strict=True):
        assert leaf.grad is not None and wanted.grad is not None and leaf.grad.dtype == dtype
        if tokens == 1 and leaf is not value:
            assert wanted.grad.abs().max() < 1e-12 and leaf.grad.abs().max() < 1e-2 * slope.abs().max()  # one key: its share is 1
        else:
            assert_near(leaf.grad, wanted.grad)


def test_scores_of_any_size(level: str) -> None:
    query, key, value = (torch.randn(1, 2, 70, 32) for _ in range(3))
    assert_near(attend(query * 300, key, value, 1.0), exact(query.double() * 300, key.double(), value.double(), 1.0))


def test_nan_comes_out_where_it_is_seen(level: str) -> None:
    query, key, value = (torch.randn(1, 1, 100, 16) for _ in range(3))
    key[0, 0, 80, 3] = torch.nan
    out = attend(query, key, value, 1.0)
    assert out[0, :80].isfinite().all() and out[0, 80:].isnan().all()


def test_shapes_that_do_not_fit_are_refused(level: str) -> None:
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 3, 5, 8)
    with pytest.raises(RuntimeError, match="4 heads share 3"):
        attend(query, key, key, 1.0)
    with pytest.raises(RuntimeError, match="do not fit"):
        attend(query, query, query[:, :, :4], 1.0)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        attend(query.double(), query.double(), query.double(), 1.0)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "opt", "gpt_neox", "phi"])
def test_models_answer_as_with_sdpa(everywhere: None, dense: Callable[..., PreTrainedModel], kind: str) -> None:
    model = dense(kind)
    model.set_attn_implementation("sdpa")
    ids = torch.randint(3, 101, (2, 60), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(ids)
    padding[0, :9] = 0
    for mask in (None, padding):  # the second goes to sdpa
        answers, slopes = [], []
        for models in ((), (model,)):
            model.zero_grad()
            with fast_attention(*models):
                logits = model(input_ids=ids, attention_mask=mask).logits
                logits.float().square().mean().backward()
            answers.append(logits.detach())
            slopes.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        torch.testing.assert_close(answers[1][1], answers[0][1], rtol=1e-4, atol=1e-4)
        assert (slopes[1] - slopes[0]).norm() < 1e-3 * slopes[0].norm()
    assert model.config._attn_implementation == "sdpa"


def test_a_window_goes_to_sdpa(everywhere: None, dense: Callable[..., PreTrainedModel], calls: list[Tensor]) -> None:
    model = dense("mistral", sliding_window=8)
    model.set_attn_implementation("sdpa")
    ids = torch.randint(3, 101, (1, 30), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids).logits
    with fast_attention(model):
        assert torch.equal(model(input_ids=ids).logits, expected) and not calls


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    seen: list[Tensor] = []

    def attending(query: Tensor, *others: Any) -> Tensor:
        seen.append(query)
        return attend(query, *others)

    monkeypatch.setattr(attention, "attend", attending)
    return seen


def test_it_ends_with_the_block(everywhere: None, dense: Callable[..., PreTrainedModel], calls: list[Tensor]) -> None:
    model, ids = dense("llama"), torch.zeros(1, 5, dtype=torch.long)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ZeroDivisionError), fast_attention(model):
        model(input_ids=ids)
        raise ZeroDivisionError
    assert len(calls) == model.config.num_hidden_layers
    model(input_ids=ids)
    assert len(calls) == model.config.num_hidden_layers and model.config._attn_implementation == "sdpa"


def test_other_ways_to_attend_are_left_alone(everywhere: None, dense: Callable[..., PreTrainedModel]) -> None:
    model = dense("llama")
    model.set_attn_implementation("eager")
    with fast_attention(model):
        assert model.config._attn_implementation == "eager"
