"""Whole small timelines of every preset, checked by hand: two layers, three experts, one chosen per token, two tokens.

Costs: dense 10 ns, expert 4, head 5, a copy 20, a copy back 20, an expert on the cores 12, a disk read 30, the host 1 per layer
and nothing else; no contention. A second format takes half of each copy.
Token 0 routes to experts 0 (layer 0) and 1 (layer 1); token 1 to experts 0 and 2.
"""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.sim.offload.costs import CostTables, host_costs
from moeplan.sim.offload.simulators import first_difference, prices_of, run_compiled, run_simpy
from moeplan.sim.offload.workload import build_workload
from moeplan.sim.timeline import LANE_NAMES, NUM_RATED_LANES, OP_NAMES, RATE_ONE
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.specs.schedules.presets import PRESETS, load_preset
from moeplan.traces.format import RoutingTrace
from strategies import capacities_of, config_of

COSTS = CostTables(
    step_class=np.zeros(2, np.int64),
    dense_ns=np.full((1, 2), 10),
    head_ns=np.array([5]),
    kernel_ns=np.array([[0, 4], [0, 3]]),
    grouped_ns=np.array([0]),
    expert_format=np.zeros(6, np.int64),
    expert_bytes=np.array([100, 50]),
    num_chunks=np.array([1, 1]),
    chunk_bytes=np.array([[100, 100], [50, 50]]),
    chunk_ns=np.array([[20, 20], [10, 10]]),
    back_ns=np.array([20, 10]),
    cpu_ns=np.array([[0, 12], [0, 9]]),
    disk_ns=np.array([30, 15]),
    host_ns=host_costs(step=0, layer=1, kernel=0, transfer=0),
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
    # All three experts of layer 1 follow layer 0's miss into the second block of buffers; layer 1's expert runs when all are in.
    "prefetch-all": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | h2d fetch 0.0e0 11-31 | compute expert 0.0e0 31-35
        h2d prefetch 0.1e0 31-51 | compute dense 0.1 35-45 | host host layer 0.1 45-46 | h2d fetch 0.1e1 51-71
        h2d fetch 0.1e2 71-91 | compute expert 0.1e1 91-95 | compute head 0.1 95-100 | compute dense 1.0 100-110
        host host layer 1.0 110-111 | h2d fetch 1.0e0 111-131 | compute expert 1.0e0 131-135
        h2d prefetch 1.1e0 131-151 | compute dense 1.1 135-145 | host host layer 1.1 145-146
        h2d fetch 1.1e1 151-171 | h2d fetch 1.1e2 171-191 | compute expert 1.1e2 191-195 | compute head 1.1 195-200""",
    # With one routed expert a layer that is streamed is a layer fetched whole: the last kernel waits for the last copy.
    "infmoe": """
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
    # As pre-gated, in one launch a layer.
    "scmoe": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | h2d fetch 0.0e0 11-31 | compute expert 0.0e0 31-35
        h2d prefetch 0.1e1 31-51 | compute dense 0.1 35-45 | host host layer 0.1 45-46 | compute expert 0.1e1 51-55
        compute head 0.1 55-60 | compute dense 1.0 60-70 | host host layer 1.0 70-71 | h2d fetch 1.0e0 71-91
        compute expert 1.0e0 91-95 | h2d prefetch 1.1e2 91-111 | compute dense 1.1 95-105
        host host layer 1.1 105-106 | compute expert 1.1e2 111-115 | compute head 1.1 115-120""",
    # The guess for layer 1 (sure, and mostly hidden) pays at step 0; at step 1 it is cached already.
    "lookahead": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | h2d fetch 0.0e0 11-31 | compute expert 0.0e0 31-35
        h2d prefetch 0.1e1 31-51 | compute dense 0.1 35-45 | host host layer 0.1 45-46 | compute expert 0.1e1 51-55
        compute head 0.1 55-60 | compute dense 1.0 60-70 | host host layer 1.0 70-71 | compute expert 1.0e0 71-75
        compute dense 1.1 75-85 | host host layer 1.1 85-86 | h2d fetch 1.1e2 86-106 | compute expert 1.1e2 106-110
        compute head 1.1 110-115""",
    # The first request resembles nothing yet: an activation cache without guesses.
    "moe-infinity": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | h2d fetch 0.0e0 11-31 | compute expert 0.0e0 31-35
        compute dense 0.1 35-45 | host host layer 0.1 45-46 | h2d fetch 0.1e1 46-66 | compute expert 0.1e1 66-70
        compute head 0.1 70-75 | compute dense 1.0 75-85 | host host layer 1.0 85-86 | compute expert 1.0e0 86-90
        compute dense 1.1 90-100 | host host layer 1.1 100-101 | h2d fetch 1.1e2 101-121
        compute expert 1.1e2 121-125 | compute head 1.1 125-130""",
    # Recall 0: every guess is wrong. At step 0 the wrong copy has begun when layer 1 is decided, so it ends first.
    "promoe": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | h2d fetch 0.0e0 11-31 | compute expert 0.0e0 31-35
        h2d prefetch 0.1e2 31-51 | compute dense 0.1 35-45 | host host layer 0.1 45-46 | h2d fetch 0.1e1 51-71
        compute expert 0.1e1 71-75 | compute head 0.1 75-80 | compute dense 1.0 80-90 | host host layer 1.0 90-91
        compute expert 1.0e0 91-95 | h2d prefetch 1.1e0 91-111 | compute dense 1.1 95-105
        host host layer 1.1 105-106 | h2d fetch 1.1e2 111-131 | compute expert 1.1e2 131-135
        compute head 1.1 135-140""",
    # The truth is fetched ahead both times.
    "read-me": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | h2d fetch 0.0e0 11-31 | compute expert 0.0e0 31-35
        h2d prefetch 0.1e1 31-51 | compute dense 0.1 35-45 | host host layer 0.1 45-46 | compute expert 0.1e1 51-55
        compute head 0.1 55-60 | compute dense 1.0 60-70 | host host layer 1.0 70-71 | compute expert 1.0e0 71-75
        h2d prefetch 1.1e2 71-91 | compute dense 1.1 75-85 | host host layer 1.1 85-86 | compute expert 1.1e2 91-95
        compute head 1.1 95-100""",
    # Experts 0 and 1 stay; expert 2 takes 12 ns on the cores against 24 by copy.
    "fiddler": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | compute expert 0.0e0 11-15 | compute dense 0.1 15-25
        host host layer 0.1 25-26 | compute expert 0.1e1 26-30 | compute head 0.1 30-35 | compute dense 1.0 35-45
        host host layer 1.0 45-46 | compute expert 1.0e0 46-50 | compute dense 1.1 50-60 | host host layer 1.1 60-61
        cpu cpu expert 1.1e2 61-73 | compute head 1.1 73-78""",
    # A single miss goes to the cores, which end before the link would; the guess for layer 1 is fetched meanwhile.
    "hybrimoe": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | cpu cpu expert 0.0e0 11-23 | h2d prefetch 0.1e1 11-31
        compute dense 0.1 23-33 | host host layer 0.1 33-34 | compute expert 0.1e1 34-38 | compute head 0.1 38-43
        compute dense 1.0 43-53 | host host layer 1.0 53-54 | cpu cpu expert 1.0e0 54-66 | compute dense 1.1 66-76
        host host layer 1.1 76-77 | cpu cpu expert 1.1e2 77-89 | compute head 1.1 89-94""",
    # Nothing is copied; each expert takes 12 ns on the cores, and the dense part waits for it.
    "cpu-moe": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | cpu cpu expert 0.0e0 11-23 | compute dense 0.1 23-33
        host host layer 0.1 33-34 | cpu cpu expert 0.1e1 34-46 | compute head 0.1 46-51 | compute dense 1.0 51-61
        host host layer 1.0 61-62 | cpu cpu expert 1.0e0 62-74 | compute dense 1.1 74-84 | host host layer 1.1 84-85
        cpu cpu expert 1.1e2 85-97 | compute head 1.1 97-102""",
    # Layer 0 on the cores, layer 1 on the device.
    "n-cpu-moe": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | cpu cpu expert 0.0e0 11-23 | compute dense 0.1 23-33
        host host layer 0.1 33-34 | compute expert 0.1e1 34-38 | compute head 0.1 38-43 | compute dense 1.0 43-53
        host host layer 1.0 53-54 | cpu cpu expert 1.0e0 54-66 | compute dense 1.1 66-76 | host host layer 1.1 76-77
        compute expert 1.1e2 77-81 | compute head 1.1 81-86""",
    # Expert 0 of both layers stays on the device.
    "kt-uniform": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | compute expert 0.0e0 11-15 | compute dense 0.1 15-25
        host host layer 0.1 25-26 | cpu cpu expert 0.1e1 26-38 | compute head 0.1 38-43 | compute dense 1.0 43-53
        host host layer 1.0 53-54 | compute expert 1.0e0 54-58 | compute dense 1.1 58-68 | host host layer 1.1 68-69
        cpu cpu expert 1.1e2 69-81 | compute head 1.1 81-86""",
    # The most popular expert of each layer stays: 0, and 1 (which ties with 2).
    "kt-frequency": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | compute expert 0.0e0 11-15 | compute dense 0.1 15-25
        host host layer 0.1 25-26 | compute expert 0.1e1 26-30 | compute head 0.1 30-35 | compute dense 1.0 35-45
        host host layer 1.0 45-46 | compute expert 1.0e0 46-50 | compute dense 1.1 50-60 | host host layer 1.1 60-61
        cpu cpu expert 1.1e2 61-73 | compute head 1.1 73-78""",
    # Layer 0 on the device, layer 1 on the cores.
    "kt-front-loading": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | compute expert 0.0e0 11-15 | compute dense 0.1 15-25
        host host layer 0.1 25-26 | cpu cpu expert 0.1e1 26-38 | compute head 0.1 38-43 | compute dense 1.0 43-53
        host host layer 1.0 53-54 | compute expert 1.0e0 54-58 | compute dense 1.1 58-68 | host host layer 1.1 68-69
        cpu cpu expert 1.1e2 69-81 | compute head 1.1 81-86""",
    # Every expert is somebody's first choice here, so all come in full precision.
    "hobbit": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | h2d fetch 0.0e0 11-31 | compute expert 0.0e0 31-35
        h2d prefetch 0.1e1 31-51 | compute dense 0.1 35-45 | host host layer 0.1 45-46 | compute expert 0.1e1 51-55
        compute head 0.1 55-60 | compute dense 1.0 60-70 | host host layer 1.0 70-71 | compute expert 1.0e0 71-75
        compute dense 1.1 75-85 | host host layer 1.1 85-86 | h2d fetch 1.1e2 86-106 | compute expert 1.1e2 106-110
        compute head 1.1 110-115""",
    # Experts 1 and 2 are stored in half the bytes: 10 ns a copy, 3 ns a kernel.
    "edge-moe": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | h2d fetch 0.0e0 11-31 | compute expert 0.0e0 31-35
        h2d prefetch 0.1e1 31-41 | compute dense 0.1 35-45 | host host layer 0.1 45-46 | compute expert 0.1e1 46-49
        compute head 0.1 49-54 | compute dense 1.0 54-64 | host host layer 1.0 64-65 | compute expert 1.0e0 65-69
        compute dense 1.1 69-79 | host host layer 1.1 79-80 | h2d fetch 1.1e2 80-90 | compute expert 1.1e2 90-93
        compute head 1.1 93-98""",
    # Two slots for both layers: layer 1's old expert 1 (just left behind, unused) makes room for expert 2.
    "least-stale": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | h2d fetch 0.0e0 11-31 | compute expert 0.0e0 31-35
        compute dense 0.1 35-45 | host host layer 0.1 45-46 | h2d fetch 0.1e1 46-66 | compute expert 0.1e1 66-70
        compute head 0.1 70-75 | compute dense 1.0 75-85 | host host layer 1.0 85-86 | compute expert 1.0e0 86-90
        compute dense 1.1 90-100 | host host layer 1.1 100-101 | h2d fetch 1.1e2 101-121
        compute expert 1.1e2 121-125 | compute head 1.1 125-130""",
    # One slot a layer leaves no choice.
    "affinity": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | h2d fetch 0.0e0 11-31 | compute expert 0.0e0 31-35
        compute dense 0.1 35-45 | host host layer 0.1 45-46 | h2d fetch 0.1e1 46-66 | compute expert 0.1e1 66-70
        compute head 0.1 70-75 | compute dense 1.0 75-85 | host host layer 1.0 85-86 | compute expert 1.0e0 86-90
        compute dense 1.1 90-100 | host host layer 1.1 100-101 | h2d fetch 1.1e2 101-121
        compute expert 1.1e2 121-125 | compute head 1.1 125-130""",
    # The host holds the two most popular experts; expert 2 of layer 1 is read from disk first.
    "three-tiers": """
        compute dense 0.0 0-10 | host host layer 0.0 10-11 | h2d fetch 0.0e0 11-31 | compute expert 0.0e0 31-35
        compute dense 0.1 35-45 | host host layer 0.1 45-46 | h2d fetch 0.1e1 46-66 | compute expert 0.1e1 66-70
        compute head 0.1 70-75 | compute dense 1.0 75-85 | host host layer 1.0 85-86 | compute expert 1.0e0 86-90
        compute dense 1.1 90-100 | host host layer 1.1 100-101 | disk disk read 1.1e2 101-131
        h2d fetch 1.1e2 131-151 | compute expert 1.1e2 151-155 | compute head 1.1 155-160""",
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
    if name in ("n-cpu-moe", "kt-front-loading"):
        return schedule.with_options(cache__pooled_experts=3)
    if name == "least-stale":
        return schedule.with_options(cache__pooled_experts=2)
    if name == "promoe":
        return schedule.with_options(cache__experts_per_layer=1, predictor__recall=0.0, copy__chunk_bytes=4096)
    if name == "three-tiers":
        schedule = schedule.with_options(copy__host_experts=2)
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
    costs = COSTS
    if schedule.experts.low_fraction:
        costs = COSTS._replace(expert_format=np.array([0, 1, 1, 0, 1, 1]))
    workload = build_workload(trace, schedule.workload, with_next_use=schedule.cache.policy == "belady")
    config, capacities, serial = config_of(schedule, trace), capacities_of(schedule, trace), not schedule.copy.overlap
    fast = run_compiled(config, workload, costs, capacities, serial=serial, rows=True)
    slow = run_simpy(config, workload, costs, capacities, serial=serial)
    assert by_time(shown(fast.timeline.rows)) == by_time(listed(EXPECTED[name]))
    assert first_difference(slow, fast) is None


def test_the_layer_step_that_decisions_weigh_is_one_that_fetches_nothing_with_its_share_of_the_host():
    schedule, trace = preset_of_one_slot("resident"), two_tokens()
    costs = COSTS._replace(host_ns=host_costs(step=3, layer=1, kernel=2, transfer=9))
    workload = build_workload(trace, schedule.workload)
    config = config_of(schedule, trace)
    capacities = capacities_of(schedule, trace)
    done = run_compiled(config, workload, costs, capacities, serial=False)
    assert prices_of(costs, workload).layer_step_ns[0] == int(done.step_end[-1]) // 4
