"""The weight formats of GGUF files, and the mixes of them that quantisers write under one name.

Modelled: bytes of a block and weights in it, for every type that ggml and its fork ik_llama.cpp write; for each named mix the
type of experts' matrices (a mean over gate, up and down and over layers), of everything else in the layers, and of the
output matrix. Ignored: padding, tensors that a mix raises in a few layers only beyond that mean, importance matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from types import MappingProxyType

# type: (bytes of a block, weights in it, bits of a value)
_BLOCKS: Mapping[str, tuple[int, int, int]] = MappingProxyType({
    "Q4_0": (18, 32, 4), "Q4_1": (20, 32, 4), "Q5_0": (22, 32, 5), "Q5_1": (24, 32, 5), "Q8_0": (34, 32, 8),
    "Q2_K": (84, 256, 2), "Q3_K": (110, 256, 3), "Q4_K": (144, 256, 4), "Q5_K": (176, 256, 5), "Q6_K": (210, 256, 6),
    "IQ1_S": (50, 256, 2), "IQ1_M": (56, 256, 2), "IQ2_XXS": (66, 256, 2), "IQ2_XS": (74, 256, 2), "IQ2_S": (82, 256, 2),
    "IQ3_XXS": (98, 256, 3), "IQ3_S": (110, 256, 3), "IQ4_NL": (18, 32, 4), "IQ4_XS": (136, 256, 4),
    "TQ1_0": (54, 256, 2), "TQ2_0": (66, 256, 2), "MXFP4": (17, 32, 4),
    # ik_llama.cpp's own; a scale for each row is left out.
    "IQ1_KT": (56, 256, 2), "IQ2_KS": (70, 256, 2), "IQ2_KL": (86, 256, 2), "IQ2_K": (76, 256, 2), "IQ2_KT": (68, 256, 2),
    "IQ3_KS": (102, 256, 3), "IQ3_K": (110, 256, 3), "IQ3_KT": (100, 256, 3), "IQ4_KSS": (128, 256, 4), "IQ4_KS": (136, 256, 4),
    "IQ4_K": (144, 256, 4), "IQ4_KT": (128, 256, 4), "IQ5_KS": (168, 256, 5), "IQ5_K": (176, 256, 5), "IQ6_K": (212, 256, 6),
})  # fmt: skip
_SOURCE = "ggml/src/ggml-common.h (block sizes); for IQn_K… ikawrakow/ik_llama.cpp, the same file"
_ROWS = ("_R4", "_R8")
"""Endings of types whose rows are interleaved for processors: the same bytes in another order."""


_NUMBERS: Mapping[int, str] = MappingProxyType({
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
    14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4", 133: "Q6_0", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K", 144: "IQ4_KS", 145: "IQ2_KS",
    146: "IQ4_KSS", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT",
})  # fmt: skip
"""Types by the numbers that files have for them (ggml/include/ggml.h of llama.cpp; from 133 on, of ik_llama.cpp)."""
# ik_llama.cpp numbers types with interleaved rows so much higher; those of one bit are laid out in another way altogether.
_INTERLEAVED, _OTHERWISE = 200, (219, 229)
_WHOLE: Mapping[str, tuple[int, int]] = MappingProxyType({
    "F32": (4, 1), "F16": (2, 1), "BF16": (2, 1), "F64": (8, 1), "I8": (1, 1), "I16": (2, 1), "I32": (4, 1), "I64": (8, 1),
    "NVFP4": (36, 64), "Q6_0": (26, 32),
})  # fmt: skip
_ROW_BYTES: Mapping[str, int] = MappingProxyType(
    dict.fromkeys(("IQ4_KS", "IQ4_KSS", "IQ5_KS", "IQ1_KT", "IQ2_KT", "IQ3_KT", "IQ4_KT"), 4)
    | dict.fromkeys(("IQ2_KS", "IQ3_KS", "IQ2_KL"), 2)
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
    if name is None and number > _INTERLEAVED and number not in _OTHERWISE:
        name = _NUMBERS.get(number - _INTERLEAVED)
    if name is None:
        return None
    num_bytes, weights = _WHOLE[name] if name in _WHOLE else _BLOCKS[name][:2]
    return TensorType(name=name, block_bytes=num_bytes, block_weights=weights, row_bytes=_ROW_BYTES.get(name, 0))


# What llama.cpp stores a matrix in where a row is not a whole number of blocks of 256 (`llama_tensor_get_type`'s fallbacks).
_SHORT_ROWS: Mapping[str, str] = MappingProxyType({
    "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "Q2_K", "Q3_K", "IQ4_XS"), "IQ4_NL"),
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Bits per weight of a file that goes by one name, for rows of whole blocks."""

    experts: Fraction
    dense: Fraction
    head: Fraction
    embedding: Fraction
    """Of the token embedding."""
    recipe: Recipe | None
    """Which types these are; None where the recipe differs from model to model: then the bits are those of files that carry the name."""

    @property
    def exact(self) -> bool:
        """Whether the name is a published recipe."""
        return self.recipe is not None

    def fitting(self, *, hidden: int, width: int, gated: bool = True) -> Mix:
        """Return the mix of a model with vectors of `hidden` and experts of `width`: rows that are no whole blocks take other types."""
        return self if self.recipe is None else self.recipe.mix(hidden, width, gated=gated)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Types of a mix's tensors."""

    gate: str
    """Of the matrices that lead into an expert."""
    down: tuple[tuple[Fraction, str], ...]
    """Of those that lead out of it: shares of the layers, and the type there."""
    dense: str
    head: str
    embedding: str

    def mix(self, hidden: int = 256, width: int = 256, *, gated: bool = True) -> Mix:
        """Return the bits per weight where rows hold `hidden` weights, and those of matrices that lead out of an expert `width`."""
        into = 2 if gated else 1
        out = sum((share * _stored_bits(name, width) for share, name in self.down), Fraction(0))
        return Mix(
            experts=(into * _stored_bits(self.gate, hidden) + out) / (into + 1), dense=_stored_bits(self.dense, hidden),
            head=_stored_bits(self.head, hidden), embedding=_stored_bits(self.embedding, hidden), recipe=self,
        )  # fmt: skip


