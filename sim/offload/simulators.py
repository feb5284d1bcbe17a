"""Both engines behind one call: the same inputs in, one comparable outcome out.

Modelled: a run is a policy configuration, a workload and cost tables; `run_twin` and `run_simpy` take the same and return
the same. Ignored: how those inputs come about (`simulate`).
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...base.errors import Internal
from ..policies.offload import begin_step, decide_visit
from ..policies.state import NUM_COUNTS, Array, Decision, PolicyConfig, PolicyState, Prices, make_decision, make_state
from ..timeline import (
    D2H,
    DISK,
    H2D,
    OP_BACK,
    OP_CPU,
    OP_DEMAND,
    OP_DENSE,
    OP_DISK,
    OP_EXPERT,
    OP_HEAD,
    OP_HOST_LAUNCH,
    OP_HOST_LAYER,
    OP_HOST_STEP,
    OP_HOST_SUBMIT,
    OP_PREFETCH,
    ROW_FIELDS,
    Timeline,
    canonical,
)  # fmt: skip
from . import clock_fields as fields
from .compiled import MORE, NUM_HELD, NUM_OP_FIELDS, run_overlapped
from .compiled_queues import Q_FIELDS
from .compiled_serial import run_serial
from .costs import CostTables
from .workload import Workload

_QUEUE_ROOM = 1024
# Which operations' time each busy entry of the clock adds up.
_BUSY_OPS = {
    fields.BUSY_DENSE: [OP_DENSE], fields.BUSY_EXPERT: [OP_EXPERT], fields.BUSY_HEAD: [OP_HEAD], fields.BUSY_DEMAND: [OP_DEMAND],
    fields.BUSY_PREFETCH: [OP_PREFETCH], fields.BUSY_BACK: [OP_BACK], fields.BUSY_CPU: [OP_CPU], fields.BUSY_DISK: [OP_DISK],
    fields.BUSY_HOST: [OP_HOST_LAUNCH, OP_HOST_LAYER, OP_HOST_STEP, OP_HOST_SUBMIT],
}  # fmt: skip
# Clock entries in which the engines must agree.
_COMPARED = (
    "READY", "LATE", "ROWS", "MAKESPAN", "BUSY_DENSE", "BUSY_EXPERT", "BUSY_HEAD", "BUSY_DEMAND", "BUSY_PREFETCH", "BUSY_BACK",
    "BUSY_HOST", "BUSY_CPU", "BUSY_DISK", "STALL_COPY", "STALL_HOST", "STALL_CPU", "BYTES_H2D", "BYTES_D2H",
    "AFTER_H2D", "AFTER_D2H", "AFTER_DISK",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run did. Times in whole nanoseconds."""

    counts: Array
    """int64 [NUM_COUNTS]: logical counts, indexed by the names in `policies.state`."""
    clock: Array
    """int64 [NUM_CLOCK]: busy times, stalls and bytes, indexed by the names in `offload_twin`; SimPy fills the times,
    bytes, ready and late hits that both engines must agree on."""
    step_end: Array
    """int64 [num_steps]: when each forward pass ended."""
    makespan_ns: int
    timeline: Timeline | None
    """Rows, where they were asked for."""
    engine: str
    abandoned: bool = False
    """The run was stopped because it took longer than its limit; nothing else in it counts."""


def fresh_state(
    config: PolicyConfig, workload: Workload, capacities: Array, costs: CostTables | None = None
) -> PolicyState:
    """Return the state in which a run of `workload` begins.

    costs: the tables that decisions weigh; without them all experts have one format and no decision may weigh costs.
    """
    return make_state(config, capacities=capacities, popularity=workload.popularity, first_use=workload.first_use,
                      formats=None if costs is None else costs.expert_format,
                      prices=None if costs is None else prices_of(costs, workload))  # fmt: skip


def decided_visits(
    config: PolicyConfig, workload: Workload, state: PolicyState, *, num_steps: int | None = None
) -> Iterator[tuple[int, int, Decision]]:
    """Yield (step, layer, decision) of every visit of the first `num_steps` steps (all when None), with nothing done and no time.

    state: one in which the run begins; it follows along. The decision's buffers are overwritten by the next visit.
    """
    out = make_decision(config)
    for step in range(workload.num_steps if num_steps is None else min(num_steps, workload.num_steps)):
        begin_step(config, workload.steps, state, step)
        for layer in range(config.num_layers):
            decide_visit(config, workload.steps, state, out, step, layer)
            yield step, layer, out


