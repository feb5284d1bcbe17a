"""The page of a plan: every section with the right figures, nothing fetched from anywhere, nothing that can break out."""

from __future__ import annotations

import json
import re

import plotly.graph_objects as go
import plotly.offline
import pytest

from moeplan.base.errors import InputError
from moeplan.reports.offload.page import plan_command, plan_report, write_plan_report
from moeplan.reports.page import Section
from moeplan.reports.sources import constants, source_summary
from moeplan.specs.plans.document import OFFLOAD, check_plan
from report_documents import hit_curves, made_up_timeline, plan_document, profile
from report_pages import Page


@pytest.fixture(scope="module")
def text() -> str:
    lru, belady = hit_curves()
    return plan_report(
        plan_document(), timeline=made_up_timeline(), lru_curve=lru, belady_curve=belady, profile=profile()
    )


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_nothing_is_fetched_and_the_library_is_inside_once(text: str, page: Page) -> None:
    assert [entry for entry in page.fetching if not str(entry[2]).startswith("#")] == []
    assert {value for _, _, value in page.fetching} == {f"#{name}" for name in page.sections if name}
    assert page.policy is not None and page.policy.startswith("default-src 'none';")
    assert re.findall(r"[\w-]+-src ([^;]*)", page.policy) == [
        "'none'",
        "'unsafe-inline'",
        "'unsafe-inline'",
        "data: blob:",
    ]
    library = plotly.offline.get_plotlyjs()
    assert text.count(library) == 1 and len(page.scripts) == 2
    own = text.replace(library, "")
    assert "http://" not in own and "https://" not in own and "@import" not in own and "url(" not in own


def test_every_section_is_there_in_order(page: Page) -> None:
    assert list(page.sections) == [
        "",
        "speed",
        "time",
        "lanes",
        "hits",
        "front",
        "schedule",
        "memory_breakdown",
        "assumptions",
        "provenance",
    ]
    assert list(page.plots) == ["plot-speed", "plot-share", "plot-lanes", "plot-hits", "plot-front"]


def test_names_from_files_stay_text(text: str, page: Page) -> None:
    assert "tiny <b>model</b> on rtx-4090 with 6.00 GiB of device memory" in page.sections[""]
    assert "<b>model" not in text
    hostile = plan_document()
    hostile["best"]["assumptions"] = ["</script><script>alert(1)</script>"]
    hostile["baselines"][0]["name"] = "</script><img src=x>"
    lru, _ = hit_curves()
    broken = Page(plan_report(hostile, lru_curve=lru))
    assert [entry for entry in broken.fetching if not str(entry[2]).startswith("#")] == []
    assert len(broken.scripts) == 2
    assert "</script><img src=x>" in [row[0] for row in broken.rows["speed"]]
    for figure in broken.plots.values():
        assert "<img" not in json.dumps(figure) and "<script" not in json.dumps(figure)


def test_the_answer_comes_first(page: Page) -> None:
    lead = page.sections[""]
    for part in (
        "40.0 decoded tokens/s predicted, 33.3 to 50.0 likely",
        "Prompts, tokens/s120 (100 to 150)", "To the first token83.3 ms (75.0 ms to 100 ms)",
        "Decoding, tokens/s40.0 (33.3 to 50.0)", "The whole window1.50 s (1.20 s to 1.80 s)",
        "Least-recently-used cache, 4 experts a layer; the next gate, run early, says what to fetch ahead, 1 layer ahead; copies",
        "Policy: copy binds; more memory would help.",
        "Step, median25.0 ms", "Step, 99th percentile37.5 ms", "Hit rate75.0 %", "Copied a token3.00 MiB", "What bindscopies",
        "Device memory used5.00 GiB", "Above the lower bound25.0 %", "Schedules considered2,345",
    ):  # fmt: skip
        assert part in lead


