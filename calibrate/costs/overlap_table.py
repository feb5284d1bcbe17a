"""What overlap costs a layer's experts on one GPU, as measured there: kernels, launches, multiprocessors, copies beside products.

    overlap.dense              one plain product after the other, over one grouped launch, by rows of each expert
    overlap.launches           the same experts in several launches, over one launch, by rows and launches
    overlap.multiprocessors    one launch on a share of the multiprocessors, over all of them
    overlap.beside             the speed that products and copies leave each other

Modelled: ratios to one grouped launch, between measured points on straight lines over logarithms, beyond them as at their ends. The seconds
of these curves are ratios. Ignored: how shapes other than the measured one differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...specs.machines.profile import Curve

Array = npt.NDArray[np.float64]
DENSE, LAUNCHES, MULTIPROCESSORS, BESIDE = (
    f"overlap.{what}" for what in ("dense", "launches", "multiprocessors", "beside")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapTable:
    """Ratios of one GPU. Of what was not measured there is nothing: then it is not known, not 1."""

    dense: Curve | None
    launches: Curve | None
    multiprocessors: Curve | None
    beside: Curve | None

    def dense_over_grouped(self, rows: Array) -> Array | None:
        """Return how many times as long plain products take as a grouped launch, for experts of `rows: [...]` rows in the mean."""
        return None if self.dense is None else _between(np.log(np.maximum(rows, 1.0)), self.dense, "rows", log=True)

    def over_one_launch(self, rows: Array, launches: int) -> Array | None:
        """Return how many times as long so many launches take as one, for experts of `rows: [...]` rows in the mean."""
        curve = self.launches
        if curve is None:
            return None
        known = np.array(curve.arguments["launches"])
        counts = np.unique(known)
        at = np.log(np.maximum(rows, 1.0))
        lines = np.stack([_between(at, _only(curve, known == count), "rows", log=True) for count in counts])
        place = float(np.interp(np.log(launches), np.log(counts), np.arange(len(counts))))
        low = min(int(place), len(counts) - 1)
        high = min(low + 1, len(counts) - 1)
        return np.asarray(lines[low] + (place - low) * (lines[high] - lines[low]))

    def speed_on(self, share: float) -> float | None:
        """Return the speed of kernels on a share of the multiprocessors, relative to all of them."""
        if self.multiprocessors is None:
            return None
        least = min(self.multiprocessors.arguments["share"])
        longer = float(_between(np.array([share]), self.multiprocessors, "share", log=False)[0])
        # Fewer than were ever measured are slower in proportion.
        return min(1.0, share / least) / longer

    @property
    def shared_speed(self) -> float | None:
        """Speed of products beside copies, and of copies beside products, relative to alone."""
        return None if self.beside is None else min(1.0, 1 / self.beside.seconds[0])

    @property
    def fastest(self) -> float:
        """What kernels may at most be faster by than one grouped launch on all multiprocessors."""
        ratios = [
            min(curve.seconds) for curve in (self.dense, self.launches, self.multiprocessors) if curve is not None
        ]
        return float(np.prod([1 / min(1.0, ratio) for ratio in ratios]))


def overlap_table(curves: Mapping[str, Curve]) -> OverlapTable | None:
    """Return what a profile's curves say of overlap; None where nothing was measured."""
    found = [curves.get(name) for name in (DENSE, LAUNCHES, MULTIPROCESSORS, BESIDE)]
    if all(curve is None for curve in found):
        return None
    dense, launches, multiprocessors, beside = found
    return OverlapTable(dense=dense, launches=launches, multiprocessors=multiprocessors, beside=beside)


def _only(curve: Curve, keep: npt.NDArray[np.bool_]) -> Curve:
    """Return some points of a curve."""
    at = np.flatnonzero(keep).tolist()
    return Curve(
        arguments={axis: tuple(values[n] for n in at) for axis, values in curve.arguments.items()},
        seconds=tuple(curve.seconds[n] for n in at), relative_uncertainty=curve.relative_uncertainty,
    )  # fmt: skip


def _between(wanted: Array, curve: Curve, axis: str, *, log: bool) -> Array:
    """Return ratios at `wanted: [...]`, logarithms where `log`."""
    known = np.array(curve.arguments[axis])
    order = np.argsort(known)
    at = np.log(known[order]) if log else known[order]
    return np.asarray(np.interp(wanted, at, np.array(curve.seconds)[order]))