def one_type(name: str) -> Recipe | None:
    """Return the recipe of a file whose matrices all are of the type `name`, None for another name."""
    plain = _plain(name)
    if plain not in _BLOCKS:
        return None
    return Recipe(gate=plain, down=((Fraction(1), plain),), dense=plain, head=plain, embedding=plain)


def _plain(name: str) -> str:
    """Return the name of a type without what it says about the order of rows."""
    plain = name.upper()
    for ending in _ROWS:
        plain = plain.removesuffix(ending)
    return plain


def _stored_bits(name: str, row: int) -> Fraction:
    """Return bits per weight of a matrix meant for the type `name` with rows of `row` weights."""
    num_bytes, weights, _ = _BLOCKS[name]
    if row % weights and name in _SHORT_ROWS:
        num_bytes, weights, _ = _BLOCKS[_SHORT_ROWS[name]]
    return Fraction(8 * num_bytes, weights)


def block_bits(name: str) -> tuple[int, Fraction, int] | None:
    """Return (bits of a value, bits per weight, weights of a block) of a GGUF type, None for another name."""
    found = _BLOCKS.get(_plain(name))
    if found is None:
        return None
    num_bytes, weights, bits = found
    return bits, Fraction(8 * num_bytes, weights), weights


def mix(name: str) -> Mix | None:
    """Return the mix called `name` (Q4_K_M, UD-Q2_K_XL, MXFP4_MOE …), None for another name."""
    return _mixes().get(name.upper())


def mix_names() -> tuple[str, ...]:
    """Return the names of all mixes and types, for messages."""
    return tuple(sorted({*_mixes(), *_BLOCKS}))


def source() -> str:
    """Return where block sizes are documented."""
    return _SOURCE


def _down(first: str, *raised: tuple[int, str]) -> tuple[tuple[Fraction, str], ...]:
    """Return shares of the layers by type: so many sixteenths in other types, what is left in `first`."""
    left = Fraction(16 - sum(sixteenths for sixteenths, _ in raised), 16)
    return ((left, first), *((Fraction(sixteenths, 16), name) for sixteenths, name in raised))


