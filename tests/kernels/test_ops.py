"""The ops against the equations, written out here once more without the library's code."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from bimos.kernels import int8_linear, packed_linear, reference

CASES = [
    # planes, experts, in, out, group, which tensors
    (1, 4, 24, 7, None, ("scale_in", "scale_out", "router")),
    (1, 1, 16, 5, None, ("scale_in", "scale_out")),
    (2, 2, 40, 3, None, ("scale_in", "scale_out", "router", "bias")),
    (2, 1, 32, 11, 8, ("scale_group", "bias")),
    (1, 1, 64, 9, 64, ("scale_group", "scale_out")),
    (1, 1, 8, 1, None, ("scale_out",)),
    (2, 3, 16, 13, 16, ("scale_in", "scale_out", "router", "scale_group", "bias")),
    (1, 1, 8, 2, None, ()),
]


def make(planes: int, experts: int, n_in: int, n_out: int, group: int | None, names: tuple[str, ...]) -> dict[str, Tensor | None]:
    torch.manual_seed(n_in * n_out)
    shapes = {
        "scale_in": (planes, experts, n_in),
        "scale_out": (planes, experts, n_out),
        "router": (experts, n_in),
        "scale_group": (planes, n_out, n_in // (group or n_in)),
        "bias": (n_out,),
    }
    tensors: dict[str, Tensor | None] = {"weight": torch.randint(0, 256, (planes, n_out, n_in // 8), dtype=torch.uint8)}
    for name, shape in shapes.items():
        tensors[name] = (torch.rand(shape) - 0.3).half() if name in names else None
    return tensors


def by_hand(x: Tensor, t: dict[str, Tensor | None], group: int | None) -> Tensor:
    """One number at a time, in Python floats: x `[tokens, in]` to `[tokens, out]`."""
    weight = t["weight"]
    assert weight is not None
    planes, n_out, n_in = weight.shape[0], weight.shape[1], 8 * weight.shape[2]
    rows = []
    for token in x.double():
        gate = torch.ones(1, dtype=torch.float64)
        if t["router"] is not None:
            logits = torch.tensor([sum(float(r) * float(v) for r, v in zip(row, token, strict=True)) for row in t["router"]])
            gate = torch.tensor([float(v) for v in logits.double().exp() / logits.double().exp().sum()])
        row = []
        for i in range(n_out):
            total = 0.0 if t["bias"] is None else float(t["bias"][i])
            for p in range(planes):
                inner = 0.0
                for j in range(n_in):
                    sign = 1.0 if (int(weight[p, i, j // 8]) >> (j % 8)) & 1 else -1.0
                    s_in = (
                        1.0 if t["scale_in"] is None else sum(float(g) * float(s[j]) for g, s in zip(gate, t["scale_in"][p], strict=True))
                    )
                    s_group = 1.0 if t["scale_group"] is None else float(t["scale_group"][p, i, j // (group or n_in)])
                    inner += sign * s_group * s_in * float(token[j])
                s_out = 1.0 if t["scale_out"] is None else sum(float(g) * float(s[i]) for g, s in zip(gate, t["scale_out"][p], strict=True))
                total += s_out * inner
            row.append(total)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Within the error that kernels may have."""
    assert (actual.double() - expected.double()).norm() <= 1e-4 * expected.double().norm()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_linear_is_the_equation(case: tuple[Any, ...]) -> None:
    tensors = make(*case)
    x = torch.randn(3, case[2])
    expected = by_hand(x, tensors, case[4])
    assert_near(packed_linear(x, **tensors), expected)
    bf16 = packed_linear(x.bfloat16(), **tensors)
    assert bf16.dtype == torch.bfloat16
    torch.testing.assert_close(bf16.double(), by_hand(x.bfloat16().float(), tensors, case[4]), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(("case", "dtype"), itertools.product(CASES, [torch.float32, torch.bfloat16]), ids=str)
def test_packed_linear_passes_opcheck(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    tensors = make(*case)
    names = ("weight", "scale_in", "scale_out", "router", "scale_group", "bias")
    for shape in ((case[2],), (2, 3, case[2])):
        torch.library.opcheck(torch.ops.bimos.packed_linear.default, (torch.randn(shape).to(dtype), *(tensors[n] for n in names)))


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_packed_linear_compiles_whole(case: tuple[Any, ...]) -> None:
    tensors = make(*case)
    compiled = torch.compile(lambda x: packed_linear(x * 2, **tensors) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, case[2])
    assert torch.equal(compiled(x), packed_linear(x * 2, **tensors) + 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_input_gradient(case: tuple[Any, ...]) -> None:
    tensors = make(*case)
    x = torch.randn(2, case[2], requires_grad=True)
    grad = torch.randn(2, case[3])
    y = packed_linear(x, **tensors)
    assert_near(y.detach(), torch.ops.bimos.packed_linear(x.detach(), *tensors.values()))
    (got,) = torch.autograd.grad(y, x, grad)
    for j in range(0, case[2], 5):  # central differences
        step = torch.zeros_like(x)
        step[:, j] = 1e-2
        with torch.no_grad():
            difference = (reference.packed_linear(x + step, **tensors) - reference.packed_linear(x - step, **tensors)) / 2e-2
        torch.testing.assert_close(got[:, j], (difference * grad).sum(-1), rtol=2e-2, atol=2e-2)


def test_a_device_overrides_one_dispatch_key() -> None:
    tensors = make(*CASES[0])
    x = torch.randn(2, 24)
    library = torch.library.Library("bimos", "IMPL")
    library.impl("packed_linear", lambda x, weight, *rest: x.new_full((*x.shape[:-1], weight.shape[1]), 7), "CPU")
    try:
        assert (packed_linear(x, **tensors) == 7).all()
    finally:
        library._destroy()
    assert (packed_linear(x, **tensors) != 7).any()


def test_wrong_shapes_are_refused_while_tracing() -> None:
    tensors = make(*CASES[0])
    compiled = torch.compile(lambda x, t: packed_linear(x, **t), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="features"):
        compiled(torch.randn(2, 16), tensors)
    with pytest.raises(Exception, match="scale_in has shape"):
        compiled(torch.randn(2, 24), tensors | {"router": None})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_int8_linear(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (37, 24), dtype=torch.int8)
    scale = (torch.rand(37, 1) / 100).half()
    b = torch.randn(37).half() if bias else None
    x = torch.randn(2, 3, 24).to(dtype)
    expected = x.double() @ (weight.double() * scale.double()).T + (0 if b is None else b.double())
    y = int8_linear(x, weight, scale, b)
    assert y.dtype == dtype
    if dtype == torch.float32:
        assert_near(y, expected)
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)
    torch.library.opcheck(torch.ops.bimos.int8_linear.default, (x, weight, scale, b))
    compiled = torch.compile(int8_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, scale, b), y)


def test_int8_linear_in_chunks_and_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (50, 16), dtype=torch.int8)
    scale = torch.rand(50, 1).half()
    x = torch.randn(4, 16)
    whole = reference.int8_linear(x, weight, scale)
    rows: list[int] = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: (rows.append(len(w)), linear(x, w))[1])
    monkeypatch.setattr(reference, "HEAD_CHUNK_BYTES", 7 * 16 * 4)
    torch.testing.assert_close(reference.int8_linear(x, weight, scale), whole, rtol=1e-5, atol=1e-4)
    assert rows == [7] * 7 + [1]
    # 4096 inputs of 16 times 127 are far beyond float16's 65504; the scaled sum is not.
    y = int8_linear(
        torch.full((1, 4096), 1.0, dtype=torch.float16), torch.full((1, 4096), 127, dtype=torch.int8), torch.tensor([[0.01]]).half()
    )
    torch.testing.assert_close(y.float(), torch.tensor([[4096 * 1.27]]), rtol=5e-3, atol=0)


def test_int8_input_gradient() -> None:
    weight = torch.randint(-127, 128, (5, 8), dtype=torch.int8)
    scale = torch.rand(5, 1).half()
    x = torch.randn(2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(int8_linear(x, weight, scale).sum(), x)
    torch.testing.assert_close(grad, (weight.float() * scale.float()).sum(0).expand(2, 8))
