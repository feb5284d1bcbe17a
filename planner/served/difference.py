"""How sure it is that one schedule is faster than another on the same machine: errors that both share cancel.

Modelled: constants of the card, of the link, of the cores and of the host are wrong by the same factor for both schedules, each on its
own; so is routing. Their effects on the ratio of both times, found by running both again with each at either end of its
uncertainty, add up as independent ones do, with an error that the two do not share. Ignored: that a constant may be wrong at one
size of pass and right at another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...sim.offload.costs import CostTables
from ...sim.offload.forecast import run_tables, simulate
from ...sim.offload.metrics import figures_of
from ...sim.offload.run_facts import run_facts
from ...sim.offload.simulate import Simulation
from ...sim.offload.tabulate import AS_IS, FAST, SLOW
from ...specs.schedules.offload import OffloadSchedule
from ..offload.objective import value_of

SHARED: Mapping[str, tuple[str, ...]] = {
    "the card": ("dense_ns", "head_ns", "kernel_ns", "grouped_ns"), "the link": ("chunk_ns", "back_ns"), "the cores": ("cpu_ns",),
    "the host": ("host_ns",), "the disk": ("disk_ns",),
}  # fmt: skip
UNSHARED = 0.03
"""Relative error of a ratio that no shared constant explains: repeated runs of one build differ by about as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """By how many times one schedule is faster than another."""

    ratio: float
    """Above 1: the first is faster."""
    low: float
    high: float
    shares: dict[str, float]
    """By cause, how much it may move the ratio, as a fraction; the largest first."""

    @property
    def promised(self) -> bool:
        """Whether the first is faster whatever the errors."""
        return self.low > 1

    @property
    def words(self) -> str:
        """The ratio with its ends."""
        return f"{self.ratio:.2f} times as fast ({self.low:.2f} to {self.high:.2f})"


def difference(
    simulation: Simulation, one: OffloadSchedule, other: OffloadSchedule, objective: str, *, granted: float = 0.0,
    elsewhere: Simulation | None = None,
) -> Difference:  # fmt: skip
    """Return by how many times `one` is faster than `other`, both resolved; granted: the fraction of its time by which `other` may
    be faster than predicted for a reason that is known. elsewhere: the simulation that `other` runs on, where the model is divided
    otherwise over the cards.
    """
    first = _values(simulation, one, objective)
    second = _values(elsewhere or simulation, other, objective)
    ratio = second[""] * (1 - granted) / first[""]
    shares: dict[str, float] = {}
    for name in first:
        if name and name in second:
            moved = abs(math.log(second[name] / first[name] / (second[""] / first[""])))
            cause = name.rpartition("/")[0]
            shares[cause] = max(shares.get(cause, 0.0), moved)
    wide = math.sqrt(sum(moved**2 for moved in shares.values()) + UNSHARED**2)
    ranked = {name: math.expm1(moved) for name, moved in sorted(shares.items(), key=lambda pair: -pair[1]) if moved > 0}
    return Difference(ratio=ratio, low=ratio * math.exp(-wide), high=ratio * math.exp(wide), shares=ranked)


def _values(simulation: Simulation, schedule: OffloadSchedule, objective: str) -> dict[str, float]:
    """Return a schedule's time as predicted (""), with each cause at either end ("cause/end"), and with other routing."""
    found = {}
    given = simulation.given(schedule)
    facts = run_facts(given)
    ends = {
        shift: run_tables(given, simulation.model, simulation.costs, facts=facts, shift=shift)[0]
        for shift in (AS_IS, SLOW, FAST)
    }  # fmt: skip

    def value(tables: CostTables) -> float:
        return value_of(objective, figures_of(simulate(given, tables).step_end, given.workload))

    found[""] = value(ends[AS_IS])
    for cause, fields in SHARED.items():
        for shift in (SLOW, FAST):
            moved = ends[AS_IS]._replace(**{name: getattr(ends[shift], name) for name in fields})
            found[f"{cause}/{shift}"] = value(moved)
    for number, trace in enumerate(simulation.likewise):
        like = simulation.over(trace)
        again = like.given(schedule)
        tables = run_tables(again, like.model, like.costs, facts=run_facts(again))[0]
        found[f"routing/{number}"] = value_of(objective, figures_of(simulate(again, tables).step_end, again.workload))
    return found
