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


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Bits per weight of a file that goes by one name."""

    experts: Fraction
    dense: Fraction
    head: Fraction
    exact: bool
    """Whether the name is a published recipe; else the bits are those of files that carry it."""


def block_bits(name: str) -> tuple[int, Fraction, int] | None:
    """Return (bits of a value, bits per weight, weights of a block) of a GGUF type, None for another name."""
    plain = name.upper()
    for ending in _ROWS:
        plain = plain.removesuffix(ending)
    found = _BLOCKS.get(plain)
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


def _b(name: str) -> Fraction:
    num_bytes, weights, _ = _BLOCKS[name]
    return Fraction(8 * num_bytes, weights)


def _down(*parts: tuple[Fraction, str]) -> Fraction:
    """Return the mean of shares of layers in several types; what is left takes the last one."""
    given = sum((share for share, _ in parts[:-1]), Fraction(0))
    total = sum((share * _b(name) for share, name in parts[:-1]), Fraction(0))
    return total + (1 - given) * _b(parts[-1][1])


@cache
def _mixes() -> Mapping[str, Mix]:
    """Return every mix. `llama_tensor_get_type` of llama.cpp's llama-quant.cpp says which tensors are raised.

    Half of the layers (the first and last eighth and every third between) have a finer down matrix in the …_M mixes.
    """
    half, eighth, last = Fraction(1, 2), Fraction(1, 8), Fraction(1)

    def three(gate: str, *down: tuple[Fraction, str]) -> Fraction:
        return (2 * _b(gate) + _down(*down)) / 3

    q6 = _b("Q6_K")
    mixes = {
        "Q2_K": (three("Q2_K", (last, "Q3_K")), _b("Q3_K"), q6), "Q2_K_S": (_b("Q2_K"), _b("Q2_K"), q6),
        "Q3_K_S": (_b("Q3_K"), _b("Q3_K"), q6),
        "Q3_K_M": (three("Q3_K", (Fraction(1, 16), "Q5_K"), (Fraction(7, 16), "Q4_K"), (last, "Q3_K")), _b("Q3_K"), q6),
        "Q3_K_L": (three("Q3_K", (last, "Q5_K")), _b("Q4_K"), q6),
        "Q4_0": (_b("Q4_0"), _b("Q4_0"), q6), "Q4_1": (_b("Q4_1"), _b("Q4_1"), q6),
        "Q4_K_S": (three("Q4_K", (eighth, "Q5_K"), (last, "Q4_K")), _b("Q4_K"), q6),
        "Q4_K_M": (three("Q4_K", (half, "Q6_K"), (last, "Q4_K")), _b("Q4_K"), q6),
        "Q5_0": (_b("Q5_0"), _b("Q5_0"), q6), "Q5_K_S": (_b("Q5_K"), _b("Q5_K"), q6),
        "Q5_K_M": (three("Q5_K", (half, "Q6_K"), (last, "Q5_K")), _b("Q5_K"), q6),
        "Q6_K": (q6, q6, q6), "Q8_0": (_b("Q8_0"),) * 3,
        "IQ4_XS": (three("IQ4_XS", (eighth, "Q5_K"), (last, "IQ4_XS")), _b("IQ4_XS"), q6),
        "IQ4_NL": (three("IQ4_NL", (eighth, "Q5_K"), (last, "IQ4_NL")), _b("IQ4_NL"), q6),
        "IQ3_M": (three("IQ3_S", (eighth, "Q4_K"), (last, "IQ3_S")), _b("Q4_K"), q6),
        "IQ3_XXS": (three("IQ3_XXS", (eighth, "Q4_K"), (last, "Q3_K")), _b("IQ3_XXS"), q6),
        "IQ2_M": (three("IQ2_S", (eighth, "IQ4_XS"), (last, "IQ3_S")), _b("IQ3_S"), _b("Q5_K")),
        "IQ2_XXS": (three("IQ2_XXS", (eighth, "IQ3_S"), (last, "IQ2_XXS")), _b("IQ3_XXS"), _b("Q5_K")),
        "IQ1_S": (_b("IQ1_S"), _b("IQ2_XXS"), _b("Q5_K")), "IQ1_M": (_b("IQ1_M"), _b("IQ2_XXS"), _b("Q5_K")),
        "MXFP4_MOE": (_b("MXFP4"), _b("Q8_0"), _b("Q8_0")),
    }  # fmt: skip
    # Mixes whose recipe differs from model to model: what published files come to.
    approximate = {
        "UD-IQ1_S": ("1.7", "4.5"), "UD-IQ1_M": ("1.85", "4.5"), "UD-IQ2_XXS": ("2.15", "4.5"), "UD-IQ2_M": ("2.55", "5"),
        "UD-Q2_K_XL": ("2.75", "5"), "UD-IQ3_XXS": ("3.15", "5"), "UD-Q3_K_XL": ("3.6", "5.5"), "UD-IQ4_XS": ("4.3", "5.5"),
        "UD-Q4_K_XL": ("4.65", "6"), "UD-Q5_K_XL": ("5.65", "6.5"), "UD-Q6_K_XL": ("6.6", "8.5"), "UD-Q8_K_XL": ("8.6", "10"),
    }  # fmt: skip
    found = {
        name: Mix(experts=experts, dense=dense, head=head, exact=True) for name, (experts, dense, head) in mixes.items()
    }
    for name, (experts, dense) in approximate.items():
        found[name] = Mix(experts=Fraction(experts), dense=Fraction(dense), head=q6, exact=False)
    return MappingProxyType(found)
