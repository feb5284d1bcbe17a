"""Random numbers that are a function of a counter, so that a recording depends on its seed alone.

Modelled: a 64-bit mixer (the finaliser of SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) over keys made of seed, token, layer and draw; uniform numbers from it. No state is
carried from one draw to the next, so chunks can be cut anywhere. Ignored: cryptographic strength.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...base.jit import jit

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio, the mixer's usual increment
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_TO_UNIT = 1.0 / (1 << 53)


@jit
def mix(key: np.uint64) -> np.uint64:
    """Return 64 well-mixed bits of a key."""
    key = (key ^ (key >> _S30)) * _M1
    key = (key ^ (key >> _S27)) * _M2
    return key ^ (key >> _S31)


@jit
def unit(bits: np.uint64) -> float:
    """Return a number in [0, 1) from 64 random bits."""
    return float(bits >> _S11) * _TO_UNIT


@jit
def uniforms(seed: int, stream: int, first: int, count: int) -> npt.NDArray[np.float64]:
    """Return the numbers [first, first + count) of one stream of a seed, each in [0, 1)."""
    key = mix(mix(np.uint64(seed) + GOLDEN) + np.uint64(stream) * _M2)
    out = np.empty(count)
    for i in range(count):
        out[i] = unit(mix(key + np.uint64(first + i) * GOLDEN))
    return out


def shuffled(seed: int, stream: int, size: int) -> npt.NDArray[np.int64]:
    """Return the numbers 0 to size − 1 in random order."""
    return np.argsort(uniforms(seed, stream, 0, size), kind="stable")