def prices_of(costs: CostTables, workload: Workload) -> Prices:
    """Return the predicted costs that decisions may weigh: undisturbed copies, experts here and there, a mean visit."""
    copy = costs.chunk_ns[:, 0] * (costs.num_chunks - 1) + costs.chunk_ns[:, 1]
    dense = (costs.dense_ns.sum(1) + costs.head_ns)[costs.step_class]
    steps, layers = workload.num_steps, workload.num_layers
    experts = int(costs.kernel_ns[0][: len(workload.visit_sizes)] @ workload.visit_sizes)
    total = int(dense.sum()) + experts + steps * layers * int(costs.grouped_ns[0])
    return Prices(copy_ns=copy.astype(np.int64), device_ns=costs.kernel_ns, cpu_ns=costs.cpu_ns,
                  visit_ns=np.array([total // max(steps * layers, 1)], np.int64))  # fmt: skip


def run_twin(config: PolicyConfig, workload: Workload, costs: CostTables, capacities: Array, *, serial: bool, rows: bool = False,
             limit_ns: int = 0, later_ns: Array | None = None, max_steps: int | None = None,
             weighed: CostTables | None = None) -> Outcome:  # fmt: skip
    """Return the compiled twin's outcome; with `rows`, the run is done twice, the first time to count them.

    limit_ns: stop as soon as a step's end, plus `later_ns` of the next step, exceeds this (0: never); the outcome is then
    `abandoned`. later_ns: int64 [num_steps + 1], the least time from each step to the end (None: nothing is known).
    max_steps: run only the first so many steps. weighed: tables that decisions weigh, where they are not the run's own: a run
    that was decided with one prediction can be timed with another.
    """
    if not rows:
        return _twin_once(
            config, workload, costs, capacities, serial, 0, limit_ns, later_ns, max_steps, weighed=weighed
        )
    # Room for one row: it only counts.
    counted = _twin_once(config, workload, costs, capacities, serial, 1, weighed=weighed)
    return _twin_once(config, workload, costs, capacities, serial, int(counted.clock[fields.ROWS]), weighed=weighed)


def _twin_once(config: PolicyConfig, workload: Workload, costs: CostTables, capacities: Array, serial: bool, num_rows: int,
               limit_ns: int = 0, later_ns: Array | None = None, max_steps: int | None = None,
               room: int = _QUEUE_ROOM, weighed: CostTables | None = None) -> Outcome:  # fmt: skip
    state = fresh_state(config, workload, capacities, costs if weighed is None else weighed)
    decision = make_decision(config)
    clock = np.zeros(fields.NUM_CLOCK, np.int64)
    clock[fields.LIMIT] = limit_ns
    num_steps = workload.num_steps if max_steps is None else min(max_steps, workload.num_steps)
    step_end = np.zeros(num_steps, np.int64)
    later = np.zeros(num_steps + 1, np.int64) if later_ns is None else later_ns
    rows = np.zeros((num_rows, ROW_FIELDS), np.int64)
    demand, ahead, backlog, reads = (np.zeros((0 if serial else room, Q_FIELDS), np.int64) for _ in range(4))
    moving, held = np.zeros((1, Q_FIELDS), np.int64), np.zeros(NUM_HELD, np.int64)
    ops = np.zeros((NUM_OP_FIELDS, config.num_experts + 2), np.int64)
    arrived = np.full(config.num_layers * config.num_experts, -1, np.int64)
    first = 0
    for steps in workload.pieces():  # everything a run has reached stays in the arrays above from one piece to the next
        last = min(first + len(steps.step_phase), num_steps)
        held[MORE] = last < num_steps
        ends, after = step_end[first:last], later[first : last + 1]
        if serial:
            run_serial(config, steps, costs, state, decision, clock, after, ends, rows)
        else:
            run_overlapped(config, steps, costs, state, decision, clock, demand, ahead, backlog, reads, moving, held, ops,
                           arrived, after, ends, rows)  # fmt: skip
        first = last
        if first == num_steps or clock[fields.STUCK]:
            break
    if (
        clock[fields.STUCK] == fields.QUEUE_FULL
    ):  # the link lags so far behind that its queue outgrew its room: start over
        return _twin_once(
            config, workload, costs, capacities, serial, num_rows, limit_ns, later_ns, max_steps, 8 * room, weighed
        )
    if clock[fields.STUCK] == fields.DEADLOCK:
        raise Internal("the schedule deadlocked: every lane waits for another")
    timeline = Timeline(rows=canonical(rows)) if num_rows else None
    return Outcome(counts=state.count.copy(), clock=clock, step_end=step_end, makespan_ns=int(clock[fields.MAKESPAN]),
                   timeline=timeline, engine="twin", abandoned=bool(clock[fields.STUCK] == fields.ABANDONED))  # fmt: skip


def run_simpy(config: PolicyConfig, workload: Workload, costs: CostTables, capacities: Array, *, serial: bool,
              rows: bool = True, weighed: CostTables | None = None) -> Outcome:  # fmt: skip
    """Return the SimPy model's outcome, with its timeline unless `rows` is False; `weighed` as in `run_twin`."""
    # Imported here: a machine that only measures runs the twin and has no SimPy.
    from .simpy_model import OffloadModel

    state = fresh_state(config, workload, capacities, costs if weighed is None else weighed)
    decision = make_decision(config)
    model = OffloadModel(config, workload.steps, costs, state, decision, serial=serial, keep_rows=rows)
    # Millions of small event objects and no cycles worth collecting: the collector would double the run's time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        found, step_end, makespan = model.run()
    finally:
        if collecting:
            gc.enable()
    clock = np.zeros(fields.NUM_CLOCK, np.int64)
    for place, ops in _BUSY_OPS.items():
        clock[place] = sum(model.busy[op] for op in ops)
    clock[fields.BYTES_H2D], clock[fields.BYTES_D2H] = model.moved_bytes[H2D], model.moved_bytes[D2H]
    clock[[fields.AFTER_H2D, fields.AFTER_D2H, fields.AFTER_DISK]] = [
        model.bytes_after[lane] for lane in (H2D, D2H, DISK)
    ]
    clock[fields.ROWS] = len(found)
    clock[fields.READY], clock[fields.LATE] = model.ready_hits, model.late_hits
    clock[fields.STALL_COPY], clock[fields.STALL_HOST] = model.stall_copy, model.stall_host
    clock[fields.STALL_CPU] = model.stall_cpu
    clock[fields.MAKESPAN] = makespan
    return Outcome(counts=state.count.copy(), clock=clock, step_end=step_end, makespan_ns=makespan,
                   timeline=Timeline(rows=canonical(found)) if rows else None, engine="simpy")  # fmt: skip


def first_steps(workload: Workload, costs: CostTables, count: int) -> tuple[Workload, CostTables]:
    """Return the workload and the tables of the first `count` steps alone; popularity and costs stay those of the whole."""
    cut = dataclasses.replace(
        workload, step_start=workload.step_start[: count + 1], step_token=workload.step_token[: workload.step_start[count]],
        step_phase=workload.step_phase[:count], step_first=workload.step_first[:count], step_reset=workload.step_reset[:count],
        step_tokens=workload.step_tokens[:count], step_context=workload.step_context[:count],
        # A share of the whole's, so that what a mean visit is predicted to take stays what it was.
        visit_sizes=workload.visit_sizes * count // workload.num_steps, piece_start=np.array([0, count], np.int64),
        prompts=workload.prompts[workload.prompts[:, 1] < count], requests=workload.requests[workload.requests[:, 1] < count],
    )  # fmt: skip
    return cut, costs._replace(step_class=costs.step_class[:count])


def first_difference(one: Outcome, other: Outcome) -> str | None:
    """Return None when two outcomes agree to the nanosecond, row by row; else the first thing that differs."""
    for name, left, right in (("counts", one.counts, other.counts), ("step_end", one.step_end, other.step_end)):
        if not np.array_equal(left, right):
            at = int(np.flatnonzero(left != right)[0])
            return f"{name}[{at}]: {one.engine} {left[at]}, {other.engine} {right[at]}"
    for name in _COMPARED:
        at = getattr(fields, name)
        if name == "ROWS" and (one.timeline is None or other.timeline is None):
            continue
        if one.clock[at] != other.clock[at]:
            return f"{name.lower()}: {one.engine} {one.clock[at]}, {other.engine} {other.clock[at]}"
    if one.timeline is not None and other.timeline is not None:
        left, right = one.timeline.rows, other.timeline.rows
        if left.shape != right.shape:
            return f"rows: {one.engine} {left.shape[0]}, {other.engine} {right.shape[0]}"
        different = np.flatnonzero(np.any(left != right, axis=1))
        if len(different):
            at = int(different[0])
            return f"row {at}: {one.engine} {left[at].tolist()}, {other.engine} {right[at].tolist()}"
    return None


__all__ = ["NUM_COUNTS", "Outcome", "decided_visits", "first_difference", "fresh_state", "run_simpy", "run_twin"]
