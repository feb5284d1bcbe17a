"""Nothing is faster than its link, no link runs ever further behind, and a place takes its copies one after the other."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.sim.offload.simulate import Simulation
from moeplan.sim.offload.simulators import decided_layer_steps, first_difference, fresh_state, run_compiled, run_simpy
from moeplan.sim.offload.workload import build_workload
from moeplan.sim.timeline import (
    D2H,
    DISK,
    H2D,
    ROW_BYTES,
    ROW_END,
    ROW_EXPERT,
    ROW_LANE,
    ROW_LAYER,
    ROW_START,
    ROW_STEP,
)
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.presets import PRESETS, load_preset
from moeplan.traces.synthesis.dial import Dials
from moeplan.traces.synthesis.synthesise import synth_trace
from strategies import capacities_of, config_of, make_costs, make_trace, runs

drawn = settings(max_examples=examples(100), deadline=None, suppress_health_check=list(HealthCheck))


def run_of(case):
    config, workload, costs, capacities, schedule, _ = case
    return run_compiled(config, workload, costs, capacities, serial=not schedule.copy.overlap, rows=True)


def check_links(case, found) -> None:
    """The bytes that are reported went over their links within the time that is reported, and those rows say so."""
    costs = case[2]
    rows, end = found.timeline.rows, int(found.step_end[-1])
    clock = found.clock
    in_time = {
        lane: int(rows[(rows[:, ROW_LANE] == lane) & (rows[:, ROW_END] <= end), ROW_BYTES].sum())
        for lane in (H2D, D2H, DISK)
    }
    assert clock.bytes_h2d - clock.after_h2d == in_time[H2D]
    assert clock.bytes_d2h - clock.after_d2h == in_time[D2H]
    after = [clock.after_h2d, clock.after_d2h, clock.after_disk]
    assert sum(after) == rows[rows[:, ROW_END] > end, ROW_BYTES].sum()
    fastest = {
        H2D: (costs.chunk_bytes / costs.chunk_ns).max(), D2H: (costs.expert_bytes / costs.back_ns).max(),
        DISK: (costs.expert_bytes / np.maximum(costs.disk_ns, 1)).max(),
    }  # fmt: skip
    for lane, num_bytes in in_time.items():
        assert num_bytes <= fastest[lane] * end * (1 + 1e-9)


def tiny():
    model = load_model("switch-base-8")
    dials = Dials(
        num_layers=model.num_moe_layers, num_experts=model.num_experts, top_k=1, prompt_tokens=(0,), decode_tokens=(40,)
    )
    return model, synth_trace(dials, num_requests=1, seed=0, model=model.name)


@drawn
@given(runs())
def test_bytes_reported_crossed_their_links_in_the_time_reported(case):
    check_links(case, run_of(case))


@drawn
@given(runs())
def test_no_link_lags_by_more_than_the_places_hold(case):
    """At the end of a step only guesses that nobody used are under way, at most one for each place and none without a cache."""
    config, _, costs, capacities, schedule, _ = case
    found = run_of(case)
    rows = found.timeline.rows
    places = 0 if schedule.cache.policy == "none" else int(capacities.sum()) + config.staging
    for lane, chunks in ((H2D, int(costs.num_chunks.max())), (DISK, 1)):
        mine = rows[rows[:, ROW_LANE] == lane]
        for step, end in enumerate(found.step_end.tolist()):
            late = mine[(mine[:, ROW_STEP] <= step) & (mine[:, ROW_END] > end)]
            assert len(late) <= places * chunks, (lane, step)
    assert schedule.copy.overlap or found.makespan_ns == found.step_end[-1]


def copies_by_slot(case, found):
    """Return {slot: [(begin, end) of each copy into it, in the order in which they were submitted]}."""
    config, workload, costs, capacities, _, _ = case
    rows = found.timeline.rows[found.timeline.rows[:, ROW_LANE] == H2D]
    chunks = defaultdict(list)
    for row in rows[np.argsort(rows[:, ROW_START], kind="stable")].tolist():
        chunks[
            row[ROW_STEP] * config.num_layers + row[ROW_LAYER], row[ROW_LAYER] * config.num_experts + row[ROW_EXPERT]
        ].append(row)
    slots = defaultdict(list)
    for _, _, out in decided_layer_steps(config, workload, fresh_state(config, workload, capacities, costs)):
        for move in out.moves[: out.size[0].moves]:
            count = int(costs.num_chunks[move.format])
            mine = [chunks[move.target, move.key].pop(0) for _ in range(count)]
            slots[move.slot].append((mine[0][ROW_START], mine[-1][ROW_END]))
    return slots


@drawn
@given(runs().filter(lambda case: case[4].cache.policy != "none" and not case[4].copy.cancel))
def test_a_slot_takes_its_copies_one_after_the_other(case):
    found = run_of(case)
    for slot, copies in copies_by_slot(case, found).items():
        for before, after in itertools.pairwise(copies):
            assert slot >= 0 and before[1] <= after[0]


@drawn
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_used_guesses_behind_older_ones_wait_for_them(seed, staging, depth, host):
    """A slow link, wrong guesses and few buffers: a used guess often has an older guess's copy under way in its slot."""
    rng = np.random.default_rng(seed)
    trace = make_trace(rng, num_layers=4, num_experts=6, top_k=2, requests=[(0, 8)], guesses=2)
    schedule = load_preset("mixtral-offloading").with_options(
        cache__experts_per_layer=5, predictor__staging=staging, predictor__depth=depth, predictor__width=3
    )
    workload = build_workload(trace, schedule.workload)
    costs = make_costs(rng, workload, schedule, host=host)
    costs = costs._replace(chunk_ns=costs.chunk_ns + 100)
    case = (config_of(schedule, trace), workload, costs, capacities_of(schedule, trace), schedule, trace)
    found = run_of(case)
    assert first_difference(run_simpy(*case[:4], serial=False), found) is None
    for copies in copies_by_slot(case, found).values():
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(copies))


