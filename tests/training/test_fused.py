"""Norms and gates of training against their equations in float64, and in models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from bimos.kernels import native
from bimos.methods.mixing import mix
from bimos.training.attention import attend
from bimos.training.fused import PREFIX, fused, gated_silu, rms_norm

ERRORS = {torch.float32: 1e-6, torch.bfloat16: 5e-3}

pytestmark = pytest.mark.skipif(native.isa() is None, reason="the kernels are not built")


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 40), (300, 576), (2, 3, 130, 24)], ids=str)
def test_values_and_gradients(level: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(shape[-1])
    x = (torch.randn(shape) * 3).to(dtype).requires_grad_()
    weight, slope = (torch.randn(shape[-1]) + 1).requires_grad_(), torch.randn(shape).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = exact(*wide)
    expected.backward(slope.double())
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        y = rms_norm(x, weight, 1e-5)
        y.backward(slope)
    finally:
        torch.set_num_threads(threads)
    assert y.dtype == dtype and x.grad is not None and weight.grad is not None
    for actual, wanted in ((y, expected), (x.grad, wide[0].grad), (weight.grad, wide[1].grad)):
        assert wanted is not None
        # One value alone is always 1: its gradient is what epsilon leaves of it.
        assert (actual.double() - wanted).norm() <= ERRORS[actual.dtype] * wanted.norm() + (1e-6 if shape[-1] == 1 else 0)


def test_rows_that_are_not_contiguous(level: str) -> None:
    x, weight = torch.randn(8, 6, 24).transpose(0, 1), torch.rand(24)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), exact(x, weight))


def test_nan_stays_in_its_row(level: str) -> None:
    x = torch.randn(4, 40)
    x[2, 3] = torch.nan
    y = rms_norm(x, torch.ones(40), 1e-5)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 7, 40), (300, 576)], ids=str)
def test_gates_and_gradients(level: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(shape[-1])
    gate, up, slope = ((torch.randn(shape) * 4).to(dtype) for _ in range(3))
    gate.view(-1)[0] = 200  # where an exponential would overflow
    gate.view(-1)[-1] = -200
    wide = [t.double().requires_grad_() for t in (gate, up)]
    expected = F.silu(wide[0]) * wide[1]
    expected.backward(slope.double())
    leaves = gate.requires_grad_(), up.requires_grad_()
    y = gated_silu(*leaves)
    y.backward(slope)
    assert y.dtype == dtype
    for actual, wanted in ((y, expected), (gate.grad, wide[0].grad), (up.grad, wide[1].grad)):
        assert actual is not None and wanted is not None and actual.shape == wanted.shape
        assert (actual.double() - wanted).norm() <= ERRORS[dtype] * wanted.norm() + 1e-30


def test_gates_of_another_shape_are_refused(level: str) -> None:
    with pytest.raises(RuntimeError, match="shapes differ"):
        gated_silu(torch.ones(2, 8), torch.ones(4, 4))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "opt", "gpt_neox", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_answer_as_before(dense: Callable[..., PreTrainedModel], kind: str, dtype: torch.dtype) -> None:
    model = dense(kind).to(dtype)
    ids = torch.randint(3, 101, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids).logits
    classes = [type(module) for module in model.modules()]
    with fused(model):
        names = {type(module).__name__.removeprefix(PREFIX) for module in model.modules() if type(module).__name__.startswith(PREFIX)}
        assert len(names) == (2 if kind in ("llama", "mistral", "qwen2", "qwen3") else 0)
        inside = [type(module) for module in model.modules()]
        with fused(model):  # within itself, as blocks within a run
            actual = model(input_ids=ids).logits
        assert [type(module) for module in model.modules()] == inside
    assert [type(module) for module in model.modules()] == classes
    error = 1e-4 if dtype == torch.float32 else 3e-2
    assert (actual - expected).norm() < error * expected.norm()


def test_modules_of_another_kind_are_left_alone() -> None:
    class Centred(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(-1, keepdim=True))

    class Twice(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    class ByTokens(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, _ = x.shape  # a ValueError where there are fewer
            return super().forward(x.view(batch * tokens, -1)).view(batch, tokens, -1)

    class Halved(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[..., ::2]

    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)
    others = Centred(16), nn.LayerNorm(16, bias=False), Twice(config), ByTokens(config), Halved(16)
    model = nn.Sequential(*others, LlamaRMSNorm(16), LlamaMLP(config))
    before = [type(module) for module in model]
    with fused(model):
        assert [type(module) is kind for module, kind in zip(model, before, strict=True)] == [True] * len(others) + [False, False]
    assert [type(module) for module in model] == before


@pytest.mark.parametrize(
    "function",
    [
        lambda x: rms_norm(x, torch.ones(16), 1e-5),
        lambda x: gated_silu(x, x),
        lambda x: attend(x, x, x, 0.25),
        lambda x: mix(x, None, torch.ones(1, 16)),
    ],
    ids=["norm", "gate", "attention", "mix"],
)
def test_gradients_of_gradients_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 2, 3, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
