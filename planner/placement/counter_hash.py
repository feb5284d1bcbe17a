"""Randomness without a state: 32 well-mixed bits of a few whole numbers.

Modelled: draws that depend only on what they are for (seed, move, token …), so one draw more or less elsewhere changes
nothing and results are the same byte for byte on every machine. Ignored: cryptography, periods, any other quality beyond
what sampling needs.
"""

from __future__ import annotations

from ...jit import jit

_MASK = 0xFFFFFFFF


@jit
def hash_bits(a: int, b: int, c: int, d: int) -> int:
    """Return 32 bits (0 … 2**32 − 1) mixed from four whole numbers.

    Every word goes through the public-domain integer finaliser `lowbias32` (C. Wellons, constants from there). All
    products stay below 2**63 once masked, so compiled and plain Python agree.
    """
    x = 0x9E3779B9
    for word in (a, b, c, d):
        x = (x ^ (word & _MASK)) & _MASK
        x ^= x >> 16
        x = (x * 0x7FEB352D) & _MASK
        x ^= x >> 15
        x = (x * 0x46CA68B5) & _MASK
        x ^= x >> 16
    return x


@jit
def hash_below(limit: int, a: int, b: int, c: int, d: int) -> int:
    """Return a whole number 0 … limit − 1 (`limit` ≤ 2**31; bias below limit / 2**32)."""
    return (hash_bits(a, b, c, d) * limit) >> 32


@jit
def hash_fraction(a: int, b: int, c: int, d: int) -> float:
    """Return a number in [0, 1), a multiple of 2**−32."""
    return hash_bits(a, b, c, d) / 4294967296.0
