"""The Triton kernel for int8 heads against float64: on a GPU where there is one, else in Triton's interpreter (see conftest.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed (the extra 'gpu')")

from bimos.kernels import int8_linear, reference, triton_head

if not triton_head.INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU, and Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cpu" if triton_head.INTERPRETED else "cuda"
ERRORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@settings(max_examples=20 if DEVICE == "cpu" else 200, deadline=None)
@given(
    tokens=st.sampled_from([1, 3, 16, 17, 70]),
    n_in=st.integers(1, 300),
    n_out=st.integers(1, 200),
    dtype=st.sampled_from(list(ERRORS)),
    bias=st.booleans(),
    layout=st.sampled_from(["rows", "wider", "every second", "transposed"]),
)
def test_of_any_shape(tokens: int, n_in: int, n_out: int, dtype: torch.dtype, bias: bool, layout: str) -> None:
    torch.manual_seed(tokens)
    x = {
        "rows": lambda: torch.randn(tokens, n_in),
        "wider": lambda: torch.randn(2, tokens, n_in + 3)[1, :, 3:],
        "every second": lambda: torch.randn(tokens, 2 * n_in)[:, ::2],
        "transposed": lambda: torch.randn(n_in, tokens).T,
    }[layout]().to(DEVICE, dtype)
    weight = torch.randint(-128, 128, (n_out, n_in), dtype=torch.int8).to(DEVICE)
    scale = (torch.rand(n_out, 1) * 0.01).half().to(DEVICE)
    b = torch.randn(n_out).half().to(DEVICE) if bias else None
    y = triton_head.int8_linear(x, weight, scale, b)
    exact = x.double() @ weight.double().T * scale.double().T + (0 if b is None else b.double())
    size = (x.double().abs() @ weight.double().abs().T * scale.double().T).norm() / n_in**0.5
    assert y.dtype == dtype and y.shape == exact.shape and y.is_contiguous()
    assert (y.double() - exact).norm() <= ERRORS[dtype] * max(exact.norm(), size)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_what_is_not_finite_stays_with_its_token(value: float) -> None:
    x, weight = torch.randn(3, 40, device=DEVICE), torch.randint(-128, 128, (9, 40), dtype=torch.int8, device=DEVICE)
    scale = torch.ones(9, 1, device=DEVICE)
    clean = triton_head.int8_linear(x, weight, scale, None)
    x[1, 7] = value
    y = triton_head.int8_linear(x, weight, scale, None)
    assert not y[1].isfinite().any() and torch.equal(y[[0, 2]], clean[[0, 2]])


def test_what_is_not_covered_goes_to_the_reference() -> None:
    weight, scale = torch.ones(5, 8, dtype=torch.int8, device=DEVICE), torch.ones(5, 1, device=DEVICE)
    assert triton_head.int8_linear(torch.empty(0, 8, device=DEVICE), weight, scale, None).shape == (0, 5)
    x = torch.randn(2, 8, device=DEVICE).double()
    y = triton_head.int8_linear(x, weight, scale, None)
    assert y.dtype == torch.float64 and torch.equal(y, reference.int8_linear(x, weight, scale))
    with pytest.raises(RuntimeError):
        triton_head.int8_linear(torch.ones(2, 7, device=DEVICE), weight, scale, None)
    with pytest.raises((RuntimeError, IndexError)):
        triton_head.int8_linear(torch.ones(2, 8, device=DEVICE), weight, scale[:3], None)


@pytest.fixture
def dispatched() -> Iterator[None]:
    """The op runs the kernel on DEVICE: on a GPU it does by itself."""
    if DEVICE == "cuda":
        yield
        return
    library = torch.library.Library("bimos", "IMPL")
    library.impl("int8_linear", triton_head.int8_linear, "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.mark.filterwarnings("ignore:Warning only once")
def test_opcheck_and_compile(dispatched: None) -> None:
    weight = torch.randint(-128, 128, (9, 40), dtype=torch.int8, device=DEVICE)
    arguments = torch.randn(2, 40, device=DEVICE), weight, torch.rand(9, 1, device=DEVICE), torch.randn(9, device=DEVICE)
    torch.library.opcheck(torch.ops.bimos.int8_linear.default, arguments)
    compiled = torch.compile(int8_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), triton_head.int8_linear(*arguments))
