from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bimos.errors import BimosError
from bimos.packing.embedding import Int8Embedding, Int8Head, TiedInt8Head, quantize_embeddings, quantize_rows

Make = Callable[..., PreTrainedModel]


def test_rows_are_within_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(9000, 16) * torch.logspace(-5, 2, 9000)[:, None]
    weight[17] = 0
    rows, scale = quantize_rows(weight)
    assert rows.dtype == torch.int8 and scale.dtype == torch.float16 and scale.shape == (9000, 1)
    error = (rows.float() * scale.float() - weight).abs().amax(1)
    step = weight.abs().amax(1) / 127
    assert (error <= 0.5005 * step + 3e-8).all()  # half a step, of a scale rounded up in float16, which ends at 6e-8
    assert (rows[17] == 0).all() and rows.abs().max() == 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma", "opt", "gpt_neox", "phi"])
def test_models_change_little(kind: str, dtype: torch.dtype, dense: Make, ids: Tensor) -> None:
    model = dense(kind).to(dtype)
    with torch.no_grad():
        before_embedding, before = model.get_input_embeddings()(ids), model(ids).logits.float()
        quantize_embeddings(model)
        after_embedding, after = model.get_input_embeddings()(ids), model(ids).logits.float()
    assert isinstance(model.get_input_embeddings(), Int8Embedding) and after_embedding.dtype == dtype
    scale = before_embedding.float().abs().max()
    assert (after_embedding.float() - before_embedding.float()).abs().max() < 0.01 * scale
    tolerance = 0.03 if dtype == torch.float32 else 0.1
    assert 0 < (after - before).std() < tolerance * before.std()


def test_gemma_keeps_its_scale(dense: Make, ids: Tensor) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = dense("gemma").to(dtype)
        original = model.get_input_embeddings()
        assert type(original) is not nn.Embedding
        quantize_embeddings(model)
        new = model.get_input_embeddings()
        rows = (new.weight.float() * new.scale.float()).to(dtype)[ids]
        assert torch.equal(new(ids), rows * original.embed_scale.to(dtype))


def test_opt_keeps_its_position_embeddings(dense: Make) -> None:
    model = dense("opt")
    positions = model.model.decoder.embed_positions
    assert quantize_embeddings(model) == ["model.decoder.embed_tokens", "lm_head"]
    assert model.model.decoder.embed_positions is positions and positions.weight.dtype == torch.float32


def test_tied_embeddings_are_one_pair_of_tensors(dense: Make, ids: Tensor) -> None:
    model = dense("llama")
    quantize_embeddings(model)
    assert isinstance(model.lm_head, TiedInt8Head)
    names = [name for name in model.state_dict() if "embed_tokens" in name or "lm_head" in name]
    assert names == ["model.embed_tokens.weight", "model.embed_tokens.scale"]
    twin = copy.deepcopy(model)
    twin.model.embed_tokens.weight.zero_()
    with torch.no_grad():
        assert twin(ids).logits.abs().max() == 0  # the copy's head reads the copy's embedding
        assert model(ids).logits.abs().max() > 0


def test_untied_head_and_bias(dense: Make, ids: Tensor) -> None:
    model = dense("phi")
    head = model.lm_head
    quantize_embeddings(model)
    assert isinstance(model.lm_head, Int8Head)
    x = torch.randn(3, 32)
    torch.testing.assert_close(model.lm_head(x), head(x), rtol=0.03, atol=0.03)
    assert torch.equal(model.lm_head.bias, head.bias.half())


def test_the_result_follows_the_models_dtype(dense: Make, ids: Tensor) -> None:
    model = dense("llama")
    quantize_embeddings(model)
    scale = model.model.embed_tokens.scale.clone()
    model.to(torch.bfloat16)
    assert model.model.embed_tokens(ids).dtype == model(ids).logits.dtype == torch.bfloat16
    assert torch.equal(model.model.embed_tokens.scale, scale)
    assert torch.equal(model.to(torch.float32).model.embed_tokens.scale, scale)


def test_embeddings_that_do_more_than_scale_are_refused(dense: Make) -> None:
    class Shifted(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + 1

    model = dense("mistral")
    model.set_input_embeddings(Shifted(101, 32))
    with pytest.raises(BimosError, match="Shifted cannot be stored in 8 bits; use --embedding-bits 16"):
        quantize_embeddings(model)
