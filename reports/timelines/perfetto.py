"""A timeline as Chrome Trace Event JSON, the form that ui.perfetto.dev and chrome://tracing open.

Modelled: a process for each device, a thread for each lane (lanes never overlap, which is what keeps the viewer from
spilling slices onto other tracks), a slice for each row, an arrow from each transfer to the kernel that waited for it, and
counters for what links carry and, where it is known, how many experts the device holds. Times are microseconds with three
decimals, so nothing of the nanosecond clock is lost. One event a line, keys in a fixed order: equal timelines give equal
bytes. Ignored: everything the rows do not say.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, TypeAlias

import pandas as pd

from ...base.errors import Internal
from ...base.text_files import write_atomic
from ...base.units import GIGA, MEGA, NS_PER_S, NS_PER_US
from ...sim.parallel.timeline import EP_GROUP, EP_MICRO, EpTimeline
from ...sim.timeline import LANE_NAMES, Timeline
from .occupancy import Occupancy
from .waits import TRANSFER_OPS, waits

Event = dict[str, Any]

_LANE_TITLES = {
    "compute": "compute stream", "h2d": "host to device copies", "d2h": "device to host copies", "host": "host program",
    "cpu": "experts on the host's cores", "disk": "disk to host reads", "inter": "port between nodes", "intra": "port inside the node",
}  # fmt: skip
# Cause before effect: the host launches, kernels run, copies feed them.
_LANE_ORDER = ("host", "compute", "cpu", "h2d", "d2h", "disk", "inter", "intra")
_LINKS = ("h2d", "d2h", "disk", "inter", "intra")
_EXCHANGES = ("dispatch", "combine", "reduce")

AnyTimeline: TypeAlias = Timeline | EpTimeline | pd.DataFrame


def timeline_events(timeline: AnyTimeline, *, occupancy: Occupancy | None = None, slack_ns: int = 0) -> list[Event]:
    """Return the trace events of a timeline: names, slices in order of start, arrows, counters.

    timeline: a Timeline, an EpTimeline (a process for each rank, a thread for its kernels and each of its ports), or a frame with
    their columns (then perhaps of several devices). occupancy: experts held after each
    decision, for the counter; it belongs to the first device. slack_ns: as in `waits`. Raises Internal when two rows of a
    lane overlap.
    """
    frame = _frame(timeline)
    frame = frame.sort_values(["start_ns", "end_ns"], kind="stable", ignore_index=True)
    devices = {str(name): at for at, name in enumerate(_in_order(frame))}
    lanes = list(LANE_NAMES) + sorted(set(frame["lane"].astype(str)) - set(LANE_NAMES))
    threads = {lane: at for at, lane in enumerate(lanes, start=1)}
    pids = [devices[str(name)] for name in frame["device"].tolist()]
    tids = [threads[lane] for lane in frame["lane"].astype(str).tolist()]
    events = list(_names(frame, devices, threads))
    events += _slices(frame, pids, tids)
    starts, ends = frame["start_ns"].tolist(), frame["end_ns"].tolist()
    for number, (transfer, kernel) in enumerate(waits(frame, slack_ns), start=1):
        flow = {"cat": "wait", "name": "waited for", "id": number}
        # An arrow binds to the slice that is open at its time, so it must leave before its transfer is over.
        leave = max(starts[transfer], ends[transfer] - 1)
        events.append({"ph": "s", "pid": pids[transfer], "tid": tids[transfer], "ts": _us(leave), **flow})
        events.append(
            {"ph": "f", "bp": "e", "pid": pids[kernel], "tid": tids[kernel], "ts": _us(starts[kernel]), **flow}
        )
    for device, pid in devices.items():
        mine = frame[frame["device"] == device]
        for link in _LINKS:
            events += _link_counter(mine[mine["lane"] == link], pid, link)
    if occupancy is not None and devices:
        first = next(iter(devices))
        events += _cache_counter(frame[frame["device"] == first], devices[first], occupancy)
    return events


def timeline_to_perfetto(timeline: AnyTimeline, *, occupancy: Occupancy | None = None, slack_ns: int = 0) -> bytes:
    """Return the trace file of a timeline, byte-identical for equal timelines; arguments as in `timeline_events`."""
    lines = ",\n".join(json.dumps(event) for event in timeline_events(timeline, occupancy=occupancy, slack_ns=slack_ns))
    return ('{"traceEvents": [\n' + lines + '\n],\n"displayTimeUnit": "ns"}\n').encode()


def write_timeline(path: str | os.PathLike[str], timeline: AnyTimeline, *, occupancy: Occupancy | None = None,
                   slack_ns: int = 0) -> str:  # fmt: skip
    """Write the trace file of a timeline and return its path; raises InputError where it cannot be written."""
    write_atomic(path, timeline_to_perfetto(timeline, occupancy=occupancy, slack_ns=slack_ns))
    return os.fspath(path)


def _in_order(frame: pd.DataFrame) -> list[str]:
    """Return the devices: ranks by number, others as they come."""
    names = [str(name) for name in frame["device"].unique()]
    numbers = [name.removeprefix("rank ") for name in names]
    if all(number.isdigit() for number in numbers):
        return [name for _, name in sorted(zip(map(int, numbers), names, strict=True))]
    return names


def _frame(timeline: AnyTimeline) -> pd.DataFrame:
    """Return the rows as a frame, those of ranks in order of rank and with their batch and group."""
    if isinstance(timeline, pd.DataFrame):
        return timeline
    if isinstance(timeline, Timeline):
        return timeline.frame()
    rows = timeline.rows
    return timeline.frame().assign(batch=rows[:, EP_MICRO] + 1, group=rows[:, EP_GROUP] + 1)


def _us(ns: int) -> float:
    """Return a time in microseconds; three decimals hold every nanosecond."""
    return round(ns / NS_PER_US, 3)


def _names(frame: pd.DataFrame, devices: dict[str, int], threads: dict[str, int]) -> Iterator[Event]:
    order = {lane: at for at, lane in enumerate((*_LANE_ORDER, *(lane for lane in threads if lane not in _LANE_ORDER)))}
    for device, pid in devices.items():
        yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": device}}
        yield {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}
        used = set(frame["lane"][frame["device"] == device].astype(str))
        for lane in sorted(used, key=order.__getitem__):
            tid = threads[lane]
            title = _LANE_TITLES.get(lane, lane)
            yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": title}}
            yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": order[lane]}}


def _slices(frame: pd.DataFrame, pids: list[int], tids: list[int]) -> Iterator[Event]:
    names = ("op", "step", "layer", "expert", "start_ns", "end_ns", "bytes", "tokens")
    # Batches and groups of expert-parallel steps are said where a row may have them.
    extra = [name for name in ("batch", "group") if name in frame]
    parts = list(zip(*(frame[name].tolist() for name in extra), strict=True)) if extra else [()] * len(frame)
    columns = [frame[name].astype(str).tolist() if name == "op" else frame[name].tolist() for name in names]
    ends: dict[tuple[int, int], int] = {}
    for part, pid, tid, op, step, layer, expert, start, end, num_bytes, tokens in zip(
        parts, pids, tids, *columns, strict=True
    ):
        if start < ends.get((pid, tid), 0) or end <= start:
            raise Internal(f"rows of one lane overlap at {start} ns ({op}, step {step}, layer {layer})")
        ends[pid, tid] = end
        args: dict[str, Any] = {"step": step, "layer": layer}
        if expert >= 0:
            args["expert"] = expert
        if num_bytes:
            args["bytes"] = num_bytes
            args["GB/s"] = _gb_per_s(num_bytes, end - start)
        if tokens:
            args["tokens"] = tokens
        args |= dict(zip(extra, part, strict=True))
        moves = num_bytes or op in TRANSFER_OPS
        category = (
            "exchange" if op in _EXCHANGES else "copy" if moves else "host" if op.startswith("host") else "kernel"
        )
        yield {"ph": "X", "pid": pid, "tid": tid, "cat": category, "name": slice_name(op, layer, expert), "ts": _us(start),
               "dur": _us(end - start), "args": args}  # fmt: skip


def slice_name(op: str, layer: int, expert: int) -> str:
    """Return what a row is called: `dense L3`, `expert L3 e17`, `experts L3` for several at once, `head`, `host step`."""
    if op == "expert":
        return f"experts L{layer}" if expert < 0 else f"expert L{layer} e{expert}"
    if op in ("head", "host step"):
        return op
    return f"{op} L{layer}" if expert < 0 else f"{op} L{layer} e{expert}"


def _gb_per_s(num_bytes: int, duration_ns: int) -> float:
    return round(num_bytes * NS_PER_S / GIGA / duration_ns, 3)


def _link_counter(rows: pd.DataFrame, pid: int, link: str) -> Iterator[Event]:
    """Yield what the link carries: the rate of each copy, nothing between copies."""
    name = f"link {link}"
    last_end: int | None = None
    for start, end, num_bytes in zip(
        rows["start_ns"].tolist(), rows["end_ns"].tolist(), rows["bytes"].tolist(), strict=True
    ):
        if last_end is not None and last_end < start:
            yield {"ph": "C", "pid": pid, "name": name, "ts": _us(last_end), "args": {"GB/s": 0.0}}
        yield {
            "ph": "C",
            "pid": pid,
            "name": name,
            "ts": _us(start),
            "args": {"GB/s": _gb_per_s(num_bytes, end - start)},
        }
        last_end = end
    if last_end is not None:
        yield {"ph": "C", "pid": pid, "name": name, "ts": _us(last_end), "args": {"GB/s": 0.0}}


def _cache_counter(rows: pd.DataFrame, pid: int, occupancy: Occupancy) -> Iterator[Event]:
    """Yield how many experts the device holds, at each decision that changes it: a layer is decided when its dense part ends."""
    decided = rows[rows["op"] == "dense"]
    before = -1
    for step, layer, end in zip(
        decided["step"].tolist(), decided["layer"].tolist(), decided["end_ns"].tolist(), strict=True
    ):
        if step >= len(occupancy.experts):
            break
        held = int(occupancy.experts[step, layer])
        if held != before:
            megabytes = round(held * occupancy.expert_bytes / MEGA, 3)
            yield {"ph": "C", "pid": pid, "name": "cache", "ts": _us(end), "args": {"experts": held, "MB": megabytes}}
        before = held