def test_the_comparison_has_a_row_a_schedule(page: Page) -> None:
    rows = page.rows["speed"]
    assert rows[0] == [
        "Schedule", "Decoded tokens/s", "Interval", "Whole window", "Step p50", "Step p99", "Hits", "Fetched ahead", "of it used",
        "in time", "Copied a token", "Device memory",
    ]  # fmt: skip
    assert rows[1] == ["Chosen"]
    assert rows[2] == [
        "best",
        "40.0",
        "33.3 to 50.0",
        "1.50 s",
        "25.0 ms",
        "37.5 ms",
        "75.0 %",
        "80",
        "50.0 %",
        "75.0 %",
        "3.00 MiB",
        "5.00 GiB",
    ]
    assert rows[3] == ["Published schedules"]
    assert rows[4] == [
        "on-demand",
        "16.0",
        "13.3 to 20.0",
        "3.75 s",
        "62.5 ms",
        "93.8 ms",
        "0.0 %",
        "–",
        "–",
        "–",
        "3.00 MiB",
        "5.00 GiB",
    ]
    assert [row[0] for row in rows[5:10]] == [
        "mixtral-offloading-code",
        "References out of reach",
        "Belady's cache",
        "1.5 × memory",
        "2 × memory",
    ]
    assert rows[9][2] == "53.3 to 160"
    assert rows[10:] == [
        ["Schedule", "Why"],
        ["resident", "Does not fit: resident needs 12 bytes; 5 bytes are missing."],
    ]
    counted = (
        "2,345 schedules were considered: 2,000 simulated to the end, 45 until they could no longer win, 300 ruled out"
    )
    assert counted in page.sections["speed"]
    assert "mean forward pass, prompts included, below 20.0 ms" in page.sections["speed"]


def test_what_schedules_need_is_said_and_marked() -> None:
    document = plan_document()
    apart = document["baselines"].pop() | {"family": "cache", "needs": "a trained predictor"}
    document["baselines_that_need_more"] = [apart]
    document["num_raced_out"] = 7
    found = Page(plan_report(document))
    assert [row[0] for row in found.rows["speed"]][3:7] == [
        "Published schedules",
        "on-demand",
        "Need another model or trained parts",
        "mixtral-offloading-code †",
    ]
    assert ["mixtral-offloading-code †", "A trained predictor."] in found.rows["speed"]
    assert "by a bound on their time, 7 given up after a part of the window" in found.sections["speed"]
    assert "†: needs what this case does not have" in found.sections["speed"]
    assert found.plots["plot-speed"]["layout"]["yaxis"]["ticktext"][2] == "mixtral-<br>offloading-code †"


def test_speeds_are_drawn_with_their_intervals(page: Page) -> None:
    bars = page.plots["plot-speed"]["data"][0]
    assert bars["x"] == [40.0, 16.0, 25.0, 44.0, 60.0, 80.0]
    assert bars["error_x"]["array"] == pytest.approx([10.0, 4.0, 6.25, 11.0, 15.0, 80.0])
    assert bars["error_x"]["arrayminus"] == pytest.approx([40 / 6, 16 / 6, 25 / 6, 44 / 6, 10.0, 80 / 3])
    assert bars["y"] == pytest.approx([0.85, 2.7, 3.7, 5.55, 6.55, 7.55])
    layout = page.plots["plot-speed"]["layout"]
    assert layout["yaxis"]["ticktext"][2] == "mixtral-<br>offloading-code"
    assert layout["xaxis"]["title"]["text"] == "decoded tokens/s" and layout["xaxis"]["range"] == [
        0,
        pytest.approx(160 * 1.02),
    ]
    headings = [note["text"] for note in layout["annotations"] if note["text"].startswith("<b>")]
    assert headings == ["<b>Chosen</b>", "<b>Published schedules</b>", "<b>References out of reach</b>"]


def test_shares_add_up_and_the_mean_pass_stands_beside(page: Page) -> None:
    figure = page.plots["plot-share"]
    assert figure["layout"]["barmode"] == "stack"
    assert [sum(values) for values in zip(*(trace["x"] for trace in figure["data"]), strict=True)] == pytest.approx(
        [100.0] * 6
    )
    assert [trace["x"][0] for trace in figure["data"]] == pytest.approx([20, 15, 5, 5, 50, 5])
    assert [note["text"] for note in figure["layout"]["annotations"]][:2] == ["30.0 ms", "75.0 ms"]


