"""Both engines behind one call: the same inputs in, one comparable outcome out.

Modelled: a run is a policy configuration, a workload and cost tables; `run_compiled` and `run_simpy` take the same and return
the same. Ignored: how those inputs come about (`simulate`).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...base.errors import Internal
from ...base.records import Array, records
from ..policies.offload import begin_step, decide_layer_step
from ..policies.policy_file import raise_fault, use_rules
from ..policies.records import COUNTS
from ..policies.state import Decision, PolicyConfig, PolicyState, Prices, make_decision, make_state, needs_prices
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
    Timeline,
    canonical,
    plain_rows,
)  # fmt: skip
from .compiled.over_cards import run_over_cards
from .compiled.overlapped import run_overlapped
from .compiled.serial import run_serial
from .costs import CostTables
from .run_records import ABANDONED, CLOCK, DEADLOCK, QUEUE_FULL, Run, make_run
from .workload import Workload, picked

# Room of a queue at first: what an expert of each of a layer's may ask for, several layers ahead.
_QUEUE_ROOM, _ROOM_PER_EXPERT = 1024, 32
# Which operations' time each busy entry of the clock adds up.
_BUSY_OPS = {
    "busy_dense": [OP_DENSE], "busy_expert": [OP_EXPERT], "busy_head": [OP_HEAD], "busy_demand": [OP_DEMAND],
    "busy_prefetch": [OP_PREFETCH], "busy_back": [OP_BACK], "busy_cpu": [OP_CPU], "busy_disk": [OP_DISK],
    "busy_host": [OP_HOST_LAUNCH, OP_HOST_LAYER, OP_HOST_STEP, OP_HOST_SUBMIT],
}  # fmt: skip
# Clock entries in which the simulators must agree.
_COMPARED = (
    "ready", "late", "rows", "makespan", "busy_dense", "busy_expert", "busy_head", "busy_demand", "busy_prefetch", "busy_back",
    "busy_host", "busy_cpu", "busy_disk", "stall_copy", "stall_host", "stall_cpu", "bytes_h2d", "bytes_d2h",
    "after_h2d", "after_d2h", "after_disk",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run did. Times in whole nanoseconds."""

    counts: Any
    """Logical counts: one record of `policies.records.COUNTS`."""
    clock: Any
    """Busy times, stalls and bytes: one record of `run_records.CLOCK`; SimPy fills the times, bytes, ready and late hits that both
    simulators must agree on."""
    step_end: Array
    """int64 [num_steps]: when each forward pass ended; of an abandoned run, those that did."""
    makespan_ns: int
    timeline: Timeline | None
    """Rows, where they were asked for."""
    engine: str
    abandoned: bool = False
    """The run was stopped because it took longer than its limit; nothing else in it counts but its passes' ends."""


def fresh_state(
    config: PolicyConfig, workload: Workload, capacities: Array, costs: CostTables | Prices | None = None
) -> PolicyState:
    """Return the state in which a run of `workload` begins.

    costs: the tables that decisions weigh, or their prices alone; without tables all experts have one format, without either no
    decision may weigh costs.
    """
    tables = costs if isinstance(costs, CostTables) else None
    prices = costs if isinstance(costs, Prices) else None
    if tables is not None and needs_prices(config):
        prices = prices_of(tables, workload)
    state = make_state(config, capacities=capacities, popularity=workload.popularity, first_use=workload.first_use,
                       formats=None if tables is None else tables.expert_format, prices=prices)  # fmt: skip
    use_rules(config, state)
    return state


def decided_layer_steps(
    config: PolicyConfig, workload: Workload, state: PolicyState, *, num_steps: int | None = None
) -> Iterator[tuple[int, int, Decision]]:
    """Yield (step, layer, decision) of every layer step of the first `num_steps` steps (all when None), with nothing done and no time.

    state: one in which the run begins; it follows along. The decision's buffers are overwritten by the next layer step.
    """
    out = make_decision(config)
    for step in range(workload.num_steps if num_steps is None else min(num_steps, workload.num_steps)):
        begin_step(config, workload.steps, state, step)
        for layer in range(config.num_layers):
            decide_layer_step(config, workload.steps, state, out, step, layer)
            yield step, layer, out
    raise_fault(config, state)


