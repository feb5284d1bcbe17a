"""What a run decides, layer step by layer step, with nothing done: which experts come how, what is computed where.

Modelled: how each expert came to be where it is used, and the launches of every layer step. Ignored: what anything costs, and counts
of a whole run (`sim.offload.run_facts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ...calibrate.costs.run_kind import AHEAD, FRESH, RESIDENT
from ...sim.offload.run_input import RunInput
from ...sim.offload.simulators import decided_layer_steps, fresh_state
from ...sim.policies.state import (
    Array,
    Decision,
)
from ...sim.timeline import ROW_LAYER, ROW_START, ROW_STEP


def arrivals_of(out: Decision) -> Array:
    """Return, for each expert of a decided layer step, whether it was asked for, guessed before, or there: FRESH, AHEAD or RESIDENT."""
    asked = out.items["transfer"][: out.size[0].items]
    found: Array = np.where(asked < 0, RESIDENT, np.where(asked < out.size[0].first_transfer, AHEAD, FRESH))
    return found


def run_arrivals(given: RunInput) -> dict[tuple[int, int, int], str]:
    """Return for every (step, layer, expert) that a run computes how the expert came to be there."""
    found: dict[tuple[int, int, int], str] = {}
    for step, layer, out in _decisions(given):
        experts = out.items["expert"][: out.size[0].items].tolist()
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
        items, cores = int(out.size[0].items), int(out.size[0].cores)
        columns = (out.items["kernel"], out.items["expert"], out.items["format"], out.items["tokens"])
        mine: dict[int, list[Item]] = {}
        for kernel, *item in zip(*(column[:items].tolist() for column in columns), strict=True):
            mine.setdefault(kernel, []).append((item[0], item[1], item[2]))
        launches[step, layer] = [mine[kernel] for kernel in sorted(mine)]
        for expert, fmt in zip(out.cores["expert"][:cores].tolist(), out.cores["format"][:cores].tolist(), strict=True):
            core_formats[step, layer, expert] = fmt
    return Work(launches=launches, core_formats=core_formats)


def _decisions(given: RunInput) -> Iterator[tuple[int, int, Decision]]:
    """Return every layer step's (step, layer, decision) of a run in which nothing is done."""
    state = fresh_state(given.config, given.workload, given.capacities, given.weighed)
    return decided_layer_steps(given.config, given.workload, state)


def launch_of_rows(rows: Array) -> Array:
    """Return int64 [num_rows]: the how-manyth launch of its layer step each row is; `rows` are kernels, in any order."""
    order = np.lexsort((rows[:, ROW_START], rows[:, ROW_LAYER], rows[:, ROW_STEP]))
    layer_steps = rows[order][:, [ROW_STEP, ROW_LAYER]]
    begins = (
        np.flatnonzero(np.r_[True, (layer_steps[1:] != layer_steps[:-1]).any(axis=1)])
        if len(rows)
        else np.zeros(0, np.int64)
    )
    found = np.zeros(len(rows), np.int64)
    found[order] = np.arange(len(rows)) - np.repeat(begins, np.diff(np.r_[begins, len(rows)]))
    return found
