"""How packed weights become operands of the matrix units, and what happens to a finished tile: inside the dequantising GEMM.

A tile of words [BLOCK_N, C] is decoded plane by plane in registers. A shift, a mask and an "or" put two neighbouring weights into
the low bits of two 16-bit floats whose exponent makes them base + q: 128 + q in bfloat16, 1024 + q in float16, whole and exact.
Scales and zero points are likewise placed into float32 by shifts. No instruction converts whole numbers to floats; those run
at a fraction of the rate of others. Several narrow weights fit into those low bits, so most planes need no shift: a weight is left
where it is, as base + 2**lift · q, and its group's scale and zero point, whose shifts are there anyway, take the power of two away.
With few rows, scales, zero points and sums of all groups of a block are asked for before any is used: nothing prefetches them, and
waiting for each in turn would cost more than computing.
Ignored: many rows; they have a kernel of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import activate, multiply


@triton.jit
def _plane(
    words: tl.tensor, BITS: tl.constexpr, PLANE: tl.constexpr, TOGETHER: tl.constexpr, FLOAT16: tl.constexpr
) -> tl.tensor:
    """Plane PLANE of words [BLOCK_N, C] as base + 2**lift · q [BLOCK_N, 2·C], base 128 in bfloat16 or 1024 in float16.

    TOGETHER planes share one shift; the lift is what a plane's place among them is above the lowest.
    """
    LIFT: tl.constexpr = PLANE % TOGETHER * BITS
    # 0x10001 repeats a mask in both halves of a word.
    fields = (words >> (PLANE * BITS - LIFT)) & ((((1 << BITS) - 1) << LIFT) * 0x10001)
    if FLOAT16:
        pair = fields | 0x64006400
        low = pair.to(tl.int16).to(tl.float16, bitcast=True)
        high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        pair = fields | 0x43004300
        low = pair.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(low, high), [words.shape[0], 2 * words.shape[1]])


@triton.jit
def _scale(code: tl.tensor, BITS: tl.constexpr, PLANE: tl.constexpr, TOGETHER: tl.constexpr) -> tl.tensor:
    """2**−lift times the relative scale of 16-bit codes (as int32): 3 exponent and 5 mantissa bits, placed as float32's own."""
    LIFT: tl.constexpr = PLANE % TOGETHER * BITS
    return (((code & 0xFF) << 18) + ((120 - LIFT) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _zero(
    code: tl.tensor, BITS: tl.constexpr, PLANE: tl.constexpr, TOGETHER: tl.constexpr, FLOAT16: tl.constexpr
) -> tl.tensor:
    """base + 2**lift · zero point: 8 bits placed below the leading one of 128.0 or 1024.0, in steps of 2**(lift + BITS − 8)."""
    LIFT: tl.constexpr = PLANE % TOGETHER * BITS
    if FLOAT16:
        return ((((code & 0xFF00) << (BITS + LIFT)) >> 3) | 0x44800000).to(tl.float32, bitcast=True)
    else:
        return (((code & 0xFF00) << (BITS + LIFT)) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(plane: tl.tensor, scale: tl.tensor, zero: tl.tensor) -> tl.tensor:
    """(q − zero) · scale of a plane, rounded to the plane's type."""
    product = plane.to(tl.float32) * scale[:, None] - (scale * zero)[:, None]
    return product.to(plane.dtype)


@triton.jit
def _below(value: tl.tensor, bound: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """value < bound in the shape of `mask`; comparing first and spreading after loses the type in Triton's interpreter."""
    return tl.zeros(mask.shape, dtype=tl.int32) + value < bound


@triton.jit
def _code(
    code_ptrs: tl.tensor,
    num_outputs: tl.tensor,
    col_mask: tl.tensor,
    column: tl.tensor,
    k: tl.tensor,
    G: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    MASK_N: tl.constexpr,
    MASK_K: tl.constexpr,
) -> tl.tensor:
    """Codes [BLOCK_N] of a block's group G as int32, without a sign; nothing is loaded for groups that the block has not."""
    if G >= NUM_GROUPS:
        return tl.zeros(col_mask.shape, dtype=tl.int32)
    elif MASK_K:
        mask = col_mask & _below(column + G * GROUP, k, col_mask)
        return tl.load(code_ptrs + G * num_outputs, mask=mask, other=0).to(tl.uint16, bitcast=True).to(tl.int32)
    elif MASK_N:
        return tl.load(code_ptrs + G * num_outputs, mask=col_mask, other=0).to(tl.uint16, bitcast=True).to(tl.int32)
    else:
        return tl.load(code_ptrs + G * num_outputs).to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def _codes(
    code_ptrs: tl.tensor,
    num_outputs: tl.tensor,
    col_mask: tl.tensor,
    column: tl.tensor,
    k: tl.tensor,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    MASK_N: tl.constexpr,
    MASK_K: tl.constexpr,
) -> tl.tensor:
    """The codes of all groups of a block, at most eight."""
    return (
        _code(code_ptrs, num_outputs, col_mask, column, k, 0, NUM_GROUPS, GROUP, MASK_N, MASK_K),
        _code(code_ptrs, num_outputs, col_mask, column, k, 1, NUM_GROUPS, GROUP, MASK_N, MASK_K),
        _code(code_ptrs, num_outputs, col_mask, column, k, 2, NUM_GROUPS, GROUP, MASK_N, MASK_K),
        _code(code_ptrs, num_outputs, col_mask, column, k, 3, NUM_GROUPS, GROUP, MASK_N, MASK_K),
        _code(code_ptrs, num_outputs, col_mask, column, k, 4, NUM_GROUPS, GROUP, MASK_N, MASK_K),
        _code(code_ptrs, num_outputs, col_mask, column, k, 5, NUM_GROUPS, GROUP, MASK_N, MASK_K),
        _code(code_ptrs, num_outputs, col_mask, column, k, 6, NUM_GROUPS, GROUP, MASK_N, MASK_K),
        _code(code_ptrs, num_outputs, col_mask, column, k, 7, NUM_GROUPS, GROUP, MASK_N, MASK_K),
    )


@triton.jit
def _sum(
    sum_ptrs: tl.tensor,
    num_rows: tl.tensor,
    row_mask: tl.tensor,
    column: tl.tensor,
    k: tl.tensor,
    G: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    MASK_K: tl.constexpr,
) -> tl.tensor:
    """Sums [BLOCK_M] of the rows' inputs in a block's group G; rows beyond the last repeat it, so only tails need a mask."""
    if G >= NUM_GROUPS:
        return tl.zeros(row_mask.shape, dtype=tl.float32)
    elif MASK_K:
        return tl.load(sum_ptrs + G * num_rows, mask=row_mask & _below(column + G * GROUP, k, row_mask), other=0.0)
    else:
        return tl.load(sum_ptrs + G * num_rows)


@triton.jit
def _sums(
    sum_ptrs: tl.tensor,
    num_rows: tl.tensor,
    row_mask: tl.tensor,
    column: tl.tensor,
    k: tl.tensor,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    MASK_K: tl.constexpr,
) -> tl.tensor:
    """The sums of all groups of a block, at most eight."""
    return (
        _sum(sum_ptrs, num_rows, row_mask, column, k, 0, NUM_GROUPS, GROUP, MASK_K),
        _sum(sum_ptrs, num_rows, row_mask, column, k, 1, NUM_GROUPS, GROUP, MASK_K),
        _sum(sum_ptrs, num_rows, row_mask, column, k, 2, NUM_GROUPS, GROUP, MASK_K),
        _sum(sum_ptrs, num_rows, row_mask, column, k, 3, NUM_GROUPS, GROUP, MASK_K),
        _sum(sum_ptrs, num_rows, row_mask, column, k, 4, NUM_GROUPS, GROUP, MASK_K),
        _sum(sum_ptrs, num_rows, row_mask, column, k, 5, NUM_GROUPS, GROUP, MASK_K),
        _sum(sum_ptrs, num_rows, row_mask, column, k, 6, NUM_GROUPS, GROUP, MASK_K),
        _sum(sum_ptrs, num_rows, row_mask, column, k, 7, NUM_GROUPS, GROUP, MASK_K),
    )


@triton.jit
def add_block(
    acc: tl.tensor,
    acc_up: tl.tensor,
    x_ptrs: tl.tensor,
    word_ptrs: tl.tensor,
    code_ptrs: tl.tensor,
    sum_ptrs: tl.tensor,
    up_words: tl.tensor,
    up_codes: tl.tensor,
    row_mask: tl.tensor,
    col_mask: tl.tensor,
    column: tl.tensor,
    k: tl.tensor,
    num_outputs: tl.tensor,
    num_rows: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    MASK_N: tl.constexpr,
    MASK_K: tl.constexpr,
    GATED: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    SUMS_INSIDE: tl.constexpr,
    FLOAT16: tl.constexpr,
) -> tl.tensor:
    """acc (and acc_up) [BLOCK_N, BLOCK_M] plus one block of WORDS words of every row, from input `column` on."""
    COLUMNS: tl.constexpr = 2 * WORDS
    PLANES_PER_GROUP: tl.constexpr = GROUP // COLUMNS
    NUM_GROUPS: tl.constexpr = 16 // BITS // PLANES_PER_GROUP
    # A group has one scale, so planes of one group are not lifted.
    TOGETHER: tl.constexpr = (10 if FLOAT16 else 7) // BITS if PLANES_PER_GROUP == 1 else 1
    # With many rows the matrix units are what is waited for, and registers are short.
    if not SCALE_FIRST:
        codes = _codes(code_ptrs, num_outputs, col_mask, column, k, NUM_GROUPS, GROUP, MASK_N, MASK_K)
        if GATED:
            codes_up = _codes(code_ptrs + up_codes, num_outputs, col_mask, column, k, NUM_GROUPS, GROUP, MASK_N, MASK_K)
        if not SUMS_INSIDE:
            group_sums = _sums(sum_ptrs, num_rows, row_mask, column, k, NUM_GROUPS, GROUP, MASK_K)
    words = tl.load(word_ptrs, mask=col_mask[:, None], other=0)
    if GATED:
        words_up = tl.load(word_ptrs + up_words, mask=col_mask[:, None], other=0)
    for g in tl.static_range(NUM_GROUPS):
        if SCALE_FIRST:
            code = _code(code_ptrs, num_outputs, col_mask, column, k, g, NUM_GROUPS, GROUP, MASK_N, MASK_K)
        else:
            code = codes[g]
        scale = _scale(code, BITS, g * PLANES_PER_GROUP, TOGETHER)
        zero = _zero(code, BITS, g * PLANES_PER_GROUP, TOGETHER, FLOAT16)
        part = tl.zeros_like(acc)
        if GATED:
            if SCALE_FIRST:
                code_up = _code(
                    code_ptrs + up_codes, num_outputs, col_mask, column, k, g, NUM_GROUPS, GROUP, MASK_N, MASK_K
                )
            else:
                code_up = codes_up[g]
            scale_up = _scale(code_up, BITS, g * PLANES_PER_GROUP, TOGETHER)
            zero_up = _zero(code_up, BITS, g * PLANES_PER_GROUP, TOGETHER, FLOAT16)
            part_up = tl.zeros_like(acc)
        sums = tl.zeros([x_ptrs.shape[0]], dtype=tl.float32)
        for i in tl.static_range(PLANES_PER_GROUP):
            x_mask = row_mask[:, None]
            if MASK_K:
                inputs = column + (g * PLANES_PER_GROUP + i) * COLUMNS + tl.arange(0, COLUMNS)
                x_mask = x_mask & (inputs < k)[None, :]
            x = tl.load(x_ptrs + (g * PLANES_PER_GROUP + i) * COLUMNS, mask=x_mask, other=0.0)
            q = _plane(words, BITS, g * PLANES_PER_GROUP + i, TOGETHER, FLOAT16)
            if SCALE_FIRST:
                acc = multiply(_scaled(q, scale, zero), x.T, acc, 0)
            else:
                part = multiply(q, x.T, part, 0)
                if SUMS_INSIDE:
                    sums += tl.sum(x.to(tl.float32), axis=1)
            if GATED:
                q_up = _plane(words_up, BITS, g * PLANES_PER_GROUP + i, TOGETHER, FLOAT16)
                if SCALE_FIRST:
                    acc_up = multiply(_scaled(q_up, scale_up, zero_up), x.T, acc_up, 0)
                else:
                    part_up = multiply(q_up, x.T, part_up, 0)
        if not SCALE_FIRST:
            if not SUMS_INSIDE:
                sums = group_sums[g]
            acc += (part - zero[:, None] * sums[None, :]) * scale[:, None]
            if GATED:
                acc_up += (part_up - zero_up[:, None] * sums[None, :]) * scale_up[:, None]
    return acc, acc_up


@triton.jit
def finish(
    acc: tl.tensor,
    acc_up: tl.tensor,
    scale_ptrs: tl.tensor,
    bias_ptrs: tl.tensor,
    out_ptrs: tl.tensor,
    n: tl.tensor,
    row_mask: tl.tensor,
    col_mask: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """Row scales, biases and the activation on a finished tile, then its store."""
    acc *= tl.load(scale_ptrs, mask=col_mask, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptrs, mask=col_mask, other=0.0).to(tl.float32)[:, None]
    if GATED:
        acc_up *= tl.load(scale_ptrs + n, mask=col_mask, other=0.0)[:, None]
        if HAS_BIAS:
            acc_up += tl.load(bias_ptrs + n, mask=col_mask, other=0.0).to(tl.float32)[:, None]
    acc = activate(acc, acc_up, alpha, limit, ACTIVATION)
    mask = col_mask[:, None] & row_mask[None, :]
    # Rows past a group's end have sums but no inputs: what they add up to may not fit the output's type.
    acc = tl.where(mask, acc, 0.0)
    tl.store(out_ptrs, acc.to(out_ptrs.dtype.element_ty), mask=mask)
