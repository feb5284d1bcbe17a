"""What a machine has become since its profile was measured: runs made again, held against what the profile says of them."""

from __future__ import annotations

import dataclasses

import pytest

from calibration_samples import LATENCY_S, LINK, SHAPES, lawful_samples, runs_of
from moeplan.calibrate.costs.forms import expert_weight_bytes
from moeplan.calibrate.costs.load import load_costs
from moeplan.calibrate.fitting.drift import drift_of, drifted
from moeplan.calibrate.fitting.fit import fit_profile
from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.calibrate.samples import Sample
from moeplan.executor.calibration.reference_runs import ReferenceRuns, reference_runs
from moeplan.specs.machines.profile import Profile
from moeplan.specs.models import weight_format

HELD_OUT = made_up_model("held out", hidden=768, intermediate=1024)


@pytest.fixture(scope="module")
def profile() -> Profile:
    samples = lawful_samples()
    copies = [
        Sample(
            kind="copy",
            labels={"direction": "h2d", "memory": "pinned"},
            arguments={"bytes": size},
            seconds=(LATENCY_S + size / LINK,) * 5,
        )
        for size in (expert_weight_bytes(*shape, True, bits) for shape in SHAPES for bits in ("32", "4"))
    ]
    runs = [*runs_of("32"), *runs_of("4")]
    return fit_profile(dataclasses.replace(samples, samples=(*samples, *copies, *runs))).profile


def again(bits: str, **slower: float) -> list[Sample]:
    """Return the runs of one format made again; each kind so much slower."""
    return [
        dataclasses.replace(one, seconds=tuple(slower.get(one.kind, 1.0) * s for s in one.seconds))
        for one in runs_of(bits)
    ]


def test_a_machine_that_is_as_it_was_has_no_drift(profile: Profile) -> None:
    found = drift_of(profile, [*again("32"), *again("4")])
    assert list(found) == ["copy.h2d", "dense", "expert.32", "expert.4"]
    assert list(found.values()) == pytest.approx([1.0] * 4, abs=0.03)


def test_each_table_has_its_own_drift(profile: Profile) -> None:
    still, found = drift_of(profile, again("32")), drift_of(profile, [*again("32", run_expert=1.3, run_copy=0.8)])
    assert found["expert.32"] == pytest.approx(1.3 * still["expert.32"])
    assert found["copy.h2d"] == pytest.approx(0.8 * still["copy.h2d"])
    assert found["dense"] == still["dense"]
    assert "expert.4" not in found  # no such run was made again


def test_what_the_profile_does_not_know_is_left_out(profile: Profile) -> None:
    elsewhere = [
        dataclasses.replace(one, arguments=dict(one.arguments) | {"hidden": 640})
        for one in again("32", run_expert=2.0)
        if one.kind == "run_expert"
    ]
    assert drift_of(profile, elsewhere) == {}
    assert drift_of(profile, again("16", run_expert=2.0)).keys() <= {"copy.h2d", "dense"}
    beside = [one for one in again("32", run_expert=2.0) if one.labels["beside"] != "nothing"]
    assert drift_of(profile, beside) == {}
    assert drift_of(profile, again("32")[:2]) == {}  # two are too few to tell


def test_a_drifted_profile_costs_what_the_machine_does_now(profile: Profile) -> None:
    now = drifted(profile, {"expert.32": 1.25, "dense": 0.9, "copy.h2d": 2.0})
    then_costs, costs = load_costs(profile, HELD_OUT), load_costs(now, HELD_OUT)
    wide, packed = weight_format("32"), weight_format("4")
    for cost, ratio in (("expert_kernel", 1.25), ("grouped_item", 1.25)):
        assert getattr(costs, cost)(2, wide).seconds == pytest.approx(
            ratio * getattr(then_costs, cost)(2, wide).seconds
        )
        assert getattr(costs, cost)(2, packed).seconds == pytest.approx(getattr(then_costs, cost)(2, packed).seconds)
    assert costs.dense_layer(0, 4, 512, 4).seconds == pytest.approx(0.9 * then_costs.dense_layer(0, 4, 512, 4).seconds)
    assert costs.host_to_device(2**21).seconds == pytest.approx(2 * then_costs.host_to_device(2**21).seconds)
    assert costs.device_to_host(2**21).seconds == pytest.approx(then_costs.device_to_host(2**21).seconds)
    assert now.host == profile.host


def test_the_nearest_calibrated_shape_is_run_again(profile: Profile) -> None:
    found = reference_runs(profile, [HELD_OUT], ["4", "32", "4"], "cpu")
    assert found is not None
    assert (found.model.hidden_size, found.model.expert_intermediate_size) in SHAPES
    assert (found.model.hidden_size, found.bits) == (1024, ("4", "32"))
    assert reference_runs(profile, [HELD_OUT], ["32", "16"], "cpu") is None  # no runs in 16 bits


def test_runs_are_made_again_one_format_at_a_time(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []

    def measure_runs(models: list[object], bits: list[str], extent: object, *, device: str) -> list[Sample]:
        assert models == [found.model]
        made.append((bits[0], device))
        return again(bits[0], run_expert=1.5 if len(made) < 3 else 3.0)

    monkeypatch.setattr("moeplan.executor.calibration.reference_runs.measure_runs", measure_runs)
    found = ReferenceRuns(profile=profile, model=HELD_OUT, bits=("32", "4"), device="cpu")
    for place in range(6):
        found.run(place)
    assert made == [("32", "cpu"), ("4", "cpu")] * 3
    # Three passes of each, of which one or two were slower still: the medians are those of two, and of one, of them.
    drift = found.drift()
    assert drift["expert.32"] == pytest.approx(3.0, rel=0.05)
    assert drift["dense"] == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(("bits", "total"), [(1, 1), (3, 3), (3, 4), (3, 5), (2, 3), (3, 48), (2, 6)])
def test_every_format_comes_up_in_a_round(
    profile: Profile, monkeypatch: pytest.MonkeyPatch, bits: int, total: int
) -> None:
    found = ReferenceRuns(profile=profile, model=HELD_OUT, bits=("32", "16", "4")[:bits], device="cpu")
    made: list[str] = []
    monkeypatch.setattr(
        "moeplan.executor.calibration.reference_runs.measure_runs",
        lambda models, kinds, extent, *, device: made.extend(kinds) or [],
    )
    for place in range(total):
        found.run_beside(place, total)
    assert set(made) == set(found.bits)
    assert len(made) < 2 * bits