@cache
def _mixes() -> Mapping[str, Mix]:
    """Return every mix. `llama_tensor_get_type` of llama.cpp's llama-quant.cpp says which tensors are raised.

    Half of the layers (the first and last eighth and every third between) have a finer down matrix in the …_M mixes. Mixes of IQ types
    are those made with an importance matrix, as published ones are.
    """
    # name: (gate and up, down, the rest of layers, output matrix, token embedding)
    recipes = {
        "Q2_K": ("Q2_K", _down("Q3_K"), "Q3_K", "Q6_K", "Q2_K"), "Q2_K_S": ("Q2_K", _down("Q2_K", (2, "Q4_K")), "Q2_K", "Q6_K", "Q2_K"),
        "Q3_K_S": ("Q3_K", _down("Q3_K"), "Q3_K", "Q6_K", "Q3_K"),
        "Q3_K_M": ("Q3_K", _down("Q3_K", (1, "Q5_K"), (7, "Q4_K")), "Q3_K", "Q6_K", "Q3_K"),
        "Q3_K_L": ("Q3_K", _down("Q5_K"), "Q4_K", "Q6_K", "Q3_K"),
        "Q4_0": ("Q4_0", _down("Q4_0"), "Q4_0", "Q6_K", "Q4_0"), "Q4_1": ("Q4_1", _down("Q4_1"), "Q4_1", "Q6_K", "Q4_1"),
        "Q4_K_S": ("Q4_K", _down("Q4_K", (2, "Q5_K")), "Q4_K", "Q6_K", "Q4_K"),
        "Q4_K_M": ("Q4_K", _down("Q4_K", (8, "Q6_K")), "Q4_K", "Q6_K", "Q4_K"),
        "Q5_0": ("Q5_0", _down("Q5_0"), "Q5_0", "Q6_K", "Q5_0"), "Q5_K_S": ("Q5_K", _down("Q5_K"), "Q5_K", "Q6_K", "Q5_K"),
        "Q5_K_M": ("Q5_K", _down("Q5_K", (8, "Q6_K")), "Q5_K", "Q6_K", "Q5_K"),
        "Q6_K": ("Q6_K", _down("Q6_K"), "Q6_K", "Q6_K", "Q6_K"), "Q8_0": ("Q8_0", _down("Q8_0"), "Q8_0", "Q8_0", "Q8_0"),
        "IQ4_XS": ("IQ4_XS", _down("IQ4_XS"), "IQ4_XS", "Q6_K", "IQ4_XS"),
        "IQ4_NL": ("IQ4_NL", _down("IQ4_NL"), "IQ4_NL", "Q6_K", "IQ4_NL"),
        "IQ3_M": ("IQ3_S", _down("IQ3_S", (2, "Q4_K")), "Q4_K", "Q6_K", "IQ3_S"),
        "IQ3_XXS": ("IQ3_XXS", _down("Q3_K", (2, "Q4_K")), "IQ3_XXS", "Q6_K", "IQ3_S"),
        "IQ2_M": ("IQ2_S", _down("IQ3_S", (2, "IQ4_XS")), "IQ3_S", "Q5_K", "IQ3_S"),
        "IQ2_XXS": ("IQ2_XXS", _down("IQ2_XXS", (2, "IQ3_S")), "IQ3_XXS", "Q5_K", "Q2_K"),
        "IQ1_S": ("IQ1_S", _down("IQ1_S"), "IQ2_XXS", "Q5_K", "Q2_K"), "IQ1_M": ("IQ1_M", _down("IQ1_M"), "IQ2_XXS", "Q5_K", "Q2_K"),
        "MXFP4_MOE": ("MXFP4", _down("MXFP4"), "Q8_0", "Q8_0", "Q8_0"),
    }  # fmt: skip
    # Mixes whose recipe differs from model to model: what published files come to.
    approximate = {
        "UD-IQ1_S": ("1.7", "4.5"), "UD-IQ1_M": ("1.85", "4.5"), "UD-IQ2_XXS": ("2.15", "4.5"), "UD-IQ2_M": ("2.55", "5"),
        "UD-Q2_K_XL": ("2.75", "5"), "UD-IQ3_XXS": ("3.15", "5"), "UD-Q3_K_XL": ("3.6", "5.5"), "UD-IQ4_XS": ("4.3", "5.5"),
        "UD-Q4_K_XL": ("4.65", "6"), "UD-Q5_K_XL": ("5.65", "6.5"), "UD-Q6_K_XL": ("6.6", "8.5"), "UD-Q8_K_XL": ("8.6", "10"),
    }  # fmt: skip
    found = {
        name: Recipe(gate=gate, down=down, dense=dense, head=head, embedding=embedding).mix()
        for name, (gate, down, dense, head, embedding) in recipes.items()
    }
    for name, (experts, dense) in approximate.items():
        found[name] = Mix(
            experts=Fraction(experts),
            dense=Fraction(dense),
            head=_stored_bits("Q6_K", 256),
            embedding=Fraction(dense),
            recipe=None,
        )
    return MappingProxyType(found)
