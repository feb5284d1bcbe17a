"""How sure a difference between schedules of one workload on one machine is: errors that they share cancel.

Modelled: what is wrong by one factor for all of them: dense kernels, kernels of experts, exchanges of one kind. Each moves a schedule
by its time on the critical path, so it moves a sum of schedules by the same sum of those times. Beside them what is hidden by overlap,
whose size is itself a prediction; for counts, that a placement's real steps lie unevenly above their expectation; for recorded tokens,
the scatter over steps, pair by pair. Effects are independent and add up as such; all are half-widths that hold nine times in ten.
Ignored: that a constant may be wrong at one size and right at another.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...base.errors import Internal
from ...sim.parallel.simulate import EpPrediction

# Of 16 overlapped layers of EPS-MoE (arXiv 2410.12247, 3072 tokens) 15 are reproduced within 31 % (`moeplan reproduce eps-moe`).
OVERLAP_UNCERTAINTY = 0.31
# From counts, every preset's step lies 0 to 3.3 % below the counted one (DeepSeek-V2-Lite, 2 x 4 ranks; `INDEPENDENCE_UNCERTAINTY`): nine
# in ten of such errors are within so much of their middle.
COUNTS_UNCERTAINTY = 0.9 * 0.033 / 2
# Nine in ten of a normal distribution lie within so many standard deviations.
_NINE_IN_TEN = 1.645
# A change below this is not worth an operator's trouble: the noise of step times in serving.
WORTH_FRACTION = 0.01

PAYS, COSTS, UNDECIDED, NOTHING = "pays", "costs", "undecided", "changes nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Seconds of a step that something saves, with the doubt about the saving itself."""

    saved_s: float
    """Below zero where it costs."""
    uncertainty_s: float
    """Half the width of the interval."""
    of_s: float
    """The step that it is a part of."""

    @property
    def verdict(self) -> str:
        """pays, costs, undecided, or changes nothing."""
        if abs(self.saved_s) + self.uncertainty_s < WORTH_FRACTION * self.of_s:
            return NOTHING
        if abs(self.saved_s) <= self.uncertainty_s:
            return UNDECIDED
        return PAYS if self.saved_s > 0 else COSTS

    @property
    def change_fraction(self) -> float:
        """The change of the step: below zero where something is saved."""
        return -self.saved_s / self.of_s

    def to_dict(self) -> dict[str, object]:
        """Return the figures as plain values."""
        return {
            "saved_s": self.saved_s, "uncertainty_s": self.uncertainty_s, "change_fraction": self.change_fraction,
            "uncertainty_fraction": self.uncertainty_s / self.of_s, "verdict": self.verdict,
        }  # fmt: skip


def gain(terms: Sequence[tuple[float, EpPrediction]], wrong: Mapping[str, float], *, of_s: float, exact: bool) -> Gain:
    """Return the saving that is a weighted sum of steps, such as (1, before) and (-1, after).

    wrong: relative uncertainty of "dense", "expert" and "exchange". exact: tokens were recorded one by one. Raises Internal for
    predictions that do not say where their time goes.
    """
    shared: defaultdict[str, list[float]] = defaultdict(list)
    by_traffic: defaultdict[tuple[object, ...], list[float]] = defaultdict(list)
    for weight, one in terms:
        if one.parts is None:
            raise Internal(f"{one.schedule.name} was predicted without its parts")
        schedule = one.schedule
        for kind, seconds in one.parts.by_kind_s.items():
            name, error = _cause(kind, schedule.all_to_all.kind, wrong)
            shared[name].append(weight * error * seconds)
        hidden = max(0.0, one.compute_s + one.exchange_s - one.step_s)
        shared["overlap"].append(weight * OVERLAP_UNCERTAINTY * hidden)
        key = (schedule.placement, schedule.replica, schedule.all_to_all.kind, schedule.parallel)
        by_traffic[key].append(weight * one.step_s)
    effects = [math.fsum(each) for each in shared.values()]  # exactly nought where a schedule stands beside itself
    if exact:
        effects.append(_scatter(terms))
    else:
        # Schedules that send and compute the same have the same error.
        effects += [COUNTS_UNCERTAINTY * math.fsum(each) for each in by_traffic.values()] if len(by_traffic) > 1 else []
    return Gain(
        saved_s=sum(weight * one.step_s for weight, one in terms),
        uncertainty_s=math.sqrt(sum(each**2 for each in effects)),
        of_s=of_s,
    )


def _cause(kind: str, exchange: str, wrong: Mapping[str, float]) -> tuple[str, float]:
    """Return (what is wrong alike, by how much) for a kind of activity."""
    if kind in ("dispatch", "combine"):
        return f"{exchange} exchanges", wrong["exchange"]
    if kind in ("reduce", "waiting"):
        return "reductions", wrong["exchange"]
    return ("experts", wrong["expert"]) if kind == "expert" else ("dense", wrong["dense"])


def _scatter(terms: Sequence[tuple[float, EpPrediction]]) -> float:
    """Return the doubt that a mean over so few steps leaves about a sum of schedules on the same steps."""
    counts = {len(one.steps_s) for _, one in terms}
    if len(counts) != 1 or counts == {1}:
        return 0.0
    each = np.sum([weight * np.array(one.steps_s) for weight, one in terms], axis=0)
    return float(_NINE_IN_TEN * each.std(ddof=1) / math.sqrt(len(each)))
