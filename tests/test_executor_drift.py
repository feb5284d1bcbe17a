"""Calibrated operations again: how a machine's speed now compares with its profile."""

from __future__ import annotations

import pytest

from calibration_samples import lawful_samples
from moeplan.calibrate.fit import fit_profile
from moeplan.calibrate.standard_shapes import made_up_model
from moeplan.executor import drift as drift_module
from moeplan.executor.drift import Drift, Gauge
from moeplan.hardware import Profile

VALIDATED = made_up_model("validated", hidden=512, intermediate=640)


@pytest.fixture(scope="module")
def profile() -> Profile:
    return fit_profile(lawful_samples()).profile


def test_readings_are_compared_with_the_profiles_own_points(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    slower = 1.0

    class Told:
        """A harness whose machine takes `slower` times what the profile says."""

        def __init__(self, device: object) -> None:
            del device

        def measure(self, benches: list[drift_module.Bench], **_: object) -> list[drift_module.Sample]:
            found = []
            for bench in benches:
                if bench.kind == "expert":
                    seconds = drift_module._point(profile.curves[f"expert.{bench.labels['bits']}"], bench.arguments)
                else:
                    pause = profile.curves["host.piece"].seconds[0]
                    seconds = drift_module._point(profile.curves["copy.h2d.pinned"], bench.arguments) - pause
                times = (seconds * slower,)
                found.append(
                    drift_module.Sample(kind=bench.kind, labels=bench.labels, arguments=bench.arguments, seconds=times)
                )
            return found

    monkeypatch.setattr(drift_module, "Harness", Told)
    gauge = Gauge("cpu", profile, [VALIDATED], ["32", "3"])  # the profile has nothing of the second format
    try:
        gauge.read()
        slower = 1.25
        gauge.read()
    finally:
        gauge.close()
    found = gauge.against(profile)
    assert found.compute == pytest.approx((0.0, 0.25)) and found.copy == pytest.approx((0.0, 0.25))
    assert found.to_dict()["compute"] == pytest.approx(0.125)
    assert "experts took +12% (+0% to +25%) and copies took" in found.sentences()[0]


def test_a_real_reading_takes_time_and_gives_memory_back(profile: Profile) -> None:
    gauge = Gauge("cpu", profile, [VALIDATED], ["32"])
    gauge.read()
    found = gauge.against(profile)
    gauge.close()
    assert len(found.compute) == len(found.copy) == 1 and found.compute[0] > -1.0 and found.copy[0] > -1.0
    assert gauge._device.used_bytes == 0


def test_nothing_to_compare_with_is_said_by_silence() -> None:
    nothing = Drift(compute=(), copy=())
    assert nothing.sentences() == ()
    assert nothing.to_dict() == {"compute": None, "copy": None, "by_round": {"compute": [], "copy": []}}
