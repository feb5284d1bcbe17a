"""The queues of the compiled twin: rows of whole numbers between a head and a tail, in the order in which they are served.

Modelled: demands in order of submission; prefetches by (visit they are for, id); write-backs and disk reads first come,
first served. Ignored: growth: a queue that outgrows its room stops the run, which is then repeated with more.
"""

from __future__ import annotations

from ...base.jit import jit_inline, jit_inner
from ..policies.state import Array

# Fields of a queued copy. Q_KERNEL, Q_BACK and Q_READ: what must be done first. Q_BEGAN: its class when a chunk began.
(Q_ID, Q_KEY, Q_TARGET, Q_KERNEL, Q_BACK, Q_LEFT, Q_CLASS, Q_FORMAT, Q_READ, Q_BEGAN, Q_FIELDS) = range(11)


@jit_inner
def pack(queue: Array, head: int, tail: int) -> int:
    """Move a queue's entries to its front; return where they now end."""
    for at in range(head, tail):
        for field in range(Q_FIELDS):
            queue[at - head, field] = queue[at, field]
    return tail - head


@jit_inline
def copy_entry(source: Array, at: int, target: Array, to: int) -> None:
    """Copy one entry from a queue's place to a queue's place."""
    for field in range(Q_FIELDS):
        target[to, field] = source[at, field]


@jit_inner
def find_entry(queue: Array, head: int, tail: int, target: int, transfer: int) -> int:
    """Return where a transfer stands in a queue sorted by (target, id), or -1 when it is not waiting there any more."""
    end = tail
    while head < tail:
        middle = (head + tail) // 2
        if queue[middle, Q_TARGET] < target or (queue[middle, Q_TARGET] == target and queue[middle, Q_ID] < transfer):
            head = middle + 1
        else:
            tail = middle
    found = head < end and queue[head, Q_ID] == transfer and queue[head, Q_LEFT] > 0
    return head if found else -1


@jit_inner
def shift_back(queue: Array, tail: int) -> None:
    """Move entries 0 to `tail` (exclusive) one place back, so that place 0 is free."""
    for at in range(tail, 0, -1):
        copy_entry(queue, at - 1, queue, at)


@jit_inner
def settle_demand(queue: Array, head: int, tail: int, moving: Array) -> None:
    """Write the rest of a cut transfer at `head` of the demands and let earlier ids pass it."""
    at = head
    while at + 1 < tail and queue[at + 1, Q_ID] < moving[0, Q_ID]:
        copy_entry(queue, at + 1, queue, at)
        at += 1
    copy_entry(moving, 0, queue, at)


@jit_inner
def settle_prefetch(queue: Array, head: int, tail: int, moving: Array) -> None:
    """Write the rest of a cut transfer at `head` of the prefetches and let what is wanted earlier pass it."""
    at = head
    target, transfer = moving[0, Q_TARGET], moving[0, Q_ID]
    while at + 1 < tail and (
        queue[at + 1, Q_TARGET] < target or (queue[at + 1, Q_TARGET] == target and queue[at + 1, Q_ID] < transfer)
    ):
        copy_entry(queue, at + 1, queue, at)
        at += 1
    copy_entry(moving, 0, queue, at)
