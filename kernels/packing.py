"""Weights of 4, 3 and 2 bits: quantised in groups of a row, packed into words, and back. Pure torch, on any device.

A group of weights w becomes whole numbers q with w ≈ (q − zero) · scale. The zero point is an 8-bit number in steps of
2**(bits − 8). The scale is the row's float32 `row_scale` times an 8-bit floating-point number of 3 exponent and 5 mantissa bits:
2**(e − 7) · (1 + m/32), so a group far smaller than the largest of its row keeps its relative precision down to a 252nd of it. Both
expand to float32 by a shift and an addition, exactly. Scale and zero are chosen first and the weights rounded to what those two
really are, so their coarseness costs range, not bias.

Two ways to choose them: "nearest" covers the full range of each group (zero included); "half-quadratic" then moves each
group's zero point where that brings its weights closer (Badri and Shaji's HQQ, 2023: in turns, what the present numbers leave over,
shrunk by the proximal operator of an l_p norm, p < 1, and the zero point that fits the rest best).

Ignored: calibration data (GPTQ, AWQ).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..base.errors import InputError, UnknownName
from .checks import check_dtype, check_rows_contiguous, check_shape, described
from .slot_layout import PackedFormat, check_columns, packed_format

SCALE_EXPONENT_BIAS = 7
SCALE_MANTISSA_BITS = 5
LARGEST_SCALE_CODE = 255
"""The largest scale code stands for 2**0 · (1 + 31/32)."""
ZERO_STEPS_LOG2 = 8
NEAREST, HALF_QUADRATIC = "nearest", "half-quadratic"
ROUNDINGS = (NEAREST, HALF_QUADRATIC)
_NORM, _BETA, _KAPPA, _ROUNDS = 0.7, 10.0, 1.01, 20
"""Exponent, penalty, its growth and the most rounds: the constants of HQQ's published code."""
_TINY = 1e-12
"""Zero points are given in steps of 2**(bits - ZERO_STEPS_LOG2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix:
    """Packed matrices [num_slots, N, K], one for each slot; views into an arena or tensors of their own.

    `words` int32 [num_slots, N, num_words], `codes` int16 [num_slots, K/group, N] (scale in the low byte, zero in the high one),
    `row_scale` float32 [num_slots, N], `bias` [num_slots, N] or None.
    """

    words: torch.Tensor
    codes: torch.Tensor
    row_scale: torch.Tensor
    bits: int
    num_columns: int
    bias: torch.Tensor | None = None

    @property
    def format(self) -> PackedFormat:
        """How words and groups are laid out."""
        return packed_format(self.bits)

    @property
    def num_slots(self) -> int:
        """Matrices held."""
        return self.words.shape[0]

    @property
    def num_rows(self) -> int:
        """Rows of each matrix."""
        return self.words.shape[1]


def check_packed(field: str, packed: PackedMatrix) -> None:
    """Return nothing; raises InputError where the parts of a packed matrix do not belong together."""
    fmt = packed.format
    check_columns(fmt, packed.num_columns)
    slots, rows = packed.num_slots, packed.num_rows
    check_dtype(f"{field}.words", packed.words, (torch.int32,))
    check_shape(
        f"{field}.words", packed.words, (slots, rows, fmt.num_words(packed.num_columns)), "[num_slots, N, num_words]"
    )
    check_dtype(f"{field}.codes", packed.codes, (torch.int16,))
    check_shape(
        f"{field}.codes", packed.codes, (slots, packed.num_columns // fmt.group, rows), "[num_slots, num_groups, N]"
    )
    check_dtype(f"{field}.row_scale", packed.row_scale, (torch.float32,))
    check_shape(f"{field}.row_scale", packed.row_scale, (slots, rows), "[num_slots, N]")
    for name, tensor in (("words", packed.words), ("codes", packed.codes), ("row_scale", packed.row_scale)):
        check_rows_contiguous(f"{field}.{name}", tensor)
    if packed.codes.shape[1] > 1 and packed.codes.stride(1) != rows:
        raise InputError(
            f"{field}.codes", described(packed.codes), "groups follow each other without gaps", "call .contiguous()"
        )


def pack(weights: torch.Tensor, bits: int, rounding: str = NEAREST) -> PackedMatrix:
    """Return `weights` [num_slots, N, K] (or one matrix [N, K], as a single slot) quantised and packed at `bits`.

    rounding: one of ROUNDINGS.

    Raises InputError for other shapes, non-finite weights, a K that is not whole groups, or bits that are not packed.
    """
    matrices = weights.unsqueeze(0) if weights.dim() == 2 else weights
    check_shape("weights", matrices, (None, None, None), "matrices [num_slots, N, K]")
    if not bool(torch.isfinite(matrices).all()):
        raise InputError(
            "weights", described(weights), "weights are finite numbers", "look for overflow where they were made"
        )
    fmt = packed_format(bits)
    values, codes, row_scale = quantise(matrices, fmt, rounding)
    return PackedMatrix(
        words=pack_words(values, fmt), codes=codes, row_scale=row_scale, bits=bits, num_columns=matrices.shape[-1]
    )


def unpack(packed: PackedMatrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weights [num_slots, N, K] that `packed` stands for, rounded to `dtype`."""
    check_packed("packed", packed)
    values = unpack_words(packed.words, packed.format, packed.num_columns)
    return dequantise(values, packed.codes, packed.row_scale, packed.format, dtype)


