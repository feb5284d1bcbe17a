"""What a run is like, as far as the cost of its operations depends on it, and how measured runs change those costs.

    transient / cached        experts arrive in a few buffers that are used again at once, or in the slots of a cache
    overlapped / in stream    copies have a thread (and a core) of their own, or stand between the kernels
    fresh / ahead / resident  an expert was copied when this layer step asked for it, guessed and copied before, or has been there longer

Modelled: a factor for each of these, against the same operation measured alone, smooth in the sizes. Ignored: where the
factors come from (caches, mostly); a machine on which runs were not measured has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...specs.machines.profile import Curve
from .surface import Array

TRANSIENT, CACHED = "transient", "cached"
OVERLAPPED, IN_STREAM = "overlap", "stream"
FRESH, AHEAD, RESIDENT = "fresh", "ahead", "resident"
NOTHING, BESIDE_COPIES = "nothing", "copies"
DISK_LINK = "disk"
"""What samples of copies are marked with that were reads of a file."""

# How far, in logarithms, a factor counts: shapes within a factor of two; numbers of tokens hardly beyond themselves, since
# libraries choose other kernels for two rows than for one.
_WIDTH, _TOKENS_WIDTH = 0.7, 0.3
_NINE_IN_TEN = 90
# Repetitions beyond which a factor is as well known as it can be.
_ENOUGH = 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunKind:
    """What a run is like."""

    bits: str
    cached: bool
    overlapped: bool
    fresh_fraction: float
    """Share of the experts used that were copied when the layer step that used them asked for them."""
    fetches_per_transfer: float
    """Layer steps that demand at least one expert, over all transfers."""
    experts_per_layer_step: float | None
    """Experts that a layer step uses; None: any number, and factors are the least there are."""
    typical_tokens: float
    """Tokens that an expert gets when it is used."""
    ahead_fraction: float = 0.0
    """Share of the experts used that had been guessed: copied for this layer step, but before it."""
    cpu_tasks_per_core_expert: float = 0.0
    """Layer steps that send experts to the host's cores, over all experts that run there."""

    @property
    def mode(self) -> str:
        """The part of a table's name that says how experts are kept and copied."""
        return mode_of(CACHED if self.cached else TRANSIENT, OVERLAPPED if self.overlapped else IN_STREAM)


def usual_run(bits: str, experts_per_layer_step: float, typical_tokens: float) -> RunKind:
    """Return what a run is like whose decisions are not known yet: half of its experts hit, two move for a layer step that fetches."""
    return RunKind(
        bits=bits,
        cached=True,
        overlapped=True,
        fresh_fraction=0.5,
        fetches_per_transfer=0.5,
        cpu_tasks_per_core_expert=0.5,
        experts_per_layer_step=experts_per_layer_step,
        typical_tokens=typical_tokens,
    )


def mode_of(cache: str, stream: str) -> str:
    """Return the part of a table's name that says how experts are kept and copied."""
    return f"{cache}-{stream}"


def factor(curve: Curve | None, **sizes: float | None) -> float:
    """Return the factor at `sizes`: the mean of the logarithms around it, weighted by how near they are; 1 without a curve.

    Where a size is None no factor is lower than this one, whatever the size.
    """
    if curve is None:
        return 1.0
    known = {name: size for name, size in sizes.items() if size is not None}
    if len(known) < len(sizes):
        return min(curve.seconds)
    return _smoothed(curve, np.arange(len(curve.seconds)), known)


def left_out_error(curve: Curve, axis: str) -> float:
    """Return the error, nine times in ten, of factors predicted from those of other values of `axis`; 0 with one value only."""
    values = np.array(curve.arguments[axis])
    errors = []
    for value in sorted(set(values.tolist())):
        others = np.flatnonzero(values != value)
        if len(others) == 0:
            return 0.0
        for at in np.flatnonzero(values == value).tolist():
            sizes = {name: column[at] for name, column in curve.arguments.items() if name != "times"}
            errors.append(abs(_smoothed(curve, others, sizes) / curve.seconds[at] - 1))
    return float(np.percentile(errors, _NINE_IN_TEN))


def _smoothed(curve: Curve, points: Array, sizes: dict[str, float]) -> float:
    """Return the weighted mean of some of a curve's points; those measured more often count more."""
    distance = np.zeros(len(points))
    for name, value in sizes.items():
        column = np.maximum(np.array(curve.arguments[name])[points], 1.0)
        width = _TOKENS_WIDTH if name == "tokens" else _WIDTH
        distance += ((np.log(column) - math.log(max(value, 1.0))) / width) ** 2
    often = np.minimum(np.array(curve.arguments["times"])[points], _ENOUGH)
    weights = often * np.exp(-0.5 * (distance - distance.min()))
    return float(np.exp((weights * np.log(np.array(curve.seconds)[points])).sum() / weights.sum()))
