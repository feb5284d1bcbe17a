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

import numpy as np
import numpy.typing as npt

from ..jit import jit
from ..sim.costs import HOST_KERNEL, HOST_LAYER, HOST_STEP, HOST_TRANSFER, CostTables
from ..sim.workload import Workload

Array = npt.NDArray[np.int64]


@jit
def _fewest_loads(visit_start: Array, visit_expert: Array, next_use: Array, num_layers: int, num_experts: int, pooled: bool,
                  slots: int) -> int:  # fmt: skip
    """Return the loads of the farthest-next-use rule with `slots` places per layer, or in one pool for all."""
    num_keys = num_layers * num_experts
    held = np.zeros(num_keys, np.uint8)
    upcoming = np.full(num_keys, 2**62, np.int64)
    size = np.zeros(1 if pooled else num_layers, np.int64)
    loads = 0
    for visit in range(visit_start.shape[0] - 1):
        layer = visit % num_layers
        base = layer * num_experts
        pool = 0 if pooled else layer
        for index in range(visit_start[visit], visit_start[visit + 1]):
            key = base + visit_expert[index]
            upcoming[key] = next_use[index]
            if not held[key]:
                loads += 1
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


def fewest_loads(workload: Workload, slots: int, *, pooled: bool) -> int:
    """Return a number of expert loads that no schedule with at most `slots` places (per layer, or pooled) can go below.

    The workload must carry next uses. With `slots` covering everything this is the number of distinct experts used.
    """
    steps = workload.steps
    return int(
        _fewest_loads(steps.visit_start, steps.visit_expert, steps.visit_next_use, workload.num_layers,
                      workload.num_experts, pooled, slots)
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeFloor:
    """What a run computes and what its host does whatever is cached, in nanoseconds over all steps."""

    compute_ns: int
    host_ns: int


def compute_floor(workload: Workload, costs: CostTables, *, grouped: bool) -> ComputeFloor:
    """Return the compute and host time that every schedule with these cost tables pays.

    Grouped launches pay at least one launch a visit; host operations between a layer's routing and its first kernel
    delay the stream, one layer operation and one launch a visit.
    """
    steps = workload.steps
    visits = len(steps.visit_start) - 1
    kernels = int(costs.kernel_ns[0][steps.visit_tokens].sum()) + (int(costs.grouped_ns[0]) * visits if grouped else 0)
    dense = int(costs.dense_ns[costs.step_class].sum())
    head = int(costs.head_ns[costs.step_class].sum())
    host = visits * int(costs.host_ns[HOST_LAYER] + costs.host_ns[HOST_KERNEL])
    host += workload.num_steps * int(costs.host_ns[HOST_STEP] + costs.host_ns[HOST_KERNEL])
    return ComputeFloor(compute_ns=dense + head + kernels, host_ns=host)


def time_floor_ns(floor: ComputeFloor, costs: CostTables, loads: int, *, serial: bool) -> int:
    """Return a total time in nanoseconds that no schedule with at least `loads` expert loads can go below."""
    count = int(costs.num_chunks[0])
    copy = int(costs.chunk_ns[0, 0]) * (count - 1) + int(costs.chunk_ns[0, 1])
    stream = floor.compute_ns + floor.host_ns
    submit = int(costs.host_ns[HOST_TRANSFER]) * loads
    # Submissions are made between a routing and the kernels that follow it: the stream waits for them.
    return stream + submit + loads * copy if serial else max(stream + submit, loads * copy)
