"""The cost tables that both engines index: whole nanoseconds and bytes, so that no rounding can make them differ.

Modelled: everything an activity can cost in a run, the lanes it runs on, and how busy lanes slow each other down. Ignored:
where the numbers come from (`tabulate`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ...base.records import Array, records, whole_numbers
from ..timeline import LANE_NAMES, NUM_RATED_LANES, RATE_ONE

HOST_COSTS = whole_numbers("step", "layer", "kernel", "transfer")
"""What the host takes for each step, layer step, launch and submitted copy, in nanoseconds."""

ONE_AT_A_TIME = np.zeros(0, np.int64)
"""The `stages` of runs whose passes follow one another."""


class CostTables(NamedTuple):
    """Durations in nanoseconds and sizes in bytes, as int64 arrays."""

    step_class: Array  # [num_steps]: row of `dense_ns` and `head_ns`
    dense_ns: Array  # [num_classes, num_layers]: from the end of the last MoE layer to this one's routing being known
    head_ns: Array  # [num_classes]: what follows the last MoE layer
    kernel_ns: Array  # [num_formats, max_expert_tokens + 1]: an expert's own launch, or its share of a grouped one
    grouped_ns: Array  # [1]: what a grouped launch costs besides its shares; 0 for per-expert launches
    expert_format: (
        Array  # [num_layers * num_experts]: of each expert at the start (see `policies.state.PolicyState.format`)
    )
    expert_bytes: Array  # [num_formats]
    num_chunks: Array  # [num_formats]
    chunk_bytes: Array  # [num_formats, 2]: every chunk but the last, the last
    chunk_ns: Array  # [num_formats, 2]
    back_ns: Array  # [num_formats]: one expert to the host
    cpu_ns: (
        Array  # [num_formats, max_expert_tokens + 1]: one expert on the host's cores; no columns where none runs there
    )
    disk_ns: Array  # [num_formats]: reading one expert from disk; 0 where none is read
    host_ns: Array  # HOST_COSTS [1]
    rate: Array  # [NUM_RATED_LANES, 2**NUM_RATED_LANES]: work per nanosecond while the lanes of a bit mask are busy
    stages: Array = ONE_AT_A_TIME
    """[num_layers + 2] where passes of a prompt follow each other over cards: the card of each MoE layer, that of the head, and how many
    passes may be under way; empty where a pass waits for the one before."""


def host_costs(*, step: int, layer: int, kernel: int, transfer: int) -> Array:
    """Return HOST_COSTS [1] of these nanoseconds."""
    found = records(HOST_COSTS)
    found["step"], found["layer"], found["kernel"], found["transfer"] = step, layer, kernel, transfer
    return found


def rate_table(rate_fraction: Callable[[str, frozenset[str]], float]) -> Array:
    """Return [NUM_RATED_LANES, 2**NUM_RATED_LANES] whole rates from relative speeds; an idle lane's entry is RATE_ONE."""
    table = np.full((NUM_RATED_LANES, 2**NUM_RATED_LANES), RATE_ONE, np.int64)
    for lane in range(NUM_RATED_LANES):
        for mask in range(2**NUM_RATED_LANES):
            if mask >> lane & 1:
                others = frozenset(
                    LANE_NAMES[other] for other in range(NUM_RATED_LANES) if other != lane and mask >> other & 1
                )
                table[lane, mask] = max(1, round(rate_fraction(LANE_NAMES[lane], others) * RATE_ONE))
    return table


def chunk_sizes(num_bytes: int, chunk_bytes: int | None) -> tuple[int, int, int]:
    """Return (number of chunks, bytes of each but the last, bytes of the last)."""
    if chunk_bytes is None or chunk_bytes >= num_bytes:
        return 1, num_bytes, num_bytes
    count = -(-num_bytes // chunk_bytes)
    return count, chunk_bytes, num_bytes - (count - 1) * chunk_bytes
