"""What the compiled simulator keeps while a run goes on: its clock, lanes, queues and the operations of one layer step.

Modelled: records with named fields (see `base.records`), bound together in `Run`; all of it is carried from one piece of a long
recording to the next. Ignored: when anything happens (`compiled`), and what the decisions remember (`policies.records`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...base.records import Array, record_type, records, whole_numbers
from ..timeline import NUM_LANES, ROW

NEVER = 2**62
"""An end of an activity that has not begun."""

CLOCK = whole_numbers(
    "now", "compute_end", "kernels_done", "backs_done", "reads_done", "rows", "stuck", "ready", "late",
    "busy_dense", "busy_expert", "busy_head", "busy_demand", "busy_prefetch", "busy_back", "busy_host", "busy_cpu", "busy_disk",
    "stall_copy", "stall_host", "stall_cpu", "bytes_h2d", "bytes_d2h", "after_h2d", "after_d2h", "after_disk", "makespan", "step",
    "limit",
)  # fmt: skip
"""Where a run is and what it has added up. `bytes_…` are all that moved; `after_…` the part of them that moved after the last
step had ended (of the disk: read)."""

# Values of `CLOCK.stuck`.
DEADLOCK, QUEUE_FULL, ABANDONED = 1, 2, 3

LANE = record_type(
    end="int64",  # of the activity under way at its present rate, NEVER when the lane is idle
    start="int64",
    work="int64",  # what was left of it at `updated`
    updated="int64",
    rate="int64",
)
"""One lane that runs one activity at a time."""

QUEUED = record_type(
    id="int64",
    key="int64",
    target="int64",  # layer step it is for
    wait_kernel="int64",  # what must be done first: a kernel,
    wait_back="int64",  # a write-back,
    read="int64",  # a read from disk; -1 when none
    left="int64",  # chunks that have not begun
    kind="int64",  # DEMAND or PREFETCH
    format="int64",
    began="int64",  # its kind when the present chunk began
)
"""One copy that waits for its lane or is being moved."""

ENDS = whole_numbers("head", "tail")
"""Where a queue's entries begin and end."""

OPERATION = record_type(
    ready="int64",  # when the host has launched it
    work="int64",  # nanoseconds at full speed
    first="int64",  # of the items that it computes
    last="int64",  # behind the last of them
    code="int64",  # OP_…
)
"""One operation of the compute stream."""

PROGRAM = record_type(
    step="int64",  # within the piece
    layer="int64",
    op="int64",  # operation that runs or comes next
    num_ops="int64",
    awaited="int64",  # first item of the next kernel that has not been seen to have arrived
    submitted="int64",  # of the layer step: first the promotions, then moves and write-backs in order
    num_submits="int64",
    submit_at="int64",  # when the next is due
    move="int64",
    back="int64",
    core="int64",  # experts on the host's cores, run one after the other
    num_cores="int64",
    cores_from="int64",
    cores_end="int64",  # when the last one ended
    more="int64",  # further steps follow in another call
    begin="int64",  # when the next step begins
    end="int64",  # of the last step, once it is known
)
"""Where the host's program is."""

FLIGHT = whole_numbers("prompt", "passes", "left_first")
"""Where passes follow each other over cards: whether the last one was of a prompt, how many of that prompt have begun, and when the last
of them left its first card."""


class Queue(NamedTuple):
    """Copies that wait for one lane."""

    entries: Array  # QUEUED [room]
    ends: Array  # ENDS [1]


class Run(NamedTuple):
    """All that a run of the compiled simulator carries along besides the decisions' state."""

    clock: Array  # CLOCK [1]
    program: Array  # PROGRAM [1]
    lanes: Array  # LANE [NUM_LANES]
    demands: Queue  # in order of submission
    guesses: Queue  # prefetches, by (layer step they are for, id)
    backs: Queue  # write-backs, first come, first served
    reads: Queue  # reads from disk, likewise
    moving: Array  # QUEUED [1]: what the host→device engine moves
    ops: Array  # OPERATION [num_experts + 2]
    arrived: Array  # int64 [num_keys]: the latest transfer of each expert that has arrived, -1 at the start
    later: Array  # int64 [num_steps + 1]: the least time from each step to the end
    weights: Array  # float64 [num_steps]: how much of each step's time counts against the limit; empty: all of it
    spent: Array  # float64 [1]: what has counted so far, where there are weights
    step_end: Array  # int64 [num_steps]
    rows: Array  # ROW [room]
    flight: Array  # FLIGHT [1]
    card_free: Array  # int64 [num_cards]: when each card is free
    card_idle: Array  # int64 [num_cards]: when its last kernel ended
    pass_end: Array  # int64 [most passes under way]: when the latest passes of a prompt ended, in turn


def make_run(
    *,
    num_layers: int,
    num_experts: int,
    num_steps: int,
    num_rows: int,
    room: int,
    limit_ns: int,
    later_ns: Array | None,
    weights: Array | None = None,
    stages: Array | None = None,
) -> Run:
    """Return what a run begins with: every lane idle, every queue empty with `room` for so many.

    stages: as cost tables have them, where passes follow each other over cards.
    """
    over_cards = stages is not None and len(stages) > 0
    most, cards = (int(stages[-1]), int(stages[:-1].max()) + 1) if stages is not None and over_cards else (1, 1)
    clock, lanes = records(CLOCK), records(LANE, NUM_LANES)
    clock["limit"] = limit_ns
    lanes["end"] = NEVER
    demands, guesses, backs, reads = (Queue(entries=records(QUEUED, room), ends=records(ENDS)) for _ in range(4))
    return Run(
        clock=clock, program=records(PROGRAM), lanes=lanes, demands=demands, guesses=guesses, backs=backs, reads=reads,
        moving=records(QUEUED), ops=records(OPERATION, num_experts + 2), arrived=np.full(num_layers * num_experts, -1, np.int64),
        later=np.zeros(num_steps + 1, np.int64) if later_ns is None else later_ns, step_end=np.zeros(num_steps, np.int64),
        rows=records(ROW, num_rows), weights=np.zeros(0) if weights is None else weights, spent=np.zeros(1),
        flight=records(FLIGHT), card_free=np.zeros(cards, np.int64), card_idle=np.zeros(cards, np.int64),
        pass_end=np.zeros(most, np.int64),
    )  # fmt: skip
