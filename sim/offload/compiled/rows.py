"""What both halves of the compiled simulator do alike: a launch's work, and how a row of a timeline is written.

Modelled: rows are counted also where there is no room for them. Ignored: when anything happens; that is the simulators' business.
"""

from __future__ import annotations

from ....base.jit import jit_inline, jit_inner, jit_lean
from ....base.records import Array
from ...policies.state import Decision, PolicyConfig
from ...timeline import COMPUTE, HOST, OP_EXPERT, OP_HOST_LAUNCH, OP_HOST_LAYER, OP_HOST_SUBMIT
from ..costs import CostTables
from ..run_records import Run


@jit_inner
def write_row(
    rows: Array,
    clock: Array,
    what: tuple[int, int],
    place: tuple[int, int, int],
    span: tuple[int, int],
    num_bytes: int,
    tokens: int,
) -> None:
    """Count one timeline row and write it where rows are wanted; activities that take no time leave none.

    what: (lane, operation). place: (step, layer, expert). span: (start, end).
    """
    if span[1] > span[0]:
        at = clock[0].rows
        if at < rows.shape[0]:
            rows[at].lane = what[0]
            rows[at].op = what[1]
            rows[at].step = place[0]
            rows[at].layer = place[1]
            rows[at].expert = place[2]
            rows[at].start = span[0]
            rows[at].end = span[1]
            rows[at].bytes = num_bytes
            rows[at].tokens = tokens
        clock[0].rows = at + 1


@jit_inline
def is_hopeless(run: Run, step: int, begin: int, end: int) -> bool:
    """Return whether a run cannot keep its limit, its step number `step` of the piece having gone from `begin` to `end`."""
    limit = run.clock[0].limit
    if limit == 0:
        return False
    if run.weights.shape[0] == 0:
        return bool(end + run.later[step + 1] > limit)
    run.spent[0] += run.weights[step] * (end - begin)
    return bool(run.spent[0] > limit)


@jit_lean
def kernel_work(costs: CostTables, out: Decision, first: int, last: int) -> int:
    """Return the nanoseconds of one launch over items `first` to `last` (exclusive)."""
    items = out.items
    work = int(costs.grouped_ns[0])
    for at in range(first, last):
        work += int(costs.kernel_ns[items[at].format, items[at].tokens])
    return work


@jit_inner
def write_kernel_row(
    rows: Array, clock: Array, out: Decision, place: tuple[int, int], first: int, last: int, span: tuple[int, int]
) -> None:
    """Write one kernel's row: an expert of its own, or -1 for a group, with the tokens of all; place: (step, layer)."""
    items = out.items
    tokens = 0
    for at in range(first, last):
        tokens += items[at].tokens
    expert = items[first].expert if last - first == 1 else -1
    write_row(rows, clock, (COMPUTE, OP_EXPERT), (place[0], place[1], expert), span, 0, tokens)


@jit_inner
def write_copy_row(
    rows: Array,
    clock: Array,
    config: PolicyConfig,
    what: tuple[int, int],
    made_for: int,
    key: int,
    span: tuple[int, int],
    num_bytes: int,
) -> None:
    """Write the row of a copy or a read of `key` that was made for the layer step `made_for`."""
    layer, expert = key // config.num_experts, key % config.num_experts
    write_row(rows, clock, what, (made_for // config.num_layers, layer, expert), span, num_bytes, 0)


@jit_inner
def write_host_rows(
    rows: Array, clock: Array, costs: CostTables, place: tuple[int, int], now: int, num_copies: int, num_launches: int
) -> None:
    """Write what the host does at a layer step from `now` on: the routing is read, copies submitted, kernels launched."""
    host, at = costs.host_ns[0], (place[0], place[1], -1)
    end = now + host.layer
    write_row(rows, clock, (HOST, OP_HOST_LAYER), at, (now, end), 0, 0)
    for _ in range(num_copies):
        begin = end
        end = begin + host.transfer
        write_row(rows, clock, (HOST, OP_HOST_SUBMIT), at, (begin, end), 0, 0)
    for _ in range(num_launches):
        begin = end
        end = begin + host.kernel
        write_row(rows, clock, (HOST, OP_HOST_LAUNCH), at, (begin, end), 0, 0)


@jit_inline
def write_host_row(rows: Array, clock: Array, op: int, place: tuple[int, int], span: tuple[int, int]) -> None:
    """Write one operation of the host; place: (step, layer)."""
    write_row(rows, clock, (HOST, op), (place[0], place[1], -1), span, 0, 0)
