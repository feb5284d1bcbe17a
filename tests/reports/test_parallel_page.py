"""The page of an expert-parallel plan: every number is the document's, traffic adds up to what the simulator sent."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys

import numpy as np
import plotly.offline
import pytest

from ep_page_case import HARDWARE, MODEL, counts, document, plan, plan_of_counts, recording
from moeplan.base.errors import InputError
from moeplan.base.units import MS_PER_S
from moeplan.cli import main
from moeplan.planner.parallel.evidence import REPORT
from moeplan.planner.parallel.links import link_tokens
from moeplan.planner.parallel.replay import replay_ep_plan, replay_of
from moeplan.reports import numbers
from moeplan.reports.parallel.page import headline, parallel_command, parallel_report, write_parallel_report
from moeplan.reports.parallel.placement import balance_plot, expert_plot, load_plot
from moeplan.reports.parallel.plan_document import (
    check_parallel_document,
    link_bytes,
    placement_of,
    plain_of,
    rank_rows,
    same_node,
)  # fmt: skip
from moeplan.reports.parallel.rivals import ablation_plot, staleness_plot, steps_plot
from moeplan.reports.parallel.traffic import reduction_bytes, traffic_of, traffic_plot, traffic_table_rows
from moeplan.reports.timelines.perfetto import timeline_events, timeline_to_perfetto
from moeplan.reports.timelines.ranks import layers_excerpt, ordinary_layers, ranks_plot, telling_ranks
from moeplan.sim.parallel.program import EP_OPS
from moeplan.sim.parallel.timeline import (
    EP_BYTES,
    EP_END,
    EP_FIELDS,
    EP_LANE,
    EP_LAYER,
    EP_OP,
    EP_RANK,
    EP_START,
    LANE_COMPUTE,
    LANE_INTER,
    EpTimeline,
)  # fmt: skip
from moeplan.specs.machines.serving import serving_machine
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import load_ep_preset
from moeplan.traces.format import save_profile
from report_pages import Page

SECTIONS = [
    "",
    "speed",
    "serving",
    "plan",
    "ingredients",
    "load",
    "experts",
    "traffic",
    "timeline",
    "moving",
    "assumptions",
    "provenance",
]
STATES = ("before", "after")


@pytest.fixture(scope="module")
def data() -> dict:
    return document()


@pytest.fixture(scope="module")
def replay():
    return replay_of(plan())


@pytest.fixture(scope="module")
def text(data, replay) -> str:
    return parallel_report(
        data, before=replay.before.outcome.timeline, after=replay.after.outcome.timeline, profile=HARDWARE
    )


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


# --- the page --------------------------------------------------------------------------------------------------------


def test_every_section_is_there_in_order_and_nothing_is_fetched(text, page) -> None:
    assert list(page.sections) == SECTIONS
    assert list(page.plots) == [
        "plot-steps", "plot-ablation", "plot-load", "plot-balance", "plot-experts", "plot-traffic", "plot-ranks", "plot-staleness",
    ]  # fmt: skip
    assert {value for _, _, value in page.fetching} == {f"#{name}" for name in SECTIONS if name}
    own = text.replace(plotly.offline.get_plotlyjs(), "")
    assert "http://" not in own and "https://" not in own and "url(" not in own


def test_the_verdict_comes_first(data, page) -> None:
    lead, best, plain = page.sections[""], data["best"], plain_of(data)
    assert lead.index(headline(data)) < lead.index(data["verdict"][1:].rstrip("."))
    rival = data["headline"]
    change = numbers.percent(best["step_s"] / rival["step_s"] - 1, signed=True)
    steps = f"{numbers.seconds(best['step_s'])} a step instead of {numbers.seconds(rival['step_s'])} ({change})"
    worth = data | {"verdict": "x: do it"}
    assert headline(worth) == f"Worth it: {rival['words']}, {steps}"
    words = rival["words"][:1].upper() + rival["words"][1:]
    assert headline(data | {"verdict": "stay with eplb: no"}) == f"{words}: {steps}"
    still = headline(data | {"verdict": "x: do it without moving experts"})
    assert still == f"Worth it, but leave the experts where they are: {rival['words']}, {steps}"
    steps_back = data["migration"]["steps_to_pay_back"]
    assert f"Pays back after{'never' if steps_back is None else f'{steps_back:,} steps'}" in lead
    assert (
        f"Between nodes a step{numbers.size(plain['inter_node_bytes'])} → {numbers.size(best['inter_node_bytes'])}"
        in lead
    )


def test_the_comparison_holds_every_schedule_with_the_numbers_of_the_document(data, page) -> None:
    every = {one["name"]: one for one in (data["best"], *data["baselines"], *data["references"])}
    every["the rival"] = data["headline"]["rival"]
    rows = page.rows["speed"][1 : len(every) + 1]
    assert [row[0].removesuffix(" (plain)") for row in rows[:2]] == ["best", "ep"]
    assert {row[0].removesuffix(" (plain)") for row in rows} == set(every)
    for row in rows:
        one = every[row[0].removesuffix(" (plain)")]
        assert row[1] == numbers.seconds(one["step_s"])
        assert row[3] == numbers.percent(one["step_s"] / plain_of(data)["step_s"] - 1, signed=True)
        assert row[8:11] == [
            f"{one['max_over_mean_load']:.3f}", numbers.size(one["inter_node_bytes"]), numbers.size(one["intra_node_bytes"]),
        ]  # fmt: skip
    bars = steps_plot(data).figure["data"]
    total = np.array(bars[0]["x"]) + np.array(bars[1]["x"])
    assert total[0] == pytest.approx(data["best"]["step_s"] * MS_PER_S)
    assert sorted(total) == pytest.approx(sorted(one["step_s"] * MS_PER_S for one in every.values()))


def test_ingredients_and_staleness_are_those_of_the_document(data, page) -> None:
    added = [row["step_s"] * MS_PER_S for row in data["ablation"] if row["kind"] == "added"]
    assert ablation_plot(data).figure["data"][0]["x"] == added
    removed = [row for row in data["ablation"] if row["kind"] == "removed"]
    assert [row[1:] for row in page.rows["ingredients"][-len(removed) :]] == [
        [numbers.seconds(row["step_s"]), numbers.percent(row["change_fraction"], signed=True)] for row in removed
    ]
    one = data["staleness"][0]
    assert staleness_plot(data).figure["data"][0]["x"] == [
        one[key] * MS_PER_S for key in ("plain_step_s", "plan_step_s", "replanned_eplb_step_s")
    ]
    assert page.rows["moving"][-1][:2] == ["flat <b>", numbers.percent(one["change_fraction"], signed=True)]


def test_names_from_files_stay_text(data) -> None:
    hostile = json.loads(json.dumps(data))
    hostile["verdict"] = "</script><script>alert(1)</script>"
    hostile["baselines"][-1]["name"] = "</script><img src=x>"
    hostile["ablation"][1]["ingredient"] = "<img src=y>"
    hostile["provenance"]["model"] = "<b>m"
    found = Page(parallel_report(hostile))
    assert [entry for entry in found.fetching if not str(entry[2]).startswith("#")] == []
    assert len(found.scripts) == 2
    assert "timeline" not in found.sections
    for figure in found.plots.values():
        assert "<img" not in json.dumps(figure) and "<script" not in json.dumps(figure)


def test_counts_say_so_and_have_no_requests_to_hold_back() -> None:
    found = Page(parallel_report(document(plan_of_counts())))
    assert "Counts have no requests to hold back" in found.sections["moving"]
    assert "No other recording was given" in found.sections["moving"]
    assert "more because only counts were recorded" in found.sections["assumptions"]
    assert ["grace", "Needs the routing of single tokens; the recording holds counts only."] in found.rows["speed"]


def test_the_page_is_written_whole_and_says_how_to_make_the_plan_again(data, tmp_path) -> None:
    path = write_parallel_report(tmp_path / "page.html", data)
    assert Page((tmp_path / "page.html").read_text(encoding="utf-8")).rows["provenance"]
    assert path == str(tmp_path / "page.html")
    assert shlex.join(parallel_command(data)) == (
        "moeplan plan --mode ep --model deepseek-v2-lite --hardware h800-sxm --trace TRACE --nodes 2 --ranks-per-node 2 "
        "--redundant 4 --phase prefill --context 40 -o plan.json"
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kind": "offload"}, "plan: kind = 'offload'"),
        ({"schema_version": 9}, "plan: schema_version = 9"),
        ({"links": None}, "plan: links"),
        ({"migration": {}}, r"plan: migration\.num_bytes = '\(absent\)'"),
        ({"baselines": []}, "none is called 'ep'"),
        ({"links": {"before": [[0]], "after": [[0]]}}, r"links\.before .*shape \(1, 1\).*\(4, 4\)"),
        ({"slot_rows": {"before": [[1], [1, 2]], "after": []}}, r"slot_rows\.before"),
    ],
)
def test_a_damaged_document_is_one_complaint(data, change, complaint) -> None:
    with pytest.raises(InputError, match=complaint):
        parallel_report(data | change)
    with pytest.raises(InputError, match="placement_before"):
        check_parallel_document({key: value for key, value in data.items() if key != "placement_before"})


# --- traffic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [plan, plan_of_counts])
def test_links_add_up_to_the_bytes_the_simulator_sent(made) -> None:
    """From tokens exactly (up to bytes rounded in the file), from expectations up to tokens rounded port by port."""
    data = document(made())
    error = 1e-9 if made is plan else 1e-2
    for state, one in zip(STATES, (plain_of(data), data["best"]), strict=True):
        traffic, reduced = traffic_of(data, state), reduction_bytes(data, state)
        rounding = traffic.links.size
        assert traffic.total(True) == pytest.approx(one["inter_node_bytes"], rel=error, abs=rounding)
        assert traffic.total(False) + reduced == pytest.approx(one["intra_node_bytes"], rel=error, abs=rounding)
        assert np.diag(traffic.links).sum() == 0
        for between in (True, False):
            sent, received = traffic.ports(between)
            assert sent.sum() == pytest.approx(received.sum())
            assert sent.sum() == pytest.approx(traffic.total(between))


def test_what_is_not_exchanged_is_what_reductions_sent() -> None:
    data, again = document(plan_of_counts()), replay_of(plan_of_counts())
    assert data["best"]["schedule"]["parallel"]["attention"] == "tensor"
    for state, one in zip(STATES, (again.before, again.after), strict=True):
        rows = one.outcome.timeline.rows
        reduced = rows[rows[:, EP_OP] == EP_OPS.index("reduce")]
        assert reduction_bytes(data, state) == pytest.approx(reduced[:, EP_BYTES].sum(), rel=1e-2)
    assert [row[0] for row in traffic_table_rows(data)][-1] == "Reductions inside nodes"
    assert [row[0] for row in traffic_table_rows(document())][-1] == "Busiest link inside a node"


PARALLELISMS: dict[str, dict[str, object]] = {
    "flat": {},
    "every choice": {"all_to_all__kind": "all-choices"},
    "hierarchical": {"all_to_all__kind": "hierarchical", "placement__policy": "eplb", "placement__num_redundant": 4},
    "groups": {"pipeline__split": "expert", "pipeline__num_groups": 3, "all_to_all__kind": "hierarchical"},
    "chunks of two batches": {"pipeline__split": "token", "pipeline__num_groups": 2, "pipeline__micro_batches": 2},
    "eight bits there": {"all_to_all__dispatch_bytes_per_value": 1.03125},
}


@pytest.mark.parametrize("name", PARALLELISMS)
def test_links_of_every_parallelism_add_up_to_the_bytes_of_its_prediction(name) -> None:
    search = plan().search
    schedule = load_ep_preset("ep").with_options(kernel__bits="16", **PARALLELISMS[name])
    predicted = search.predict(schedule, REPORT)
    tokens = link_tokens(search.evidence, search.placements.candidate(schedule), schedule)
    exchange = schedule.all_to_all
    each = tokens * exchange.dispatch_bytes_per_value + tokens.T * exchange.combine_bytes_per_value
    near = np.arange(4)[:, None] // 2 == np.arange(4)[None, :] // 2
    num_bytes = each * MODEL.hidden_size
    assert num_bytes[~near].sum() == pytest.approx(predicted.inter_node_bytes, abs=1)
    assert num_bytes[near].sum() == pytest.approx(predicted.intra_node_bytes, abs=1)


def test_matrices_are_drawn_as_they_are_with_tiers_apart(data, page) -> None:
    plot = traffic_plot(data)
    near = same_node(placement_of(data, "after"))
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}
    scales = [plot.figure["layout"][name]["colorbar"]["title"]["text"] for name in ("coloraxis", "coloraxis2")]
    assert scales[0].startswith("inside a node, ") and scales[1].startswith("between nodes, ")
    for at, trace in enumerate(plot.figure["data"]):
        state, inside = STATES[at % 2], trace["coloraxis"] == "coloraxis"
        size = units[scales[0 if inside else 1].split(", ")[1].split()[0]]
        links = link_bytes(data, state)
        drawn = np.array([[np.nan if value is None else value for value in row] for row in trace["z"]], float)
        shown = (near if inside else ~near) & ~np.eye(4, dtype=bool)
        assert np.array_equal(~np.isnan(drawn), shown)
        assert drawn[shown] * size == pytest.approx(links[shown], abs=1e-4 * size)
    rows = {row[0]: row for row in traffic_table_rows(data)}
    best, plain = data["best"], plain_of(data)
    assert rows["All links between nodes"][1:3] == (
        numbers.size(plain["inter_node_bytes"]), numbers.size(best["inter_node_bytes"]),
    )  # fmt: skip
    assert page.rows["traffic"][1:] == [list(row) for row in traffic_table_rows(data)]


# --- load and placement ----------------------------------------------------------------------------------------------


def test_maps_of_load_are_the_rows_of_the_ranks(data) -> None:
    for panel, state in enumerate(STATES):
        rows = rank_rows(data, state)
        assert rows.tolist() == data["rank_rows"][state]
        drawn = np.array(load_plot(data).figure["data"][panel]["z"])
        assert drawn == pytest.approx((rows / rows.mean(axis=1, keepdims=True)).T, abs=1e-3)
    lines = balance_plot(data).figure["data"]
    for line, one in zip(lines, (plain_of(data), data["best"]), strict=True):
        assert line["x"] == [1, 2]
        assert float(np.mean(line["y"])) == pytest.approx(one["max_over_mean_load"])
        assert line["name"].endswith(f"mean {one['max_over_mean_load']:.3f}")


@pytest.mark.parametrize("made", [plan, plan_of_counts])
def test_every_expert_is_on_the_map_of_every_layer_with_its_rows(made) -> None:
    data = document(made())
    offered = expert_plot(data).figure["choices"]
    kinds = len(expert_plot(data).figure["data"]) // 2
    assert kinds == (2 if any((placement_of(data, state).replica_counts() > 1).any() for state in STATES) else 1)
    assert offered["label"] == "Layer of the model" and len(offered["options"]) == 2
    worst = int(np.argmax(data["max_over_mean_by_layer"]["before"]))
    assert offered["start"] == worst and "least balanced" in offered["options"][worst]["name"]
    for layer, option in enumerate(offered["options"]):
        for panel, state in enumerate(STATES):
            placement = placement_of(data, state)
            found: dict[tuple[int, int], int] = {}
            for trace, copied in zip(option["data"][kinds * panel :][:kinds], (False, True), strict=False):
                cell = trace["cells"]
                assert (cell["rows"], cell["columns"]) == (4, 16)
                for rank, column, value in zip(*(cell["at"][part::3] for part in range(3)), strict=True):
                    expert = int(trace["x"][column])
                    found[rank, expert] = value
                    ranks = {int(slot) // placement.slots_per_rank
                             for slot in np.flatnonzero(placement.physical_to_logical[layer] == expert)}  # fmt: skip
                    assert rank in ranks and copied == (len(ranks) > 1)
            wanted: dict[tuple[int, int], int] = {}
            for slot, rows in enumerate(data["slot_rows"][state][layer]):
                key = (slot // placement.slots_per_rank, int(placement.physical_to_logical[layer, slot]))
                wanted[key] = wanted.get(key, 0) + rows
            assert found == wanted
            assert sum(found.values()) == sum(data["rank_rows"][state][layer])


# --- timelines -------------------------------------------------------------------------------------------------------


def row(rank: int, lane: int, op: str, layer: int, start: int, end: int, num_bytes: int = 0) -> list[int]:
    found = [0] * EP_FIELDS
    for column, value in ((EP_RANK, rank), (EP_LANE, lane), (EP_OP, EP_OPS.index(op)), (EP_LAYER, layer), (EP_START, start),
                          (EP_END, end), (EP_BYTES, num_bytes)):  # fmt: skip
        found[column] = value
    return found


def steps_of(layers: int, ranks: int) -> EpTimeline:
    """Return a step whose rank r computes r longer than rank 0 and whose last layer but two is slow."""
    rows, now = [], 0
    for layer in range(layers):
        slow = 500 if layer == layers - 3 else 0
        for rank in range(ranks):
            rows.append(row(rank, LANE_COMPUTE, "dense", layer, now, now + 100 + 10 * rank + slow))
            rows.append(row(rank, LANE_INTER, "dispatch", layer, now + 700, now + 750, 4096))
        now += 1000 + slow
    return EpTimeline(rows=np.array(rows, np.int64))


def test_the_layers_shown_are_ordinary_and_the_ranks_tell_most() -> None:
    timeline = steps_of(9, 8)
    first, last = ordinary_layers(timeline)
    assert last - first == 1 and 6 not in (first, last)
    assert telling_ranks(timeline, ranks_per_node=4) == [
        0,
        1,
        4,
        7,
    ]  # least busy, next, the other node's first, busiest
    assert telling_ranks(steps_of(9, 3), ranks_per_node=3) == [0, 1, 2]
    assert ordinary_layers(steps_of(2, 2)) == (0, 1)
    part = layers_excerpt(timeline, (1, 2))
    assert (part.start_ns, part.end_ns) == (1000, 2750)
    plot = ranks_plot([("the plan", timeline)], ranks_per_node=4, layer_names=[str(n) for n in range(9)])
    bars = {trace["name"]: trace for trace in plot.figure["data"]}
    assert len(bars["dispatch"]["x"]) == 2 * 4
    assert bars["dispatch"]["x"] == [0.05] * 8  # microseconds
    assert sorted(set(bars["attention, router"]["x"])) == [0.1, 0.11, 0.14, 0.17]
    assert "text" not in bars["dispatch"]


def test_bars_are_the_rows_of_the_simulator(replay) -> None:
    timeline = replay.after.outcome.timeline
    figure = ranks_plot([("", timeline)], ranks_per_node=2, layer_names=["1", "2"]).figure
    part = layers_excerpt(timeline, ordinary_layers(timeline))
    drawn = sum(sum(trace["x"]) for trace in figure["data"])
    begin, finish = np.maximum(part.rows[:, EP_START], part.start_ns), np.minimum(part.rows[:, EP_END], part.end_ns)
    in_ns = {"time, µs": 1e3, "time, ms": 1e6}[figure["layout"]["xaxis"]["title"]["text"]]
    assert drawn == pytest.approx((finish - begin).sum() / in_ns, rel=1e-6)
    assert sum(len(trace["x"]) for trace in figure["data"]) == len(part.rows)


def test_perfetto_has_a_process_a_rank_and_a_thread_a_port(replay) -> None:
    timeline = replay.after.outcome.timeline
    events = timeline_events(timeline)
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == [f"rank {rank}" for rank in range(4)]
    threads = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert threads == {"compute stream", "port between nodes", "port inside the node"}
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == len(timeline.rows)
    sent = sum(event["args"].get("bytes", 0) for event in slices)
    assert sent == int(timeline.rows[:, EP_BYTES].sum())
    assert {event["cat"] for event in slices} == {"kernel", "exchange"}
    assert all({"batch", "group"} <= set(event["args"]) for event in slices)
    assert {event["name"] for event in events if event["ph"] == "C"} == {"link inter", "link intra"}
    assert timeline_to_perfetto(timeline) == timeline_to_perfetto(timeline)


@pytest.mark.parametrize(("made", "given"), [(plan, recording), (plan_of_counts, counts)])
def test_a_document_replays_to_the_plan_without_a_search(made, given) -> None:
    again, whole = replay_ep_plan(document(made()), MODEL, serving_machine(HARDWARE), given()), replay_of(made())
    for one, other in ((again.before, whole.before), (again.after, whole.after)):
        assert one.step_s == other.step_s
        assert np.array_equal(one.outcome.timeline.rows, other.outcome.timeline.rows)


def test_another_recording_is_noticed(data) -> None:
    with pytest.raises(InputError, match=r"--trace = .*replays to a step of .* where the plan states"):
        replay_ep_plan(data, MODEL, serving_machine(HARDWARE), recording(seed=2))


# --- the command line ------------------------------------------------------------------------------------------------


def moeplan(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["moeplan", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_plan_and_report_write_the_same_page_and_timeline(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    model = load_model("tiny-moe")
    layers = (model.num_moe_layers, model.num_experts)
    for name, seed in (("loads", 0), ("others", 1)):
        load = np.random.default_rng(seed).integers(1, 1000, layers)
        profile = dataclasses.replace(counts(), counts=load, layer_ids=model.moe_layers, top_k=model.top_k)
        save_profile(profile, tmp_path / f"{name}.safetensors")
    case = ["--mode", "ep", "--model", "tiny-moe", "--hardware", "h800-sxm", "--nodes", "2", "--ranks-per-node", "2"]
    case += ["--redundant", "4", "--trace", "loads.safetensors", "--evaluate-on", "others.safetensors"]
    assert moeplan(monkeypatch, "plan", *case, "--report", "a.html", "--timeline", "a.json", "-o", "p.json") == 0
    assert (
        moeplan(monkeypatch, "report", "p.json", "--trace", "loads.safetensors", "-o", "b.html", "--timeline", "b.json")
        == 0
    )
    for kind in ("html", "json"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    data = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert [one["recording"] for one in data["staleness"]] == ["others.safetensors"]
    assert headline(data) in (tmp_path / "a.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert moeplan(monkeypatch, "report", "p.json", "--trace", "others.safetensors", "-o", "c.html") == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "c.html").exists()
    offload = ["--model", "tiny-moe", "--hardware", "t4", "--trace", "bundled", "--evaluate-on", "loads.safetensors"]
    assert moeplan(monkeypatch, "plan", *offload) == 2
