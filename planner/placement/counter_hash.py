"""Randomness without a state: numbers that depend only on what they are for.

Modelled: draws from the simulator's counter-based hash of a few whole numbers (seed, move, token …), so one draw more or
less elsewhere changes nothing and results are the same byte for byte on every machine. Ignored: cryptography, periods, any
other quality beyond what sampling needs.
"""

from __future__ import annotations

from ...base.jit import jit
from ...sim.policies.prefetching import hash32


@jit
def hash_below(limit: int, a: int, b: int, c: int, d: int) -> int:
    """Return a whole number 0 … limit − 1 (`limit` ≤ 2**31; bias below limit / 2**32)."""
    return (hash32(a, b, c, d) * limit) >> 32


@jit
def hash_fraction(a: int, b: int, c: int, d: int) -> float:
    """Return a number in [0, 1), a multiple of 2**−32."""
    return hash32(a, b, c, d) / 4294967296.0


def shuffled(count: int, seed: int, stream: int) -> list[int]:
    """Return 0 … count − 1 in an order that depends only on `count`, `seed` and `stream`."""
    return sorted(range(count), key=lambda place: (hash32(seed, stream, place, 0), place))