def quantise(
    weights: torch.Tensor, fmt: PackedFormat, rounding: str = NEAREST
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return whole numbers uint8 [..., N, K], codes int16 [..., K/group, N] and row scales float32 [..., N] for `weights`."""
    check_columns(fmt, weights.shape[-1])
    if rounding not in ROUNDINGS:
        raise UnknownName("rounding", rounding, ROUNDINGS)
    largest = 2**fmt.bits - 1
    groups = weights.float().unflatten(-1, (-1, fmt.group))
    low = groups.amin(-1).clamp(max=0)
    high = groups.amax(-1).clamp(min=0)
    wanted = (high - low) / largest
    table = scale_of_code(torch.arange(LARGEST_SCALE_CODE + 1, device=weights.device))
    row_scale = wanted.amax(-1) / table[-1]
    row_scale = torch.where(row_scale > 0, row_scale, torch.ones_like(row_scale))
    # The smallest code that is not below what the group wants, so that its range is covered.
    ratio = (wanted / row_scale.unsqueeze(-1)).contiguous()
    scale_code = torch.searchsorted(table, ratio).clamp(max=LARGEST_SCALE_CODE)
    scale = table[scale_code] * row_scale.unsqueeze(-1)
    step = 2.0 ** (fmt.bits - ZERO_STEPS_LOG2)
    zero_code = (-low / scale / step).round().clamp(0, 255)
    if rounding == HALF_QUADRATIC:
        zero_code = _fitting_zero(groups, scale, zero_code, fmt)
    values = (groups / scale.unsqueeze(-1) + (zero_code * step).unsqueeze(-1)).round().clamp(0, largest)
    codes = _to_int16(scale_code + zero_code.long() * 256).transpose(-1, -2).contiguous()
    return values.to(torch.uint8).flatten(-2), codes, row_scale


def _fitting_zero(
    groups: torch.Tensor, scale: torch.Tensor, zero_code: torch.Tensor, fmt: PackedFormat
) -> torch.Tensor:
    """Return the zero codes [..., N, K/group] that leave the least squared error over, of all that were tried.

    groups: [..., N, K/group, group]; scale, and zero_code to begin with: [..., N, K/group].
    """
    step, largest, beta = 2.0 ** (fmt.bits - ZERO_STEPS_LOG2), 2**fmt.bits - 1, _BETA
    wide = scale.unsqueeze(-1)
    wanted, zero = groups / wide, zero_code * step
    best, least, before = zero_code, torch.full_like(zero, torch.inf), float("inf")
    for _ in range(_ROUNDS):
        coded = (zero / step).round().clamp(0, 255)
        middle = (coded * step).unsqueeze(-1)
        values = (wanted + middle).round().clamp(0, largest)
        left = (wanted - (values - middle)) * wide
        error = left.square().sum(-1)
        best, least = torch.where(error < least, coded, best), torch.minimum(error, least)
        size = left.abs()
        kept = left.sign() * (size - size.clamp(min=_TINY).pow(_NORM - 1) / beta).clamp(min=0) / wide
        zero = (values - (wanted - kept)).mean(-1)
        beta *= _KAPPA
        total = float(error.sum())
        if total >= before:
            break
        before = total
    return best


def dequantise(
    values: torch.Tensor, codes: torch.Tensor, row_scale: torch.Tensor, fmt: PackedFormat, dtype: torch.dtype
) -> torch.Tensor:
    """Return (q − zero) · scale [..., N, K] for whole numbers `values`, computed in float32 and rounded once to `dtype`."""
    scale, zero = scale_and_zero(codes.transpose(-1, -2), fmt.bits)
    scale = scale * row_scale.unsqueeze(-1)
    groups: torch.Tensor = values.float().unflatten(-1, (-1, fmt.group))
    return ((groups - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2).to(dtype)


def scale_of_code(code: torch.Tensor) -> torch.Tensor:
    """Return the float32 scales, relative to the row's, that 8-bit scale codes stand for."""
    mantissa = code % (1 << SCALE_MANTISSA_BITS)
    exponent = code // (1 << SCALE_MANTISSA_BITS) - SCALE_EXPONENT_BIAS
    return torch.ldexp(1 + mantissa.float() / (1 << SCALE_MANTISSA_BITS), exponent)


def scale_and_zero(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return relative scales and zero points, float32, of the 16-bit `codes` of groups."""
    wide = codes.long() & 0xFFFF
    return scale_of_code(wide & 0xFF), (wide >> 8).float() * 2.0 ** (bits - ZERO_STEPS_LOG2)


def pack_words(values: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """Return int32 words [..., N, num_words] of whole numbers `values` [..., N, K] below 2**bits."""
    num_columns = values.shape[-1]
    full_columns = fmt.num_blocks(num_columns) * fmt.block_columns
    blocks, tail = values[..., :full_columns], values[..., full_columns:]
    words = _pack_blocks(_padded(blocks, full_columns), fmt, fmt.block_words)
    if not fmt.has_tail(num_columns):
        return words
    tail = _padded(tail, 2 * fmt.num_planes * fmt.tail_words)
    return torch.cat([words, _pack_blocks(tail, fmt, fmt.tail_words)], dim=-1)


def unpack_words(words: torch.Tensor, fmt: PackedFormat, num_columns: int) -> torch.Tensor:
    """Return the whole numbers uint8 [..., N, num_columns] that `words` [..., N, num_words] hold."""
    full_words = fmt.num_blocks(num_columns) * fmt.block_words
    parts = [_unpack_blocks(words[..., :full_words], fmt, fmt.block_words)]
    if fmt.has_tail(num_columns):
        parts.append(_unpack_blocks(words[..., full_words:], fmt, fmt.tail_words))
    return torch.cat(parts, dim=-1)[..., :num_columns]


def _padded(values: torch.Tensor, num_columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, num_columns - values.shape[-1]))


def _shifts(fmt: PackedFormat, device: torch.device) -> torch.Tensor:
    """Bit positions [num_planes, 1, 2] of a word's values by plane and half."""
    planes = torch.arange(fmt.num_planes, device=device).view(-1, 1, 1) * fmt.bits
    return planes + torch.arange(2, device=device) * 16


def _pack_blocks(values: torch.Tensor, fmt: PackedFormat, block_words: int) -> torch.Tensor:
    """Words of whole blocks: columns run over planes, then words, then halves."""
    if values.shape[-1] == 0:
        return torch.zeros((*values.shape[:-1], 0), dtype=torch.int32, device=values.device)
    fields = values.long().unflatten(-1, (-1, fmt.num_planes, block_words, 2))
    wide = (fields << _shifts(fmt, values.device)).sum((-1, -3))
    return torch.where(wide >= 2**31, wide - 2**32, wide).to(torch.int32).flatten(-2)


def _unpack_blocks(words: torch.Tensor, fmt: PackedFormat, block_words: int) -> torch.Tensor:
    """Whole numbers of whole blocks, in the order of columns."""
    if words.shape[-1] == 0:
        return torch.zeros((*words.shape[:-1], 0), dtype=torch.uint8, device=words.device)
    fields: torch.Tensor = words.unflatten(-1, (-1, 1, block_words, 1)) >> _shifts(fmt, words.device).to(torch.int32)
    values: torch.Tensor = (fields & (2**fmt.bits - 1)).to(torch.uint8).flatten(-4)
    return values


def _to_int16(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values >= 2**15, values - 2**16, values).to(torch.int16)
