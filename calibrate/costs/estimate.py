"""What a cost model answers: seconds with where they come from, what bounds them and how wrong they may be.

Modelled: sums, whose uncertainties add as they are, because the same constants stand in every activity and err together; products of
constants, whose uncertainties add as squares. Ignored: what an activity costs (`cost_model`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ...specs.machines.profile import SOURCES, Constant

Array: TypeAlias = npt.NDArray[np.float64]
BOUNDS = ("compute", "memory", "link", "launch", "host")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds, with where they come from, what bounds them, and how wrong they may be."""

    seconds: float
    source: str
    """Sources of all constants that entered, most trusted first, joined by "+"."""
    bound: str
    """compute, memory, link, launch or host: what would have to be faster."""
    relative_uncertainty: float
    launch_s: float = 0.0
    """Of the seconds, those that pass in launching kernels, not in their work."""

    def __add__(self, other: Estimate) -> Estimate:
        """Return the sum: sources merged, the longer part's bound, uncertainties added in seconds."""
        seconds = self.seconds + other.seconds
        wrong = self.seconds * self.relative_uncertainty + other.seconds * other.relative_uncertainty
        return Estimate(
            seconds=seconds, source=merge_sources(self.source, other.source),
            bound=self.bound if self.seconds >= other.seconds else other.bound,
            relative_uncertainty=wrong / seconds if seconds > 0 else 0.0, launch_s=self.launch_s + other.launch_s,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Estimates of one operation at several sizes, as arrays."""

    seconds: Array
    relative_uncertainty: Array
    launch_s: Array
    source: str
    bound: str
    """Of the last of them."""

    def at(self, place: int) -> Estimate:
        """Return one of them."""
        return Estimate(
            seconds=float(self.seconds[place]), source=self.source, bound=self.bound,
            relative_uncertainty=float(self.relative_uncertainty[place]), launch_s=float(self.launch_s[place]),
        )  # fmt: skip


def times_of(estimates: Sequence[Estimate]) -> Times:
    """Return estimates, at least one, as arrays; their sources merged."""
    return Times(
        seconds=np.array([one.seconds for one in estimates]),
        relative_uncertainty=np.array([one.relative_uncertainty for one in estimates]),
        launch_s=np.array([one.launch_s for one in estimates]),
        source=merge_sources(*{one.source for one in estimates}), bound=estimates[-1].bound,
    )  # fmt: skip


def merge_sources(*sources: str) -> str:
    """Return the distinct sources of several estimates, most trusted first, joined by "+"."""
    names = {name for source in sources for name in source.split("+") if name}
    return "+".join(sorted(names, key=lambda name: (SOURCES.index(name) if name in SOURCES else len(SOURCES), name)))


def rate_term(seconds: float, bound: str, *constants: Constant) -> Estimate:
    """Return one product or quotient of constants as an estimate."""
    return Estimate(
        seconds=seconds, source=merge_sources(*(constant.source for constant in constants)), bound=bound,
        relative_uncertainty=math.hypot(*(constant.relative_uncertainty for constant in constants)),
        launch_s=seconds if bound == "launch" else 0.0,
    )  # fmt: skip
