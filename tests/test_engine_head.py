"""The engine's head of bytes, which the matrix unit has in tiles, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from bimos.engine import Engine
from bimos.kernels import native

pytestmark = pytest.mark.skipif(native.isa() is None, reason=f"no C++ kernels: {native.problem}")

Packed = Callable[..., PreTrainedModel]


@pytest.mark.parametrize(("hidden", "outlier"), [(40, 1), (576, 1), (2400, 1), (40, 50), (576, 1e4), (1216, 1e4), (2400, 1e4)])
def test_head_of_bytes(hidden: int, outlier: float, packed: Packed) -> None:
    """Logits of one and many tokens against float64, in one and several pieces, the last depths full or not.

    An outlier that no row multiplies needs whole numbers of 24 bits for what lies beside it.
    """
    model = packed("mistral", embedding_bits=8, hidden_size=hidden, num_hidden_layers=1, vocab_size=301, sliding_window=None)
    head = model.lm_head
    model.model.norm.weight.data[7] = outlier
    head.weight[:, 7] = 0
    engine = Engine(model, threads=2)
    ids = torch.randint(3, 301, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    wide = torch.nn.Module.float(model)
    with torch.no_grad():
        states = wide.model(input_ids=torch.tensor(ids)[:, None]).last_hidden_state[:, 0].double()
    expected = states @ (head.weight.double() * head.scale.double().view(-1, 1)).T
    for count in (1, 2, 3, 4, 5, 8, 9, 16, 17, 40):
        sequences = [torch.ops.bimos.engine_open(engine._id) for _ in range(count)]
        actual = torch.ops.bimos.engine_read(engine._id, ids[:count], sequences, 1).double()
        assert (actual - expected[:count]).norm() < 5e-3 * expected[:count].norm()
