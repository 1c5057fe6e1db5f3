"""The C++ kernels against the equations in float64, at every level that this processor has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor

from bimos import BimosError
from bimos.kernels import int8_linear, native, packed_linear, reference
from bimos.packing.linear import PackedLinear
from levels import LEVELS

pytestmark = pytest.mark.skipif(native.isa() is None, reason=f"no C++ kernels: {native.problem}")

HIGHEST = native.isa()
# Root of the mean square error relative to that of the result; float32 is the kernels' own.
ERRORS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


# Not the fixture `level`: hypothesis takes none that is made anew for every test.
@pytest.fixture(autouse=True)
def highest_level_afterwards() -> Iterator[None]:
    yield
    if HIGHEST:
        native.use_isa(HIGHEST)


def make(planes: int, experts: int, n_in: int, n_out: int, group: int | None, scales: bool, bias: bool) -> dict[str, Any]:
    def half(*shape: int) -> Tensor:
        return (torch.rand(shape) + 0.1).half()

    return {
        "weight": torch.randint(0, 256, (planes, n_out, n_in // 8), dtype=torch.uint8),
        "scale_in": half(planes, experts, n_in) if scales or experts > 1 else None,
        "scale_out": half(planes, experts, n_out) if scales or experts > 1 else None,
        "router": torch.randn(experts, n_in).half() * n_in**-0.5 if experts > 1 else None,
        "scale_group": half(planes, n_out, -(-n_in // group)) if group else None,
        "bias": torch.randn(n_out).half() if bias else None,
    }


def make_full(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensors.get(name) for name in ("weight", "scale_in", "scale_out", "router", "scale_group", "bias")}


def exact(x: Tensor, tensors: dict[str, Any], group_size: int = 0) -> Tensor:
    doubles = {name: t if t is None or t.dtype == torch.uint8 else t.double() for name, t in tensors.items()}
    gate = None if doubles["router"] is None else torch.softmax(x.double() @ doubles["router"].T, -1)
    weight = tensors["weight"]
    assert weight is not None
    y = torch.zeros(*x.shape[:-1], weight.shape[1], dtype=torch.float64)
    for plane in range(weight.shape[0]):
        signs = reference.unpack_signs(weight[plane], torch.float64)
        if (group := doubles["scale_group"]) is not None:
            size = group_size or signs.shape[1] // group.shape[2]
            signs = signs * group[plane, :, torch.arange(signs.shape[1]) // size]
        mixed = [
            1.0 if s is None else s[plane, 0] if gate is None else gate @ s[plane] for s in (doubles["scale_in"], doubles["scale_out"])
        ]
        y = y + (x.double() * mixed[0]) @ signs.T * mixed[1]
    return y if doubles["bias"] is None else y + doubles["bias"]


def with_int8_sums(x: Tensor, tensors: dict[str, Any], group: int | None) -> Tensor:
    """What `int8` allows, one plane, static scales: the sums of four inputs in steps of a 127th of the largest of their block."""
    scaled = (x * tensors["scale_in"][0, 0].float()).double()
    block = group or 256
    y = torch.zeros(len(x), tensors["weight"].shape[1], dtype=torch.float64)
    signs = reference.unpack_signs(tensors["weight"][0], torch.float64)
    for start in range(0, x.shape[1], block):
        fours = scaled[:, start : start + block].unflatten(1, (-1, 4))
        step = fours.abs().sum(-1).amax(-1) / 127  # [tokens]
        sums = torch.einsum("tgf,ogf->tog", fours, signs[:, start : start + block].unflatten(1, (-1, 4)))
        part = torch.round(sums / step[:, None, None]).sum(-1) * step[:, None]
        if group:
            part = part * tensors["scale_group"][0, :, start // group].double()
        y += part
    return y * tensors["scale_out"][0, 0].double()


def with_int8_inputs(x: Tensor, tensors: dict[str, Any], group: int | None) -> Tensor:
    """What `int8` allows many tokens with the matrix unit: inputs in steps of a 127th of the largest of up to 1152."""
    scaled = (x * tensors["scale_in"][0, 0].float()).double()
    pieces = scaled.split(group or scaled.shape[1], -1)
    assert pieces[0].shape[1] <= 1152
    steps = [piece.abs().amax(-1, keepdim=True) / 127 for piece in pieces]
    rounded = torch.cat([torch.round(piece / step) * step for piece, step in zip(pieces, steps, strict=True)], -1)
    signs = reference.unpack_signs(tensors["weight"][0], torch.float64)
    if group:
        signs = signs * tensors["scale_group"][0].double().repeat_interleave(group, -1)
    return rounded @ signs.T * tensors["scale_out"][0, 0].double()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


shapes = st.fixed_dictionaries(
    {
        "planes": st.integers(1, 3),
        "experts": st.integers(1, 5),
        "n_in": st.integers(1, 90).map(lambda n: 8 * n),
        "n_out": st.integers(1, 150),
        "group": st.sampled_from([None, None, 4, 8, 32, 64, 96]),
        "scales": st.booleans(),
        "bias": st.booleans(),
    }
)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("n_in", [72, 576])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("scales", [False, True])
def test_product_made_in_place(name: str, n_in: int, int8: bool, scales: bool) -> None:
    """One plane of whole tiles needs no sums beside the result: the same to the bit as with a bias of zeros, which does."""
    native.use_isa(name)
    tensors = make(1, 4 if scales else 1, n_in, 128, None, scales, False)
    zeros = {**tensors, "bias": torch.zeros(128).half()}
    for tokens in (1, 7, 11):
        x = torch.randn(tokens, n_in)
        assert torch.equal(packed_linear(x, **tensors, int8=int8), packed_linear(x, **zeros, int8=int8))


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=60, deadline=None)
@given(shape=shapes, tokens=st.integers(1, 40), dtype=st.sampled_from(list(ERRORS)), threads=st.integers(1, 3), tiled=st.booleans())
def test_packed_linear(level: str, shape: dict, tokens: int, dtype: torch.dtype, threads: int, tiled: bool) -> None:
    native.use_isa(level)
    group_size = shape["group"] or 0  # the last group may be shorter
    torch.manual_seed(tokens)
    tensors = make(**shape)
    x = torch.randn(2, tokens, shape["n_in"] + 8)[1, :, 8:].to(dtype)  # rows of a wider matrix, not contiguous
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tiles = native.tile(tensors["weight"], tensors["scale_group"], group_size) if tiled else None
        y = packed_linear(x, **tensors, tiles=tiles, group_size=group_size)
    finally:
        torch.set_num_threads(before)
    assert y.dtype == dtype and y.shape == (tokens, shape["n_out"])
    expected = exact(x, tensors, group_size)
    # A few outputs may cancel to almost nothing: their size is then what random signs would give.
    size = exact(x.abs(), tensors | {"weight": torch.full_like(tensors["weight"], 255)}, group_size).norm() / shape["n_in"] ** 0.5
    assert (y.double() - expected).norm() < ERRORS[dtype] * max(expected.norm(), size)


@pytest.mark.parametrize("level", LEVELS)
def test_wide_layers_in_parts_by_rows_and_by_tokens(level: str) -> None:
    native.use_isa(level)
    torch.manual_seed(0)
    tensors = make(1, 4, 4096, 300, None, True, False)
    tiles = native.tile(tensors["weight"])
    for tokens in (1, 3, 5, 8, 9, 17, 40):
        x = torch.randn(tokens, 4096)
        y = packed_linear(x, **tensors, tiles=tiles)
        assert relative_error(y, exact(x, tensors)) < 1e-4
        for token in range(tokens):  # what stands beside a token does not change it
            alone = packed_linear(x[token], **tensors, tiles=tiles)
            if level == "amx" and tokens > 4:  # many go by matrices, which round otherwise than tables
                assert relative_error(alone, y[token].double()) < 1e-4
            else:
                torch.testing.assert_close(alone, y[token], rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("n_in", "group"), [(568, None), (72, None), (320, 32), (192, 96)])
def test_int8_sums(level: str, n_in: int, group: int | None) -> None:
    native.use_isa(level)
    torch.manual_seed(n_in)
    tensors = make(1, 1, n_in, 130, group, True, False)
    for tokens in (1, 2, 3, 4, 9, 19):
        x = torch.randn(tokens, n_in)
        y = packed_linear(x, **tensors, int8=True)
        # Sums that lie half way between two steps fall to either side: a few of tens of thousands.
        allowed = with_int8_inputs if level == "amx" and tokens > 4 else with_int8_sums
        assert relative_error(y, allowed(x, tensors, group)) < 3e-4
        assert 1e-3 < relative_error(y, exact(x, tensors)) < 2e-2


@pytest.mark.parametrize("level", LEVELS)
def test_int8_sums_of_mixed_experts_and_several_planes(level: str) -> None:
    native.use_isa(level)
    torch.manual_seed(0)
    tensors = make(2, 4, 584, 70, None, True, True)
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, 584)
        assert relative_error(packed_linear(x, **tensors, int8=True), exact(x, tensors)) < 2e-2
    x[2, 5] = float("nan")
    y = packed_linear(x, **tensors, int8=True)
    assert y[2].isnan().all() and y[:2].isfinite().all()


@pytest.mark.parametrize("level", LEVELS)
def test_outliers_keep_their_neighbours(level: str) -> None:
    native.use_isa(level)
    torch.manual_seed(0)
    tensors = make(1, 1, 2048, 200, None, False, False)
    for tokens in (3, 5, 8, 12, 40):
        x = torch.randn(tokens, 2048)
        x[: tokens // 2 + 1, ::100] *= 20
        assert relative_error(packed_linear(x, **tensors), exact(x, tensors)) < 1e-4
        in_one_piece = torch.randn(tokens, 2048)  # of those that share a step
        in_one_piece[0, 7] *= 100
        assert relative_error(packed_linear(in_one_piece, **tensors), exact(in_one_piece, tensors)) < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("group", [None, 8, 32])
@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("level", LEVELS)
def test_what_is_not_finite_comes_out_as_nan(level: str, experts: int, group: int | None, value: float) -> None:
    native.use_isa(level)
    tensors = make(1, experts, 320, 70, group, True, True)
    for tokens in (3, 37):
        x = torch.randn(tokens, 320)
        clean = packed_linear(x, **tensors)
        x[1, 300] = value
        y = packed_linear(x, **tensors)
        assert y[1].isnan().all()
        assert torch.equal(y[0], clean[0]) and torch.equal(y[2:], clean[2:])


@pytest.mark.parametrize("group", [None, 64, 96, 1024])
def test_many_tokens(level: str, group: int | None) -> None:
    """More than are taken at a time, and pieces of inputs, groups and tokens that do not come out even."""
    torch.manual_seed(0)
    tensors = make(2, 2, 1400, 100, group, True, True)
    x = torch.randn(203, 1400)
    assert relative_error(packed_linear(x, **tensors, group_size=group or 0), exact(x, tensors, group or 0)) < 1e-4


def test_no_tokens_and_other_dtypes_go_to_the_reference() -> None:
    tensors = make(1, 2, 64, 9, None, True, True)
    assert packed_linear(torch.empty(0, 64), **tensors).shape == (0, 9)
    x = torch.randn(2, 64)
    assert relative_error(packed_linear(x.double(), **tensors), exact(x, tensors)) < 1e-6
    floats = {name: t if t is None or t.dtype == torch.uint8 else t.float() for name, t in tensors.items()}
    assert torch.equal(packed_linear(x, **floats), reference.packed_linear(x, **floats))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("scale_in", (1, 2, 8), "do not fit"), ("router", (3, 64), "do not fit"), ("bias", (8,), "bias"), ("weight", (1, 9, 4), "features")],
)
def test_wrong_shapes_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    tensors = make(1, 2, 64, 9, None, True, True)
    dtype = torch.uint8 if name == "weight" else torch.float16
    with pytest.raises(RuntimeError, match=message):
        packed_linear(torch.randn(2, 64), **tensors | {name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize("level", LEVELS)
def test_tiles_of_another_level_are_not_trusted(level: str) -> None:
    tensors = make(1, 1, 64, 20, None, True, False)
    others = [native.tile(tensors["weight"]) for other in LEVELS if native.use_isa(other) is None]
    native.use_isa(level)
    x = torch.randn(2, 64)
    for tiles in [*others, torch.zeros(1, 1, 1, dtype=torch.uint8)]:
        assert relative_error(packed_linear(x, **tensors, tiles=tiles), exact(x, tensors)) < 1e-4


def test_a_module_follows_its_tensors() -> None:
    """Tiles are made once, and again when the planes have changed or moved."""
    torch.manual_seed(0)
    first, second = make(1, 2, 64, 20, None, True, False), make(1, 2, 64, 20, None, True, False)
    layer = PackedLinear.from_tensors({name: t for name, t in first.items() if t is not None})
    x = torch.randn(3, 64)
    assert relative_error(layer(x), exact(x, first)) < 1e-4
    tiles = layer.tiles()
    assert tiles is not None and layer.tiles() is tiles and "tiles" not in "".join(layer.state_dict())
    layer.load_state_dict({name: t for name, t in second.items() if t is not None})
    assert relative_error(layer(x), exact(x, second)) < 1e-4
    assert layer.tiles() is not tiles
    assert layer.to("meta").tiles() is None


def test_tiles_of_inference_mode_are_remembered_too() -> None:
    torch.manual_seed(0)
    first, second = ({name: t for name, t in make(1, 2, 64, 20, None, True, False).items() if t is not None} for _ in range(2))
    with torch.inference_mode():
        layer = PackedLinear.from_tensors({name: t.clone() for name, t in first.items()})
        x = torch.randn(3, 64)
        tiles = layer.tiles()
        assert tiles is not None and layer.tiles() is tiles
        layer.load_state_dict(second)
        assert relative_error(layer(x), exact(x, make_full(second))) < 1e-4


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 16, 17])
def test_int8_linear(level: str, dtype: torch.dtype, tokens: int) -> None:
    native.use_isa(level)
    torch.manual_seed(0)
    weight, scale = torch.randint(-127, 128, (5001, 72), dtype=torch.int8), torch.rand(5001, 1).half()
    bias = torch.randn(5001) if tokens % 2 else None
    x = torch.randn(tokens, 72).to(dtype)
    expected = x.double() @ (weight.double() * scale.double()).T + (0 if bias is None else bias.double())
    y = int8_linear(x, weight, scale, bias)
    assert y.dtype == dtype and relative_error(y, expected) < ERRORS[dtype]


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="the stable ABI hands messages on from 2.13")
def test_what_the_reference_raises_is_said() -> None:
    head = torch.zeros(8, 64, dtype=torch.int8), torch.ones(8, 1), None
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.ops.bimos.int8_linear(torch.zeros(3, 64, dtype=torch.int64), *head)
    planes = torch.zeros(1, 8, 8, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="size of tensor"):
        torch.ops.bimos.packed_linear(torch.zeros(3, 64), planes, torch.ones(2, 1, 32), None, None, None, None, None)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70), width=st.integers(1, 200) | st.integers(4090, 4200), tokens=st.integers(1, 9), outlier=st.sampled_from([1, 20])
)
def test_int8_linear_of_any_shape(level: str, rows: int, width: int, tokens: int, outlier: int) -> None:
    native.use_isa(level)
    torch.manual_seed(rows)
    weight = torch.randint(-128, 128, (rows, width), dtype=torch.int8)
    x = torch.randn(tokens, width) + 1  # a mean that weights made unsigned must not leave behind
    x[:, 0] *= outlier
    y = int8_linear(x, weight, torch.ones(rows, 1))
    expected = x.double() @ weight.double().T
    squares = (weight.double() ** 2).T
    size = (x.double() ** 2 @ squares).sum().sqrt()  # a single sum may cancel to almost nothing
    # Rounding to 1/32512 of the token's largest, whose mean square is a twelfth of a step's: more than 1e-4 only beside outliers.
    step = (x.double().abs().amax(-1, keepdim=True) / 32512).expand(tokens, width)
    several = 1 + 5 / (rows * tokens) ** 0.5  # deviations, that no single sum exceeds
    assert (y - expected).norm() < max(1e-4 * size, several * (step**2 / 12 @ squares).sum().sqrt())
    x[-1, width // 2] = float("nan")
    again = int8_linear(x, weight, torch.ones(rows, 1))
    assert again[-1].isnan().all() and torch.equal(again[:-1], y[:-1])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("weight", [-128, 127])
def test_int8_linear_at_the_ends_of_its_range(level: str, weight: int) -> None:
    native.use_isa(level)
    y = int8_linear(torch.full((2, 12300), -3.0), torch.full((17, 12300), weight, dtype=torch.int8), torch.ones(17, 1))
    assert (y / (-3.0 * weight * 12300) - 1).abs().max() < 1e-5


def test_unknown_levels_are_refused() -> None:
    with pytest.raises(BimosError, match="known: scalar, avx2, avx512"):
        native.use_isa("sse")


@pytest.mark.parametrize("wanted", ["reference", "mmx", *LEVELS])
def test_the_environment_chooses(wanted: str) -> None:
    code = "from bimos.kernels import native; print(native.isa(), '|', native.problem)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"BIMOS_ISA": wanted}, capture_output=True, text=True, check=True)
    isa, problem = done.stdout.strip().split(" |", 1)
    assert isa == (wanted if wanted in LEVELS else "None") and (wanted in LEVELS or wanted in problem)


def test_opcheck_and_compile() -> None:
    tensors = make(2, 3, 64, 20, 32, True, True)
    x, tiles = torch.randn(3, 64), native.tile(tensors["weight"], tensors["scale_group"])
    for int8 in (False, True):
        torch.library.opcheck(torch.ops.bimos.packed_linear.default, (x, *tensors.values(), tiles, int8))
    layer = PackedLinear.from_tensors({name: t for name, t in tensors.items() if t is not None})
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-36])
def test_int8_linear_of_what_it_cannot_scale(level: str, value: float) -> None:
    native.use_isa(level)
    x = torch.full((1, 1024), value)
    y = int8_linear(x, torch.full((5, 1024), 3, dtype=torch.int8), torch.full((5, 1), 0.01).half())
    assert y.isfinite().all() and y.abs().max() < 1e-30 if value < 1 else not y.isfinite().any()
