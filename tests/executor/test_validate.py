"""From a plan to figures: what is run, what counts as measured, what decisions say before anything runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from executor_stages import preset, run_input, small_model, small_trace
from moeplan.base.errors import InputError
from moeplan.executor.calibration.run_samples import excerpt_of
from moeplan.executor.running.execute import execute, open_stage
from moeplan.executor.running.execution import Execution, median_steps
from moeplan.executor.running.overlap import overlap_ns
from moeplan.executor.running.supported import check_runnable
from moeplan.executor.validation.validate_plan import planned_cases
from moeplan.sim.offload.run_facts import run_facts
from moeplan.sim.timeline import ROW_END, ROW_FIELDS, ROW_START, Timeline
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.offload import OffloadSchedule


def executed(part_ns: list[list[int]], disturbed: list[list[bool]]) -> Execution:
    return Execution(
        counts=np.zeros(1, np.int64), timeline=Timeline(rows=np.zeros((0, ROW_FIELDS), np.int64), device="none"),
        step_ns=np.array(part_ns).sum(axis=1), part_ns=np.array(part_ns), disturbed=np.array(disturbed), makespan_ns=0, ready_hits=0,
        late_hits=0, slot_bytes=1, outputs=(), notes=(),
    )  # fmt: skip


def test_a_step_is_the_sum_of_its_parts_medians_without_disturbed_ones_unless_all_were() -> None:
    runs = [
        executed([[10, 1], [10, 50]], [[False, False], [False, True]]),
        executed([[12, 2], [90, 60]], [[False, False], [True, True]]),
        executed([[14, 6], [12, 70]], [[False, True], [False, True]]),
    ]
    assert median_steps(runs).tolist() == [12 + 1.5, 11 + 60.0]
    assert runs[0].disturbed.tolist() == [[False, False], [False, True]]  # what was measured is left as it is


def test_parts_add_up_to_steps() -> None:
    given = run_input(preset("mixtral-offloading"), small_trace())
    with open_stage(small_model(), [given.workload]) as stage:
        found = execute(stage, given)
    assert found.part_ns.shape == found.disturbed.shape == (given.workload.num_steps, 3)
    assert found.part_ns.sum(axis=1).tolist() == found.step_ns.tolist()
    assert found.disturbed.dtype == bool


def test_what_decisions_say_of_a_run() -> None:
    trace = small_trace()
    on_demand = run_facts(run_input(preset("on-demand"), trace))
    # Nothing is kept, so every expert is fetched for its own layer step, and every layer step fetches.
    given = run_input(preset("on-demand"), trace)
    layer_steps = given.workload.num_steps * 3
    assert on_demand.fresh_fraction == 1.0 and 1.0 <= on_demand.experts_per_layer_step <= 8.0
    assert on_demand.fetches_per_transfer == pytest.approx(layer_steps / given.workload.num_expert_uses)
    resident = run_facts(run_input(preset("resident"), trace))
    assert (resident.fresh_fraction, resident.fetches_per_transfer) == (0.0, 0.0)
    cached = run_facts(run_input(preset("mixtral-offloading"), trace))
    assert 0.0 < cached.fresh_fraction < 1.0
    # A gate that chooses one layer ahead is always right: only what the first layer of a pass uses is asked for.
    ahead = run_facts(run_input(preset("pre-gated"), trace))
    steps = run_input(preset("pre-gated"), trace).workload.steps
    starts = steps.layer_step_start
    first = sum(int(starts[at + 1] - starts[at]) for at in range(0, len(starts) - 1, 3))
    assert ahead.fresh_fraction == pytest.approx(first / int(starts[-1]))
    assert ahead.fresh_fraction + ahead.ahead_fraction == pytest.approx(1.0)
    assert on_demand.ahead_fraction == resident.ahead_fraction == 0.0


def rows_of(*spans: tuple[int, int]) -> Any:
    rows = np.zeros((len(spans), ROW_FIELDS), np.int64)
    rows[:, [ROW_START, ROW_END]] = np.array(spans).reshape(-1, 2)
    return rows


def test_overlap_is_counted_row_by_row() -> None:
    found = overlap_ns(rows_of((0, 10), (10, 20), (30, 40)), rows_of((15, 32), (5, 8)))
    assert found.tolist() == [3.0, 5.0, 2.0]
    assert overlap_ns(rows_of((0, 10)), rows_of()).tolist() == [0.0]


@pytest.mark.parametrize(
    "name", ["resident", "naive", "on-demand", "mixtral-offloading", "mixtral-offloading-code", "pre-gated"]
)
def test_the_presets_that_were_built_first_run(name: str) -> None:
    check_runnable(preset(name))


@pytest.mark.parametrize(
    ("key", "value"),
    [("host__per_step_s", 0.1), ("copy__host_experts", 0)],
)
def test_what_is_only_simulated_is_refused(key: str, value: object) -> None:
    with pytest.raises(InputError, match=key.replace("__", r"\.")):
        check_runnable(preset("mixtral-offloading", **{key: value}))


def document(**changes: Any) -> dict[str, Any]:
    def entry(name: str, speed: float, **options: Any) -> dict[str, Any]:
        schedule = OffloadSchedule(name=name).with_options(cache__experts_per_layer=2, **options)
        return {"name": name, "schedule": schedule.to_dict(), "window_s": 1 / speed}

    rivals = [
        entry("slow", 1.0),
        entry("simulated only", 9.0, host__per_step_s=0.1),
        entry("fast", 5.0),
        entry("middle", 3.0),
    ]
    return {"kind": "offload", "best": entry("best", 7.0), "baselines": rivals} | changes


def test_a_plan_names_its_best_schedule_and_the_fastest_rivals_that_run() -> None:
    cases = planned_cases(document(), small_model(), 2)
    assert [case.name for case in cases] == ["best", "fast", "middle"]
    assert {case.group for case in cases} == {"16"}
    assert [case.name for case in planned_cases(document(), small_model(), 0)] == ["best"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"kind": "ep"}, r"plan\.kind"), ({"best": None}, r"plan\.best"), ({"best": {"name": "x"}}, r"plan\.best")],
)
def test_what_is_no_plan_for_one_device_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        planned_cases(document(**changes), small_model(), 2)


def test_an_excerpt_has_the_layers_and_experts_that_a_gibibyte_holds() -> None:
    large = load_model("mixtral-8x7b")
    small = excerpt_of(large, "16", 4)
    assert (small.num_layers, small.moe_layers, small.num_experts) == (1, (0,), 4)  # as small as its two choices allow
    assert small.hidden_size == large.hidden_size
    assert excerpt_of(large, "4", 4).num_layers == 2  # 4 experts of 97 MB a layer
    tiny = load_model("tiny-moe")
    assert (excerpt_of(tiny, "32", 4).num_experts, excerpt_of(tiny, "32", 4).num_layers) == (16, 4)
