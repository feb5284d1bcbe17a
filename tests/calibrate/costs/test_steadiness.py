"""Passes of a calibration: a slow one does not count, and how passes differ is in the intervals."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from calibration_samples import dense_s, lawful_samples
from moeplan.base.errors import InputError
from moeplan.calibrate.costs.load import load_costs
from moeplan.calibrate.costs.steadiness import COMPUTE_PASSES, COPY_PASSES, others_share, pass_curves
from moeplan.calibrate.fitting.fit import Fit, fit_profile
from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.calibrate.samples import Sample, SampleSet, merge, sample_from_dict, sample_to_dict, together
from moeplan.specs.models import weight_format
from moeplan.specs.models.pass_shape import PassShape, dense_arguments

MODEL = made_up_model("held out", hidden=768, intermediate=1024)
LEVELS = (1.0, 1.3, 1.0, 0.95, 1.05)


def slowed(found: SampleSet, kernels: float, copies: float = 1.0) -> SampleSet:
    """Return what the same machine would have measured, had it been so much slower."""
    by = {"copy": copies, "copy_while": copies, "host": 1.0}
    return dataclasses.replace(
        found,
        samples=tuple(
            dataclasses.replace(one, seconds=tuple(by.get(one.kind, kernels) * s for s in one.seconds)) for one in found
        ),
    )


def calibrated(levels: tuple[float, ...], **how: bool) -> Fit:
    return fit_profile(merge([slowed(lawful_samples(), level) for level in levels]), **how)


def host(*seconds: float, passes: tuple[int, ...] = ()) -> Sample:
    return Sample(kind="host", labels={"what": "layer"}, arguments={}, seconds=seconds, passes=passes)


def test_a_slow_lap_does_not_count() -> None:
    found = together([host(1.0, 1.1, 1.2), host(9.0, 9.0, 9.9), host(1.2, 1.0, 1.1)])
    assert found.passes == (3, 3, 3)
    assert found.lap_medians() == [1.1, 9.0, 1.1]
    assert found.median_s == 1.1
    assert found.midmean_s == pytest.approx(1.1)
    # Two passes do not show which is the odd one, and one or two repetitions are no pass.
    assert together([host(1.0, 1.0, 1.0), host(3.0, 3.0, 3.0)]).median_s == 2.0
    thin = together([host(1.0, 1.0), host(1.0, 3.0, 3.0), host(3.0, 3.0, 3.0)])
    assert (thin.lap_medians(), thin.median_s) == (None, 3.0)


@pytest.mark.parametrize(
    ("seconds", "midmean"), [((2.0,), 2.0), ((2.0, 4.0), 3.0), ((2.0, 4.0, 9.0), 4.0), ((1.0, 2.0, 4.0, 9.0), 3.0)]
)
def test_the_mean_of_the_middle_half_of_a_few(seconds: tuple[float, ...], midmean: float) -> None:
    assert host(*seconds).midmean_s == midmean


def test_passes_survive_merging_again_and_a_file() -> None:
    found = together([together([host(1.0), host(2.0, 3.0)]), host(4.0)])
    assert (found.seconds, found.passes) == ((1.0, 2.0, 3.0, 4.0), (1, 2, 1))
    row = sample_to_dict(found)
    assert sample_from_dict(row, "row") == found
    assert (
        sample_from_dict({"laps" if name == "passes" else name: value for name, value in row.items()}, "row") == found
    )
    assert "passes" not in sample_to_dict(host(1.0))


@pytest.mark.parametrize("passes", [(2,), (1, 1, 2), (0, 3), (True, 2), (1.5, 1.5), (-1, 4)])
def test_passes_that_do_not_add_up_are_refused(passes: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="passes"):
        host(1.0, 2.0, 3.0, passes=passes)
    row = sample_to_dict(host(1.0, 2.0, 3.0)) | {"passes": "three"}
    with pytest.raises(InputError, match="passes"):
        sample_from_dict(row, "row")


def test_the_profile_is_of_the_usual_lap_and_says_how_the_others_differed() -> None:
    fit = calibrated(LEVELS)
    curve = fit.profile.curves[COMPUTE_PASSES]
    assert curve.seconds == pytest.approx(np.array(LEVELS) / np.exp(np.mean(np.log(LEVELS))))
    assert curve.relative_uncertainty == pytest.approx(1.645 * np.std(np.log(LEVELS), ddof=1))
    assert fit.profile.curves[COPY_PASSES].relative_uncertainty == pytest.approx(0.0)
    assert not any("one time only" in line for line in fit.warnings)
    steady = calibrated((1.0,) * 5)
    shape = PassShape(tokens=4, context_tokens=512, requests=4)
    expected = dense_s(dense_arguments(MODEL, [0], shape, 4))
    varied, same = (load_costs(one.profile, MODEL).dense_layer(0, 4, 512, 4) for one in (fit, steady))
    assert varied.seconds == pytest.approx(same.seconds) == pytest.approx(expected, rel=0.05)
    assert varied.relative_uncertainty == pytest.approx(
        math.hypot(same.relative_uncertainty, curve.relative_uncertainty)
    )


def test_every_kernel_and_copy_is_as_uncertain_as_the_machine() -> None:
    passes = [
        slowed(lawful_samples(), kernels, copies)
        for kernels, copies in zip(LEVELS, (1.0, 1.0, 1.2, 1.1, 0.9), strict=True)
    ]
    profile = fit_profile(merge(passes)).profile
    costs = load_costs(profile, MODEL)
    kernels, copies = (profile.curves[name].relative_uncertainty for name in (COMPUTE_PASSES, COPY_PASSES))
    assert kernels > copies > 0.1
    fmt = weight_format("16")
    for one in (
        costs.expert_kernel(4, fmt),
        costs.grouped_item(4, fmt),
        costs.head(4),
        costs.dense_layer(0, 4, 512, 4),
    ):
        assert one.relative_uncertainty >= kernels
    for one in (costs.host_to_device(2**21), costs.device_to_host(2**21)):
        assert copies <= one.relative_uncertainty < kernels


def test_parts_that_vary_apart_count_each_on_its_own() -> None:
    # One format is slow in one pass, another in another: the machine as a whole hardly changed, what is measured did.
    def one_pass(slow: str | None) -> SampleSet:
        found = lawful_samples()
        return dataclasses.replace(
            found,
            samples=tuple(
                dataclasses.replace(one, seconds=tuple(1.5 * s for s in one.seconds))
                if one.kind == "expert" and one.labels["bits"] == slow
                else one
                for one in found
            ),
        )

    curve = pass_curves(merge([one_pass(slow) for slow in ("32", "16", "4", None, None)]), "a test", meanwhile=False)[
        COMPUTE_PASSES
    ]
    one_part = np.log([1.5, 1, 1, 1, 1])
    parts = len(("expert", "grouped")) * 3 + len(("dense", "head"))
    assert curve.relative_uncertainty == pytest.approx(1.645 * math.sqrt(3 * np.var(one_part, ddof=1) / parts))


def test_what_runs_between_the_laps_shares_their_mean() -> None:
    alone, meanwhile = (calibrated(LEVELS, meanwhile=shared).profile.curves[COMPUTE_PASSES] for shared in (False, True))
    assert meanwhile.relative_uncertainty == pytest.approx(alone.relative_uncertainty / math.sqrt(len(LEVELS)))


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_laps_say_so(count: int) -> None:
    fit = calibrated(LEVELS[:count])
    assert not {COMPUTE_PASSES, COPY_PASSES} & set(fit.profile.curves)
    assert any("one time only" in line for line in fit.warnings)
    assert pass_curves(lawful_samples(), "a test", meanwhile=False) == {}


def beside_others(share: float) -> SampleSet:
    """Return samples measured while other programs took a share of the cores' time."""
    began = {"total": 1000, "busy": 400, "own": 100, "steal": 0}
    ended = {"total": 2000, "busy": 400 + 250 + round(1000 * share), "own": 350, "steal": 0}
    conditions = {"began": {"cpu_jiffies": began}, "ended": {"cpu_jiffies": ended}}
    return dataclasses.replace(lawful_samples(), conditions=conditions)


