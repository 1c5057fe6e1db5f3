"""Products with shared signs by tables: values and gradients against float64, and that tables are left alone where they do not pay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimos.kernels import native
from bimos.methods import ste
from bimos.methods.planes import Plane, SignPlane
from bimos.methods.ste import SharedSigns, sign_linear

needs_kernels = pytest.mark.skipif(native.isa() is None, reason=f"no C++ kernels: {native.problem}")


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables pay on every level, so that any processor tests them."""
    monkeypatch.setattr(ste, "tables_pay", lambda latent, dtype: all(n % 8 == 0 for n in latent.shape))


def passes(latent: nn.Parameter, x: Tensor, towards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of x and gradient of the latent, of two halves of a batch."""
    x = x.detach().requires_grad_()
    with SharedSigns([SignPlane(latent)], x.dtype):
        y = torch.stack([sign_linear(half, latent) for half in x])
        (y * towards).sum().backward()
    assert x.grad is not None and latent.grad is not None
    grad, latent.grad = latent.grad, None
    return y.detach(), x.grad, grad


@needs_kernels
@pytest.mark.parametrize(("out", "n_in"), [(8, 8), (40, 72), (200, 576), (1536, 64)])
@pytest.mark.parametrize("tokens", [1, 3, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tables_give_what_products_give(out: int, n_in: int, tokens: int, dtype: torch.dtype, tables: None) -> None:
    torch.manual_seed(out)
    latent = nn.Parameter(torch.randn(out, n_in))
    with torch.no_grad():
        latent[0, :3] = torch.tensor([0.0, -0.0, -1e-30])
    x, towards = torch.randn(2, tokens, n_in).to(dtype), torch.randn(2, tokens, out).to(dtype)
    signs = torch.where(latent.detach() >= 0, 1.0, -1.0).double()
    expected = x.double() @ signs.T
    of_signs = torch.einsum("bto,bti->oi", towards.double(), x.double()) * (latent.detach().abs() < 1)
    y, of_x, of_latent = passes(latent, x, towards)
    assert y.dtype == of_x.dtype == dtype and of_latent.dtype == torch.float32
    for actual, wanted in ((y, expected), (of_x, towards.double() @ signs), (of_latent, of_signs)):
        assert (actual.double() - wanted).norm() < 2e-2 * wanted.norm()  # sums of four inputs are rounded to 8 bits
    assert not hasattr(latent, "shared_signs")


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("plane", list(Plane))
def test_tables_of_one_pass_are_those_of_shared_signs(dtype: torch.dtype, plane: Plane, tables: None) -> None:
    torch.manual_seed(3)
    latent = nn.Parameter(torch.randn(40, 72))
    x, towards = torch.randn(33, 72).to(dtype), torch.randn(33, 40).to(dtype)
    found = []
    for context in (SharedSigns([SignPlane(latent, plane)], dtype), ste.by_tables()):
        inputs = x.detach().requires_grad_()
        with context:
            y = sign_linear(inputs, latent, plane)
            (y * towards).sum().backward()
        found.append((y.detach(), inputs.grad, latent.grad))
        latent.grad = None
    for shared, fresh in zip(*found, strict=True):
        assert shared is not None and fresh is not None and torch.equal(shared, fresh)
    outside = sign_linear(x, latent, plane)
    assert not torch.equal(outside, found[0][0])  # by torch, which rounds no sums
    assert (outside.float() - found[0][0].float()).norm() < 2e-2 * outside.float().norm()


@pytest.mark.parametrize("plane", list(Plane))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_signs_of_nobody_else_are_made_again_for_gradients(plane: Plane, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    latent = nn.Parameter(torch.randn(40, 72))
    x, towards = torch.randn(3, 11, 72), torch.randn(3, 11, 40)
    found, sizes = [], []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != latent.data_ptr():
            sizes.append(tensor.numel())
        return tensor

    for product in (sign_linear, lambda x, latent, plane: F.linear(x, ste.sign_ste(latent, x, plane))):
        inputs = x.detach().requires_grad_()
        with torch.autocast("cpu", enabled=dtype == torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
            y = product(inputs, latent, plane)
        (y * towards).sum().backward()
        found.append((y.detach(), inputs.grad, latent.grad))
        latent.grad = None
        if len(found) == 1:
            assert max(sizes) == x.numel() < latent.numel()
    for made_again, kept in zip(*found, strict=True):
        assert made_again is not None and kept is not None and made_again.dtype == kept.dtype
        torch.testing.assert_close(made_again, kept)


def test_one_vector_has_a_gradient() -> None:
    latent, x = nn.Parameter(torch.rand(5, 16) - 0.5), torch.randn(16, requires_grad=True)
    sign_linear(x, latent).sum().backward()
    assert x.grad is not None and latent.grad is not None
    torch.testing.assert_close(latent.grad, x.detach().expand(5, 16))


@needs_kernels
def test_signs_are_there_for_whoever_asks_beside_tables(tables: None) -> None:
    torch.manual_seed(0)
    latent, x = nn.Parameter(torch.rand(16, 24) * 1.8 - 0.9), torch.randn(5, 24).bfloat16()
    with SharedSigns([SignPlane(latent)], torch.bfloat16):
        (sign_linear(x, latent) + x @ ste.sign_ste(latent, x).T).sum().backward()
    assert latent.grad is not None
    torch.testing.assert_close(latent.grad, (2 * x.float().sum(0)).expand(16, 24), rtol=2e-2, atol=2e-2)


@needs_kernels
def test_signs_as_bits() -> None:
    torch.manual_seed(0)
    latent = torch.randn(24, 40)
    latent[3, 5] = 0.0
    signs = torch.where(latent >= 0, 1.0, -1.0)
    from bimos.kernels.reference import unpack_signs

    assert torch.equal(unpack_signs(torch.ops.bimos.sign_bits(latent, False))[0], signs)
    assert torch.equal(unpack_signs(torch.ops.bimos.sign_bits(latent, True))[0], signs.T)
    assert torch.equal(unpack_signs(torch.ops.bimos.sign_bits(latent.T, True))[0], signs)  # not contiguous
    with pytest.raises(RuntimeError, match="multiple of 8"):
        torch.ops.bimos.sign_bits(torch.zeros(12, 8), True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elsewhere_torch_multiplies(dtype: torch.dtype, tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ste, "_TableProduct", None)  # whoever calls it fails
    latent = nn.Parameter(torch.randn(12, 16))
    x, towards = torch.randn(2, 5, 16).to(dtype), torch.randn(2, 5, 12).to(dtype)
    y, _, _ = passes(latent, x, towards)
    torch.testing.assert_close(y, x @ torch.where(latent.detach() >= 0, 1.0, -1.0).to(dtype).T)


@pytest.mark.parametrize(
    ("level", "has_matrix_unit", "multiplies_bfloat16", "pays_in"),
    [
        ("avx512", False, True, {torch.bfloat16}),
        ("avx512", True, True, set()),
        ("amx", True, True, set()),
        ("avx2", False, True, set()),  # a lower level was asked for
        ("avx2", False, False, {torch.float32}),
        (None, False, False, set()),
    ],
)
def test_tables_pay_only_where_they_were_measured(
    level: str | None, has_matrix_unit: bool, multiplies_bfloat16: bool, pays_in: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    latent = torch.zeros(16, 16)
    monkeypatch.setattr(native, "isa", lambda: level)
    monkeypatch.setattr(native, "_has_matrix_unit", lambda: has_matrix_unit)
    monkeypatch.setattr(native, "_multiplies_bfloat16", lambda: multiplies_bfloat16)
    assert {dtype for dtype in (torch.float32, torch.bfloat16, torch.float64) if ste.tables_pay(latent, dtype)} == pays_in
    for dtype in pays_in:
        assert not any(ste.tables_pay(other, dtype) for other in (torch.zeros(12, 16), latent.double(), latent.to("meta")))
    wanted = torch.bfloat16 if multiplies_bfloat16 else torch.float32
    assert native.fast_dtype(torch.bfloat16) == wanted and native.fast_dtype(torch.float64) == torch.float64
