"""What files of Unsloth's dynamic mixes (UD-…) come to: bits of a weight, since their recipes differ from model to model.

Modelled: experts, the rest, and how far files of different models lie apart. Ignored: which tensors a file raises; the file itself
says so (`--model FILE.gguf` reads its header).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

SOURCE = "published files of huggingface.co/unsloth, sizes over parameters"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic:
    """What files under one name come to."""

    experts: Fraction
    """Bits per weight of experts."""
    dense: Fraction
    """Of everything else but the output matrix."""
    spread: float
    """Relative: nine files in ten lie within this of the mean (three generations of one mix of DeepSeek-R1 were 212, 231 and 251 GB)."""


def _dynamic(experts: str, dense: str, spread: float) -> Dynamic:
    return Dynamic(experts=Fraction(experts), dense=Fraction(dense), spread=spread)


DYNAMIC: Mapping[str, Dynamic] = MappingProxyType({
    "UD-IQ1_S": _dynamic("1.7", "4.5", 0.2), "UD-IQ1_M": _dynamic("1.85", "4.5", 0.2), "UD-IQ2_XXS": _dynamic("2.15", "4.5", 0.15),
    "UD-IQ2_M": _dynamic("2.55", "5", 0.15), "UD-Q2_K_XL": _dynamic("2.85", "6", 0.15), "UD-IQ3_XXS": _dynamic("3.15", "5", 0.15),
    "UD-Q3_K_M": _dynamic("3.65", "8.5", 0.12), "UD-Q3_K_XL": _dynamic("3.7", "6.5", 0.12), "UD-IQ4_XS": _dynamic("4.3", "5.5", 0.08),
    "UD-Q4_K_XL": _dynamic("4.85", "7.5", 0.1), "UD-Q4_K_M": _dynamic("5", "8.5", 0.08), "UD-Q5_K_S": _dynamic("5.8", "8.5", 0.08),
    "UD-Q5_K_M": _dynamic("5.9", "8.5", 0.08), "UD-Q5_K_XL": _dynamic("5.95", "8", 0.08), "UD-Q6_K_XL": _dynamic("7.1", "8.5", 0.08),
    "UD-Q8_K_XL": _dynamic("9.2", "11", 0.08),
})  # fmt: skip
