"""A teacher that multiplies in whole numbers for a while: what it says, and that it is the same model afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from bimos.config import DistillConfig
from bimos.kernels import native
from bimos.methods import method_config
from bimos.models import convertible_linears
from bimos.training import integers
from bimos.training.budget import Budget
from bimos.training.distillation import Distillation, NumberedWindows
from bimos.training.endtoend import distill
from bimos.training.fused import fused
from bimos.training.integers import IntegerLinear, integer_products
from bimos.training.progress import Progress
from bimos.training.student import binarize
from bimos.training.teacher import TopKCache, hidden_states, logit_head

pytestmark = pytest.mark.skipif(native.isa() is None, reason="the kernels are not built")

METHOD = method_config("binarymos", {"num_experts": 2})
LENGTH = 24
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@pytest.fixture
def where_it_pays(level: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On every processor, at every level."""
    monkeypatch.setattr(integers, "pays", lambda dtype: True)
    yield


def linears(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is kind}


def teacher_of(dense: Callable[..., PreTrainedModel], kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    sharp = {"initializer_range": 0.2}  # what it says is far from even
    return dense(kind, **sharp).to(dtype).requires_grad_(False)


def furthest(dtype: torch.dtype) -> float:
    """What products may be off by, of their norm."""
    return 4e-2 if dtype == torch.bfloat16 else 2e-3


def student_of(teacher: PreTrainedModel) -> PreTrainedModel:
    student = copy.deepcopy(teacher)
    binarize(student, list(convertible_linears(student)), METHOD, {}, torch.Generator().manual_seed(0))
    return student


def said(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return logit_head(model)(hidden_states(model, ids, False)[0]).float()


@pytest.mark.usefixtures("where_it_pays")
@DTYPES
@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "gpt_neox", "phi"])
def test_it_says_nearly_the_same(dense: Callable[..., PreTrainedModel], kind: str, dtype: torch.dtype) -> None:
    teacher, ids = teacher_of(dense, kind, dtype), torch.randint(3, 101, (2, 40), generator=torch.Generator().manual_seed(0))
    before, expected = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}, said(teacher, ids)
    plain = linears(teacher, nn.Linear)
    with fused(teacher), integer_products(teacher):
        assert linears(teacher, IntegerLinear) == plain and teacher.get_output_embeddings() is not None
        assert teacher.state_dict().keys() == before.keys()
        actual = said(teacher, ids)
        with integer_products(teacher):  # within itself
            assert torch.equal(said(teacher, ids), actual)
        assert linears(teacher, IntegerLinear) == plain
    assert 0 < (actual - expected).norm() < furthest(dtype) * expected.norm()
    assert linears(teacher, nn.Linear) == plain and torch.equal(said(teacher, ids), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any("tiles" in vars(module) for module in teacher.modules())


@pytest.mark.usefixtures("where_it_pays")
def test_all_is_put_back_after_an_error(dense: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of(dense)
    plain = linears(teacher, nn.Linear)
    with pytest.raises(KeyboardInterrupt), integer_products(teacher):
        raise KeyboardInterrupt
    assert linears(teacher, nn.Linear) == plain
    covered = integers._is_covered

    def fails_at_the_head(module: nn.Linear) -> bool:
        if module is teacher.lm_head:
            raise MemoryError
        return covered(module)

    monkeypatch.setattr(integers, "_is_covered", fails_at_the_head)
    with pytest.raises(MemoryError), integer_products(teacher):
        raise AssertionError
    assert linears(teacher, nn.Linear) == plain


@pytest.mark.usefixtures("where_it_pays")
def test_what_is_left_alone(dense: Callable[..., PreTrainedModel]) -> None:
    other = teacher_of(dense, dtype=torch.float16)
    with integer_products(other):
        assert not linears(other, IntegerLinear)
    teacher = teacher_of(dense)
    count = len(convertible_linears(teacher))

    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    teacher.model.layers[0].mlp.down_proj.__class__ = Other
    with integer_products(teacher):
        assert not linears(teacher, nn.Linear) and len(linears(teacher, Other)) == 1
        assert len(linears(teacher, IntegerLinear)) == count  # all but one, and the head


@pytest.mark.usefixtures("where_it_pays")
@DTYPES
def test_gradients_of_inputs_and_other_dtypes(dense: Callable[..., PreTrainedModel], dtype: torch.dtype) -> None:
    teacher = teacher_of(dense, dtype=dtype)
    linear = teacher.model.layers[0].mlp.down_proj
    x = torch.randn(3, linear.in_features).to(dtype).requires_grad_()
    grad = torch.randn(3, linear.out_features).to(dtype)
    expected = linear(x)
    (wanted,) = torch.autograd.grad(expected, x, grad)
    with integer_products(teacher):
        y = linear(x)
        (of_x,) = torch.autograd.grad(y, x, grad)
        assert torch.equal(y, linear(x.detach())) and not linear(x.detach()).requires_grad
        with pytest.raises(RuntimeError):
            linear(x.detach().double())
        with pytest.raises(RuntimeError):
            linear(x.detach()[:, :-1])
    assert 0 < (y - expected).norm() < furthest(dtype) * expected.norm()
    assert torch.equal(of_x, wanted)


@pytest.mark.usefixtures("where_it_pays")
def test_a_shared_head_has_its_tiles_once(dense: Callable[..., PreTrainedModel]) -> None:
    teacher = teacher_of(dense)
    head = nn.Linear(1, 1, bias=False)
    head.weight = teacher.get_output_embeddings().weight
    head.in_features, head.out_features = head.weight.shape[1], head.weight.shape[0]
    with integer_products(teacher, head):
        assert vars(head)["tiles"][0] is vars(teacher.get_output_embeddings())["tiles"][0]
    assert type(head) is nn.Linear and "tiles" not in vars(head)


@pytest.mark.usefixtures("where_it_pays")
def test_weights_that_could_be_trained(dense: Callable[..., PreTrainedModel]) -> None:
    """As `from_pretrained` gives them, whom nobody has frozen."""
    teacher = teacher_of(dense).requires_grad_()
    linear = teacher.model.layers[0].mlp.down_proj
    x = torch.randn(3, linear.in_features).bfloat16()
    expected = linear(x)
    with integer_products(teacher):
        assert linears(teacher, IntegerLinear) and not linears(teacher, nn.Linear)
        assert torch.equal(linear(x), expected) and linear(x).requires_grad
        with torch.no_grad():
            assert not torch.equal(linear(x), expected)


def test_only_where_it_pays(dense: Callable[..., PreTrainedModel], level: str) -> None:
    narrow, wide = teacher_of(dense), teacher_of(dense, dtype=torch.float32)
    with integer_products(narrow, wide):
        assert bool(linears(narrow, IntegerLinear)) == (level == "avx512" and not torch.cpu._is_amx_tile_supported())
        assert not linears(wide, IntegerLinear)  # float32 was asked for


@pytest.mark.usefixtures("avx2_alone")
def test_float32_where_it_stands_for_bfloat16(dense: Callable[..., PreTrainedModel]) -> None:
    narrow, wide = teacher_of(dense), teacher_of(dense, dtype=torch.float32)
    with integer_products(narrow, wide):
        assert linears(wide, IntegerLinear) and not linears(narrow, IntegerLinear)


@pytest.mark.usefixtures("where_it_pays")
@DTYPES
@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_loss_and_gradients(dense: Callable[..., PreTrainedModel], tmp_path: Path, cached: bool, dtype: torch.dtype) -> None:
    teacher = teacher_of(dense, dtype=dtype)
    ids, window = torch.randint(3, 101, (4, LENGTH), generator=torch.Generator().manual_seed(0)), torch.arange(4)
    losses, gradients = [], []
    for in_integers in (False, True):
        student = student_of(teacher)
        cache = TopKCache(tmp_path / str(in_integers), 4, LENGTH, 8, 101) if cached else None
        with integer_products(teacher if in_integers else nn.Identity()):
            loss = Distillation(student, teacher, DistillConfig(), cache)(ids, window)["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.float().flatten() for p in student.parameters() if p.grad is not None]))
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert torch.cosine_similarity(gradients[0], gradients[1], 0) > 0.99


class Windows(Dataset[dict[str, Tensor]]):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(3, 101, (LENGTH,), generator=torch.Generator().manual_seed(index))}


@pytest.mark.usefixtures("where_it_pays")
@DTYPES
def test_a_run(dense: Callable[..., PreTrainedModel], tmp_path: Path, threads: int, dtype: torch.dtype) -> None:
    teacher = teacher_of(dense, dtype=dtype)
    plain = linears(teacher, nn.Linear)
    inside: list[int] = []
    heads: set[type] = set()
    handle = teacher.model.register_forward_hook(lambda *_: inside.append(len(linears(teacher, IntegerLinear))))
    last = []
    for in_integers in (False, True):
        student = student_of(teacher)
        student.model.register_forward_hook(lambda *_, of=student: heads.add(type(of.get_output_embeddings())))
        config = DistillConfig(batch_size=4, lr_latent=5e-3, checkpoint_minutes=60.0, int8_teacher=in_integers)
        data = NumberedWindows(Windows(), 40, None, seed=0)
        report = distill(student, teacher, data, LENGTH, config, Budget(tokens=40 * LENGTH), tmp_path / str(in_integers), Progress(None))
        assert set(inside) == {len(plain) if in_integers else 0}
        assert heads == {IntegerLinear if in_integers else nn.Linear}
        inside.clear()
        heads.clear()
        assert type(student.get_output_embeddings()) is nn.Linear and linears(teacher, nn.Linear) == plain
        last.append(report["loss_last"])
    handle.remove()
    assert last[0] != last[1] and last[1] == pytest.approx(last[0], rel=0.05)
