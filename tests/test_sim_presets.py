"""Whole small timelines of every preset, checked by hand: two layers, three experts, one chosen per token, two tokens.

Costs: dense 10 ns, expert 4, head 5, a copy 20, a copy back 20, the host 1 per layer and nothing else; no contention.
Token 0 routes to experts 0 (layer 0) and 1 (layer 1); token 1 to experts 0 and 2.
"""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.schedule import PRESETS, OffloadSchedule, load_preset
from moeplan.sim.costs import NUM_RATED_LANES, RATE_ONE, CostTables
from moeplan.sim.engines import first_difference, run_simpy, run_twin
from moeplan.sim.timeline import LANE_NAMES, OP_NAMES
from moeplan.sim.workload import build_workload
from moeplan.traces.format import RoutingTrace
from strategies import capacities_of, config_of

COSTS = CostTables(
    step_class=np.zeros(2, np.int64),
    dense_ns=np.full((1, 2), 10),
    head_ns=np.array([5]),
    kernel_ns=np.array([[0, 4]]),
    grouped_ns=np.array([0]),
    expert_format=np.zeros(6, np.int64),
    expert_bytes=np.array([100]),
    num_chunks=np.array([1]),
    chunk_bytes=np.array([[100, 100]]),
    chunk_ns=np.array([[20, 20]]),
    back_ns=np.array([20]),
    host_ns=np.array([0, 1, 0, 0]),
    rate=np.full((NUM_RATED_LANES, 2**NUM_RATED_LANES), RATE_ONE),
)

EXPECTED = {
    # Nothing moves: dense, 1 ns of host, expert, twice, then the head.
    "resident": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | compute expert 0.0e0 11-15
        compute dense 0.1 15-25 | host host layer 0.1 25-26 | compute expert 0.1e1 26-30 | compute head 0.1 30-35
        compute dense 1.0 35-45 | host host layer 1.0 45-46 | compute expert 1.0e0 46-50
        compute dense 1.1 50-60 | host host layer 1.1 60-61 | compute expert 1.1e2 61-65 | compute head 1.1 65-70""",
    # Three copies a layer, whatever is chosen, before the expert may run.
    "naive": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11
        h2d fetch 0.0e0 11-31 | h2d fetch 0.0e1 31-51 | h2d fetch 0.0e2 51-71 | compute expert 0.0e0 71-75
        compute dense 0.1 75-85 | host host layer 0.1 85-86
        h2d fetch 0.1e1 86-106 | h2d fetch 0.1e0 106-126 | h2d fetch 0.1e2 126-146 | compute expert 0.1e1 146-150
        compute head 0.1 150-155
        compute dense 1.0 155-165 | host host layer 1.0 165-166
        h2d fetch 1.0e0 166-186 | h2d fetch 1.0e1 186-206 | h2d fetch 1.0e2 206-226 | compute expert 1.0e0 226-230
        compute dense 1.1 230-240 | host host layer 1.1 240-241
        h2d fetch 1.1e2 241-261 | h2d fetch 1.1e0 261-281 | h2d fetch 1.1e1 281-301 | compute expert 1.1e2 301-305
        compute head 1.1 305-310""",
    # One copy a layer, after the routing; nothing is kept, so expert 0 of layer 0 is copied twice.
    "on-demand": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | h2d fetch 0.0e0 11-31 | compute expert 0.0e0 31-35
        compute dense 0.1 35-45 | host host layer 0.1 45-46 | h2d fetch 0.1e1 46-66 | compute expert 0.1e1 66-70
        compute head 0.1 70-75
        compute dense 1.0 75-85 | host host layer 1.0 85-86 | h2d fetch 1.0e0 86-106 | compute expert 1.0e0 106-110
        compute dense 1.1 110-120 | host host layer 1.1 120-121 | h2d fetch 1.1e2 121-141 | compute expert 1.1e2 141-145
        compute head 1.1 145-150""",
    # The guess for layer 1 (expert 1, both times) is fetched behind layer 0's miss; right at step 0, wrong at step 1,
    # where expert 1 is cached already, so nothing is fetched ahead.
    "mixtral-offloading": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | h2d fetch 0.0e0 11-31 | h2d prefetch 0.1e1 31-51
        compute expert 0.0e0 31-35 | compute dense 0.1 35-45 | host host layer 0.1 45-46 | compute expert 0.1e1 51-55
        compute head 0.1 55-60
        compute dense 1.0 60-70 | host host layer 1.0 70-71 | compute expert 1.0e0 71-75
        compute dense 1.1 75-85 | host host layer 1.1 85-86 | h2d fetch 1.1e2 86-106 | compute expert 1.1e2 106-110
        compute head 1.1 110-115""",
    # One slot a layer, one stream: expert 1 is copied back before expert 2 takes its slot.
    "mixtral-offloading-code": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | h2d fetch 0.0e0 11-31 | compute expert 0.0e0 31-35
        compute dense 0.1 35-45 | host host layer 0.1 45-46 | h2d fetch 0.1e1 46-66 | compute expert 0.1e1 66-70
        compute head 0.1 70-75
        compute dense 1.0 75-85 | host host layer 1.0 85-86 | compute expert 1.0e0 86-90
        compute dense 1.1 90-100 | host host layer 1.1 100-101 | d2h write-back 1.1e1 101-121 | h2d fetch 1.1e2 121-141
        compute expert 1.1e2 141-145 | compute head 1.1 145-150""",
    # Layer 1's expert starts to move when layer 0's routing is known, behind layer 0's own.
    "pre-gated": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | h2d fetch 0.0e0 11-31 | compute expert 0.0e0 31-35
        h2d prefetch 0.1e1 31-51 | compute dense 0.1 35-45 | host host layer 0.1 45-46 | compute expert 0.1e1 51-55
        compute head 0.1 55-60
        compute dense 1.0 60-70 | host host layer 1.0 70-71 | h2d fetch 1.0e0 71-91 | compute expert 1.0e0 91-95
        h2d prefetch 1.1e2 91-111 | compute dense 1.1 95-105 | host host layer 1.1 105-106 | compute expert 1.1e2 111-115
        compute head 1.1 115-120""",
}


