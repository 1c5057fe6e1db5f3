"""Losses against torch's own, computed on all logits at once."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimos.config import DistillConfig, LossConfig
from bimos.kernels import native
from bimos.methods import method_config
from bimos.models import convertible_linears, load_model
from bimos.training import losses
from bimos.training.distillation import Distillation
from bimos.training.losses import Deviation, chunk_rows, hidden_state_loss, kl_from_hidden, kl_from_top_k, relative_error
from bimos.training.student import binarize

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 25, 16, 101


@pytest.fixture(params=["chunked", "whole"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 tokens in four chunks, the last of them shorter, or in one."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 1 if request.param == "chunked" else 2**20)
    assert -(-BATCH * LENGTH // chunk_rows(VOCABULARY)) == (4 if request.param == "chunked" else 1)


@pytest.fixture
def heads() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY).requires_grad_(False), nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)


def states(seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_kl_is_that_of_torch(heads: tuple[nn.Linear, nn.Linear], temperature: float) -> None:
    student_head, teacher_head = heads
    mine, theirs = states(1).requires_grad_(), states(1).requires_grad_()
    teacher = states(2)
    actual = kl_from_hidden(mine, teacher, student_head, teacher_head, VOCABULARY, temperature)
    log_q = F.log_softmax(student_head(theirs) / temperature, dim=-1)
    log_p = F.log_softmax(teacher_head(teacher) / temperature, dim=-1)
    # `batchmean` over [B, T, V] divides by B alone; T^2 as in Hinton et al. keeps the gradient's size.
    expected = temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) / LENGTH
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)
    (3 * actual).backward()
    (3 * expected).backward()
    assert mine.grad is not None and theirs.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=2e-6 * theirs.grad.abs().max().item())


@pytest.mark.skipif(native.isa() is None, reason="the kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 15), (5, 101), (2, 4096)])
def test_fused_kl_is_the_equation(rows: int, vocabulary: int, dtype: torch.dtype, level: str) -> None:
    torch.manual_seed(vocabulary)
    student, teacher = (8 * torch.randn(rows, vocabulary)).to(dtype), (8 * torch.randn(rows, vocabulary) - 90).to(dtype)
    log_q, log_p = (F.log_softmax(logits.double() / 1.5, -1) for logits in (student, teacher))
    value, slope = torch.ops.bimos.kl_divergence(student, teacher, 1.5, 0.25)
    strange = student.clone()
    strange[0, vocabulary // 2] = torch.nan
    broken, _ = torch.ops.bimos.kl_divergence(strange, teacher, 1.5, 0.25)
    torch.testing.assert_close(value.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-5, atol=2e-6)
    expected = 0.25 * (log_q.exp() - log_p.exp())
    assert slope.dtype == dtype
    torch.testing.assert_close(slope.double(), expected, rtol=8e-3 if dtype == torch.bfloat16 else 2e-5, atol=1e-6)
    assert broken[0].isnan() and torch.equal(broken[1:], value[1:])


def test_kl_of_a_model_to_itself_is_zero(heads: tuple[nn.Linear, nn.Linear]) -> None:
    hidden = states(1).requires_grad_()
    loss = kl_from_hidden(hidden, states(1), heads[0], heads[0], VOCABULARY)
    loss.backward()
    assert hidden.grad is not None
    assert abs(loss.item()) < 1e-6 and hidden.grad.abs().max() < 1e-7


def test_no_gradient_reaches_the_teacher(heads: tuple[nn.Linear, nn.Linear]) -> None:
    teacher = states(2).requires_grad_()
    kl_from_hidden(states(1).requires_grad_(), teacher, *heads, VOCABULARY).backward()
    assert teacher.grad is None


@pytest.mark.usefixtures("chunks")
def test_kl_through_a_head_that_is_not_linear(heads: tuple[nn.Linear, nn.Linear]) -> None:
    """Soft-capped logits, as in Gemma 2."""

    def capped(hidden: Tensor) -> Tensor:
        return 5 * torch.tanh(heads[0](hidden) / 5)

    mine, theirs = states(1).requires_grad_(), states(1).requires_grad_()
    actual = kl_from_hidden(mine, states(2), capped, heads[1], VOCABULARY)
    log_q, log_p = F.log_softmax(capped(theirs), -1), F.log_softmax(heads[1](states(2)), -1)
    expected = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) / LENGTH
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)
    actual.backward()
    expected.backward()
    assert mine.grad is not None and theirs.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=2e-6 * theirs.grad.abs().max().item())


@pytest.mark.usefixtures("chunks")
def test_kl_in_bfloat16_is_near(heads: tuple[nn.Linear, nn.Linear]) -> None:
    expected = kl_from_hidden(states(1), states(2), *heads, VOCABULARY)
    half = [copy.deepcopy(head).bfloat16() for head in heads]
    hidden = states(1).bfloat16().requires_grad_()
    actual = kl_from_hidden(hidden, states(2).bfloat16(), half[0], half[1], VOCABULARY)
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(expected.item(), rel=0.02)
    actual.backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16 and hidden.grad.any()


def coarse_kl(logits: Tensor, log_p: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """KL between distributions over the teacher's k best tokens and "any other"; also those k and where they are."""
    top, index = log_p.topk(k, dim=-1)
    log_q = F.log_softmax(logits, dim=-1)
    p, q = top.exp(), log_q.gather(-1, index).exp()
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    per_token = (p * (p.log() - q.log())).sum(-1) + rest_p * (rest_p.log() - rest_q.log())
    return per_token.mean(), top, index


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("k", [1, 5, 60])
def test_top_k_loss_is_the_kl_with_the_rest_as_one_class(heads: tuple[nn.Linear, nn.Linear], k: int) -> None:
    student_head, teacher_head = (copy.deepcopy(head).double() for head in heads)
    scale = 1.0  # flat enough that neither's rest vanishes
    theirs = states(1, scale).double().requires_grad_()
    log_p = F.log_softmax(teacher_head(states(2, scale).double()), dim=-1)
    expected, top, index = coarse_kl(student_head(theirs), log_p, k)
    mine = states(1, scale).requires_grad_()
    actual = kl_from_top_k(mine, top.float(), index, heads[0], VOCABULARY)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-7)
    actual.backward()
    expected.backward()
    assert mine.grad is not None and theirs.grad is not None
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=2e-5 * theirs.grad.abs().max().item())


