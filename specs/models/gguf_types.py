"""The types of GGUF files: bytes of a block and weights in it, for all that ggml and its fork ik_llama.cpp write.

Modelled: blocks, the scale that some types keep before each row, the numbers that files have for types, rows interleaved for processors.
Ignored: the padding between tensors, at most 31 bytes each; types that were given up before any model of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

# type: (bytes of a block, weights in it, bits of a value)
_BLOCKS: Mapping[str, tuple[int, int, int]] = MappingProxyType({
    "Q4_0": (18, 32, 4), "Q4_1": (20, 32, 4), "Q5_0": (22, 32, 5), "Q5_1": (24, 32, 5), "Q8_0": (34, 32, 8),
    "Q2_K": (84, 256, 2), "Q3_K": (110, 256, 3), "Q4_K": (144, 256, 4), "Q5_K": (176, 256, 5), "Q6_K": (210, 256, 6),
    "IQ1_S": (50, 256, 2), "IQ1_M": (56, 256, 2), "IQ2_XXS": (66, 256, 2), "IQ2_XS": (74, 256, 2), "IQ2_S": (82, 256, 2),
    "IQ3_XXS": (98, 256, 3), "IQ3_S": (110, 256, 3), "IQ4_NL": (18, 32, 4), "IQ4_XS": (136, 256, 4),
    "TQ1_0": (54, 256, 2), "TQ2_0": (66, 256, 2), "MXFP4": (17, 32, 4), "NVFP4": (36, 64, 4), "Q1_0": (18, 128, 2), "Q2_0": (18, 64, 2),
    # ik_llama.cpp's own.
    "Q6_0": (26, 32, 6), "IQ1_KT": (56, 256, 2), "IQ2_KS": (70, 256, 2), "IQ2_KL": (86, 256, 2), "IQ2_K": (76, 256, 2),
    "IQ2_KT": (68, 256, 2), "IQ3_KS": (102, 256, 3), "IQ3_K": (110, 256, 3), "IQ3_KT": (100, 256, 3), "IQ4_KSS": (128, 256, 4),
    "IQ4_KS": (136, 256, 4), "IQ4_K": (144, 256, 4), "IQ4_KT": (128, 256, 4), "IQ5_KS": (168, 256, 5), "IQ5_K": (176, 256, 5),
    "IQ6_K": (212, 256, 6), "IQ1_BN": (13, 64, 2), "IQ2_BN": (16, 64, 2), "IQ1_S_R4": (6, 32, 2), "IQ1_M_R4": (7, 32, 2),
    "Q8_K_R8": (258, 256, 8), "Q8_K_R16": (258, 256, 8), "Q8_KV": (32, 32, 8), "Q8_KV_R8": (32, 32, 8),
})  # fmt: skip
_SOURCE = (
    "ggml/src/ggml-common.h (block sizes); for IQn_K… ikawrakow/ik_llama.cpp, the same file and ggml.c (row_meta_size)"
)
_ROWS = ("_R4", "_R8", "_R16")
"""Endings of types whose rows are interleaved for processors: the same bytes in another order, but for those listed above."""

_NUMBERS: Mapping[int, str] = MappingProxyType({
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
    14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 31: "Q4_0", 32: "Q4_0", 33: "Q4_0", 34: "TQ1_0",
    35: "TQ2_0", 36: "IQ4_NL", 37: "IQ4_NL", 38: "IQ4_NL", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0", 133: "Q6_0",
    134: "IQ1_BN", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K", 144: "IQ4_KS",
    145: "IQ2_KS", 146: "IQ4_KSS", 151: "Q8_KV", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT", 156: "IQ3_KS",
    157: "IQ2_KL", 158: "IQ1_KT", 219: "IQ1_S_R4", 229: "IQ1_M_R4", 353: "MXFP4", 397: "Q8_K_R16", 398: "Q8_KV_R8", 399: "Q8_K_R8",
})  # fmt: skip
"""Types by the numbers that files have for them (ggml/include/ggml.h of llama.cpp; from 133 on, of ik_llama.cpp)."""
# ik_llama.cpp numbers types with interleaved rows so much higher, but for those listed above.
_INTERLEAVED = 200
_WHOLE: Mapping[str, tuple[int, int]] = MappingProxyType({
    "F32": (4, 1), "F16": (2, 1), "BF16": (2, 1), "F64": (8, 1), "I8": (1, 1), "I16": (2, 1), "I32": (4, 1), "I64": (8, 1),
})  # fmt: skip
_ROW_BYTES: Mapping[str, int] = MappingProxyType(
    dict.fromkeys(("IQ4_KS", "IQ4_KSS", "IQ5_KS", "IQ1_KT", "IQ2_KT", "IQ3_KT", "IQ4_KT", "IQ2_BN", "Q8_KV_R8"), 4)
    | dict.fromkeys(("IQ2_KS", "IQ3_KS", "IQ2_KL", "IQ1_S_R4", "IQ1_M_R4", "IQ1_BN"), 2)
    | {"Q8_KV": 8}
)
"""Bytes of a scale before each row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorType:
    """How a tensor of a file is stored."""

    name: str
    block_bytes: int
    block_weights: int
    row_bytes: int

    def num_bytes(self, shape: tuple[int, ...]) -> int | None:
        """Return the bytes of a tensor of `shape` (rows first), None where a row is not a whole number of blocks."""
        if not shape or shape[0] % self.block_weights:
            return None
        rows = 1
        for length in shape[1:]:
            rows *= length
        return rows * (shape[0] // self.block_weights * self.block_bytes + self.row_bytes)


def tensor_type(number: int) -> TensorType | None:
    """Return the type that files give as `number`, None for one that is not known."""
    name = _NUMBERS.get(number)
    if name is None and number > _INTERLEAVED:
        name = _NUMBERS.get(number - _INTERLEAVED)
    return None if name is None else named_type(name)


def named_type(name: str) -> TensorType | None:
    """Return the type called `name` (Q4_K, IQ4_KS, IQ1_S_R4, BF16), None for one that is not known."""
    plain = _plain(name)
    found = _WHOLE.get(plain) or _BLOCKS.get(plain, (0, 0, 0))[:2]
    if not found[0]:
        return None
    return TensorType(
        name=plain, block_bytes=found[0], block_weights=found[1], row_bytes=_ROW_BYTES.get(plain, 0)
    )  # fmt: skip


def _plain(name: str) -> str:
    """Return the name of a type without what it says about the order of rows."""
    plain = name.upper()
    if plain in _BLOCKS:
        return plain
    for ending in _ROWS:
        plain = plain.removesuffix(ending)
    return plain


def block_bits(name: str) -> tuple[int, Fraction, int] | None:
    """Return (bits of a value, bits per weight, weights of a block) of a GGUF type, None for another name."""
    found = _BLOCKS.get(_plain(name))
    if found is None:
        return None
    num_bytes, weights, bits = found
    return bits, Fraction(8 * num_bytes, weights), weights


def type_names() -> tuple[str, ...]:
    """Return the names of all quantised types."""
    return tuple(_BLOCKS)


def source() -> str:
    """Return where block sizes are documented."""
    return _SOURCE