def test_a_calibration_of_seconds_beside_other_programs_is_as_uncertain_as_their_share() -> None:
    quiet, busy = (fit_profile(beside_others(share)) for share in (0.0, 0.4))
    assert COMPUTE_PASSES not in quiet.profile.curves
    assert {busy.profile.curves[name].relative_uncertainty for name in (COMPUTE_PASSES, COPY_PASSES)} == {0.4}
    assert any("one time only" in line for line in busy.warnings)
    estimates = [load_costs(found.profile, MODEL).expert_kernel(3, weight_format("32")) for found in (quiet, busy)]
    assert estimates[0].seconds == estimates[1].seconds
    assert estimates[1].relative_uncertainty == pytest.approx(math.hypot(estimates[0].relative_uncertainty, 0.4))
    assert COMPUTE_PASSES not in fit_profile(beside_others(0.4), meanwhile=True).profile.curves


@pytest.mark.parametrize("conditions", [{}, {"began": None}, {"began": {"cpu_jiffies": None}, "ended": {}},
                                        {"began": {"cpu_jiffies": {"total": 1}}, "ended": {"cpu_jiffies": {"total": 2}}}])  # fmt: skip
def test_conditions_that_say_nothing_of_others(conditions: dict[str, object]) -> None:
    assert others_share(conditions) == 0.0