def test_more_of_the_teacher_says_more(heads: tuple[nn.Linear, nn.Linear]) -> None:
    """Merging classes loses information: top-k KL grows with k, and never exceeds the KL itself."""
    log_p = F.log_softmax(heads[1](states(2)), dim=-1)
    values = []
    for k in (1, 5, 20, 60):
        top, index = log_p.topk(k, dim=-1)
        values.append(kl_from_top_k(states(1), top, index, heads[0], VOCABULARY).item())
    values.append(kl_from_hidden(states(1), states(2), *heads, VOCABULARY).item())
    assert values == sorted(values) and values[0] < values[-1]


def test_a_sure_teacher_is_no_trouble(heads: tuple[nn.Linear, nn.Linear]) -> None:
    """Logits so far apart that nothing is left for the rest."""
    hidden = states(1, 100.0).requires_grad_()
    top, index = F.log_softmax(heads[1](states(2, 100.0)), dim=-1).topk(5, dim=-1)
    loss = kl_from_top_k(hidden, top, index, heads[0], VOCABULARY)
    loss.backward()
    assert hidden.grad is not None
    assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all()


def test_weights_of_entropies_by_hand() -> None:
    """A fair coin has ln 2 nats, a sure thing none, four equal classes 2 ln 2."""
    sure, coin, four = torch.tensor([40.0, 0, 0, 0]), torch.tensor([0.0, 0, -40, -40]), torch.zeros(4)
    teacher, student = torch.stack([coin, four, sure, coin]), torch.stack([coin, coin, coin, sure])
    log2 = math.log(2)
    # By gamma 1/4: (ln 2)^.25 (ln 2)^.75, (2 ln 2)^.25 (ln 2)^.75, none, none.
    weights = torch.tensor([log2, 2**0.25 * log2, 0.0, 0.0])
    # KL of the second row: four equal classes against a coin; of the others: 0, a sure thing against a coin, a coin against a sure thing.
    log_q = F.log_softmax(student, -1)
    terms = (teacher.softmax(-1) * (teacher.log_softmax(-1) - log_q)).sum(-1)
    assert terms[2].item() == pytest.approx(log2) and terms[0].item() == pytest.approx(0, abs=1e-6)
    head = nn.Identity()
    actual = kl_from_hidden(student, teacher, head, head, 4, deviation=Deviation(0.25, 0.5))
    torch.testing.assert_close(actual, (terms * (1 + 0.5 * weights)).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize(("gamma", "weight"), [(0.1, 0.1), (0.5, 2.0), (1.0, 1.0), (0.0, 1.0)])
def test_deviation_aware_distillation(heads: tuple[nn.Linear, nn.Linear], gamma: float, weight: float, k: int | None) -> None:
    """Value and gradient of KL + lambda H(p)^gamma H(q)^(1 - gamma) KL, the weights held fixed, on all logits at once."""
    mine, theirs = states(1, 1.0).requires_grad_(), states(1, 1.0).requires_grad_()
    log_p, log_q = F.log_softmax(heads[1](states(2, 1.0)), -1), F.log_softmax(heads[0](theirs), -1)
    top, index = log_p.topk(k or VOCABULARY, dim=-1)
    deviation = Deviation(gamma, weight)
    if k is None:
        actual = kl_from_hidden(mine, states(2, 1.0), *heads, VOCABULARY, deviation=deviation)
        p, q = log_p.exp(), log_q.exp()
    else:
        actual = kl_from_top_k(mine, top, index, heads[0], VOCABULARY, deviation)
        p, q = top.exp(), log_q.gather(-1, index).exp()
        p, q = (torch.cat([part, 1 - part.sum(-1, keepdim=True)], -1) for part in (p, q))  # the rest as one class
    entropy_p, entropy_q = (-(part * part.log()).sum(-1).detach() for part in (p, q))
    terms = (p * (p.log() - q.log())).sum(-1)
    expected = (terms * (1 + weight * entropy_p**gamma * entropy_q ** (1 - gamma))).mean()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)
    actual.backward()
    expected.backward()
    assert mine.grad is not None and theirs.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-4 * theirs.grad.abs().max().item())


