"""What the teacher says: its states and logits are the model's own, and the cache gives back what was put in."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from bimos import BimosError
from bimos.training import teacher as module
from bimos.training.teacher import TopKCache, hidden_states, logit_head

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA = {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gemma2": LLAMA | {"head_dim": 8, "final_logit_softcapping": 2.0},
    "granite": LLAMA | {"logits_scaling": 8.0},
    "cohere": LLAMA | {"logit_scale": 0.25},
    "phi": {"intermediate_size": 48},  # its head has a bias
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_head_of_last_states_is_the_models_logits(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | KINDS[kind]))).eval()
    model.get_output_embeddings().weight.data *= 20  # so that capping and scaling show
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    ids = torch.randint(2, 64, (2, 9))
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
        last, every = hidden_states(model, ids, every=True)
        torch.testing.assert_close(logit_head(model)(last), expected.logits)
    assert len(every) == 2 and all(torch.equal(a, b) for a, b in zip(every, expected.hidden_states[1:], strict=True))
    assert hidden_states(model, ids, every=False)[1] == ()


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 40).requires_grad_(False)


def hidden(seed: int) -> Tensor:
    return 3 * torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


def cache(directory: Path, **changes: Any) -> TopKCache:
    return TopKCache(**({"directory": directory, "windows": 4, "length": 6, "k": 5, "vocabulary": 40} | changes))


def test_cache_gives_the_largest_log_probabilities(tmp_path: Path, head: nn.Linear) -> None:
    store = cache(tmp_path)
    assert store.get(2) is None
    value, index = store.put(2, hidden(2), head)
    expected = torch.log_softmax(head(hidden(2)), dim=-1).topk(5, dim=-1)
    assert torch.equal(index, expected.indices)
    torch.testing.assert_close(value, expected.values, rtol=1e-3, atol=1e-3)  # float16
    assert store.get(1) is None


@pytest.mark.parametrize("vocabulary", [40, 70_000])
def test_cache_survives_the_process(tmp_path: Path, vocabulary: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, vocabulary).requires_grad_(False)
    value, index = cache(tmp_path, vocabulary=vocabulary).put(3, hidden(3), head)
    found = cache(tmp_path, vocabulary=vocabulary).get(3)
    assert found is not None and torch.equal(found[0], value) and torch.equal(found[1], index)
    assert index.max() > 40 or vocabulary == 40


def test_a_window_counts_only_when_it_is_whole(tmp_path: Path, head: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    store = cache(tmp_path)

    def killed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store._index, "flush", killed)
    with pytest.raises(KeyboardInterrupt):
        store.put(0, hidden(0), head)
    assert cache(tmp_path).get(0) is None
    again = cache(tmp_path)
    again.put(0, hidden(0), head)
    assert cache(tmp_path).get(0) is not None


def test_a_cache_made_otherwise_is_refused(tmp_path: Path) -> None:
    cache(tmp_path)
    with pytest.raises(BimosError, match="made for another run"):
        cache(tmp_path, k=6)


def test_a_disk_too_small_is_refused_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=4))
    with pytest.raises(BimosError, match=r"needs .* GiB .*distill\.top_k"):
        cache(tmp_path / "logits")
    assert not os.listdir(tmp_path / "logits")


def test_room_is_taken_when_the_cache_is_made(tmp_path: Path) -> None:
    cache(tmp_path, windows=64, length=512)
    for name in ("values.bin", "indices.bin", "filled.bin"):
        found = (tmp_path / name).stat()
        assert 512 * found.st_blocks >= found.st_size > 0


def test_a_description_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    """As after a kill: the cache is described anew, and what is marked as filled still counts."""
    TopKCache(tmp_path, 3, 4, 2, 64)
    (tmp_path / "cache.json").write_text("{")
    TopKCache(tmp_path, 3, 4, 2, 64)
    with pytest.raises(BimosError, match="made for another run"):
        TopKCache(tmp_path, 3, 4, 3, 64)
