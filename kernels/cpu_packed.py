"""Packed weights on the host's cores, decoded inside the product or into scratch by compiled loops.

    dot_packed     y [N] = W x for one row: words are decoded in registers, so a decode step reads the packed bytes and no others
    decode_packed  W [N, K] as float32 or bfloat16, for many rows: one pass over the words, one over what they stand for

Both follow the layout of `slot_layout`: a plane of a block is a run of columns inside one group, so its scale and zero point are applied
once for the plane: sum(scale · (q − zero) · x) = scale · (sum(q · x) − zero · sum(x)). Products are added up in float32.

Modelled: one thread; other threads run meanwhile. Ignored: machines without numba, where `cpu` expands by torch instead.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from ..base.jit import compiled, jit_numeric
from ..base.records import Array
from .packing import LARGEST_SCALE_CODE, ZERO_STEPS_LOG2, PackedMatrix, scale_of_code
from .slot_layout import PackedFormat

FEW_ROWS = 3
"""Up to so many rows are multiplied one by one: decoding again for each is quicker than writing what was decoded."""
_HALF_BITS = 16
_SHORT_BITS, _SHORT_BLOCK = 2, 8
_SHORT_PLANES, _SHORT_MASK = _HALF_BITS // _SHORT_BITS, (1 << _SHORT_BITS) - 1
_SHORT = (_SHORT_BITS, _SHORT_BLOCK, 0, 2 * _SHORT_BLOCK)


def usable() -> bool:
    """Return whether the loops are compiled here; as plain Python they would be thousands of times slower than torch."""
    return compiled()


def product(x: torch.Tensor, matrix: PackedMatrix, slot: int, out: torch.Tensor) -> torch.Tensor:
    """Write x [n, K] times the matrix [N, K] in `slot`, transposed, without its bias, into `out` [n, N]; few rows."""
    words, _, row_scale = _arrays(matrix, slot)
    codes = matrix.codes[slot].T.contiguous().numpy()  # read row by row: across rows they would miss the cache
    fmt, columns = matrix.format, matrix.num_columns
    short = (fmt.bits, fmt.block_words, fmt.tail_words, fmt.group) == _SHORT
    step = 2.0 ** (fmt.bits - ZERO_STEPS_LOG2)
    sizes = _sizes(fmt, columns)
    even, odd, sums = (np.zeros(sizes[-1], np.float32) for _ in range(3))
    found = np.empty(matrix.num_rows, np.float32)
    for row, answer in zip(x, out, strict=True):
        dealt(row.float().numpy(), even, odd, sums, *sizes[:-1], fmt.num_planes)
        if short:
            dot_short(words, codes, row_scale, _scales(), even, odd, sums, found, step)
        else:
            dot_packed(
                words, codes, row_scale, _scales(), even, odd, sums, found, fmt.bits, fmt.num_planes, fmt.group, *sizes[:-1], step
            )  # fmt: skip
        answer.copy_(torch.from_numpy(found))
    return out


def decode(matrix: PackedMatrix, slot: int, out: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Fill `out` [N, K], float32 or bfloat16, with the matrix in `slot`, each weight rounded once; `row` float32 [K] is scratch."""
    words, codes, row_scale = _arrays(matrix, slot)
    fmt, columns = matrix.format, matrix.num_columns
    halves = out.dtype == torch.bfloat16
    wide = np.empty((0, 0), np.float32) if halves else out.numpy()
    narrow = out.view(torch.int16).numpy() if halves else np.empty((0, 0), np.int16)
    single = row.numpy()
    decode_packed(
        words, codes, row_scale, _scales(), wide, narrow, single, single.view(np.int32), fmt.bits, fmt.num_planes, fmt.group,
        *_sizes(fmt, columns)[:-1], 2.0 ** (fmt.bits - ZERO_STEPS_LOG2),
    )  # fmt: skip
    return out


@functools.cache
def _scales() -> Array:
    """float32 [256]: what scale codes stand for."""
    return scale_of_code(torch.arange(LARGEST_SCALE_CODE + 1)).numpy()


def _arrays(matrix: PackedMatrix, slot: int) -> tuple[Array, Array, Array]:
    return matrix.words[slot].numpy(), matrix.codes[slot].numpy(), matrix.row_scale[slot].numpy()


@functools.cache
def _sizes(fmt: PackedFormat, num_columns: int) -> tuple[int, int, int, int]:
    """Return (blocks, words of each, words of the tail or 0, half the columns that all of them have room for)."""
    blocks = fmt.num_blocks(num_columns)
    tail = fmt.tail_words if fmt.has_tail(num_columns) else 0
    return blocks, fmt.block_words, tail, fmt.num_planes * (blocks * fmt.block_words + tail)


