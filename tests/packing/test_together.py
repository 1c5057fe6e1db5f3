"""Packed linears of one input: one call of the op for all of them, and what each gives is what it gives by itself."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bimos.packing import linear as module
from bimos.packing.linear import PackedLinear
from bimos.packing.together import PATIENCE, Together, join_siblings


class Block(nn.Module):
    """Four linears, of which three are siblings by their names."""

    def __init__(self, **changes: dict[str, Any]) -> None:
        super().__init__()
        for name, out in (("q_proj", 24), ("k_proj", 8), ("v_proj", 8), ("o_proj", 16)):
            setattr(self, name, one(out, **changes.get(name, {})))


def one(out: int, n_in: int = 16, experts: int = 2, group_size: int | None = None, bias: bool = False, **more: Tensor) -> PackedLinear:
    tensors = {
        "weight": torch.randint(0, 256, (1, out, n_in // 8), dtype=torch.uint8),
        "scale_in": torch.rand(1, experts, n_in).half(),
        "scale_out": torch.rand(1, experts, out).half(),
    }
    if experts > 1:
        tensors["router"] = torch.randn(experts, n_in).half()
    if group_size:
        tensors["scale_group"] = torch.rand(1, out, -(-n_in // group_size)).half()
    if bias:
        tensors["bias"] = torch.randn(out).half()
    return PackedLinear.from_tensors(tensors | more, group_size)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which ops are called, as on a GPU."""
    found: list[str] = []
    monkeypatch.setattr(module, "pays_together", lambda x: True)
    for name in ("packed_linear", "packed_linears"):
        op = getattr(torch.ops.bimos, name)

        def call(*given: Any, op: Any = op, name: str = name) -> Any:
            before = len(found)
            result = op(*given)
            found[before:] = [name]  # and not what it calls itself on a CPU
            return result

        monkeypatch.setattr(torch.ops.bimos, name, call)
    return found


@pytest.mark.parametrize("options", [{}, {"experts": 1}, {"group_size": 8, "bias": True}], ids=str)
def test_three_in_one_call(options: dict[str, Any], calls: list[str]) -> None:
    torch.manual_seed(0)
    block = Block(**dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), options))
    x, other = torch.randn(1, 2, 16), torch.randn(1, 2, 16)
    layers = block.q_proj, block.k_proj, block.v_proj
    expected = [[layer(value) for layer in layers] for value in (x, other)]
    join_siblings(block)
    assert block.q_proj.together is block.k_proj.together is block.v_proj.together is not None and block.o_proj.together is None
    for value, alone in ((x, expected[0]), (other, expected[1])):
        calls.clear()
        assert all(map(torch.equal, [layer(value) for layer in layers], alone))
        assert calls == ["packed_linears"]
    assert block.q_proj.together._waiting is None  # nothing is held that nobody waits for
    with torch.inference_mode():  # tensors that do not tell who writes to them
        assert all(map(torch.equal, [layer(x.clone()) for layer in layers], expected[0]))


def test_another_input_or_one_that_was_written_to(calls: list[str]) -> None:
    block = Block()
    x, other = torch.randn(1, 16), torch.randn(1, 16)
    alone = [block.k_proj(value) for value in (other, 2 * x)]
    join_siblings(block)
    block.q_proj(x)
    assert torch.equal(block.k_proj(other), alone[0])
    block.q_proj(x)
    x.mul_(2)
    assert torch.equal(block.k_proj(x), alone[1])
    block.q_proj(x), block.q_proj(x)  # asked twice, as when activations are computed again
    assert torch.equal(block.k_proj(x), alone[1])


def test_nobody_is_waited_for_for_ever(calls: list[str]) -> None:
    block = Block()
    join_siblings(block)
    kept = block.k_proj, block.v_proj  # by whoever took them out
    block.k_proj, block.v_proj = nn.Linear(16, 8), nn.Linear(16, 8)
    for _ in range(PATIENCE + 1):
        block.q_proj(torch.randn(1, 16))
    calls.clear()
    block.q_proj(torch.randn(1, 16))
    assert block.q_proj.together is None and calls == ["packed_linear"] and kept[0].together is None


@pytest.mark.parametrize(
    "changes", [{"experts": 3}, {"n_in": 24}, {"bias": True}, {"group_size": 8}, {"scale_in": torch.ones(1, 2, 16)}], ids=str
)
def test_what_is_stored_otherwise_stays_by_itself(changes: dict[str, Any]) -> None:
    block = Block(k_proj=changes)
    join_siblings(block)
    assert block.q_proj.together is None and block.v_proj.together is None


def test_what_is_elsewhere_or_gone_is_not_waited_for(calls: list[str]) -> None:
    block, x = Block(), torch.randn(1, 16)
    expected = block.q_proj(x)
    join_siblings(block)
    block.k_proj.to("meta")  # as what is offloaded
    calls.clear()
    assert torch.equal(block.q_proj(x), expected) and calls == ["packed_linear"]
    other = Block()
    join_siblings(other)
    replica = other.q_proj._replicate_for_data_parallel()
    replica._buffers = dict(other.q_proj._buffers)
    calls.clear()
    assert torch.equal(replica(x), other.q_proj(x)) and calls == ["packed_linear", "packed_linears"]


def test_each_is_free_with_its_last_reference() -> None:
    block = Block()
    join_siblings(block)
    seen = weakref.ref(block.k_proj.weight)
    gc.disable()
    try:
        del block
        assert seen() is None
    finally:
        gc.enable()


def test_copies_are_by_themselves() -> None:
    block = Block()
    join_siblings(block)
    assert isinstance(block.q_proj.together, Together) and copy.deepcopy(block).q_proj.together is None
    assert copy.deepcopy(block.q_proj).state_dict().keys() == block.q_proj.state_dict().keys()


def test_not_where_it_does_not_pay() -> None:
    assert not module.pays_together(torch.ones(1, 16))  # on a CPU


def test_a_loaded_model_has_its_projections_together(packed: Callable[..., PreTrainedModel], tmp_path: Path, calls: list[str]) -> None:
    made = packed("llama")
    made.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        for subject in (made, model):
            calls.clear()
            logits = subject(ids).logits
            blocks = len(model.model.layers)
            assert calls.count("packed_linears") == 2 * blocks
        for layer in model.modules():
            if isinstance(layer, PackedLinear):
                layer.together = None
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=0)
