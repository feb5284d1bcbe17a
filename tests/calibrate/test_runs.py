"""Operations inside runs: factors against the same operation alone, at sizes that were measured and between them."""

from __future__ import annotations

import dataclasses

import pytest

from calibration_samples import (
    AHEAD,
    COPY,
    DENSE,
    FRESH,
    GROUPED,
    HOST_S,
    LATENCY_S,
    LINK,
    RESIDENT,
    SHAPES,
    SLOWED,
    expert_s,
    lawful_samples,
    runs_of,
)
from executor_stages import preset, small_trace
from moeplan.calibrate.costs.fitted.model import FittedCostModel
from moeplan.calibrate.costs.forms import expert_weight_bytes
from moeplan.calibrate.costs.load import load_costs
from moeplan.calibrate.costs.run_kind import RunKind, factor, left_out_error
from moeplan.calibrate.fitting.fit import fit_profile
from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.calibrate.samples import Sample
from moeplan.devices.stores.slot_sizes import expert_layout
from moeplan.sim.offload.run_facts import run_facts
from moeplan.sim.offload.simulate import Simulation
from moeplan.specs.machines.profile import Curve
from moeplan.specs.models import weight_format

HELD_OUT = made_up_model("held out", hidden=768, intermediate=1024)


def costs_with(runs: list[Sample]) -> FittedCostModel:
    samples = lawful_samples()
    fit = fit_profile(dataclasses.replace(samples, samples=(*samples, *runs)))
    found = load_costs(fit.profile, HELD_OUT)
    assert isinstance(found, FittedCostModel)
    return found


@pytest.fixture(scope="module")
def costs() -> FittedCostModel:
    return costs_with(runs_of("32"))


def kind(*, fresh: float, ahead: float = 0.0, cached: bool = True, overlapped: bool = True) -> RunKind:
    return RunKind(
        bits="32",
        cached=cached,
        overlapped=overlapped,
        fresh_fraction=fresh,
        ahead_fraction=ahead,
        fetches_per_transfer=0.25,
        experts_per_layer_step=2.0,
        typical_tokens=1.0,
    )


@pytest.mark.parametrize(("fresh", "expected"), [(0.0, RESIDENT), (1.0, FRESH), (0.25, 0.75 * RESIDENT + 0.25 * FRESH)])
def test_experts_cost_what_their_state_says(costs: FittedCostModel, fresh: float, expected: float) -> None:
    alone = costs.expert_kernel(2, weight_format("32")).seconds
    inside = costs.for_run(kind(fresh=fresh)).expert_kernel(2, weight_format("32")).seconds
    assert inside == pytest.approx(alone * expected, rel=0.03)
    assert inside == pytest.approx(expert_s(2, 768, 1024, "32") * expected, rel=0.06)


def test_experts_that_were_guessed_have_a_cost_of_their_own(costs: FittedCostModel) -> None:
    fmt = weight_format("32")
    alone = costs.expert_kernel(2, fmt).seconds
    mixed = kind(fresh=0.25, ahead=0.5)
    expected = 0.25 * FRESH + 0.5 * AHEAD + 0.25 * RESIDENT
    assert costs.for_run(mixed).expert_kernel(2, fmt).seconds == pytest.approx(alone * expected, rel=0.03)
    # Where no run had guesses, what was guessed counts as what was asked for.
    without = costs_with(runs_of("32", guesses=False))
    assert without.for_run(mixed).expert_kernel(2, fmt).seconds == pytest.approx(
        without.expert_kernel(2, fmt).seconds * (0.75 * FRESH + 0.25 * RESIDENT), rel=0.03
    )


@pytest.mark.parametrize(("fresh", "states"), [(0.0, RESIDENT), (1.0, FRESH), (0.5, (FRESH + RESIDENT) / 2)])
def test_a_grouped_launch_has_a_factor_besides_its_experts_own(
    costs: FittedCostModel, fresh: float, states: float
) -> None:
    fmt, run = weight_format("32"), costs.for_run(kind(fresh=fresh))
    assert run.grouped_item(1, fmt).seconds == pytest.approx(
        costs.grouped_item(1, fmt).seconds * states * GROUPED, rel=0.03
    )
    assert run.grouped_base().seconds == pytest.approx(
        costs.with_experts("32", 1.0).grouped_base().seconds * GROUPED, rel=0.03
    )
    # Where no launch was seen inside a run, its experts' own factors are all there is.
    single = [one for one in runs_of("32") if one.kind != "run_grouped"]
    without = costs_with(single).for_run(kind(fresh=fresh))
    assert without.grouped_item(1, fmt).seconds == pytest.approx(costs.grouped_item(1, fmt).seconds * states, rel=0.03)
    assert without.grouped_base() == costs.with_experts("32", 1.0).grouped_base()


def test_dense_parts_copies_and_handovers(costs: FittedCostModel) -> None:
    inside = costs.for_run(kind(fresh=0.5))
    assert inside.dense_layer(0, 1, 128, 1).seconds == pytest.approx(
        costs.dense_layer(0, 1, 128, 1).seconds * DENSE, rel=0.05
    )
    size = expert_weight_bytes(768, 1024, True, "32")
    assert inside.host_to_device(size).seconds == pytest.approx(
        (LATENCY_S + size / LINK) * COPY + HOST_S["piece"], rel=0.03
    )
    assert inside.device_to_host(size).seconds == costs.device_to_host(size).seconds  # that was not measured
    assert inside.transfer_wait_s() == pytest.approx((HOST_S["start"] + HOST_S["wake"]) / 4)
    assert costs.for_run(kind(fresh=0.5, overlapped=False)).transfer_wait_s() == 0.0
    assert costs.transfer_wait_s() == 0.0


