"""The page of studies: what is best, what the answer depends on, where there is none."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import moeplan
from moeplan.base.errors import InputError, UnknownName
from moeplan.reports.studies.maps import lay_out
from moeplan.reports.studies.page import study_page
from moeplan.reports.studies.rows import METRICS, Row, StudyRows, compare, effects
from moeplan.studies.pages import report_store

AXES = {"link": ["slow", "fast"], "memory": ["8GB", "16GB", "32GB"], "bits": [4, 8]}
DECODE = METRICS[0]


def study(
    name: str = "links", *, times: float = 1.0, without: tuple[int, ...] = (), axes: dict[str, Any] = AXES
) -> StudyRows:
    """Return a study whose speed doubles with the link, grows by half with each memory, and does not depend on the bits."""
    rows = []
    for link in range(2):
        for memory in range(3):
            for bits in range(2):
                if memory in without:
                    rows.append(
                        Row(
                            levels=(link, memory, bits),
                            state="does not fit",
                            reason=f"{memory} bytes <are> missing",
                            figures={},
                        )
                    )
                    continue
                speed = times * 2**link * 1.5**memory
                figures = {"decode_tokens_per_s": speed, "decode_tokens_per_s_low": speed / 2, "decode_tokens_per_s_high": speed * 2,
                           "bound": "copy", "device_bytes": 2**30, "window_s": 1.0}  # fmt: skip
                rows.append(Row(levels=(link, memory, bits), state="done", reason=None, figures=figures))
    return StudyRows(name=name, num_runs=12, axes=axes, base={"model": "tiny-moe"}, rows=rows)


def figures_of(page: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="([^"]*)-data">(.*?)</script>', page, re.DOTALL)
    return {name: json.loads(text) for name, text in found}


def test_effects_are_ratios_where_all_else_is_equal_and_shares_of_the_spread() -> None:
    link, memory, bits = effects(study(), DECODE)
    assert (link.axis, memory.axis, bits.axis) == ("link", "memory", "bits")
    assert (link.ratio, link.least, link.most, link.best, link.best_share) == (2, 2, 2, "fast", 1)
    assert math.isclose(memory.ratio, 2.25) and memory.best == "32GB"
    assert (bits.ratio, bits.spread_share) == (1, 0)
    # Without interaction the logarithm is a sum, and the shares add up.
    assert math.isclose(memory.spread_share + link.spread_share, 1)
    assert math.isclose(link.spread_share, math.log(2) ** 2 / 4 / (math.log(2) ** 2 / 4 + math.log(1.5) ** 2 * 2 / 3))


def test_runs_without_figures_leave_gaps_and_an_axis_of_one_level_has_no_effect() -> None:
    found = effects(study(without=(0, 2)), DECODE)
    assert [one.axis for one in found] == ["link", "bits"]
    assert effects(study(without=(0, 1, 2)), DECODE) == []


def test_the_axes_that_matter_are_on_the_maps() -> None:
    rows = study()
    places = lay_out(rows, effects(rows, DECODE))
    assert (places.x, places.y, places.facet, places.rest) == (1, 0, 2, ())
    page = study_page([rows])
    figure = figures_of(page)["map-1-decode_tokens_per_s"]
    assert [trace["z"] for trace in figure["data"]] == 2 * [[[1, 1.5, 2.25], [2, 3, 4.5]]]
    assert figure["data"][0]["x"] == ["8GB", "16GB", "32GB"]
    assert "Best: 4.50 generated tokens/s, with link fast, memory 32GB, bits 4" in unescape(page)


def test_reasons_are_said_and_escaped() -> None:
    page = study_page([study(without=(0,))])
    assert "0 bytes &lt;are&gt; missing" in page and "<are>" not in page
    z = figures_of(page)["map-1-decode_tokens_per_s"]["data"][0]["z"]
    assert [row[0] for row in z] == [None, None]
    nothing = study_page([study(without=(0, 1, 2))])
    assert "None of 12 runs has figures" in nothing


def test_more_axes_than_a_page_has_room_for_are_chosen_from_a_list() -> None:
    axes = {"a": [1, 2], "b": [1, 2], "c": [1, 2], "d": [1, 2]}
    rows = [
        Row(levels=(a, b, c, d), state="done", reason=None, figures={"request_s": 1.0 + 8 * a + 4 * b + 2 * c + d})
        for a in range(2) for b in range(2) for c in range(2) for d in range(2)
    ]  # fmt: skip
    rows_of = StudyRows(name="four", num_runs=16, axes=axes, base={}, rows=rows)
    figure = figures_of(study_page([rows_of]))["map-1-request_s"]
    assert [option["name"] for option in figure["choices"]["options"]] == ["d 1", "d 2"]
    assert figure["choices"]["options"][1]["data"][0]["z"][0][0] == 2


def test_studies_are_compared_where_their_labels_are_equal() -> None:
    (found,) = [one for one in compare(study(), study("again", times=1.25)) if one.metric is DECODE]
    assert (found.num_runs, found.ratio, found.least, found.most) == (12, 1.25, 1.25, 1.25)
    other = study("other", axes={"link": ["slow", "fast"], "room": [1, 2, 3], "bits": [4, 8]})
    assert compare(study(), other) == []
    page = study_page([study(), study("again", times=1.25), other])
    assert "links → again" in page and "3 studies" in page


def test_a_store_becomes_a_page(tmp_path: Path) -> None:
    store, base = tmp_path / "s.sqlite", {"model": "tiny-moe", "hardware": "t4", "trace": "bundled", "window": 2}
    content = {
        "study": "small",
        "base": base,
        "grid": {"memory": ["300MiB", "450MiB"], "cache.experts_per_layer": [2, 3]},
    }
    moeplan.sweep(content, store=store, jobs=1)
    report_store(store, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    z = figures_of(page)["map-1-decode_tokens_per_s"]["data"][0]["z"]
    told = moeplan.simulate(
        "tiny-moe", "t4", trace="bundled", window=2, memory="450MiB", settings={"cache.experts_per_layer": 3}
    )
    assert told.metrics.decode_tokens_per_s in [value for row in z for value in row]
    with pytest.raises(UnknownName, match="did you mean 'small'"):
        report_store(store, tmp_path / "page.html", "smal")
    with pytest.raises(InputError, match="no such store"):
        report_store(tmp_path / "none.sqlite", tmp_path / "page.html")
