"""One prediction: what a plan ranks and shows, what `simulate` says, what a report replays and what a validation tests are equal.

The machine is a measured one, whose costs inside a run depend on what the run's own decisions are: there the ways to a figure could part.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from functools import cache

import pytest

from calibration_samples import expert_s, lawful_samples, runs_of
from executor_stages import small_trace
from moeplan.api.subject import open_subject
from moeplan.base.units import MIB
from moeplan.calibrate.fitting.fit import fit_profile
from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.calibrate.samples import Sample
from moeplan.executor.running.prediction import run_input
from moeplan.executor.validation.validate import costs_of, dense_format
from moeplan.planner.offload import search as searching
from moeplan.planner.offload.baselines import preset_schedule
from moeplan.planner.offload.make import make_plan
from moeplan.planner.offload.plan import OffloadPlan, OffloadRequest, base_schedule, plan_to_dict
from moeplan.planner.offload.space import Candidate, candidates
from moeplan.sim.offload.forecast import forecast
from moeplan.sim.offload.run_facts import run_facts
from moeplan.sim.offload.simulate import Simulation
from moeplan.specs.machines.profile import Profile
from moeplan.specs.schedules.offload import schedule_from_dict
from moeplan.specs.schedules.presets import PRESETS

MODEL = made_up_model("held out", hidden=768, intermediate=1024)
TRACE = small_trace(num_layers=4)
MEMORY = 400 * MIB
# One weight format below another, and one in the middle of the recording's experts.
BITS = ("32", "2")


@cache
def lawful_profile() -> Profile:
    """Return a machine that was measured: kernels, copies, cores and disk alone, and operations inside runs."""
    samples = lawful_samples(bits=("32", "4"))
    more = runs_of("32")
    for one in samples.samples:
        if one.kind in ("expert", "expert_while", "grouped") and one.labels["bits"] == "4":
            more.append(dataclasses.replace(one, labels=one.labels | {"bits": "2"}))
        if one.kind == "expert" and one.labels["bits"] == "32":
            tokens, hidden, inner = (int(one.arguments[name]) for name in ("tokens", "hidden", "intermediate"))
            for bits in BITS:
                slow = 2 * expert_s(tokens, hidden, inner, "32")
                more.append(
                    Sample(kind="cpu_expert", labels={"bits": bits}, arguments=one.arguments, seconds=(slow,) * 4)
                )
    for size in (MIB, 16 * MIB):
        taken = 1e-3 + size / 1e9
        more.append(
            Sample(kind="disk", labels={"cache": "dropped"}, arguments={"bytes": size}, seconds=(taken, 1.2 * taken))
        )
    return fit_profile(dataclasses.replace(samples, samples=(*samples.samples, *more))).profile


def simulation(**changes: object) -> Simulation:
    fields = {"model": MODEL, "profile": lawful_profile(), "trace": TRACE, "memory_bytes": MEMORY} | changes
    return Simulation(**fields, dense_format=dense_format("cpu"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def planned() -> Iterator[tuple[Simulation, OffloadPlan]]:
    """A plan over a few candidates of every kind: what is tested are its figures, not how it finds them."""

    def few(*given: object, **options: object) -> Iterator[Candidate]:
        return itertools.islice(candidates(*given, **options), 0, None, 29)  # type: ignore[arg-type]

    patch = pytest.MonkeyPatch()
    patch.setattr(searching, "candidates", few)
    bound = simulation()
    yield bound, make_plan(bound, OffloadRequest(bits=("32",)))
    patch.undo()


@pytest.mark.parametrize("name", PRESETS)
def test_plan_simulate_report_and_validation_predict_the_same(
    planned: tuple[Simulation, OffloadPlan], name: str
) -> None:
    _, plan = planned
    document = plan_to_dict(plan)
    base = base_schedule(plan.request, "32")
    simulated = simulation().predict(preset_schedule(name, base, has_guesses=True))
    rows = [*document["baselines"], *document["baselines_that_need_more"]]
    shown = next(one for one in rows if one["name"] == name)
    replayed = simulation().predict(schedule_from_dict(shown["schedule"]), rows=True)
    given = run_input(schedule_from_dict(shown["schedule"]), TRACE)
    validated = forecast(given, MODEL, costs_of(lawful_profile(), MODEL, "cpu"))
    ends = [one.outcome.step_end.tolist() for one in (simulated, replayed, validated)]
    assert ends[0] == ends[1] == ends[2]
    assert shown["makespan_ns"] == simulated.outcome.makespan_ns == validated.outcome.makespan_ns
    assert simulated.metrics == replayed.metrics == validated.metrics
    assert shown["bytes_copied"] == validated.metrics.bytes_copied


def test_the_best_was_ranked_by_what_is_validated(planned: tuple[Simulation, OffloadPlan]) -> None:
    _, plan = planned
    given = run_input(plan.best.schedule, TRACE)
    validated = forecast(given, MODEL, costs_of(lawful_profile(), MODEL, "cpu"))
    assert (
        validated.outcome.step_end.tolist() == plan.best.outcome.step_end.tolist()
    )  # which the search's score is checked against


def test_runs_of_one_schedule_cost_what_their_own_decisions_make_of_them() -> None:
    # The same options and the same tables' key, but more hits: were one mix of hits and misses taken for all, costs were equal.
    bound = simulation()
    small, large = (
        bound.resolve(preset_schedule("mixtral-offloading", base_schedule(OffloadRequest(bits=("32",)), "32"), has_guesses=True)
                      .with_options(cache__experts_per_layer=slots)) for slots in (1, 7)
    )  # fmt: skip
    facts = [run_facts(bound.given(one)) for one in (small, large)]
    assert facts[0].fresh_fraction > facts[1].fresh_fraction
    # Fresh experts are the quicker ones on this machine.
    assert bound.tables(small)[0].kernel_ns[0, 1] < bound.tables(large)[0].kernel_ns[0, 1]


def test_tables_of_a_schedule_do_not_depend_on_which_was_asked_about_before() -> None:
    """What the host decides a layer depends on more than the policy: one pool that stays is told apart from shares of every layer."""
    pooled = base_schedule(OffloadRequest(bits=("mxfp4",)), "mxfp4").with_options(
        cache__policy="static", cache__pooled_experts=96, kernel__miss="cheaper"
    )
    shares = pooled.with_options(cache__pooled_experts=None, cache__experts_per_layer=4)
    found = []
    for order in ((pooled, shares), (shares, pooled)):
        fresh = open_subject(
            model="gpt-oss-20b",
            hardware="rtx-3060 + ryzen-7-7700x + ddr5-5600x2:64GiB",
            prompt_tokens=4,
            reply_tokens=2,
        ).simulation
        found.append({each: fresh.usual_tables(each)[0].host_ns for each in order})
    assert found[0] == found[1] and found[0][pooled] != found[0][shares]