@jit_numeric
def dealt(
    x: Array, even: Array, odd: Array, sums: Array, blocks: int, block_words: int, tail_words: int, planes: int
) -> None:
    """Deal x [K] out to its even and odd columns in the order of planes and words; `sums` of each plane at its number."""
    column = at = plane = 0
    for block in range(blocks + (tail_words > 0)):
        words = block_words if block < blocks else tail_words
        for _ in range(planes):
            total = np.float32(0)
            for _ in range(words):
                first = x[column] if column < len(x) else np.float32(0)
                second = x[column + 1] if column + 1 < len(x) else np.float32(0)
                even[at], odd[at] = first, second
                total += first + second
                column += 2
                at += 1
            sums[plane] = total
            plane += 1


@jit_numeric
def dot_packed(
    words: Array, codes: Array, row_scale: Array, scales: Array, even: Array, odd: Array, sums: Array, out: Array, bits: int,
    planes: int, group: int, blocks: int, block_words: int, tail_words: int, zero_step: float,
) -> None:  # fmt: skip
    """Write the product of every row of packed words with a row that was dealt out."""
    mask = np.int32((1 << bits) - 1)
    groups = codes.shape[1]
    for n in range(words.shape[0]):
        whole = np.float32(0)
        at = plane = column = begin = 0
        for block in range(blocks + (tail_words > 0)):
            count = block_words if block < blocks else tail_words
            mine = words[n, begin : begin + count]
            for p in range(planes):
                place = column // group
                if place < groups:
                    low, high = np.int32(p * bits), np.int32(p * bits + _HALF_BITS)
                    first, second = even[at : at + count], odd[at : at + count]
                    some = np.float32(0)
                    for c in range(count):
                        word = mine[c]
                        some += np.float32(np.int32(np.int32(word >> low) & mask)) * first[c]
                        some += np.float32(np.int32(np.int32(word >> high) & mask)) * second[c]
                    code = codes[n, place]
                    zero = np.float32((code >> 8) & 255) * np.float32(zero_step)
                    whole += scales[code & 255] * (some - zero * sums[plane])
                at += count
                plane += 1
                column += 2 * count
            begin += count
        out[n] = whole * row_scale[n]


@jit_numeric
def dot_short(
    words: Array, codes: Array, row_scale: Array, scales: Array, even: Array, odd: Array, sums: Array, out: Array, zero_step: float
) -> None:  # fmt: skip
    """Do the same where a plane is a group and has a few words: of lengths that the compiler knows it makes single operations."""
    groups = codes.shape[1]
    for n in range(words.shape[0]):
        whole = np.float32(0)
        for place in range(groups):
            begin = place // _SHORT_PLANES * _SHORT_BLOCK
            low = np.int32(place % _SHORT_PLANES * _SHORT_BITS)
            high = np.int32(low + _HALF_BITS)
            at = place * _SHORT_BLOCK
            some = np.float32(0)
            for c in range(_SHORT_BLOCK):
                word = words[n, begin + c]
                some += np.float32(np.int32(np.int32(word >> low) & np.int32(_SHORT_MASK))) * even[at + c]
                some += np.float32(np.int32(np.int32(word >> high) & np.int32(_SHORT_MASK))) * odd[at + c]
            code = codes[n, place]
            zero = np.float32((code >> 8) & 255) * np.float32(zero_step)
            whole += scales[code & 255] * (some - zero * sums[place])
        out[n] = whole * row_scale[n]


@jit_numeric
def decode_packed(
    words: Array, codes: Array, row_scale: Array, scales: Array, wide: Array, narrow: Array, single: Array, single_bits: Array, bits: int,
    planes: int, group: int, blocks: int, block_words: int, tail_words: int, zero_step: float,
) -> None:  # fmt: skip
    """Write the weights that packed words stand for: to `wide` float32, or rounded to even into `narrow`, bfloat16 as 16 bits."""
    mask = np.int32((1 << bits) - 1)
    columns = len(single)
    for n in range(words.shape[0]):
        column = begin = 0
        for block in range(blocks + (tail_words > 0)):
            count = block_words if block < blocks else tail_words
            for p in range(planes):
                if column < columns:
                    code = codes[column // group, n]
                    scale = scales[code & 255] * row_scale[n]
                    zero = np.float32((code >> 8) & 255) * np.float32(zero_step)
                    low, high = np.int32(p * bits), np.int32(p * bits + _HALF_BITS)
                    for c in range(count):
                        word = words[n, begin + c]
                        one = np.float32(np.int32(np.int32(word >> low) & mask)) - zero
                        other = np.float32(np.int32(np.int32(word >> high) & mask)) - zero
                        single[column + 2 * c] = one * scale
                        single[column + 2 * c + 1] = other * scale
                column += 2 * count
            begin += count
        if len(narrow):
            for k in range(columns):
                number = single_bits[k]
                narrow[n, k] = np.int16((number + np.int32(0x7FFF) + ((number >> 16) & 1)) >> 16)
        else:
            for k in range(columns):
                wide[n, k] = single[k]
