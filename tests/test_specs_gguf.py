"""Weight formats of GGUF files: exact blocks, published mixes."""

from __future__ import annotations

from fractions import Fraction

import pytest

from moeplan.errors import UnknownName
from moeplan.specs import weight_format
from moeplan.specs.gguf import block_bits, mix, mix_names


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("Q8_0", "8.5"),
        ("Q4_0", "4.5"),
        ("Q6_K", "6.5625"),
        ("IQ4_XS", "4.25"),
        ("MXFP4", "4.25"),
        ("Q2_K", "2.625"),
        ("IQ4_K_R4", "4.5"),
    ],
)
def test_blocks_are_exact(name: str, bits: str) -> None:
    found = block_bits(name)
    assert found is not None and found[1] == Fraction(bits)


def test_a_mix_lies_between_its_types() -> None:
    found = mix("Q4_K_M")
    assert found is not None and found.exact
    # Half of the layers' down matrices are Q6_K: (2 · 4.5 + (4.5 + 6.5625) / 2) / 3.
    assert found.experts == Fraction("4.84375") and found.dense == Fraction("4.5") and found.head == Fraction("6.5625")


def test_names_are_formats() -> None:
    for name in mix_names():
        fmt = weight_format(name)
        assert 1.5 < fmt.bits_per_weight < 11 and fmt.quantised
    assert weight_format("4.58bpw").bits_per_weight == Fraction("4.58")
    for wrong in ("Q4_K_X", "0.5bpw", "17bpw", "bpw"):
        with pytest.raises(UnknownName):
            weight_format(wrong)