def two_tokens() -> RoutingTrace:
    predicted = np.full((2, 2, 1, 1), -1, np.int16)
    predicted[:, 1, 0, 0] = 1
    return RoutingTrace(
        experts=np.array([[[0], [1]], [[0], [2]]], np.uint8), request=np.zeros(2, np.int32), position=np.arange(2, dtype=np.int32),
        phase=np.ones(2, np.uint8), num_experts=3, model="made-up", layer_ids=(0, 1), source="test", licence="none",
        predicted=predicted, predicted_prob=np.ones((2, 2, 1, 1), np.float16), metadata={},
    )  # fmt: skip


def preset_of_one_slot(name: str) -> OffloadSchedule:
    schedule = load_preset(name)
    if name == "resident":
        return schedule.with_options(cache__experts_per_layer=3)
    return schedule if schedule.cache.policy == "none" else schedule.with_options(cache__experts_per_layer=1)


def shown(rows: np.ndarray) -> list[str]:
    lines = []
    for lane, op, step, layer, expert, start, end, _, _ in sorted(rows.tolist(), key=lambda row: (row[5], row[0])):
        where = f"{step}.{layer}" + (f"e{expert}" if expert >= 0 else "")
        lines.append(f"{LANE_NAMES[lane]} {OP_NAMES[op]} {where} {start}-{end}")
    return lines


def listed(text: str) -> list[str]:
    return [part.strip() for line in text.strip().splitlines() for part in line.split("|")]


def by_time(lines: list[str]) -> list[str]:
    return sorted(lines, key=lambda line: (int(line.rsplit(" ", 1)[1].split("-")[0]), line))


def test_every_preset_has_a_timeline():
    assert set(EXPECTED) == set(PRESETS)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_whole_timeline_of_a_preset(name):
    trace, schedule = two_tokens(), preset_of_one_slot(name)
    workload = build_workload(trace, schedule.workload)
    config, capacities, serial = config_of(schedule, trace), capacities_of(schedule, trace), not schedule.copy.overlap
    fast = run_twin(config, workload, COSTS, capacities, serial=serial, rows=True)
    slow = run_simpy(config, workload, COSTS, capacities, serial=serial)
    assert by_time(shown(fast.timeline.rows)) == by_time(listed(EXPECTED[name]))
    assert first_difference(slow, fast) is None
