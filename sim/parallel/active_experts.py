"""How many experts of a rank are active in one step, where only the chance of each is known.

Modelled: chances of single experts, taken as independent: how many of a rank's experts are active is then a sum of coin tosses,
whose distribution is exact here, and so is the expected number on the rank that has most. That rank ends a stage: with few
tokens it runs well above the mean of any rank. Ignored: that a token chooses different experts, which makes ranks a little
more even than this.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def active_chance(inclusion: FloatArray, tokens: FloatArray) -> FloatArray:
    """Return [layers, slots]: the chance that a slot computes at least one row.

    inclusion: [layers, ranks, slots], the chance that a token of a source rank takes the slot. tokens: [ranks], of each source.
    """
    with np.errstate(divide="ignore"):
        left_out = np.log1p(-np.minimum(inclusion, 1.0))
    # No token leaves a slot out for certain, whatever the chance of one would be.
    left_out = np.where((tokens > 0)[None, :, None], left_out, 0.0)
    return np.asarray(-np.expm1(np.einsum("lrs,r->ls", np.maximum(left_out, -1e9), tokens)))


def number_active(active: FloatArray) -> FloatArray:
    """Return [..., slots + 1]: the chance that so many of `active: [..., slots]` independent experts are active."""
    found = np.zeros((*active.shape[:-1], active.shape[-1] + 1))
    found[..., 0] = 1.0
    for slot in range(active.shape[-1]):
        chance = active[..., slot, None]
        found[..., 1 : slot + 2] = found[..., 1 : slot + 2] * (1 - chance) + found[..., : slot + 1] * chance
        found[..., 0] *= 1 - chance[..., 0]
    return found


def most_over_mean(active: FloatArray) -> FloatArray:
    """Return [...]: the expected number active on the rank with most, over the largest expected number of any rank; at least 1.

    active: [..., ranks, slots].
    """
    largest = active.sum(axis=-1).max(axis=-1)
    below = np.minimum(np.cumsum(number_active(active), axis=-1), 1.0)  # chance of so many or fewer
    most = (1 - np.prod(below, axis=-2)).sum(axis=-1)
    return np.asarray(np.maximum(1.0, np.divide(most, largest, out=np.ones_like(most), where=largest > 0)))
