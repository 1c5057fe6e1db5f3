"""Distillation losses: KL divergence over a large vocabulary in chunks, and the error of hidden states.

The official balance of BinaryMoS (section 3.3 and its code): `KLDivLoss(batchmean)` over `[B, T, V]` divides by B only, and
ten times the sum over layers of the MSE of hidden states is added. Per token that is `KL + (10 / T) * sum MSE`.
Losses here are per token; `hidden_weight` is the paper's number and is divided by T.

Deviation-Aware Distillation (DB-LLM, 2402.11960, section 3.3) adds lambda times the same term with tokens weighed by entropies (nats),

    mean over tokens of  H(teacher)^gamma H(student)^(1 - gamma) KL(teacher || student)

so that tokens of which either is unsure count more. The weights are no part of the gradient. Form, gamma and lambda could not be
checked against code of the authors, who published none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bimos.kernels import native

Head = Callable[[Tensor], Tensor]

CHUNK_BYTES = 48 * 2**20  # of one chunk of logits in float32: the products of fewer tokens are slower, those of more are not faster


class Deviation(NamedTuple):
    """The weights of tokens in Deviation-Aware Distillation, and the weight of its term."""

    gamma: float
    weight: float  # lambda

    def factors(self, teacher: Tensor, student: Tensor) -> Tensor:
        """What each token's term counts in all, of entropies in nats `[n]`."""
        return 1 + self.weight * teacher.clamp_min(0) ** self.gamma * student.clamp_min(0) ** (1 - self.gamma)


def chunk_rows(vocabulary: int) -> int:
    """Tokens whose logits are held at a time."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


class _ChunkedKL(torch.autograd.Function):
    """Mean over tokens of `KL(teacher || student)`, each times its factor. The gradient is made chunk by chunk along with the value."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        targets: Callable[[slice], tuple[Tensor, Tensor | None]],
        vocabulary: int,
        temperature: float,
        deviation: Deviation | None,
    ) -> Tensor:
        rows, count = chunk_rows(vocabulary), hidden.shape[0]
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, count, rows):
            chunk = slice(start, min(start + rows, count))
            part = hidden[chunk].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(part)
            target, index = targets(chunk)
            if index is None and deviation is None and native.covers(logits, target):
                # A few passes over each row, instead of a dozen over all of a chunk in float32 (csrc/divergence.cpp).
                values, slope = torch.ops.bimos.kl_divergence(logits.detach(), target, temperature, temperature / count)
                total += values.sum()
            else:
                student = _log_softmax(logits.detach(), temperature)
                value, slope, factors = _kl(student, target, index, temperature, deviation)
                total += value
                if factors is not None:
                    slope.mul_(factors[:, None])
                slope = slope.mul_(temperature / count).to(logits.dtype)
            (gradient[chunk],) = torch.autograd.grad(logits, part, slope)
        ctx.save_for_backward(gradient)
        return total * (temperature**2 / count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits if temperature == 1 else logits.float() / temperature, dim=-1, dtype=torch.float32)


def _kl(
    student: Tensor, target: Tensor, index: Tensor | None, temperature: float, deviation: Deviation | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum over rows of the KL, each times its factor; each row's gradient by the student's logits (of the tempered softmax); the factors.

    `target` are teacher logits `[n, V]`, or with `index [n, k]` the teacher's k largest. What the teacher left out counts as
    one class of its own, so that the student is still told how much belongs to the rest.
    """
    if index is None:
        teacher = _log_softmax(target, temperature)
        probability = teacher.exp()
        factors, mine = None, None
        if deviation is not None:
            mine = student.exp()
            factors = deviation.factors(_entropy(teacher, probability), _entropy(student, mine))
        rows = (teacher.sub_(student)).mul_(probability).sum(-1)
        value = rows.sum() if factors is None else rows @ factors
        return value, (student.exp_() if mine is None else mine).sub_(probability), factors
    top, probability = target, target.exp()  # target: log-probabilities of the k
    chosen = student.gather(-1, index)
    rest = (1 - probability.sum(-1, keepdim=True)).clamp_min(1e-6)
    student_rest = (1 - chosen.exp().sum(-1, keepdim=True)).clamp_min(1e-6)
    rows = (probability * (top - chosen)).sum(-1) + (rest * (rest.log() - student_rest.log())).squeeze(-1)
    factors = None
    if deviation is not None:  # of the same classes, the rest being one
        factors = deviation.factors(
            _entropy(torch.cat([top, rest.log()], -1), torch.cat([probability, rest], -1)),
            _entropy(torch.cat([chosen, student_rest.log()], -1), torch.cat([chosen.exp(), student_rest], -1)),
        )
    value = rows.sum() if factors is None else rows @ factors
    # d/dlogits: outside the k every class shares the rest in proportion to the student's own probabilities.
    slope = student.exp_() * (1 - rest / student_rest)
    return value, slope.scatter_(-1, index, chosen.exp() - probability), factors


def _entropy(log_probability: Tensor, probability: Tensor) -> Tensor:
    """In nats `[n]`, without the products `[n, V]` in memory."""
    return -torch.einsum("nv,nv->n", probability, log_probability)


def kl_from_hidden(
    student: Tensor,
    teacher: Tensor,
    student_head: Head,
    teacher_head: Head,
    vocabulary: int,
    temperature: float = 1.0,
    deviation: Deviation | None = None,
) -> Tensor:
    """Mean per token of `KL(teacher || student)` without ever holding the logits of all tokens.

    Args:
        student, teacher: last hidden states `[..., d]`, after the final norm. Gradients reach `student` alone.
        student_head, teacher_head: map `[n, d]` to logits `[n, vocabulary]`; frozen.
        deviation: adds the term of Deviation-Aware Distillation; entropies are those at this temperature.
    """
    reference = teacher.flatten(0, -2)

    def targets(chunk: slice) -> tuple[Tensor, None]:
        with torch.no_grad():
            return teacher_head(reference[chunk]), None

    return _ChunkedKL.apply(student.flatten(0, -2), student_head, targets, vocabulary, temperature, deviation)


def kl_from_top_k(
    student: Tensor, log_probability: Tensor, index: Tensor, student_head: Head, vocabulary: int, deviation: Deviation | None = None
) -> Tensor:
    """The same against the teacher's `k` largest log-probabilities `[..., k]` and their indices, as cached on disk.

    Entropies are those of the k classes and the rest as one, of teacher and student alike.
    """
    top, where = log_probability.flatten(0, -2).float(), index.flatten(0, -2).long()
    return _ChunkedKL.apply(student.flatten(0, -2), student_head, lambda chunk: (top[chunk], where[chunk]), vocabulary, 1.0, deviation)


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over layers of the mean squared error of hidden states `[B, T, d]` (the paper's `hidden_states[1:]`)."""
    return torch.stack([(s.float() - t.float()).square().mean() for s, t in zip(student, teacher, strict=True)]).sum()


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of `||student - teacher||^2 / ||teacher||^2`.

    Relative per token, because a few tokens carry activations hundreds of times larger than the rest, and the norm that
    follows every block removes that size again.
    """
    teacher = teacher.float()
    error = (student.float() - teacher).square().sum(-1)
    return (error / teacher.square().sum(-1).clamp_min(1e-6)).mean()
