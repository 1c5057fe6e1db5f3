"""Calling blocks outside their model gives what they give inside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bimos.models import decoder_blocks
from bimos.training.streams import advance, batches, capture, embed

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "mistral": {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 5},
    "gemma": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {"intermediate_size": 48},
}


def windows(count: int, length: int = 12) -> Tensor:
    return torch.randint(2, 64, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **(SMALL | KINDS[request.param]))).eval()


def test_blocks_one_by_one_are_the_model(model: PreTrainedModel) -> None:
    """Also for windows other than those on which the call was captured."""
    ids = windows(6)
    _, calls = capture(model, windows(2).flip(0))
    _, blocks = decoder_blocks(model)
    stream = torch.cat([embed(model, ids[rows]) for rows in batches(6, 2)])
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states
    assert len(calls) == len(blocks) == 3
    for block, call, state in zip(blocks, calls, expected[:3], strict=True):
        torch.testing.assert_close(stream, state, rtol=1e-5, atol=1e-5)
        behind = advance(block, call, stream, 2)
        assert advance(block, call, stream, 2, out=stream) is stream  # in place gives the same
        assert torch.equal(stream, behind)


def test_first_input_is_the_embedding(model: PreTrainedModel) -> None:
    first, _ = capture(model, windows(2))
    assert torch.equal(first, embed(model, windows(2)))


def test_no_hook_stays(model: PreTrainedModel) -> None:
    capture(model, windows(1))
    embed(model, windows(1))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_batches_cover_all_rows() -> None:
    assert [list(range(10))[rows] for rows in batches(10, 5)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
