"""Where the matrices of one expert lie inside a slot: the bytes that are copied to move an expert.

Modelled: weights at 32 and 16 bits, at 8 bits (float8 e4m3 with one float32 scale for each output row) and packed at 4, 3 or 2
bits; biases; every part starting at a multiple of 256 bytes, which is what wide loads and tensor descriptors need. Ignored:
sharding one expert over devices. No torch here: planners may ask for sizes.

A packed matrix [N, K] has three parts. `words`: int32 [N, num_words]; `codes`: 16 bits for each group of weights, [num_groups, N]
(a scale of 8 bits and a zero point of 8 bits, which is HQQ's budget); `row_scale`: float32 [N]. In a word of a block, bits
[16·half + plane·bits, …) hold the weight of column `block_start + plane·2·C + 2·c + half`, where C is the number of words of the
block and c the word's place in it. One shift and one mask then yield two neighbouring columns, already in the two halves
of a register, and a whole plane of a tile of words is a tile of weights with contiguous columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..base.errors import InputError, UnknownName

ALIGNMENT_BYTES = 256
"""Every part of a slot starts at a multiple of this, as memory from the CUDA allocator does."""

ITEM_BYTES = MappingProxyType(
    {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int32": 4, "int16": 2, "uint8": 1}
)
"""Bytes of one value of each type that parts are made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFormat:
    """How weights of few bits are grouped and laid out in words."""

    bits: int
    group: int
    """Weights of a row that share a scale and a zero point."""
    block_words: int
    """Words of a full block of one row."""
    tail_words: int
    """Words of the shorter block that may end a row; 0 where there is none."""

    @property
    def num_planes(self) -> int:
        """Values in each half of a word."""
        return 16 // self.bits

    @property
    def block_columns(self) -> int:
        """Weights in a full block of one row."""
        return 2 * self.num_planes * self.block_words

    @property
    def tail_columns(self) -> int:
        """Weights that a tail block may hold: whole groups only."""
        return 2 * self.num_planes * self.tail_words // self.group * self.group

    def num_blocks(self, num_columns: int) -> int:
        """Return the full blocks of a row of `num_columns` weights; a rest too long for a tail takes one more."""
        full, rest = divmod(num_columns, self.block_columns)
        return full + int(rest > self.tail_columns)

    def has_tail(self, num_columns: int) -> bool:
        """Return whether a row of `num_columns` weights ends with a tail block."""
        return 0 < num_columns % self.block_columns <= self.tail_columns

    def num_words(self, num_columns: int) -> int:
        """Return the words of a row of `num_columns` weights."""
        return self.num_blocks(num_columns) * self.block_words + int(self.has_tail(num_columns)) * self.tail_words

    def num_bytes(self, num_rows: int, num_columns: int) -> int:
        """Return the bytes of a matrix: words, codes of its groups, one float32 for each row."""
        check_columns(self, num_columns)
        return num_rows * (4 * self.num_words(num_columns) + 2 * (num_columns // self.group) + 4)


# Groups: arXiv 2312.17238 §3.3 (2 bits in groups of 16, 3 and 4 bits in groups of 64). Ten 3-bit values share a word, as in HQQ.
PACKED_FORMATS: Mapping[int, PackedFormat] = MappingProxyType(
    {
        4: PackedFormat(bits=4, group=64, block_words=32, tail_words=16),
        3: PackedFormat(bits=3, group=64, block_words=32, tail_words=16),
        2: PackedFormat(bits=2, group=16, block_words=8, tail_words=0),
    }
)
"""The packed formats, by bits."""

WEIGHT_NAMES = ("32", "16", "8", "4", "3", "2")
"""Names of weight formats that kernels can run, as `specs.WEIGHT_FORMATS` spells them."""


def packed_format(bits: int) -> PackedFormat:
    """Return the packed format of `bits`; raises InputError for widths that are not packed."""
    found = PACKED_FORMATS.get(bits)
    if found is None:
        raise InputError("bits", bits, "weights are packed at 4, 3 or 2 bits", "choose one of these")
    return found


def check_columns(fmt: PackedFormat, num_columns: int) -> None:
    """Return nothing; raises InputError unless rows of `num_columns` weights are whole groups of `fmt`."""
    if num_columns <= 0 or num_columns % fmt.group:
        raise InputError(
            "num_columns",
            num_columns,
            f"{fmt.bits}-bit rows are whole groups of {fmt.group} weights",
            "pad the matrix with zeros",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """Sizes of one expert: `gate_up` [halves·intermediate_size, hidden_size] and `down` [hidden_size, intermediate_size]."""

    hidden_size: int
    intermediate_size: int
    gated: bool = True
    bias: bool = False

    @property
    def matrices(self) -> Mapping[str, tuple[int, int]]:
        """Rows and columns of each matrix, in the order they lie in a slot."""
        halves = 2 if self.gated else 1
        return {
            "gate_up": (halves * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One array inside a slot."""

    name: str
    """`gate_up.values`, `down.codes`, …"""
    dtype: str
    """A key of ITEM_BYTES."""
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the array, without what follows it up to the next part."""
        count = ITEM_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotLayout:
    """The parts of one expert's slot, in order."""

    shape: ExpertShape
    weights: str
    """A name of WEIGHT_NAMES."""
    parts: tuple[Part, ...]

    @property
    def payload_bytes(self) -> int:
        """Bytes of the parts themselves."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def slot_bytes(self) -> int:
        """Bytes from one slot of an arena to the next."""
        last = self.parts[-1]
        return _aligned(last.offset_bytes + last.num_bytes)


def slot_layout(shape: ExpertShape, weights: str, *, dtype: str = "bfloat16") -> SlotLayout:
    """Return where the parts of an expert of `shape` lie when its weights are stored as `weights`.

    `dtype` (bfloat16 or float16) is what 16-bit weights are, and biases of every format but "32". Raises UnknownName for other
    weights, InputError for sizes that are not positive or, packed, not whole groups.
    """
    if weights not in WEIGHT_NAMES:
        raise UnknownName("weights", weights, WEIGHT_NAMES)
    if dtype not in ("bfloat16", "float16"):
        raise UnknownName("dtype", dtype, ("bfloat16", "float16"))
    for field, size in (("hidden_size", shape.hidden_size), ("intermediate_size", shape.intermediate_size)):
        if size <= 0:
            raise InputError(field, size, "a matrix has rows and columns", "give a positive number")
    parts: list[Part] = []
    bias_dtype = "float32" if weights == "32" else dtype
    for matrix, (num_rows, num_columns) in shape.matrices.items():
        arrays = _arrays(weights, dtype, num_rows, num_columns)
        if shape.bias:
            arrays.append(("bias", bias_dtype, (num_rows,)))
        for name, kind, sizes in arrays:
            end = parts[-1].offset_bytes + parts[-1].num_bytes if parts else 0
            parts.append(Part(name=f"{matrix}.{name}", dtype=kind, shape=sizes, offset_bytes=_aligned(end)))
    return SlotLayout(shape=shape, weights=weights, parts=tuple(parts))


def _arrays(weights: str, dtype: str, num_rows: int, num_columns: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, type and sizes of the arrays that hold one matrix."""
    if weights in ("32", "16"):
        return [("values", "float32" if weights == "32" else dtype, (num_rows, num_columns))]
    if weights == "8":
        return [("values", "float8_e4m3fn", (num_rows, num_columns)), ("row_scale", "float32", (num_rows,))]
    fmt = packed_format(int(weights))
    check_columns(fmt, num_columns)
    return [
        ("words", "int32", (num_rows, fmt.num_words(num_columns))),
        ("codes", "int16", (num_columns // fmt.group, num_rows)),
        ("row_scale", "float32", (num_rows,)),
    ]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