def prices_of(costs: CostTables, workload: Workload) -> Prices:
    """Return the predicted costs that decisions may weigh: undisturbed copies, experts here and there, a mean layer step, host included."""
    copy = costs.chunk_ns[:, 0] * (costs.num_chunks - 1) + costs.chunk_ns[:, 1]
    dense = (costs.dense_ns.sum(1) + costs.head_ns)[costs.step_class]
    steps, layers = workload.num_steps, workload.num_layers
    experts = int(costs.kernel_ns[0][: len(workload.layer_step_sizes)] @ workload.layer_step_sizes)
    # What the stream waits for the host: for a decision and a launch each layer step, for the next pass's first launch each step.
    host = costs.host_ns[0]
    hosted = steps * (layers * int(host.layer + host.kernel) + int(host.step + host.kernel))
    total = int(dense.sum()) + experts + steps * layers * int(costs.grouped_ns[0]) + hosted
    return Prices(copy_ns=copy.astype(np.int64), device_ns=costs.kernel_ns, cpu_ns=costs.cpu_ns,
                  layer_step_ns=np.array([total // max(steps * layers, 1)], np.int64))  # fmt: skip


def run_compiled(config: PolicyConfig, workload: Workload, costs: CostTables, capacities: Array, *, serial: bool, rows: bool = False,
                 limit_ns: int = 0, later_ns: Array | None = None, weights: Array | None = None, max_steps: int | None = None,
                 weighed: CostTables | Prices | None = None) -> Outcome:  # fmt: skip
    """Return the compiled simulator's outcome; with `rows`, the run is done twice, the first time to count them.

    limit_ns: stop as soon as a step's end, plus `later_ns` of the next step, exceeds this (0: never); the outcome is then
    `abandoned`. later_ns: int64 [num_steps + 1], the least time from each step to the end (None: nothing is known).
    weights: float64 [num_steps], how much each step's time counts against the limit (None: all of it; `later_ns` then counts too).
    max_steps: run only the first so many steps. weighed: tables that decisions weigh, where they are not the run's own: a run
    that was decided with one prediction can be timed with another.
    """
    room, num_rows = (
        0 if serial else max(_QUEUE_ROOM, _ROOM_PER_EXPERT * config.num_experts),
        int(rows),
    )  # room for one row: it only counts
    num_steps = workload.num_steps if max_steps is None else min(max_steps, workload.num_steps)
    while True:
        state = fresh_state(config, workload, capacities, costs if weighed is None else weighed)
        run = make_run(num_layers=config.num_layers, num_experts=config.num_experts, num_steps=num_steps, num_rows=num_rows,
                       room=room, limit_ns=limit_ns, later_ns=later_ns, weights=weights, stages=costs.stages)  # fmt: skip
        _run_pieces(config, workload, costs, state, run, serial=serial)
        raise_fault(config, state)
        clock = run.clock[0]
        if clock.stuck == QUEUE_FULL:  # the link lags so far behind that its queue outgrew its room: start over
            room *= 8
        elif clock.stuck == DEADLOCK:
            raise Internal("the schedule deadlocked: every lane waits for another")
        elif rows and clock.rows > num_rows:
            num_rows = int(clock.rows)
        else:
            break
    timeline = None
    if rows:
        found = canonical(plain_rows(run.rows[: clock.rows]))
        timeline = Timeline(rows=found, cards=tuple(costs.stages[:-1].tolist()))
    abandoned = bool(clock.stuck == ABANDONED)
    step_end = run.step_end[: clock.step + 1] if abandoned else run.step_end
    return Outcome(counts=state.counts[0], clock=clock, step_end=step_end, makespan_ns=int(clock.makespan),
                   timeline=timeline, engine="compiled", abandoned=abandoned)  # fmt: skip


def _run_pieces(
    config: PolicyConfig, workload: Workload, costs: CostTables, state: PolicyState, run: Run, *, serial: bool
) -> None:
    """Advance `run` piece by piece; everything it has reached stays in its records from one piece to the next."""
    decision, num_steps = make_decision(config), len(run.step_end)
    first = 0
    for steps in workload.pieces(config):
        last = min(first + len(steps.step_phase), num_steps)
        run.program[0].more = last < num_steps
        piece = run._replace(
            step_end=run.step_end[first:last], later=run.later[first : last + 1], weights=run.weights[first:last]
        )
        advance = run_serial if serial else run_overlapped
        if len(costs.stages):
            advance = run_over_cards
        advance(config, steps, costs, state, decision, piece)
        first = last
        if first == num_steps or run.clock[0].stuck:
            break


def run_simpy(config: PolicyConfig, workload: Workload, costs: CostTables, capacities: Array, *, serial: bool,
              rows: bool = True, weighed: CostTables | Prices | None = None) -> Outcome:  # fmt: skip
    """Return the SimPy model's outcome, with its timeline unless `rows` is False; `weighed` as in `run_compiled`."""
    # Imported here: a machine that only measures runs the compiled one and has no SimPy.
    from .simpy_cards import CardsModel
    from .simpy_model import OffloadModel

    state = fresh_state(config, workload, capacities, costs if weighed is None else weighed)
    decision = make_decision(config)
    model: CardsModel | OffloadModel
    if len(costs.stages):
        model = CardsModel(config, workload.steps, costs, state, decision, keep_rows=rows)
    else:
        model = OffloadModel(config, workload.steps, costs, state, decision, serial=serial, keep_rows=rows)
    # Millions of small event objects and no cycles worth collecting: the collector would double the run's time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        found, step_end, makespan = model.run()
    finally:
        if collecting:
            gc.enable()
    raise_fault(config, state)
    clock = records(CLOCK)
    for name, ops in _BUSY_OPS.items():
        clock[name] = sum(model.busy[op] for op in ops)
    clock["bytes_h2d"], clock["bytes_d2h"] = model.moved_bytes[H2D], model.moved_bytes[D2H]
    for name, lane in (("after_h2d", H2D), ("after_d2h", D2H), ("after_disk", DISK)):
        clock[name] = model.bytes_after[lane]
    clock["rows"] = len(found)
    clock["ready"], clock["late"] = model.ready_hits, model.late_hits
    clock["stall_copy"], clock["stall_host"], clock["stall_cpu"] = model.stall_copy, model.stall_host, model.stall_cpu
    clock["makespan"] = makespan
    return Outcome(counts=state.counts[0], clock=clock[0], step_end=step_end, makespan_ns=makespan,
                   timeline=Timeline(rows=canonical(found), cards=tuple(costs.stages[:-1].tolist())) if rows else None,
                   engine="simpy")  # fmt: skip


def some_steps(workload: Workload, costs: CostTables, which: Array) -> tuple[Workload, CostTables]:
    """Return the workload and the tables of the steps `which` (rising numbers) alone; popularity and costs stay those of the whole."""
    return picked(workload, which), costs._replace(step_class=costs.step_class[which])


def first_difference(one: Outcome, other: Outcome) -> str | None:
    """Return None when two outcomes agree to the nanosecond, row by row; else the first thing that differs."""
    for name in COUNTS.names or ():
        if one.counts[name] != other.counts[name]:
            return f"{name}: {one.engine} {one.counts[name]}, {other.engine} {other.counts[name]}"
    if not np.array_equal(one.step_end, other.step_end):
        at = int(np.flatnonzero(one.step_end != other.step_end)[0])
        return f"step_end[{at}]: {one.engine} {one.step_end[at]}, {other.engine} {other.step_end[at]}"
    for name in _COMPARED:
        if name == "rows" and (one.timeline is None or other.timeline is None):
            continue
        if one.clock[name] != other.clock[name]:
            return f"{name}: {one.engine} {one.clock[name]}, {other.engine} {other.clock[name]}"
    if one.timeline is not None and other.timeline is not None:
        left, right = one.timeline.rows, other.timeline.rows
        if left.shape != right.shape:
            return f"rows: {one.engine} {left.shape[0]}, {other.engine} {right.shape[0]}"
        different = np.flatnonzero(np.any(left != right, axis=1))
        if len(different):
            at = int(different[0])
            return f"row {at}: {one.engine} {left[at].tolist()}, {other.engine} {right[at].tolist()}"
    return None


__all__ = ["Outcome", "decided_layer_steps", "first_difference", "fresh_state", "run_compiled", "run_simpy"]
