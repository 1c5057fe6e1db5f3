"""The Triton kernels of packed linears: bits are read packed and become signs in registers.

    y[t, o] = sum_p  s_out_p[t, o] * sum_i B_p[o, i] * (s_in_p[t, i] * x[t, i])  +  bias[o]

What s_in_p and s_out_p are says `bimos.kernels.reference`. For a token or a few, one kernel, `product`, can do all of it: every program
makes the gate once more, from `x` and the router in the cache. For many tokens `prepare` comes first and writes gates and scaled inputs,
which `product` would otherwise make anew for every block of outputs.

A byte holds 8 inputs of a row. Bit b of a tile of bytes `[out, bytes]` is a tile of signs for the inputs `8 * byte + b`: eight products of
that width instead of one that is eight times as wide, and nothing is ever rearranged in registers. So `prepare` writes its inputs as
`[planes, tokens, 8, in/8]`. Inputs may be divided between programs, which write sums in float32 that `add_up` adds in their order: the
same call with the same tiles gives the same bits.

Sums are float32. Inputs are rounded to the dtype of `x` after scaling where `tl.dot` multiplies them, as in the reference. What is not
finite makes its token NaN, on every device.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gate(
    x: tl.tensor,  # at the first token's first input
    router: tl.tensor,
    token: tl.tensor,
    is_token: tl.tensor,
    n_in: tl.tensor,
    stride_token: tl.tensor,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """softmax(x @ router^T) of some tokens, float32 `[tokens, PADDED]`; experts beyond EXPERTS get nothing."""
    expert = tl.arange(0, PADDED)
    logits = tl.zeros([token.shape[0], PADDED], tl.float32)
    for start in range(0, n_in, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_column = column < n_in
        address = x + token[:, None] * stride_token + column[None, :]
        values = tl.load(address, mask=is_token[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        address = router + expert[:, None] * n_in + column[None, :]
        weights = tl.load(address, mask=(expert < EXPERTS)[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        logits += tl.sum(values[:, None, :] * weights[None, :, :], 2)
    logits = tl.where((expert < EXPERTS)[None, :], logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def _mixed(
    scale: tl.tensor,
    gate: tl.tensor,
    column: tl.tensor,
    is_column: tl.tensor,
    width: tl.tensor,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
) -> tl.tensor:
    """`scale [EXPERTS, width]` at some columns, mixed by `gate [tokens, PADDED]`: float32 `[tokens, columns]`; one row with one expert."""
    if EXPERTS == 1:
        mixed = tl.load(scale + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    else:
        expert = tl.arange(0, PADDED)
        mixed = tl.zeros([gate.shape[0], column.shape[0]], tl.float32)
        for e in tl.static_range(EXPERTS):
            share = tl.sum(tl.where((expert == e)[None, :], gate, 0.0), 1)
            row = tl.load(scale + e * width + column, mask=is_column, other=0.0).to(tl.float32)
            mixed += share[:, None] * row[None, :]
    return mixed


@triton.jit
def _signed(magnitude: tl.tensor, minus: tl.tensor, BIT: tl.constexpr) -> tl.tensor:
    """`magnitude`, floats, where bit BIT of the bytes `minus` is 0, `-magnitude` where it is 1: a shift and two bits' logic, no branch."""
    if magnitude.dtype.primitive_bitwidth == 32:
        word = ((minus.to(tl.uint32) << (31 - BIT)) & 0x80000000) ^ magnitude.to(tl.uint32, bitcast=True)
    else:
        word = ((minus.to(tl.uint16) << (15 - BIT)) & 0x8000) ^ magnitude.to(tl.uint16, bitcast=True)
    return word.to(magnitude.dtype, bitcast=True)


