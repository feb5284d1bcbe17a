"""What no schedule can beat: fewest expert loads for a number of slots, and the step time that follows from them.

Modelled: a machine that is allowed to know the future, to load experts in any order, to let a set larger than the cache
stream through, and to overlap everything that the link and the stream permit. Its loads are those of Belady's farthest
next use over sets: after each visit, of the experts held and the experts just used, those needed soonest stay. Fetching
ahead does not lower the number of loads, so the bound holds for prefetching schedules too. The time bound takes the larger
of all compute and all copying (or their sum where copies and kernels share a stream), at speeds undisturbed by company.
Ignored: everything that would make the bound tighter but could make it wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..jit import jit
from ..sim.costs import HOST_KERNEL, HOST_LAYER, HOST_STEP, HOST_TRANSFER, CostTables
from ..sim.workload import Workload

Array = npt.NDArray[np.int64]


@jit
def _fewest_loads(visit_start: Array, visit_expert: Array, next_use: Array, num_layers: int, num_experts: int, pooled: bool,
                  slots: int) -> Any:  # fmt: skip
    """Return each step's loads under the farthest-next-use rule with `slots` places per layer, or in one pool for all."""
    num_keys = num_layers * num_experts
    held = np.zeros(num_keys, np.uint8)
    upcoming = np.full(num_keys, 2**62, np.int64)
    size = np.zeros(1 if pooled else num_layers, np.int64)
    loads = np.zeros((visit_start.shape[0] - 1) // num_layers, np.int64)
    for visit in range(visit_start.shape[0] - 1):
        layer = visit % num_layers
        base = layer * num_experts
        pool = 0 if pooled else layer
        for index in range(visit_start[visit], visit_start[visit + 1]):
            key = base + visit_expert[index]
            upcoming[key] = next_use[index]
            if not held[key]:
                loads[visit // num_layers] += 1
                held[key] = 1
                size[pool] += 1
        low = 0 if pooled else base
        high = num_keys if pooled else base + num_experts
        while size[pool] > slots:
            farthest = -1
            for key in range(low, high):
                if held[key] and (farthest < 0 or upcoming[key] > upcoming[farthest]):
                    farthest = key
            held[farthest] = 0
            size[pool] -= 1
    return loads


def fewest_loads(workload: Workload, slots: int, *, pooled: bool) -> Array:
    """Return, by step, expert loads whose sum no schedule with at most `slots` places (per layer, or pooled) can go below.

    The workload must carry next uses. With `slots` covering everything the sum is the number of distinct experts used.
    """
    steps = workload.steps
    loads: Array = _fewest_loads(steps.visit_start, steps.visit_expert, steps.visit_next_use, workload.num_layers,
                                 workload.num_experts, pooled, slots)  # fmt: skip
    return loads


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFloor:
    """By step, the nanoseconds that the stream computes or waits for the host whatever is cached."""

    step_ns: Array
    launch_ns: Array
    """Of those, host launches that a copy on the same stream may hide."""


def stream_floor(workload: Workload, costs: CostTables, *, grouped: bool, cores: bool = False) -> StreamFloor:
    """Return what every schedule with these cost tables pays in computing and in host work the stream waits for.

    Grouped launches pay at least one launch a visit; between a layer's routing and its first kernel the stream waits for
    one layer operation and one launch of the host. cores: experts may run on the host's cores, so that none need run here.
    """
    steps, layers = workload.steps, workload.num_layers
    quickest = costs.kernel_ns.min(axis=0)
    kernels = np.add.reduceat(quickest[steps.visit_tokens], steps.visit_start[:-1:layers]) * int(not cores)
    dense = costs.dense_ns.sum(axis=1)[costs.step_class] + costs.head_ns[costs.step_class]
    each_visit = int(costs.host_ns[HOST_LAYER] + costs.host_ns[HOST_KERNEL]) + (
        int(costs.grouped_ns[0]) if grouped and not cores else 0
    )
    each_step = int(costs.host_ns[HOST_STEP] + costs.host_ns[HOST_KERNEL])
    launches = np.full(workload.num_steps, layers * int(costs.host_ns[HOST_KERNEL]), np.int64)
    return StreamFloor(step_ns=kernels + dense + layers * each_visit + each_step, launch_ns=launches)


def copy_ns(costs: CostTables) -> int:
    """Return the nanoseconds of the quickest expert's transfer, running alone."""
    return int((costs.chunk_ns[:, 0] * (costs.num_chunks - 1) + costs.chunk_ns[:, 1]).min())


def remaining_ns(floor: StreamFloor, costs: CostTables, loads: Array, *, serial: bool, forgiven: int) -> Array:
    """Return int64 [num_steps + 1]: a time that steps `i` and later cannot take less than, 0 at the end.

    loads: fewest loads by step. forgiven: loads that the cache's content when step `i` begins may save; that many are
    always forgiven, since what a schedule has kept by then is not known. (Starting from any content saves at most as many
    loads as there are places, against starting empty; and a farthest-next-use run that already holds something never
    loads more than one that starts empty.)
    """
    stream = _from_each_on(floor.step_ns)
    moved = np.maximum(_from_each_on(loads) - forgiven, 0)
    # Submissions are made between a routing and the kernels that follow it: the stream waits for them.
    stream += moved * int(costs.host_ns[HOST_TRANSFER])
    link = moved * copy_ns(costs)
    if serial:  # copies and kernels add up, but launches and submissions may pass while a copy runs
        link = link + _from_each_on(floor.step_ns - floor.launch_ns)
    total: Array = np.maximum(stream, link)
    return total


def _from_each_on(values: Array) -> Array:
    """Return [n + 1] sums of `values` from each place to the end."""
    total = np.zeros(len(values) + 1, np.int64)
    total[:-1] = np.cumsum(values[::-1])[::-1]
    return total