def test_curves_mark_the_chosen_size_and_the_schedules(page: Page) -> None:
    figure = page.plots["plot-hits"]
    lru, belady, published, chosen = figure["data"]
    assert lru["x"] == belady["x"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert lru["y"] == pytest.approx([10, 20, 30, 40, 50, 60, 70, 80]) and belady["y"][0] == pytest.approx(20)
    assert lru["customdata"][3] == "<b>LRU</b><br>4 experts a layer, 4.00 MiB<br>40.0 % hits"
    assert (published["x"], published["y"]) == ([4.0], [50.0])  # on-demand caches nothing
    assert (chosen["x"], chosen["y"]) == ([4.0], [75.0])
    assert figure["layout"]["shapes"][0]["x0"] == 4.0
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["chosen: 4 a layer"]


def test_the_front_is_a_step_with_the_budget(page: Page) -> None:
    figure = page.plots["plot-front"]
    best, published, roomier, chosen = figure["data"]
    assert best["line"]["shape"] == "hv" and (best["x"], best["y"]) == ([3.0, 4.0, 5.0], [20.0, 30.0, 40.0])
    assert (
        published["y"] == pytest.approx([16.0, 25.0])
        and roomier["y"] == pytest.approx([60.0, 80.0])
        and chosen["y"] == pytest.approx([40.0])
    )
    assert figure["layout"]["shapes"][0]["x0"] == 6.0
    assert figure["layout"]["annotations"][0]["text"] == "budget 6.00 GiB"


def test_the_memory_breakdown_adds_up(page: Page) -> None:
    assert page.rows["memory_breakdown"] == [
        ["Item", "Size", "Share", "How it comes about"],
        ["dense weights", "3.00 GiB", "60.0 %", "all layers but routed experts"],
        ["resident experts", "2.00 GiB", "40.0 %", "8 experts"],
        ["device memory, together", "5.00 GiB", "", "1.00 GiB of the budget of 6.00 GiB are left"],
        ["expert store", "9.00 GiB", "100.0 %", "all experts, page-locked"],
        ["host memory, together", "9.00 GiB", "", ""],
    ]


def test_every_constant_of_the_machine_is_listed_with_its_source(page: Page) -> None:
    every = list(constants(profile()))
    listed = page.rows["assumptions"]
    assert listed[:2] == [["Schedule", "Assumption"], ["mixtral-offloading-code", "Only here."]]
    rows = listed[3:]
    assert listed[2] == ["Constant", "Value", "±", "Source", "Taken from"] and len(rows) == len(every)
    assert [(row[3], row[4]) for row in rows] == [(one.source, one.citation) for _, one in every]
    named = {row[0]: row[1:3] for row in rows}
    assert named["device: memory bandwidth"] == ["1.01 TB/s", "2 %"]
    assert named["device: peak speed: float16"] == ["165 TFLOP/s", "2 %"]
    assert len(named) == len(rows)
    summary = source_summary(profile())
    assert f"Its constants are {summary}." in page.sections["assumptions"]
    assert sum(int(part.split()[0]) for part in summary.split(", ")) == len(every)
    assert "Caches start empty." in page.sections["assumptions"]


def test_provenance_names_everything_needed_to_repeat_it(page: Page) -> None:
    rows = dict(page.rows["provenance"])
    assert rows["Device memory"] == "6.00 GiB (6,442,450,944 bytes)"
    assert rows["Recording"] == "made up & small; 777 tokens"
    assert rows["Window"] == "the first 50 forward passes: 50 passes, 60 tokens"
    assert rows["Weight formats allowed"] == "4, 3"
    assert plan_command(plan_document()) in page.sections["provenance"]


def test_the_command_has_every_option_that_differs() -> None:
    document = plan_document()
    assert plan_command(document) == (
        "moeplan plan --model 'tiny <b>model</b>' --hardware rtx-4090 --trace TRACE --memory 6442450944B "
        "--bits 4,3 --window 50 -o plan.json"
    )
    document["request"] |= {
        "objective": "least_memory",
        "floor_tokens_per_s": 12.5,
        "concurrency": 3,
        "prefill_chunk_tokens": 64,
    }
    document["provenance"] |= {"window_steps": None, "dense_bits": "8", "model": "m"}
    assert plan_command(document) == (
        "moeplan plan --model m --hardware rtx-4090 --trace TRACE --memory 6442450944B --bits 4,3 "
        "--objective least_memory --floor 12.5 --concurrency 3 --ubatch 64 --dense-bits 8 -o plan.json"
    )
    given = Page(plan_report(document, command=["moeplan", "plan", "--trace", "my file"]))
    assert "moeplan plan --trace 'my file'" in given.sections["provenance"]
    assert "the whole recording" in given.sections["provenance"]


def test_what_is_not_given_is_left_out() -> None:
    page = Page(plan_report(plan_document(), more_sections=[Section(id="more", title="More", parts=("<p>here</p>",))]))
    assert list(page.plots) == ["plot-speed", "plot-share", "plot-front"]
    assert "lanes" not in page.sections and "hits" not in page.sections and page.sections["more"].strip() == "Morehere"
    assert "profile was not given" in page.sections["assumptions"]


def test_a_plan_without_cache_rivals_or_bound_is_drawn_too() -> None:
    document = plan_document(baselines=[], references={}, baselines_that_do_not_fit={}, optimality_gap=None)
    document["best"]["schedule"] = document["best"]["schedule"] | {"cache": {"policy": "none"}, "predictor": {}}
    lru, _ = hit_curves()
    page = Page(plan_report(document, lru_curve=lru))
    assert "Above the lower boundunknown" in page.sections[""]
    assert [trace["name"] for trace in page.plots["plot-hits"]["data"]] == ["LRU"]
    assert "could not run" not in page.sections["speed"]


def test_figures_follow_the_plotting_librarys_own_rules(page: Page) -> None:
    for figure in page.plots.values():
        go.Figure({"data": figure["data"], "layout": figure["layout"]})  # raises for anything the library does not know


def test_equal_documents_give_equal_pages(text: str) -> None:
    lru, belady = hit_curves()
    again = plan_report(
        plan_document(), timeline=made_up_timeline().frame(), lru_curve=lru, belady_curve=belady, profile=profile()
    )
    assert again == text


def test_the_file_is_written_whole(tmp_path, text: str) -> None:
    lru, belady = hit_curves()
    path = tmp_path / "report.html"
    written = write_plan_report(
        path, plan_document(), timeline=made_up_timeline(), lru_curve=lru, belady_curve=belady, profile=profile()
    )
    assert written == str(path) and path.read_text(encoding="utf-8") == text
    with pytest.raises(InputError, match="plan: kind = 'ep'"):
        write_plan_report(path, plan_document(kind="ep"))
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("schema_version",), 2, r"plan: schema_version = 2: this report reads 1; make the plan again"),
        (("best", "window_s"), None, r"plan: best\.window_s = None: input should be a valid number"),
        (
            ("baselines", 1, "memory_breakdown"),
            {"items": []},
            r"plan: baselines\.1\.memory_breakdown\.device_bytes = '\(absent\)': a field is absent",
        ),
        (("provenance", "trace"), "x", r"plan: provenance\.trace = 'x': "),
        (("front",), {}, r"plan: front = \{\}: input should be a valid array"),
        (("best", "schedule", "cache", "size"), 3, r"schedule key = 'cache\.size': not one of"),
    ],
)
def test_a_damaged_plan_is_one_clear_complaint(where, value, message: str) -> None:
    document = plan_document()
    part = document
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    with pytest.raises(InputError, match=message) as found:
        plan_report(document)
    assert "\n" not in str(found.value)


def test_a_good_plan_passes_and_further_keys_are_left_alone() -> None:
    assert check_plan(plan_document(notes="mine"), OFFLOAD) is None


def test_small_machines_are_shown_in_small_units() -> None:
    document = plan_document()
    document["provenance"]["memory_bytes"] = 600 * 2**20
    for part in (*document["front"], document["best"]["memory_breakdown"]):
        part["device_bytes"] //= 10
    layout = Page(plan_report(document)).plots["plot-front"]["layout"]
    assert layout["xaxis"]["title"]["text"] == "device memory, MiB"
    assert layout["shapes"][0]["x0"] == 600 and layout["annotations"][0]["text"] == "budget 600 MiB"
