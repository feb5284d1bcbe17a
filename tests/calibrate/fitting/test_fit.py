"""A fit of a lawful machine's samples gives back the laws; what was not measured is an error, or said to be filled."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from calibration_samples import (
    BANDWIDTH,
    GROUP_S,
    HOST_S,
    LATENCY_S,
    LINK,
    PIECE_S,
    SLOWED_COMPUTE,
    SLOWED_COPY,
    dense_s,
    expert_s,
    head_s,
    lawful_samples,
)
from moeplan.base.errors import InputError, MissingCalibration
from moeplan.base.units import MIB
from moeplan.calibrate.costs.cost_model import CostModel
from moeplan.calibrate.costs.fitted.model import FittedCostModel
from moeplan.calibrate.costs.load import check_profile_matches, load_costs
from moeplan.calibrate.fitting.fit import Fit, fit_profile
from moeplan.calibrate.fitting.grouped import share_of_groups
from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.calibrate.samples import Sample, SampleSet
from moeplan.executor.calibration.calibrate import write_calibration
from moeplan.specs.machines.profile import profile_to_json
from moeplan.specs.machines.profile_file import load_hardware, profile_from_json
from moeplan.specs.models import weight_format
from moeplan.specs.models.pass_shape import PassShape, dense_arguments, head_arguments

# A shape that no sample has.
HELD_OUT = made_up_model("held out", hidden=768, intermediate=1024)


@pytest.fixture(scope="module")
def fit() -> Fit:
    return fit_profile(lawful_samples())


@pytest.fixture(scope="module")
def costs(fit: Fit) -> FittedCostModel:
    found = load_costs(fit.profile, HELD_OUT)
    assert isinstance(found, FittedCostModel)
    return found


@pytest.mark.parametrize("bits", ["32", "16", "4"])
@pytest.mark.parametrize("tokens", [1, 3, 24, 100])
def test_experts_of_a_shape_that_was_not_measured(costs: FittedCostModel, bits: str, tokens: int) -> None:
    exact = expert_s(tokens, 768, 1024, bits)
    fmt = weight_format(bits)
    assert costs.expert_kernel(tokens, fmt).seconds == pytest.approx(exact, rel=0.03)
    assert costs.grouped_item(tokens, fmt).seconds == pytest.approx(exact, rel=0.05)
    assert costs.expert_kernel(tokens, fmt).source == "measured"


def test_a_grouped_launch_is_a_base_and_shares(costs: FittedCostModel) -> None:
    assert costs.grouped_base().seconds == pytest.approx(GROUP_S, rel=0.1)
    assert costs.with_experts("4", 1).grouped_base().seconds == pytest.approx(GROUP_S, rel=0.1)


@pytest.mark.parametrize(("tokens", "context", "requests"), [(1, 256, 1), (8, 1024, 8), (100, 300, 1)])
def test_dense_part_and_head(costs: FittedCostModel, tokens: int, context: int, requests: int) -> None:
    shape = PassShape(tokens=tokens, context_tokens=context, requests=requests)
    exact = dense_s(dense_arguments(HELD_OUT, [0], shape, 4))
    assert costs.dense_layer(2, tokens, context, requests).seconds == pytest.approx(exact, rel=0.1)
    assert costs.head(tokens).seconds == pytest.approx(head_s(head_arguments(HELD_OUT, tokens, 4)), rel=0.1)


@pytest.mark.parametrize("size", [MIB // 4, 3 * MIB, 10 * MIB])
def test_copies_cost_the_engine_something_each(costs: FittedCostModel, size: int) -> None:
    exact = LATENCY_S + PIECE_S + size / LINK
    assert costs.host_to_device(size).seconds == pytest.approx(exact, rel=0.02)
    assert costs.host_to_device(size, pinned=False).seconds == pytest.approx(exact, rel=0.02)
    assert costs.device_to_host(size).seconds == pytest.approx(exact, rel=0.02)


def test_host_costs_and_contention(fit: Fit, costs: FittedCostModel) -> None:
    host = fit.profile.host
    assert (host.per_layer_s.value, host.per_transfer_s.value) == (HOST_S["layer"], HOST_S["transfer"])
    assert (host.per_kernel_s.value, host.per_step_s.value) == (HOST_S["kernel"], HOST_S["step"])
    assert fit.profile.contention["compute/h2d"].value == pytest.approx(1 / SLOWED_COMPUTE)
    assert fit.profile.contention["h2d/compute"].value == pytest.approx(1 / SLOWED_COPY, rel=0.02)
    alone, beside = frozenset[str](), frozenset({"h2d"})
    assert costs.rate_fraction("compute", alone) == 1.0
    assert costs.rate_fraction("compute", beside) == pytest.approx(1 / SLOWED_COMPUTE)
    assert costs.with_experts("4", 3.0).rate_fraction("compute", beside) == pytest.approx(1 / SLOWED_COMPUTE)


def test_constants_have_a_physical_meaning(fit: Fit) -> None:
    device = fit.profile.device
    assert device.host_shares_compute and device.kind == "cpu"
    assert device.memory_bytes_per_s.value == pytest.approx(20e9)
    assert device.dequantise_efficiency["4"].value == pytest.approx(BANDWIDTH["4"] / BANDWIDTH["16"], rel=0.1)
    assert all(constant.source == "measured" and constant.citation for _, constant in fit.profile.constants())


def test_uncertainty_comes_from_points_left_out() -> None:
    exact, shaken = fit_profile(lawful_samples()), fit_profile(lawful_samples(noise=0.15, repetitions=1))
    name = "expert.16"
    assert exact.tables[name].p90_error < 0.03
    assert 0.1 < shaken.tables[name].p90_error < 0.6
    estimate = load_costs(shaken.profile, HELD_OUT).expert_kernel(4, weight_format("16"))
    assert estimate.relative_uncertainty >= shaken.tables[name].p90_error
    assert estimate.seconds == pytest.approx(expert_s(4, 768, 1024, "16"), rel=0.3)


def test_a_profile_survives_its_file(fit: Fit) -> None:
    again = profile_from_json(profile_to_json(fit.profile))
    assert profile_to_json(again) == profile_to_json(fit.profile)
    found, expected = load_costs(again, HELD_OUT), load_costs(fit.profile, HELD_OUT)
    assert found.expert_kernel(5, weight_format("4")) == expected.expert_kernel(5, weight_format("4"))


def test_profile_and_samples_are_written_together(tmp_path: Path) -> None:
    calibration = write_calibration(lawful_samples(), tmp_path / "here.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.json", "here.samples.json"]
    loaded = load_hardware(tmp_path / "here.json")
    assert loaded.samples == "here.samples.json" and loaded.name == "here"
    document = calibration.to_dict("here.json")
    assert {"profile", "device", "num_samples", "fit"} <= set(document)


# --- holes ------------------------------------------------------------------------------------------------------------


def test_a_hole_is_an_error_that_names_the_nearest_point(costs: FittedCostModel) -> None:
    with pytest.raises(
        MissingCalibration, match=r"expert\.16: tokens = 500: measured from 1 to 128, nearest point tokens 128"
    ):
        costs.expert_kernel(500, weight_format("16"))
    with pytest.raises(MissingCalibration, match=r"expert\.8.*32, 16, 4 bits only"):
        costs.expert_kernel(1, weight_format("8"))
    with pytest.raises(MissingCalibration, match="copy"):
        costs.host_to_device(10**10)
    with pytest.raises(MissingCalibration, match="tokens"):
        costs.dense_layer(0, 1000, 1024, 1)
    huge = dataclasses.replace(HELD_OUT, expert_intermediate_size=40_000)
    with pytest.raises(MissingCalibration, match="weight_bytes"):
        dataclasses.replace(costs, model=huge).expert_kernel(1, weight_format("16"))


def test_the_datasheet_may_fill_a_hole_and_says_so(fit: Fit) -> None:
    costs = load_costs(fit.profile, HELD_OUT, allow_datasheet=True)
    filled = costs.expert_kernel(500, weight_format("16"))
    assert filled.source == "measured+datasheet"
    assert filled.seconds == CostModel(fit.profile, HELD_OUT).expert_kernel(500, weight_format("16")).seconds
    assert costs.expert_kernel(8, weight_format("16")).source == "measured"


def test_a_machine_without_tables_keeps_its_roofline() -> None:
    profile = load_hardware("h100-sxm")
    assert type(load_costs(profile, HELD_OUT)) is CostModel


def test_a_profile_of_another_device_is_refused(fit: Fit) -> None:
    check_profile_matches(fit.profile, kind="cpu", name="lawful machine")
    with pytest.raises(InputError, match="another device"):
        check_profile_matches(fit.profile, kind="cpu", name="lawless machine")
    with pytest.raises(InputError, match="describes a cpu"):
        check_profile_matches(fit.profile, kind="cuda", name="lawful machine")


def without(kind: str) -> SampleSet:
    whole = lawful_samples()
    return dataclasses.replace(whole, samples=tuple(s for s in whole if s.kind != kind))


@pytest.mark.parametrize("kind", ["dense", "head", "copy", "host", "memory", "matmul"])
def test_samples_that_lack_what_a_profile_needs_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match="samples"):
        fit_profile(without(kind))


def test_a_point_far_slower_than_its_neighbours_is_named_and_left_out() -> None:
    whole = lawful_samples()
    slow = next(s for s in whole if s.kind == "expert" and s.labels["bits"] == "16" and s.arguments["tokens"] == 16)
    changed = dataclasses.replace(slow, seconds=tuple(4 * t for t in slow.seconds))
    fit = fit_profile(dataclasses.replace(whole, samples=tuple(changed if s is slow else s for s in whole)))
    assert len(fit.tables["expert.16"].flagged) == 1 and "tokens 16" in fit.tables["expert.16"].flagged[0]
    assert any("expert.16" in warning and "tokens 16" in warning for warning in fit.warnings)
    kept = load_costs(fit.profile, HELD_OUT).expert_kernel(16, weight_format("16")).seconds
    assert kept == pytest.approx(expert_s(16, 768, 1024, "16"), rel=0.05)


def test_shares_of_groups_are_a_line_through_sizes() -> None:
    def sample(experts: int, seconds: float) -> Sample:
        arguments = {"tokens": 2, "hidden": 8, "intermediate": 8, "gated": 1, "experts": experts}
        return Sample(kind="grouped", labels={"bits": "16"}, arguments=arguments, seconds=(seconds,))

    shares, base = share_of_groups([sample(2, 5.0), sample(4, 9.0), sample(8, 17.0)])
    assert base == pytest.approx(1.0) and [seconds for _, seconds in shares] == [pytest.approx(2.0)]


def disk_samples(*reads: tuple[int, tuple[float, ...]]) -> SampleSet:
    samples = lawful_samples()
    kept = [sample for sample in samples if sample.kind != "disk"]
    found = [
        Sample(kind="disk", labels={"cache": "dropped"}, arguments={"bytes": size}, seconds=seconds)
        for size, seconds in reads
    ]
    return dataclasses.replace(samples, samples=(*kept, *found))


def test_a_disk_is_a_start_and_a_rate_and_slow_reads_count() -> None:
    # 1 ms and 0.5 GB/s; the mean is taken, because reads follow each other: (2 + 2 + 5) / 3 = 3 ms for a megabyte.
    disk = fit_profile(disk_samples((MIB, (0.002, 0.002, 0.005)), (16 * MIB, (0.031, 0.033, 0.035)))).profile.disk
    assert disk is not None
    assert disk.latency_s.value == pytest.approx(0.001)
    assert MIB / disk.read_bytes_per_s.value == pytest.approx(0.002)
    assert disk.latency_s.relative_uncertainty >= 0.5  # the quartiles of the small reads lie 1.5 ms apart
    one = fit_profile(disk_samples((MIB, (0.004, 0.004)))).profile.disk
    assert one is not None
    assert (one.latency_s.value, MIB / one.read_bytes_per_s.value) == (0.0, pytest.approx(0.004))
    # A small read that is slower than a line allows does not make the start negative.
    odd = fit_profile(disk_samples((MIB, (0.001,)), (16 * MIB, (0.032,)))).profile.disk
    assert odd is not None and odd.latency_s.value == 0.0 and odd.read_bytes_per_s.value > 0