def test_any_method_can_use_it(teacher_directory: Path) -> None:
    teacher, student = (load_model(teacher_directory, torch.float32) for _ in range(2))
    binarize(student, list(convertible_linears(student)), method_config("sign"), {}, torch.Generator().manual_seed(0))
    ids = torch.randint(0, 320, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))

    def loss(config: LossConfig | None) -> float:
        return Distillation(student, teacher, DistillConfig(), None, config)(ids, torch.arange(BATCH))["loss"].item()

    plain = loss(None)
    assert loss(LossConfig()) == plain  # off by default
    assert loss(LossConfig(dad=True, dad_lambda=0.0)) == pytest.approx(plain, rel=1e-4)
    assert loss(LossConfig(dad=True)) > 1.1 * plain  # entropies of a random model are near ln 320


def test_hidden_state_loss_sums_layers() -> None:
    student, teacher = [states(i) for i in (1, 2, 3)], [states(i) for i in (4, 5, 6)]
    expected = sum(F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True))
    torch.testing.assert_close(hidden_state_loss(student, teacher), expected)


def test_relative_error_is_relative_to_each_token() -> None:
    teacher = states(1)
    assert relative_error(teacher * 1.5, teacher).item() == pytest.approx(0.25, rel=1e-5)
    teacher[0, 0] *= 1000  # a token with huge activations, reproduced as well as the others, counts as much as they
    assert relative_error(teacher * 1.5, teacher).item() == pytest.approx(0.25, rel=1e-5)
    assert torch.isfinite(relative_error(torch.ones(1, 2, 4), torch.zeros(1, 2, 4)))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("weight", [0.0, 10.0])
def test_balance_of_the_official_loss(teacher_directory: Path, weight: float) -> None:
    """`KLDivLoss(batchmean)` over [B, T, V] + 10 x the sum over layers of the MSE of `hidden_states[1:]`, all per token."""
    teacher, student = (load_model(teacher_directory, torch.float32) for _ in range(2))
    binarize(student, list(convertible_linears(student)), method_config("binarymos"), {}, torch.Generator().manual_seed(0))
    ids = torch.randint(0, 320, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    module = Distillation(student, teacher, DistillConfig(hidden_weight=weight), None)
    actual = module(ids, torch.arange(BATCH))["loss"]
    with torch.no_grad():
        s, t = (model(ids, output_hidden_states=True) for model in (student, teacher))
        kl = F.kl_div(F.log_softmax(s.logits, -1), F.softmax(t.logits, -1), reduction="batchmean")
        mse = sum(F.mse_loss(a, b) for a, b in zip(s.hidden_states[1:], t.hidden_states[1:], strict=True))
    torch.testing.assert_close(actual.detach(), (kl + weight * mse) / LENGTH, rtol=1e-5, atol=0)
