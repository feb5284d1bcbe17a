"""Surfaces find the law behind points, follow what the law leaves over, and say where they stop."""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.base.errors import MissingCalibration
from moeplan.calibrate.costs.forms import copy_form, expert_form, expert_weight_bytes
from moeplan.calibrate.costs.surface import cross_validate, fit_surface, nine_in_ten

SIZES = np.geomspace(1e4, 1e8, 15)
SHAPES = ((1024, 1408), (2048, 768), (4096, 2048), (4096, 14336))


def test_a_copy_that_follows_the_law_gives_back_latency_and_bandwidth() -> None:
    surface = fit_surface("copy", copy_form(), {"bytes": SIZES}, 2e-5 + SIZES / 12e9)
    assert surface.parameter("latency_s") == pytest.approx(2e-5, rel=0.01)
    assert surface.parameter("bandwidth") == pytest.approx(12e9, rel=0.01)
    for size in (2e4, 3.3e6, 7e7):
        seconds, wrong = surface.predict({"bytes": size})
        assert seconds == pytest.approx(2e-5 + size / 12e9, rel=0.01)
        assert wrong < 0.1


def test_what_the_law_leaves_over_is_followed() -> None:
    bump = 1 + 0.3 * np.exp(-((np.log(SIZES) - np.log(1e6)) ** 2) / 2)
    seconds = (2e-5 + SIZES / 12e9) * bump
    surface = fit_surface("copy", copy_form(), {"bytes": SIZES}, seconds)
    form_alone = copy_form().seconds({"bytes": SIZES}, surface.parameters)
    assert np.abs(form_alone / seconds - 1).max() > 0.08
    for size, time in zip(SIZES, seconds, strict=True):
        assert surface.predict({"bytes": float(size)})[0] == pytest.approx(time, rel=0.02)


def test_leaving_points_out_tells_how_good_a_law_is() -> None:
    seconds = 2e-5 + SIZES / 12e9
    assert nine_in_ten(cross_validate("copy", copy_form(), {"bytes": SIZES}, seconds)) < 0.01
    shaken = seconds * np.exp(0.2 * np.random.default_rng(0).standard_normal(len(SIZES)))
    # Independent errors of 20 % cannot be predicted from neighbours; the fit's own residual would be smaller.
    assert 0.15 < nine_in_ten(cross_validate("copy", copy_form(), {"bytes": SIZES}, shaken)) < 0.8


def test_few_points_are_judged_by_the_form_itself() -> None:
    errors = cross_validate("copy", copy_form(), {"bytes": np.array([1e6, 2e6, 4e6])}, [1e-3, 2e-3, 3e-3])
    assert errors.shape == (3,) and errors.max() > 0.01


@pytest.mark.parametrize("units", [1, 132])
def test_an_experts_law_is_found_on_one_unit_and_on_many(units: int) -> None:
    form = expert_form(many_units=units > 1)
    truth = {1: (2e-5, 1e-12, 1e10, 6e10), 132: (2e-5, 1e-14, 3e12, 5e14, 1e-6)}[units]
    rows = [(t, h, i) for t in (1, 2, 4, 8, 16, 32, 64, 128, 256) for h, i in SHAPES]
    columns = {
        "tokens": np.array([float(t) for t, _, _ in rows]),
        "hidden": np.array([float(h) for _, h, _ in rows]),
        "intermediate": np.array([float(i) for _, _, i in rows]),
        "gated": np.ones(len(rows)),
        "units": np.full(len(rows), float(units)),
        "weight_bytes": np.array([float(expert_weight_bytes(h, i, True, "16")) for _, h, i in rows]),
    }
    seconds = form.seconds(columns, np.array(truth))
    surface = fit_surface("expert", form, columns, seconds)
    assert surface.parameter("bandwidth") == pytest.approx(truth[2], rel=0.1)
    arguments = {name: float(column[13]) for name, column in columns.items()} | {"tokens": 24.0}
    exact = form.seconds({name: np.array([value]) for name, value in arguments.items()}, np.array(truth))[0]
    assert surface.predict(arguments)[0] == pytest.approx(exact, rel=0.05)


def test_outside_the_points_is_an_error_that_names_the_nearest() -> None:
    surface = fit_surface("copy.h2d", copy_form(), {"bytes": SIZES}, 2e-5 + SIZES / 12e9)
    surface.check_inside({"bytes": 1e4}, ("bytes",))
    with pytest.raises(
        MissingCalibration,
        match=r"copy\.h2d: bytes = 200000000: measured from 10000 to 1e\+08, nearest point bytes 1e\+08",
    ):
        surface.check_inside({"bytes": 2e8}, ("bytes",))
    assert surface.nearest({"bytes": 1.1e4})["bytes"] == pytest.approx(1e4)