def test_experts_on_the_cores_wait_for_threads_to_wake(costs: FittedCostModel) -> None:
    fmt = weight_format("32")
    cores = [
        Sample(
            kind="cpu_expert", labels={"bits": "32"}, seconds=(2 * expert_s(tokens, hidden, inner, "32"),) * 4,
            arguments={"tokens": tokens, "hidden": hidden, "intermediate": inner, "gated": 1},
        )
        for hidden, inner in SHAPES for tokens in (1, 2, 8)
    ]  # fmt: skip
    found = costs_with([*runs_of("32"), *cores])
    alone = found.cpu_expert(1, fmt).seconds
    inside = found.for_run(dataclasses.replace(kind(fresh=0.5), cpu_tasks_per_core_expert=0.5)).cpu_expert(1, fmt)
    assert inside.seconds - alone == pytest.approx((HOST_S["start"] + HOST_S["wake"]) / 2)
    assert found.for_run(kind(fresh=0.5)).cpu_expert(1, fmt).seconds == alone


def test_copies_slow_kernels_down_by_what_was_seen_in_runs(costs: FittedCostModel) -> None:
    inside = costs.for_run(kind(fresh=0.5))
    assert inside.rate_fraction("compute", frozenset({"h2d"})) == pytest.approx(1 / SLOWED, rel=0.05)
    assert inside.rate_fraction("compute", frozenset()) == 1.0


def test_a_mode_that_never_ran_keeps_what_was_measured_alone(costs: FittedCostModel) -> None:
    inside = costs.for_run(kind(fresh=0.5, cached=False))
    assert inside.dense_layer(0, 1, 128, 1) == costs.dense_layer(0, 1, 128, 1)
    assert inside.host_to_device(2**20) == costs.host_to_device(2**20)


def test_predictions_on_a_measured_machine_cost_what_runs_cost(costs: FittedCostModel) -> None:
    model = made_up_model("held out", hidden=768, intermediate=1024, num_layers=3, num_experts=8)
    simulation = Simulation(model=model, profile=costs.profile, trace=small_trace(), dense_format=weight_format("32"))
    schedule = preset("mixtral-offloading")
    tables, sources = simulation.tables(schedule)
    alone = costs.expert_kernel(1, weight_format("32")).seconds + HOST_S["kernel"]
    facts = run_facts(simulation.given(schedule))
    share = {FRESH: facts.fresh_fraction, AHEAD: facts.ahead_fraction}
    own = sum(part * state for state, part in share.items()) + (1 - sum(share.values())) * RESIDENT
    assert tables.kernel_ns[0, 1] == pytest.approx(alone * own * 1e9, rel=0.05)
    size = expert_layout(model, "32").slot_bytes
    assert tables.expert_bytes.tolist() == [size]
    waits = (HOST_S["start"] + HOST_S["wake"]) * facts.fetches_per_transfer
    copy_s = (LATENCY_S + size / LINK) * COPY + HOST_S["piece"] + waits
    assert tables.chunk_ns[0, 1] == pytest.approx(copy_s * 1e9, rel=0.05)
    assert simulation.predict(schedule).metrics.window_s > 0 and sources.estimates["expert"].source == "measured"


def test_factors_are_weighted_by_nearness_and_by_how_often_they_were_seen() -> None:
    curve = Curve(arguments={"bytes": (1e6, 4e6), "times": (50.0, 50.0)}, seconds=(1.0, 4.0), relative_uncertainty=0.0)
    assert factor(None, bytes=3) == 1.0
    assert factor(curve, bytes=2e6) == pytest.approx(2.0)
    assert 1.0 < factor(curve, bytes=1e6) < 1.2 and 3.3 < factor(curve, bytes=4e6) < 4.0
    assert factor(curve, bytes=1e12) == pytest.approx(4.0)
    rare = Curve(arguments={"bytes": (1e6, 4e6), "times": (50.0, 1.0)}, seconds=(1.0, 4.0), relative_uncertainty=0.0)
    assert factor(rare, bytes=2e6) < 1.05


def test_what_factors_are_worth_is_found_by_leaving_shapes_out() -> None:
    same = Curve(
        arguments={"bytes": (1.0, 2.0, 4.0), "times": (9.0,) * 3}, seconds=(1.5,) * 3, relative_uncertainty=0.0
    )
    assert left_out_error(same, "bytes") == pytest.approx(0.0)
    one = Curve(arguments={"bytes": (1.0, 1.0), "times": (9.0,) * 2}, seconds=(1.0, 2.0), relative_uncertainty=0.0)
    assert left_out_error(one, "bytes") == 0.0
    odd = Curve(arguments={"bytes": (1.0, 1e9), "times": (9.0,) * 2}, seconds=(1.0, 2.0), relative_uncertainty=0.0)
    assert left_out_error(odd, "bytes") == pytest.approx(0.95)  # errors 1.0 and 0.5, nine tenths of the way between
