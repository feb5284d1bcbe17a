"""Predicted against measured: what missed is named, points lie where they were measured, damaged documents are refused."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import pytest

from moeplan.base.errors import InputError
from moeplan.reports.offload.page import plan_report
from moeplan.reports.validation.comparison import comparisons
from moeplan.reports.validation.page import predicted_measured_section, write_predicted_measured
from report_documents import made_up_timeline, plan_document, validation_document
from report_pages import Page


def test_predicted_against_measured_says_what_missed() -> None:
    rows = made_up_timeline()
    document = validation_document()
    document["configurations"][1]["counts_equal"] = False
    section = predicted_measured_section(document, predicted=rows, measured=rows)
    page = Page(plan_report(plan_document(), more_sections=[section]))
    shown = page.sections["measured"]
    for part in (
        "Configurations4", "Error, median2.0 %", "Error, 90th percentile18.0 %", "Noise of the same run3.0 %",
        "Intervals that hold75 %", "Order, Kendall's τ0.95", "Lost by trusting it0.4 %", "Hits, misses, bytesequal",
        "The interval of 1 of 4 configurations misses the measured time:best, 4: predicted −25.0 %",
        "Hits, misses, bytes or tokens differ between prediction and run:on-demand, 4",
    ):  # fmt: skip
        assert part in shown
    assert page.rows["measured"][1] == [
        "on-demand, 2",
        "10.0 ms",
        "9.00 ms to 11.0 ms",
        "10.1 ms",
        "−1.0 %",
        "yes",
        "equal",
    ]
    assert page.rows["measured"][4] == ["best, 4", "3.00 ms", "2.70 ms to 3.30 ms", "4.00 ms", "−25.0 %", "no", "equal"]
    assert [name for name in page.plots if name not in ("plot-speed", "plot-share", "plot-front")] == [
        "plot-scatter", "plot-errors", "plot-budget", "plot-both",
    ]  # fmt: skip


def test_a_machine_that_changed_is_said_to_have_changed() -> None:
    document = validation_document()
    without = {"median_relative_error": 0.011, "p90_relative_error": 0.05}
    changed = document | {"drift": {"expert.4": 1.25, "copy.h2d": 0.9}, "without_drift": without}
    pages = [
        Page(plan_report(plan_document(), more_sections=[predicted_measured_section(one)])).sections["measured"]
        for one in (changed, document | {"drift": None, "without_drift": None}, document)
    ]
    assert "expert.4 +25.0 %, copy.h2d −10.0 %" in pages[0]
    assert "the median error is 1.1 %, the 90th percentile 5.0 %" in pages[0]
    assert pages[1] == pages[2] and "calibrated shape" not in pages[1]


def test_points_lie_where_they_were_measured() -> None:
    page = Page(plan_report(plan_document(), more_sections=[predicted_measured_section(validation_document())]))
    _, inside, outside = page.plots["plot-scatter"]["data"]
    assert inside["x"] == pytest.approx([10.1, 19.6, 5.1]) and inside["y"] == pytest.approx([10, 20, 5])
    assert inside["error_y"]["array"] == pytest.approx([1, 2, 0.5]) and inside["error_x"]["arrayminus"][
        0
    ] == pytest.approx(0.101)
    assert (outside["x"], outside["y"]) == ([pytest.approx(4.0)], [pytest.approx(3.0)])
    axis = page.plots["plot-scatter"]["layout"]["xaxis"]
    assert axis["tickvals"] == [5, 10, 20] and axis["ticktext"] == ["5", "10", "20"]
    errors = page.plots["plot-errors"]
    assert errors["data"][1]["x"] == pytest.approx([-25.0]) and errors["layout"]["yaxis"]["ticktext"][0] == "best, 4"
    assert [shape["x1"] for shape in errors["layout"]["shapes"]] == [pytest.approx(3.0), 0.0]
    assert page.plots["plot-budget"]["data"][0]["x"] == pytest.approx([2.0, 1.0, 1.8])
    assert "plot-both" not in page.plots


def test_figures_that_a_validation_lacks_are_worked_out_or_left_open() -> None:
    bare = {"configurations": validation_document()["configurations"][:3]}
    shown = Page(plan_report(plan_document(), more_sections=[predicted_measured_section(bare)])).sections["measured"]
    assert "Error, median2.0 %" in shown and "Intervals that hold100 %" in shown
    assert "Noise of the same run–" in shown and "Order, Kendall's τ–" in shown and "Hits, misses, bytes–" in shown
    assert "misses the measured time" not in shown


def test_a_page_of_its_own(tmp_path) -> None:
    path = tmp_path / "measured.html"
    assert write_predicted_measured(path, validation_document(), title="On <this> machine") == str(path)
    page = Page(path.read_text(encoding="utf-8"))
    assert "On <this> machine" in page.sections[""] and "within 2.0 % of the measured step time" in page.sections[""]
    assert list(page.sections) == ["", "measured"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ...}, r"configurations\[2\]\.name = '\(absent\)': a field is absent"),
        ({"measured_step_s": 0.0}, r"measured_step_s = 0\.0: not a duration above zero"),
        ({"measured_step_s": float("nan")}, r"measured_step_s = nan: not a duration above zero"),
        ({"interval_s": [2, 1]}, r"interval_s = \[2, 1\]: not two durations, the lower first"),
        ({"interval_s": None}, r"interval_s = None: not two durations"),
        ({"measured_interval_s": [0.1]}, r"measured_interval_s = \[0\.1\]: not two durations"),
    ],
)
def test_a_damaged_validation_is_one_clear_complaint(change: dict[str, Any], message: str) -> None:
    document = validation_document()
    one = document["configurations"][2]
    one |= change
    document["configurations"][2] = {key: value for key, value in one.items() if value is not ...}
    with pytest.raises(InputError, match=message):
        comparisons(document)
    with pytest.raises(InputError, match="configurations = \\[\\]: not a list of at least one"):
        comparisons({"configurations": []})


def test_figures_follow_the_plotting_librarys_own_rules() -> None:
    rows = made_up_timeline()
    section = predicted_measured_section(validation_document(), predicted=rows, measured=rows)
    figures = Page(plan_report(plan_document(), more_sections=[section])).plots
    assert len(figures) == 7
    for figure in figures.values():
        go.Figure({"data": figure["data"], "layout": figure["layout"]})  # raises for anything the library does not know
