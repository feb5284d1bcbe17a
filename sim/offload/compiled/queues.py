"""The queues of the compiled simulator: entries between a head and a tail, in the order in which they are served.

Modelled: demands in order of submission; prefetches by (layer step they are for, id); write-backs and disk reads first come,
first served. Ignored: growth: a queue that outgrows its room stops the run, which is then repeated with more.
"""

from __future__ import annotations

from ....base.jit import jit_inline, jit_inner
from ....base.records import Array
from ..run_records import Queue


@jit_inner
def _pack(queue: Queue) -> None:
    """Move a queue's entries to its front."""
    entries, ends = queue.entries, queue.ends[0]
    head = ends.head
    for at in range(head, ends.tail):
        entries[at - head] = entries[at]
    ends.tail -= head
    ends.head = 0


@jit_inline
def place_behind(queue: Queue) -> int:
    """Return the place of one more entry at the end of a queue, -1 when it has no room left."""
    ends = queue.ends[0]
    if ends.head == ends.tail:
        ends.head = 0
        ends.tail = 0
    if ends.tail == queue.entries.shape[0]:
        _pack(queue)
        if ends.tail == queue.entries.shape[0]:
            return -1
    at = ends.tail
    ends.tail = at + 1
    return int(at)


@jit_inline
def place_before(queue: Queue) -> int:
    """Return the place of one more entry at the beginning of a queue, -1 when it has no room left."""
    entries, ends = queue.entries, queue.ends[0]
    if ends.head == 0:
        if ends.tail == entries.shape[0]:
            return -1
        for at in range(ends.tail, 0, -1):
            entries[at] = entries[at - 1]
        ends.tail += 1
        ends.head = 1
    ends.head -= 1
    return int(ends.head)


@jit_inner
def find_guess(queue: Queue, target: int, transfer: int) -> int:
    """Return where a transfer stands in a queue sorted by (target, id), or -1 when it is not waiting there any more."""
    entries = queue.entries
    head, end = queue.ends[0].head, queue.ends[0].tail
    tail = end
    while head < tail:
        middle = (head + tail) // 2
        if entries[middle].target < target or (entries[middle].target == target and entries[middle].id < transfer):
            head = middle + 1
        else:
            tail = middle
    found = head < end and entries[head].id == transfer and entries[head].left > 0
    return head if found else -1


@jit_inner
def settle_demand(queue: Queue, moving: Array) -> None:
    """Write the rest of a cut transfer at the head of the demands and let earlier ids pass it."""
    entries, tail = queue.entries, queue.ends[0].tail
    at = queue.ends[0].head
    while at + 1 < tail and entries[at + 1].id < moving[0].id:
        entries[at] = entries[at + 1]
        at += 1
    entries[at] = moving[0]


@jit_inner
def settle_guess(queue: Queue, moving: Array) -> None:
    """Write the rest of a cut transfer at the head of the prefetches and let what is wanted earlier pass it."""
    entries, tail = queue.entries, queue.ends[0].tail
    at = queue.ends[0].head
    target, transfer = moving[0].target, moving[0].id
    while at + 1 < tail and (
        entries[at + 1].target < target or (entries[at + 1].target == target and entries[at + 1].id < transfer)
    ):
        entries[at] = entries[at + 1]
        at += 1
    entries[at] = moving[0]