@triton.jit
def add_dot(total: tl.tensor, left: tl.tensor, right: tl.tensor, IS_WIDE: tl.constexpr, PRECISION: tl.constexpr) -> tl.tensor:
    """`total + left @ right`, in float32.

    IS_WIDE: the interpreter multiplies no bfloat16; operands are rounded to it and multiplied in float32, which is the same. PRECISION is
    `tl.dot`'s for float32, or "halves": two products in tf32, of the first 11 bits of `right` and of the rest, where `left` is exact in it.
    """
    if IS_WIDE:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    elif PRECISION == "halves":
        high = (right.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
        total = tl.dot(left, high, total, input_precision="tf32")
        total = tl.dot(left, right - high, total, input_precision="tf32")
    else:
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def _pick(which: tl.tensor, first: tl.tensor, second: tl.tensor, third: tl.tensor, COUNT: tl.constexpr) -> tl.tensor:
    """The pointer, or number, of linear `which` of COUNT."""
    if COUNT > 1:
        first = tl.where(which == 1, second, first)
    if COUNT > 2:
        first = tl.where(which == 2, third, first)
    return first


@triton.jit(do_not_specialize=["tokens"])
def prepare(
    scaled: tl.tensor,
    gate: tl.tensor | None,
    x: tl.tensor,
    scale_in: tl.tensor | None,
    scale_in_1: tl.tensor | None,
    scale_in_2: tl.tensor | None,
    router: tl.tensor | None,
    router_1: tl.tensor | None,
    router_2: tl.tensor | None,
    tokens: tl.tensor,
    n_bytes: tl.tensor,
    stride_token: tl.tensor,
    COUNT: tl.constexpr,
    PLANES: tl.constexpr,
    SHARED: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    BLOCK_ROUTER: tl.constexpr,
) -> None:
    """A token's gate and BLOCK_BYTES of its scaled inputs, or all of them, for one of COUNT linears.

    They are `gate [COUNT, tokens, PADDED]` and `scaled [COUNT, PLANES, tokens, 8, in/8]`. A grid `[tokens, 1, COUNT]` makes each gate once;
    `[tokens, blocks, COUNT]` is for few tokens, which would leave a GPU idle. SHARED: nothing is scaled, all have the first one's inputs.
    """
    token = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)
    n_in = n_bytes * 8
    which = tl.program_id(2)
    if not SHARED:
        scaled += tl.cast(which, tl.int64) * PLANES * tokens * n_in
    if scale_in is not None:
        scale_in = _pick(which, scale_in, scale_in_1, scale_in_2, COUNT)
    if router is not None:
        router = _pick(which, router, router_1, router_2, COUNT)
        gate += which * tokens * PADDED
    share = tl.zeros([1, PADDED], tl.float32)
    if router is not None:
        share = _gate(x, router, token, token < tokens, n_in, stride_token, EXPERTS, PADDED, BLOCK_ROUTER)
        tl.store(gate + token[:, None] * PADDED + tl.arange(0, PADDED)[None, :], share)
    for block in range(tl.program_id(1), tl.cdiv(n_bytes, BLOCK_BYTES), tl.num_programs(1)):
        byte = block * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
        column = block * BLOCK_BYTES * 8 + tl.arange(0, 8 * BLOCK_BYTES)
        is_column = column < n_in
        values = tl.load(x + token[:, None] * stride_token + column[None, :], mask=is_column[None, :], other=0.0).to(tl.float32)
        for plane in range(PLANES):
            result = values
            if scale_in is not None:
                result *= _mixed(scale_in + plane * EXPERTS * n_in, share, column, is_column, n_in, EXPERTS, PADDED)
            by_bit = tl.trans(tl.reshape(result, [BLOCK_BYTES, 8])).to(scaled.dtype.element_ty)
            address = scaled + (plane * tokens + token)[:, None] * n_in + tl.arange(0, 8)[:, None] * n_bytes + byte[None, :]
            tl.store(address, by_bit, mask=(byte < n_bytes)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def product(
    y: tl.tensor,
    y_1: tl.tensor | None,
    y_2: tl.tensor | None,
    x: tl.tensor,
    gate: tl.tensor | None,
    weight: tl.tensor,
    weight_1: tl.tensor | None,
    weight_2: tl.tensor | None,
    scale_in: tl.tensor | None,
    scale_in_1: tl.tensor | None,
    scale_in_2: tl.tensor | None,
    scale_out: tl.tensor | None,
    scale_out_1: tl.tensor | None,
    scale_out_2: tl.tensor | None,
    router: tl.tensor | None,
    router_1: tl.tensor | None,
    router_2: tl.tensor | None,
    scale_group: tl.tensor | None,
    scale_group_1: tl.tensor | None,
    scale_group_2: tl.tensor | None,
    bias: tl.tensor | None,
    bias_1: tl.tensor | None,
    bias_2: tl.tensor | None,
    tokens: tl.tensor,
    n_bytes: tl.tensor,
    n_out: tl.tensor,
    n_out_1: tl.tensor,
    n_out_2: tl.tensor,
    groups: tl.tensor,
    tiles_each: tl.tensor,
    stride_linear: tl.tensor,
    stride_plane: tl.tensor,
    stride_token: tl.tensor,
    stride_bit: tl.tensor,
    stride_byte: tl.tensor,
    COUNT: tl.constexpr,
    PLANES: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    IS_DOT: tl.constexpr,
    IS_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    BLOCK_ROUTER: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Tile `[BLOCK_OUT, BLOCK_TOKENS]` of the result of one of COUNT linears, or of the sum over `tiles_each` tiles of the inputs.

    IS_WHOLE: `y`, `y_1` and `y_2` are `[tokens, out]` of the linears. Else `y` is, for each of `splits` sums, all of the first linear, then
    of the others. What linears store is alike but for `out`.
    `x` is `[tokens, in]`, or what `prepare` made of it, with strides to match. Of router and gate at most one is there: the gate is made
    here, or was by `prepare`. Without IS_DOT, BLOCK_TOKENS is 1. IS_WIDE and PRECISION: see `add_dot`.
    """
    block = tl.program_id(0)
    which = 0
    before = 0
    every = n_out
    if COUNT > 1:
        blocks = tl.cdiv(n_out, BLOCK_OUT)
        which = tl.where(block >= blocks, 1, 0)
        block -= tl.where(which == 1, blocks, 0)
        before = tl.where(which == 1, n_out, 0)
        every += n_out_1
        if COUNT > 2:
            blocks = tl.cdiv(n_out_1, BLOCK_OUT)
            is_third = (which == 1) & (block >= blocks)
            block -= tl.where(is_third, blocks, 0)
            before += tl.where(is_third, n_out_1, 0)
            which += tl.where(is_third, 1, 0)
            every += n_out_2
        weight = _pick(which, weight, weight_1, weight_2, COUNT)
        if scale_in is not None:
            scale_in = _pick(which, scale_in, scale_in_1, scale_in_2, COUNT)
        if scale_out is not None:
            scale_out = _pick(which, scale_out, scale_out_1, scale_out_2, COUNT)
        if router is not None:
            router = _pick(which, router, router_1, router_2, COUNT)
        if scale_group is not None:
            scale_group = _pick(which, scale_group, scale_group_1, scale_group_2, COUNT)
        if bias is not None:
            bias = _pick(which, bias, bias_1, bias_2, COUNT)
        n_out = _pick(which, n_out, n_out_1, n_out_2, COUNT)
        if IS_WHOLE:
            y = _pick(which, y, y_1, y_2, COUNT)
        x += which * tl.cast(stride_linear, tl.int64)
        if gate is not None:
            gate += which * tokens * PADDED
    row = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    token = (tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    split = tl.program_id(2)
    is_row, is_token = row < n_out, token < tokens
    n_in = n_bytes * 8
    IS_BYTES: tl.constexpr = GROUP_SIZE % 8 == 0  # a byte is of one group
    share = tl.zeros([BLOCK_TOKENS, PADDED], tl.float32)
    if router is not None:
        share = _gate(x, router, token, is_token, n_in, stride_token, EXPERTS, PADDED, BLOCK_ROUTER)
    if gate is not None:
        share = tl.load(gate + token[:, None] * PADDED + tl.arange(0, PADDED)[None, :], mask=is_token[:, None], other=0.0)
    first = split * tiles_each
    last = tl.minimum(first + tiles_each, tl.cdiv(n_bytes, BLOCK_BYTES))
    total = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.float32)
    for plane in range(PLANES):
        plane_row = (plane * n_out + row).to(tl.int64)
        x_plane = x + plane * tl.cast(stride_plane, tl.int64)
        part = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.float32)
        by_byte = tl.zeros([BLOCK_OUT, BLOCK_BYTES], tl.float32)
        for tile in tl.range(first, last, num_stages=STAGES):
            byte = tile * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
            is_byte = byte < n_bytes
            is_weight = is_row[:, None] & is_byte[None, :]
            bits = tl.load(weight + plane_row[:, None] * n_bytes + byte[None, :], mask=is_weight, other=0)
            if GROUP_SIZE > 0 and IS_BYTES:
                address = scale_group + plane_row[:, None] * groups + (byte * 8 // GROUP_SIZE)[None, :]
                factor = tl.load(address, mask=is_weight, other=0.0).to(tl.float32)
            for bit in tl.static_range(8):
                column = byte * 8 + bit
                if GROUP_SIZE > 0 and not IS_BYTES:
                    address = scale_group + plane_row[:, None] * groups + (column // GROUP_SIZE)[None, :]
                    factor = tl.load(address, mask=is_weight, other=0.0).to(tl.float32)
                address = x_plane + token[:, None] * stride_token + bit * stride_bit + byte[None, :] * stride_byte
                values = tl.load(address, mask=is_token[:, None] & is_byte[None, :], other=0.0)
                if scale_in is not None:
                    mixed = _mixed(scale_in + plane * EXPERTS * n_in, share, column, is_byte, n_in, EXPERTS, PADDED)
                    values = values.to(tl.float32) * mixed
                if IS_DOT:
                    magnitude = tl.full([BLOCK_OUT, BLOCK_BYTES], 1.0, x.dtype.element_ty)
                    if GROUP_SIZE > 0:
                        magnitude = factor.to(x.dtype.element_ty)
                    signs = _signed(magnitude, ~bits, bit)
                    inputs = tl.trans(values.to(x.dtype.element_ty))
                    part = add_dot(part, signs, inputs, IS_WIDE, PRECISION)
                else:
                    values = values.to(tl.float32)
                    signed = tl.where(((bits >> bit) & 1) == 1, values, -values)
                    if GROUP_SIZE > 0:
                        signed *= factor
                    by_byte += signed
        if not IS_DOT:
            part = tl.sum(by_byte, 1)[:, None]
        part = tl.where(tl.abs(part) < float("inf"), part, float("nan"))
        if scale_out is not None:
            part *= tl.trans(_mixed(scale_out + plane * EXPERTS * n_out, share, row, is_row, n_out, EXPERTS, PADDED))
        total += part
    if bias is not None:
        offset = tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)
        total += tl.where(split == 0, offset, 0.0)[:, None]
    if not IS_WHOLE:
        y += tl.cast(split, tl.int64) * tokens * every + tl.cast(before, tl.int64) * tokens
    address = y + token[None, :] * n_out + row[:, None]
    tl.store(address, total.to(y.dtype.element_ty), mask=is_row[:, None] & is_token[None, :])


@triton.jit
def add_up(
    y: tl.tensor,
    y_1: tl.tensor | None,
    y_2: tl.tensor | None,
    parts: tl.tensor,
    splits: tl.tensor,
    count: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """From `parts [splits, count]`, one after the other: `first` numbers of `y`, then `second` of `y_1`, then all of `y_2`."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = index < count
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * count + index, mask=is_there, other=0.0)
    total = total.to(y.dtype.element_ty)
    tl.store(y + index, total, mask=index < first)
    if COUNT > 1:
        index -= first
        tl.store(y_1 + index, total, mask=(index >= 0) & (index < second))
    if COUNT > 2:
        index -= second
        tl.store(y_2 + index, total, mask=(index >= 0) & is_there)
