"""What a run's decisions say of it before it runs: they depend on no time.

Modelled: how often an expert was copied for the very visit that uses it, and how many transfers share one wait. Ignored: what
anything costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..calibrate.run_kind import AHEAD, FRESH, RESIDENT
from ..sim.engines import decided_visits, fresh_state
from ..sim.policies.state import (
    DEMAND,
    FIRST_TRANSFER,
    SIZE_CPU,
    SIZE_ITEMS,
    SIZE_MOVES,
    Array,
    Decision,
)
from ..sim.timeline import ROW_LAYER, ROW_START, ROW_STEP
from .execute import RunInput


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """Counts of a whole run, as shares."""

    fresh_fraction: float
    """Share of the experts used whose transfer the visit that used them asked for."""
    ahead_fraction: float
    """Share of the experts used for the first time after a guess."""
    fetches_per_transfer: float
    """Visits that demand at least one expert, over all transfers."""
    experts_per_visit: float
    """Experts that a visit uses; over decoding where there is any."""
    errands_per_core_expert: float
    """Visits that send experts to the host's cores, over all experts that run there."""


def arrivals_of(out: Decision) -> Array:
    """Return, for each expert of a decided visit, whether it was asked for, guessed before, or there: FRESH, AHEAD or RESIDENT."""
    asked = out.item_transfer[: out.size[SIZE_ITEMS]]
    found: Array = np.where(asked < 0, RESIDENT, np.where(asked < out.size[FIRST_TRANSFER], AHEAD, FRESH))
    return found


def run_arrivals(given: RunInput) -> dict[tuple[int, int, int], str]:
    """Return for every (step, layer, expert) that a run computes how the expert came to be there."""
    found: dict[tuple[int, int, int], str] = {}
    for step, layer, out in _decisions(given):
        experts = out.item_expert[: out.size[SIZE_ITEMS]].tolist()
        for expert, arrival in zip(experts, arrivals_of(out).tolist(), strict=True):
            found[step, layer, expert] = arrival
    return found


Item = tuple[int, int, int]
"""Expert, weight format, tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run decides to compute, and where."""

    launches: Mapping[tuple[int, int], list[list[Item]]]
    """For each (step, layer) the launches of its kernels in order, each as the items that it computes."""
    core_formats: Mapping[tuple[int, int, int], int]
    """Weight format of every (step, layer, expert) that the host's cores compute."""


def decided_work(given: RunInput) -> Work:
    """Return what a run computes, from its decisions made without doing anything."""
    launches: dict[tuple[int, int], list[list[Item]]] = {}
    core_formats: dict[tuple[int, int, int], int] = {}
    for step, layer, out in _decisions(given):
        items, cores = int(out.size[SIZE_ITEMS]), int(out.size[SIZE_CPU])
        columns = (out.item_kernel, out.item_expert, out.item_format, out.item_tokens)
        mine: dict[int, list[Item]] = {}
        for kernel, *item in zip(*(column[:items].tolist() for column in columns), strict=True):
            mine.setdefault(kernel, []).append((item[0], item[1], item[2]))
        launches[step, layer] = [mine[kernel] for kernel in sorted(mine)]
        for expert, fmt in zip(out.cpu_expert[:cores].tolist(), out.cpu_format[:cores].tolist(), strict=True):
            core_formats[step, layer, expert] = fmt
    return Work(launches=launches, core_formats=core_formats)


def _decisions(given: RunInput) -> Iterator[tuple[int, int, Decision]]:
    """Return every visit's (step, layer, decision) of a run in which nothing is done."""
    state = fresh_state(given.config, given.workload, given.capacities, given.weighed)
    return decided_visits(given.config, given.workload, state)


def launch_of_rows(rows: Array) -> Array:
    """Return int64 [num_rows]: the how-manyth launch of its visit each row is; `rows` are kernels, in any order."""
    order = np.lexsort((rows[:, ROW_START], rows[:, ROW_LAYER], rows[:, ROW_STEP]))
    visits = rows[order][:, [ROW_STEP, ROW_LAYER]]
    begins = (
        np.flatnonzero(np.r_[True, (visits[1:] != visits[:-1]).any(axis=1)]) if len(rows) else np.zeros(0, np.int64)
    )
    found = np.zeros(len(rows), np.int64)
    found[order] = np.arange(len(rows)) - np.repeat(begins, np.diff(np.r_[begins, len(rows)]))
    return found


def run_facts(given: RunInput) -> RunFacts:
    """Return the facts of a run, from its decisions made without doing anything."""
    used = fresh = ahead = fetches = transfers = decoded = visits = errands = on_cores = 0
    decode = given.workload.steps.step_phase == 1
    counted = decode if decode.any() else np.ones_like(decode)
    for step, _, out in _decisions(given):
        items, moves = int(out.size[SIZE_ITEMS]), int(out.size[SIZE_MOVES])
        used += items
        if counted[step]:
            decoded, visits = decoded + items, visits + 1
        arrivals = arrivals_of(out)
        fresh += int((arrivals == FRESH).sum())
        ahead += int((arrivals == AHEAD).sum())
        cores = int(out.size[SIZE_CPU])
        on_cores, errands = on_cores + cores, errands + (cores > 0)
        transfers += moves
        fetches += bool((out.move_class[:moves] == DEMAND).any())
    return RunFacts(
        fresh_fraction=fresh / used if used else 0.0,
        ahead_fraction=ahead / used if used else 0.0,
        fetches_per_transfer=fetches / transfers if transfers else 0.0,
        experts_per_visit=decoded / max(1, visits),
        errands_per_core_expert=errands / max(1, on_cores),
    )
