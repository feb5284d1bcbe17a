"""Perfetto files: whole event lists of a made-up timeline, and what the viewer's importer would make of them."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings

from long_runs import examples
from moeplan.base.errors import InputError, Internal
from moeplan.reports.timelines.occupancy import Occupancy
from moeplan.reports.timelines.perfetto import slice_name, timeline_events, timeline_to_perfetto, write_timeline
from moeplan.sim.offload.simulators import run_simpy
from moeplan.sim.timeline import LANE_NAMES, OP_NAMES, Timeline, canonical
from strategies import runs


def timeline(*rows: tuple[str, str, int, int, int, int, int, int, int]) -> Timeline:
    """Return a timeline of (lane, op, step, layer, expert, start, end, bytes, tokens)."""
    coded = [(LANE_NAMES.index(lane), OP_NAMES.index(op), *rest) for lane, op, *rest in rows]
    return Timeline(rows=canonical(np.array(coded, np.int64)))


TWO_LAYERS = timeline(
    ("compute", "dense", 0, 0, -1, 0, 1000, 0, 1),
    ("host", "host layer", 0, 0, -1, 1000, 1200, 0, 0),
    ("h2d", "fetch", 0, 0, 3, 1200, 3200, 4000, 0),
    ("compute", "expert", 0, 0, 1, 1200, 2000, 0, 1),
    ("compute", "expert", 0, 0, 3, 3200, 4001, 0, 2),
    ("h2d", "prefetch", 0, 1, 5, 3200, 4200, 2000, 0),
    ("compute", "dense", 0, 1, -1, 4001, 5001, 0, 1),
    ("d2h", "write-back", 0, 0, 1, 4100, 4600, 4000, 0),
    ("compute", "expert", 0, 1, -1, 5001, 6001, 0, 3),
    ("h2d", "fetch", 1, 0, 2, 6000, 7000, 4000, 0),
    ("compute", "head", 0, 1, -1, 6001, 6501, 0, 1),
)


# The host program's thread.
HOST = LANE_NAMES.index("host") + 1


def meta(name: str, value: object, **where: int) -> dict[str, object]:
    key = "name" if name.endswith("_name") else "sort_index"
    return {"ph": "M", "pid": 0, **where, "name": name, "args": {key: value}}


def piece(tid: int, cat: str, name: str, ts: float, dur: float, **args: object) -> dict[str, object]:
    args = {key.replace("rate", "GB/s"): value for key, value in args.items()}
    return {"ph": "X", "pid": 0, "tid": tid, "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def count(name: str, ts: float, **args: object) -> dict[str, object]:
    args = {key.replace("rate", "GB/s"): value for key, value in args.items()}
    return {"ph": "C", "pid": 0, "name": name, "ts": ts, "args": args}


def test_every_event_of_a_small_timeline() -> None:
    held = Occupancy(experts=np.array([[2, 4]]), expert_bytes=4000)
    flow = {"cat": "wait", "name": "waited for", "id": 1}
    assert timeline_events(TWO_LAYERS, occupancy=held) == [
        meta("process_name", "device 0"),
        meta("process_sort_index", 0),
        meta("thread_name", "host program", tid=HOST),
        meta("thread_sort_index", 0, tid=HOST),
        meta("thread_name", "compute stream", tid=1),
        meta("thread_sort_index", 1, tid=1),
        meta("thread_name", "host to device copies", tid=2),
        meta("thread_sort_index", 3, tid=2),
        meta("thread_name", "device to host copies", tid=3),
        meta("thread_sort_index", 4, tid=3),
        piece(1, "kernel", "dense L0", 0.0, 1.0, step=0, layer=0, tokens=1),
        piece(HOST, "host", "host layer L0", 1.0, 0.2, step=0, layer=0),
        piece(1, "kernel", "expert L0 e1", 1.2, 0.8, step=0, layer=0, expert=1, tokens=1),
        piece(2, "copy", "fetch L0 e3", 1.2, 2.0, step=0, layer=0, expert=3, bytes=4000, rate=2.0),
        piece(1, "kernel", "expert L0 e3", 3.2, 0.801, step=0, layer=0, expert=3, tokens=2),
        piece(2, "copy", "prefetch L1 e5", 3.2, 1.0, step=0, layer=1, expert=5, bytes=2000, rate=2.0),
        piece(1, "kernel", "dense L1", 4.001, 1.0, step=0, layer=1, tokens=1),
        piece(3, "copy", "write-back L0 e1", 4.1, 0.5, step=0, layer=0, expert=1, bytes=4000, rate=8.0),
        piece(1, "kernel", "experts L1", 5.001, 1.0, step=0, layer=1, tokens=3),
        piece(2, "copy", "fetch L0 e2", 6.0, 1.0, step=1, layer=0, expert=2, bytes=4000, rate=4.0),
        piece(1, "kernel", "head", 6.001, 0.5, step=0, layer=1, tokens=1),
        {"ph": "s", "pid": 0, "tid": 2, "ts": 3.199, **flow},
        {"ph": "f", "bp": "e", "pid": 0, "tid": 1, "ts": 3.2, **flow},
        count("link h2d", 1.2, rate=2.0),
        count("link h2d", 3.2, rate=2.0),
        count("link h2d", 4.2, rate=0.0),
        count("link h2d", 6.0, rate=4.0),
        count("link h2d", 7.0, rate=0.0),
        count("link d2h", 4.1, rate=8.0),
        count("link d2h", 4.6, rate=0.0),
        count("cache", 1.0, experts=2, MB=0.008),
        count("cache", 5.001, experts=4, MB=0.016),
    ]


def test_the_file_is_one_json_document_with_an_event_a_line() -> None:
    raw = timeline_to_perfetto(TWO_LAYERS)
    text = raw.decode()
    document = json.loads(text)
    assert document == {"traceEvents": timeline_events(TWO_LAYERS), "displayTimeUnit": "ns"}
    assert text.startswith('{"traceEvents": [\n{"ph": "M"')  # viewers look at the first bytes for the type
    lines = text.splitlines()
    assert [json.loads(line.removesuffix(",")) for line in lines[1:-2]] == document["traceEvents"]
    assert raw == timeline_to_perfetto(TWO_LAYERS.frame())


def test_an_empty_timeline_is_a_valid_file() -> None:
    empty = Timeline(rows=np.zeros((0, 9), np.int64))
    assert json.loads(timeline_to_perfetto(empty)) == {"traceEvents": [], "displayTimeUnit": "ns"}


def test_each_device_is_a_process_of_its_own() -> None:
    one, two = TWO_LAYERS.frame(), TWO_LAYERS.frame()
    two["device"] = "device 1"
    events = timeline_events(pd.concat([one, two], ignore_index=True))
    slices = [event for event in events if event["ph"] == "X"]
    alone = [event for event in timeline_events(TWO_LAYERS) if event["ph"] == "X"]
    assert [event for event in slices if event["pid"] == 0] == alone
    assert [event | {"pid": 0} for event in slices if event["pid"] == 1] == alone
    assert sorted(event["id"] for event in events if event["ph"] == "s") == [1, 2]


def test_a_lane_that_overlaps_is_refused() -> None:
    rows = timeline(("compute", "dense", 0, 0, -1, 0, 10, 0, 1), ("compute", "expert", 0, 0, 1, 9, 12, 0, 1))
    with pytest.raises(Internal, match=r"rows of one lane overlap at 9 ns \(expert, step 0, layer 0\)"):
        timeline_events(rows)


def test_names_of_slices() -> None:
    assert slice_name("host step", 5, -1) == "host step"
    assert slice_name("host launch", 5, -1) == "host launch L5"


def test_the_file_replaces_an_older_one_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")
    assert write_timeline(path, TWO_LAYERS) == str(path)
    assert path.read_bytes() == timeline_to_perfetto(TWO_LAYERS)
    bad = timeline(("h2d", "fetch", 0, 0, 1, 0, 9, 1, 0), ("h2d", "fetch", 0, 0, 2, 5, 12, 1, 0))
    with pytest.raises(Internal):
        write_timeline(path, bad)
    assert path.read_bytes() == timeline_to_perfetto(TWO_LAYERS)
    with pytest.raises(InputError, match="cannot be written"):
        write_timeline(tmp_path / "absent" / "out.json", TWO_LAYERS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def imported(events: list[dict[str, object]]) -> list[tuple[str, str]]:
    """Return (from, to) of every arrow as the viewer binds it; asserts what it would otherwise drop without a word.

    Modelled after the importer: events in order of time, those of one instant in order of the file; a slice stays on its
    thread's stack until a slice that begins at or after its end; an arrow leaves from and arrives at the slice on top.
    """
    top: dict[tuple[int, int], dict[str, object]] = {}
    leaving: dict[int, str] = {}
    arrows = []
    timed = sorted((event for event in events if event["ph"] in "Xsf"), key=lambda event: event["ts"])
    for event in timed:
        thread = (event["pid"], event["tid"])
        here = top.get(thread)
        if event["ph"] == "X":
            assert here is None or round((here["ts"] + here["dur"]) * 1000) <= round(event["ts"] * 1000)
            top[thread] = event
            continue
        assert here is not None and here["ts"] <= event["ts"] <= here["ts"] + here["dur"]
        if event["ph"] == "s":
            assert event["id"] not in leaving
            leaving[event["id"]] = here["name"]
        else:
            arrows.append((leaving.pop(event["id"]), here["name"]))
    assert not leaving
    return arrows


def test_the_arrow_of_the_small_timeline_binds_to_both_slices() -> None:
    assert imported(timeline_events(TWO_LAYERS)) == [("fetch L0 e3", "expert L0 e3")]


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(runs())
def test_files_of_simulated_timelines_are_what_the_viewer_expects(case) -> None:
    config, workload, costs, capacities, schedule, _ = case
    rows = run_simpy(config, workload, costs, capacities, serial=not schedule.copy.overlap).timeline
    events = timeline_events(rows)
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == len(rows.rows)
    assert sum(event["args"].get("bytes", 0) for event in slices) == rows.frame()["bytes"].sum()
    for source, target in imported(events):
        assert source.startswith(("fetch L", "prefetch L")) and target.startswith("expert")
    by_name = defaultdict(list)
    for event in events:
        if event["ph"] == "C":
            by_name[event["name"]].append(event)
    for name, values in by_name.items():
        times = [event["ts"] for event in values]
        assert times == sorted(times)
        assert values[-1]["args"]["GB/s"] == 0.0, name
