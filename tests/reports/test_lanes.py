"""Lanes of a few steps: which steps are shown, and that bars are the rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from moeplan.reports.timelines.lanes import Excerpt, excerpt, lanes_plot, step_spans, waiting_fraction
from moeplan.sim.timeline import Timeline
from report_documents import made_up_timeline

# A step of `made_up_timeline`: two layers of dense 100, host 20, fetch 200 + 10 × step, expert 50; head 30; host 20.
STEP_NS = 2 * (100 + 20 + 200 + 50) + 30 + 20


def test_a_step_lasts_until_its_last_operation() -> None:
    spans = step_spans(made_up_timeline(3).frame())
    ends = [STEP_NS, 2 * STEP_NS + 20, 3 * STEP_NS + 60]
    assert spans["end_ns"].tolist() == ends
    assert spans["start_ns"].tolist() == [0, *ends[:-1]]
    assert spans["tokens"].tolist() == [5, 1, 1]


def test_ordinary_steps_of_the_later_half_are_shown() -> None:
    # Steps 4 to 8 of nine are candidates; of three in a row, 5 to 7 take the median time.
    part = excerpt(made_up_timeline(9).frame())
    assert (part.steps, part.words) == ((5, 7), "steps 5 to 7 of 9")
    assert part.end_ns - part.start_ns == 3 * STEP_NS + 20 * (5 + 6 + 7)
    assert set(part.frame["step"]) == {5, 6, 7} and len(part.frame) == 3 * 10


def test_steps_with_another_number_of_tokens_are_no_ordinary_ones() -> None:
    frame = made_up_timeline(8).frame()
    frame.loc[(frame["step"] == 6) & (frame["tokens"] > 0), "tokens"] = 9  # a prompt in the later half
    part = excerpt(frame)
    assert part.steps == (4, 5)


def test_fewer_steps_or_layers_where_rows_are_many() -> None:
    frame = made_up_timeline(9).frame()
    assert excerpt(frame, most_rows=20).steps == (5, 6)
    assert excerpt(frame, most_rows=10).words == "step 6 of 9"
    part = excerpt(frame, most_rows=5)
    assert part.words == "step 6 of 9, its first 2 layers" and len(part.frame) == 5
    assert part.step_ends_ns == (part.end_ns,)


def test_steps_that_were_chosen_already() -> None:
    part = excerpt(made_up_timeline(5).frame(), steps=(1, 2))
    assert part.steps == (1, 2) and part.start_ns == STEP_NS


def test_one_step_alone_is_shown() -> None:
    part = excerpt(made_up_timeline(1).frame())
    assert part.words == "step 0 of 1" and part.step_ends_ns == (STEP_NS,)


def test_idle_time_of_the_compute_lane() -> None:
    part = excerpt(made_up_timeline(1).frame())
    assert waiting_fraction(part) == pytest.approx(1 - (2 * 150 + 30) / STEP_NS)


def test_every_row_is_a_bar_and_cut_to_what_is_shown() -> None:
    rows = made_up_timeline(3)
    late = rows.rows.copy()
    part = excerpt(Timeline(rows=late).frame(), steps=(1, 1))
    figure = lanes_plot([("", part)]).figure
    bars = {trace["name"]: trace for trace in figure["data"]}
    assert list(bars) == ["dense", "expert", "head", "fetch", "host layer", "host step"]
    assert bars["fetch"]["base"] == pytest.approx([0.12, 0.50]) and bars["fetch"]["x"] == pytest.approx([0.21, 0.21])
    assert (
        bars["fetch"]["customdata"][0]
        == "<b>fetch L0 e1</b><br>step 1, layer 0, expert 1<br>210 ns<br>4,096 bytes, 19.5 GB/s"
    )
    assert bars["expert"]["customdata"][1] == "<b>expert L1 e1</b><br>step 1, layer 1, expert 1<br>50.0 ns, 1 token"
    assert sum(len(trace["x"]) for trace in figure["data"]) == 10
    layout = figure["layout"]
    assert layout["xaxis"]["title"]["text"] == "time, µs" and layout["xaxis"]["range"] == [0, pytest.approx(0.81)]
    assert layout["yaxis"]["ticktext"] == ["host", "compute", "copies<br>to device"]
    # A lane that runs over the border is cut there.
    frame = part.frame.assign(start_ns=part.frame["start_ns"] - 1000, end_ns=part.frame["end_ns"] + 1000)
    borders = {"start_ns": part.start_ns, "end_ns": part.end_ns, "step_ends_ns": part.step_ends_ns}
    cut = lanes_plot([("", Excerpt(frame=frame, steps=(1, 1), words="", **borders))])
    for trace in cut.figure["data"]:
        assert min(trace["base"]) >= 0 and max(np.add(trace["base"], trace["x"])) <= 0.81 + 1e-9


def test_two_timelines_share_an_axis_and_start_together() -> None:
    slow = made_up_timeline(4).frame()
    slow["start_ns"], slow["end_ns"] = 2 * slow["start_ns"] + 10**6, 2 * slow["end_ns"] + 10**6
    first, second = excerpt(made_up_timeline(4).frame(), steps=(2, 3)), excerpt(slow, steps=(2, 3))
    figure = lanes_plot([("predicted", first), ("measured", second)]).figure
    bars = {trace["name"]: trace for trace in figure["data"]}
    base = pd.DataFrame({"row": bars["dense"]["y"], "base": bars["dense"]["base"]})
    upper, lower = (mine["base"].to_numpy() for _, mine in base.groupby("row"))
    assert lower == pytest.approx(2 * upper) and upper[0] == 0
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["<b>predicted</b>", "<b>measured</b>"]
    assert len(figure["layout"]["shapes"]) == 2  # one border between two steps, in each
