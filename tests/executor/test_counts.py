"""What the executor does is, count for count and row for row, what the simulator says it does."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from executor_stages import (
    ONLY_SIMULATED,
    RUNNABLE,
    expert_tokens,
    preset,
    run_input,
    runs_for_real,
    small_model,
    small_trace,
    tables_of,
    weighed,
)
from long_runs import examples
from moeplan.base.errors import InputError
from moeplan.executor.running.execute import Stage, execute, open_stage
from moeplan.executor.running.execution import Execution, count_differences
from moeplan.sim.offload.drafting.draft import Drafting
from moeplan.sim.offload.run_input import RunInput
from moeplan.sim.offload.simulators import Outcome, run_compiled
from moeplan.sim.offload.workload import build_workload
from moeplan.sim.policies.state import needs_prices
from moeplan.sim.timeline import (
    LANE_NAMES,
    OP_BACK,
    OP_CPU,
    OP_DENSE,
    OP_DISK,
    OP_EXPERT,
    OP_HEAD,
    OP_PREFETCH,
    ROW_OP,
    Timeline,
)
from moeplan.specs.drafting import Acceptance
from moeplan.specs.schedules.presets import PRESETS
from moeplan.traces.format import RoutingTrace
from strategies import runs


def predicted(run: RunInput, expert_bytes: Sequence[int]) -> Outcome:
    serial = not run.schedule.copy.overlap
    tables = tables_of(run, *expert_bytes)
    return run_compiled(run.config, run.workload, tables, run.capacities, serial=serial, rows=True, weighed=run.weighed)


def work_of(timeline: Timeline) -> Counter[tuple[int, ...]]:
    """Count rows without their times. Whether a copy began as demand or prefetch depends on time, so it is left out."""
    ops = (OP_DENSE, OP_EXPERT, OP_HEAD, 3, OP_PREFETCH, OP_BACK, OP_CPU, OP_DISK)
    rows = timeline.rows[np.isin(timeline.rows[:, ROW_OP], ops)].copy()
    rows[rows[:, ROW_OP] == OP_PREFETCH, ROW_OP] = 3
    return Counter(tuple(row) for row in np.delete(rows, [5, 6], axis=1).tolist())


def assert_same_work(found: Execution, run: RunInput) -> None:
    outcome = predicted(run, found.expert_bytes)
    timing_dependent = run.schedule.copy.cancel
    assert count_differences(found, outcome, expert_tokens(run.workload), timing_dependent=timing_dependent) == []
    if timing_dependent:
        return
    assert outcome.timeline is not None
    assert work_of(found.timeline) == work_of(outcome.timeline)


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return small_trace()


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_preset_does_what_the_simulator_says(name: str, trace: RoutingTrace) -> None:
    run = run_input(preset(name), trace)
    with open_stage(small_model(), [run.workload]) as stage:
        found = execute(stage, run)
    assert_same_work(found, run)
    found.timeline.check()
    assert len(found.step_ns) == run.workload.num_steps and found.step_ns.min() > 0
    # The last row may end after the last step: an admitted prefetch finishes.
    assert found.makespan_ns >= found.step_ns.sum()


@pytest.mark.parametrize(
    "changes",
    [
        {"cache__policy": "lfu", "cache__pooled_experts": 7, "predictor__kind": "oracle", "predictor__depth": 2},
        {"cache__policy": "lfuda", "cache__experts_per_layer": 2, "predictor__kind": "next-gate"},
        {"cache__policy": "affinity", "cache__experts_per_layer": 1, "cache__first_layer_extra": 2, "predictor__kind": "next-gate"},
        {"cache__policy": "belady", "cache__experts_per_layer": 2, "copy__write_back": True, "kernel__grouping": "grouped"},
        {"cache__policy": "static", "predictor__kind": "synthetic", "predictor__staging": 3, "copy__chunk_bytes": 4096},
        {"cache__policy": "lru", "cache__experts_per_layer": 1, "predictor__kind": "all", "copy__chunk_bytes": 4096},
        {"cache__policy": "lru", "cache__experts_per_layer": 2, "predictor__kind": "next-gate", "predictor__staging": 2,
         "copy__write_back": True, "workload__concurrency": 2, "predictor__depth": 2},
        {"kernel__miss": "cpu", "cache__experts_per_layer": 1, "predictor__kind": "next-gate", "copy__write_back": True},
        {"kernel__miss": "cheaper", "predictor__kind": "synthetic", "cache__pooled_experts": 5, "workload__concurrency": 3},
        {"kernel__miss": "balanced", "kernel__grouping": "grouped", "cache__experts_per_layer": 2, "copy__write_back": True},
        {"kernel__miss": "balanced", "cache__policy": "none", "cache__experts_per_layer": None, "predictor__kind": "next-gate",
         "copy__chunk_bytes": 4096},
        {"predictor__benefit": True, "predictor__kind": "next-gate", "predictor__depth": 2, "predictor__staging": 2},
        {"predictor__benefit": True, "cache__policy": "none", "cache__experts_per_layer": None, "predictor__kind": "synthetic"},
        {"copy__cancel": True, "predictor__kind": "synthetic", "predictor__recall": 0.5, "predictor__depth": 2},
        {"experts__low_bits": "4", "experts__low_rank": 1, "copy__write_back": True, "cache__experts_per_layer": 2},
        {"experts__low_bits": "8", "experts__low_fraction": 0.5, "copy__chunk_bytes": 4096, "kernel__grouping": "grouped"},
        {"experts__low_bits": "2", "experts__low_rank": 0, "kernel__miss": "balanced", "predictor__kind": "synthetic"},
        {"experts__low_bits": "4", "experts__low_fraction": 0.3, "copy__overlap": False, "copy__write_back": True},
        {"experts__low_bits": "4", "experts__low_fraction": 0.6, "cache__policy": "static", "predictor__kind": "none"},
        {"cache__policy": "lru", "cache__experts_per_layer": 2, "cache__reset": "request", "workload__prefill_chunk_tokens": 2},
        {"cache__policy": "lru", "cache__experts_per_layer": 2, "copy__overlap": False, "predictor__kind": "next-gate"},
    ],
)  # fmt: skip
def test_every_option_does_what_the_simulator_says(changes: dict[str, object], trace: RoutingTrace) -> None:
    run = run_input(preset("mixtral-offloading", predictor__staging=0).with_options(**changes), trace)
    with open_stage(small_model(), [run.workload]) as stage:
        found = execute(stage, run, poison=True, keep_outputs=True)
    assert_same_work(found, run)
    assert all(torch.isfinite(output).all() for output in found.outputs)


@settings(max_examples=examples(8), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(
        ["mixtral-offloading-code", "resident", "cpu-moe", "hybrimoe", "mixtral-offloading", "on-demand"]
    ),
    together=st.integers(1, 3),
    length=st.integers(1, 4),
    chance=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_drafted_passes_do_what_the_simulator_says(name: str, together: int, length: int, chance: float) -> None:
    trace = small_trace()
    schedule = preset(name, workload__concurrency=together)
    drafting = Drafting(length=length, acceptance=Acceptance(chance=chance))
    plain = run_input(schedule, trace)
    workload = build_workload(
        trace, schedule.workload, reset_per_request=schedule.cache.reset == "request", drafting=drafting
    )
    run = dataclasses.replace(
        plain, workload=workload, weighed=None if plain.weighed is None else weighed(workload, schedule)
    )
    with open_stage(small_model(), [run.workload]) as stage:
        found = execute(stage, run, keep_outputs=True)
    assert_same_work(found, run)
    decode = np.flatnonzero(workload.step_phase == 1)
    assert [len(found.outputs[step]) for step in decode] == workload.step_tokens[
        decode
    ].tolist()  # logits of every guess
    assert int(workload.yields.sum()) == plain.workload.num_tokens


@settings(
    max_examples=examples(15), deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)
@given(drawn=runs())
def test_drawn_schedules_do_what_the_simulator_says(drawn: tuple[object, ...]) -> None:
    config, workload, costs, capacities, schedule, trace = drawn  # type: ignore[misc]
    assume(runs_for_real(schedule))
    low = {} if schedule.experts.low_bits is None else {"experts__low_bits": "16"}
    run = RunInput(
        schedule=schedule.with_options(experts__bits="32", **low),
        config=config,
        workload=workload,
        capacities=capacities,
        weighed=costs if needs_prices(config) or low else None,
    )
    model = small_model(
        num_layers=trace.num_layers, num_experts=trace.num_experts, top_k=trace.top_k, hidden=32, inter=16
    )
    with open_stage(model, [workload]) as stage:
        found = execute(stage, run, poison=True, keep_outputs=True)
    assert_same_work(found, run)
    assert all(torch.isfinite(output).all() for output in found.outputs)


def test_every_preset_runs() -> None:
    assert set(RUNNABLE) == set(PRESETS)
    assert ONLY_SIMULATED == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"host__per_layer_s": 0.1},
        {"kernel__miss": "balanced", "copy__host_experts": 4},
        {"experts__low_bits": "4", "experts__low_rank": 1, "copy__host_experts": 4},
    ],
)
def test_what_is_only_simulated_is_refused_in_one_line(changes: dict[str, object], trace: RoutingTrace) -> None:
    run = run_input(preset("on-demand"), trace)
    with open_stage(small_model(), [run.workload]) as stage, pytest.raises(InputError, match="simulated") as caught:
        execute(stage, dataclasses.replace(run, schedule=run.schedule.with_options(**changes)))
    assert "\n" not in str(caught.value)


def test_repeated_runs_on_one_stage_agree(trace: RoutingTrace) -> None:
    run = run_input(preset("mixtral-offloading"), trace)
    with open_stage(small_model(), [run.workload]) as stage:
        used = stage.device.used_bytes
        first, second = execute(stage, run), execute(stage, run)
        assert stage.device.used_bytes == used
    assert np.array_equal(first.counts, second.counts)
    assert work_of(first.timeline) == work_of(second.timeline)


def test_lanes_and_devices_are_named_as_in_a_prediction(trace: RoutingTrace) -> None:
    run = run_input(preset("mixtral-offloading-code", copy__overlap=True), trace)
    with open_stage(small_model(), [run.workload]) as stage:
        frame = execute(stage, run).timeline.frame()
    assert set(frame["lane"]) == {"compute", "h2d", "d2h", "host"} < set(LANE_NAMES)
    assert frame["start_ns"].min() >= 0
    assert (frame.loc[frame["lane"] == "h2d", "bytes"] == 3 * 64 * 64 * 4).all()


def test_a_stage_forgets_a_format_and_draws_it_again(trace: RoutingTrace) -> None:
    run = run_input(preset("on-demand"), trace)
    with open_stage(small_model(), [run.workload]) as stage:
        assert isinstance(stage, Stage)
        before = execute(stage, run, keep_outputs=True).outputs[0]
        stage.forget("32")
        with open_stage(small_model(), [run.workload]) as other:
            after = execute(other, run, keep_outputs=True).outputs[0]
    assert torch.equal(before, after)
