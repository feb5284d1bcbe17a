"""Where a step's time goes: the chain of operations and exchanges that nothing could have shortened, kind by kind.

Modelled: from the last end backwards, each activity to the one that it had to wait for: the operation before on its rank, an
exchange whose tokens it needs, the operation that an exchange follows on the rank that is last, or the exchange that held the
network. Kinds add up to the makespan, to the nanosecond. A kind's time is also how much the step grows with that kind: if all of its
activities took a small share longer, the step would grow by that share of it. Ignored: which other chains are almost as long.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...base.errors import Internal
from .program import EP_OPS, NONE, OP_EXPERT, Program
from .simulators import EpOutcome
from .tables import EpTables

# Waiting for a network that no ended exchange explains (one tier of two was taken).
WAITING = "waiting"


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalPath:
    """Nanoseconds of a step by kind of activity."""

    by_kind_ns: dict[str, int]
    """Kinds of `EP_OPS`, and `waiting`; the sum is the makespan."""
    imbalance_ns: int
    """Of the experts' part, what lies above the mean rank's time."""


def critical_path(program: Program, tables: EpTables, outcome: EpOutcome) -> CriticalPath:
    """Return the critical path of a step that was run; raises Internal where it does not add up."""
    by_kind = dict.fromkeys((*EP_OPS, WAITING), 0)
    imbalance = 0.0
    ends, starts, over = outcome.op_end, outcome.ex_start, outcome.ex_end
    op, rank, exchange = NONE, 0, NONE
    if len(ends) and (not len(over) or int(ends.max()) >= int(over.max())):
        op, rank = (int(each) for each in np.unravel_index(int(ends.argmax()), ends.shape))
    elif len(over):
        exchange = int(over.argmax())
    while op != NONE or exchange != NONE:
        if op != NONE:
            work, end = int(tables.work_ns[op, rank]), int(ends[op, rank])
            by_kind[EP_OPS[program.op_kind[op]]] += work
            if program.op_kind[op] == OP_EXPERT:
                imbalance += work - float(tables.work_ns[op].mean())
            begin = end - work
            before = int(ends[op - 1, rank]) if op else 0
            if begin == before:
                op = op - 1 if op else NONE
                continue
            waits = program.wait_list[program.wait_start[op] : program.wait_start[op + 1]]
            exchange, op = next(int(each) for each in waits if int(over[each]) == begin), NONE
            continue
        begin = int(starts[exchange])
        by_kind[EP_OPS[program.ex_kind[exchange]]] += int(over[exchange]) - begin
        after = int(program.ex_after_ex[exchange])
        follows = int(program.ex_after_op[exchange])
        ready = int(over[after]) if after != NONE else int(ends[follows].max())
        if begin > ready:
            held = np.flatnonzero((over == begin) & (starts < begin))
            if len(held):
                exchange = int(held[0])
                continue
            by_kind[WAITING] += begin - ready
        if after != NONE:
            exchange = after
        else:
            op, rank, exchange = follows, int(ends[follows].argmax()), NONE
    if sum(by_kind.values()) != outcome.makespan_ns:
        raise Internal(f"the critical path is {sum(by_kind.values())} ns of a step of {outcome.makespan_ns} ns")
    return CriticalPath(by_kind_ns=by_kind, imbalance_ns=max(0, round(imbalance)))