@drawn
@given(st.integers(0, 2**32), st.sampled_from(["pre-gated", "scmoe"]), st.integers(2, 3), st.booleans())
def test_a_pre_gated_block_is_fetched_whole_before_its_experts_run(seed, name, top_k, host):
    """The published order: all of this block's fetches, then the next block's begin, then this block's experts."""
    rng = np.random.default_rng(seed)
    trace = make_trace(rng, num_layers=4, num_experts=6, top_k=top_k, requests=[(3, 4), (0, 3)])
    schedule = load_preset(name).with_options(workload__concurrency=2)
    workload = build_workload(trace, schedule.workload)
    costs = make_costs(rng, workload, schedule, host=host)
    case = (config_of(schedule, trace), workload, costs, capacities_of(schedule, trace), schedule, trace)
    found = run_of(case)
    rows = found.timeline.rows
    for step in range(case[1].num_steps):
        for layer in range(1, case[0].num_layers):
            mine = rows[(rows[:, ROW_STEP] == step) & (rows[:, ROW_LAYER] == layer)]
            kernels, copies = mine[mine[:, 1] == 1], mine[mine[:, ROW_LANE] == H2D]
            if len(kernels) and len(copies):
                assert copies[:, ROW_END].max() <= kernels[:, ROW_START].min()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_no_faster_than_their_links(name):
    """On a bundled machine: the bytes a second that a preset's figures imply are no more than the link carries."""
    model, trace = tiny()
    profile = load_hardware("a100-80gb-sxm")
    schedule = load_preset(name)
    if schedule.predictor.kind == "next-gate":
        schedule = schedule.with_options(predictor__kind="synthetic")
    if schedule.cache.policy != "none" and name != "resident":
        size = (
            {"cache__pooled_experts": 16}
            if schedule.cache.placement in ("front", "back")
            else {"cache__experts_per_layer": 2}
        )
        schedule = schedule.with_options(**size)
    if schedule.kernel.miss != "fetch":
        pytest.skip("this machine's profile has no costs of the host's cores")
    found = (
        Simulation(model=model, profile=profile, trace=trace).predict(schedule.with_options(experts__bits="16")).metrics
    )
    assert found.bytes_copied <= profile.host_to_device.pinned_bytes_per_s.value * found.window_s
    assert found.bytes_copied + found.bytes_after > 0 or name == "resident"


def test_fetching_whole_layers_ahead_is_bound_by_its_link():
    """Without a backlog that nobody pays for, fetching every expert ahead takes at least the time of all these copies."""
    model, trace = tiny()
    profile = load_hardware("a100-80gb-sxm")
    found = Simulation(model=model, profile=profile, trace=trace).predict(load_preset("prefetch-all")).metrics
    layers, experts = model.num_moe_layers, model.num_experts
    assert found.bytes_copied == 40 * ((layers - 1) * experts + 1) * model.expert_bytes(
        weight_format(model.native_bits)
    )
    assert found.bytes_after == 0
    assert found.peak_transient_experts == 2 * experts
    assert found.bound == "copy"
