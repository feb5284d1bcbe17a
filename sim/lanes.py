"""SimPy lanes whose activities slow each other down, and the engine that copies.

Modelled: an activity has whole work left (nanoseconds times RATE_ONE) and a rate given by the set of busy lanes; when that
set changes, work done so far is booked at the old rate and the remaining time is rounded up to a nanosecond. Requests of
one instant are collected and one arbitration, after everything else of that instant, picks by (class, layer step, id).
Ignored: which requests there are; that is the model's business.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import simpy
from simpy.events import NORMAL

from ..base.errors import Internal
from .policies.state import DEMAND, Array
from .timeline import RATE_ONE

# SimPy settles events of one instant by priority; ours come after all of its own.
_AFTER_ALL = NORMAL + 1

Process: TypeAlias = Generator[simpy.Event, Any, None]


@dataclass(slots=True)
class Activity:
    """Something running on a lane."""

    lane: int
    work: int
    """Nanoseconds times RATE_ONE that are left since `updated`."""
    started: int
    updated: int
    rate: int
    done: simpy.Event
    version: int = 0


def at_end_of_instant(env: simpy.Environment, call: Callable[[], None]) -> None:
    """Have `call` called now, after everything else of this instant has happened."""
    event = env.event()
    event.callbacks.append(lambda _: call())
    event._ok, event._value = True, None
    env.schedule(event, priority=_AFTER_ALL)


class Lanes:
    """The lanes of one device; at most one activity runs on each."""

    def __init__(self, env: simpy.Environment, rate: Array) -> None:
        self.env = env
        self._table: list[list[int]] = rate.tolist()
        self._running: dict[int, Activity] = {}

    def busy(self, lane: int) -> bool:
        """Return whether the lane runs something."""
        return lane in self._running

    def run(self, lane: int, duration: int) -> simpy.Event:
        """Start an activity of `duration` nanoseconds at full speed; the event fires when it is done."""
        activity = Activity(lane, duration * RATE_ONE, self.env.now, self.env.now, RATE_ONE, self.env.event())
        self._running[lane] = activity
        self._change()
        return activity.done

    def _change(self) -> None:
        """Book the work done so far, set every rate anew and aim each completion at its new instant."""
        now = self.env.now
        mask = sum(1 << lane for lane in self._running)
        for activity in self._running.values():
            rate = self._table[activity.lane][mask]
            if rate == activity.rate and activity.version:
                continue  # its completion is already aimed right
            activity.work -= activity.rate * (now - activity.updated)
            activity.updated = now
            activity.rate = rate
            activity.version += 1
            left = -(-activity.work // activity.rate)
            timeout = self.env.timeout(left, value=(activity, activity.version))
            timeout.callbacks.append(self._complete)

    def _complete(self, event: simpy.Event) -> None:
        activity, version = event.value
        if activity.version != version:  # the rate changed meanwhile; a later timeout is the true one
            return
        del self._running[activity.lane]
        self._change()
        activity.done.succeed(activity)


@dataclass(slots=True)
class Transfer:
    """One expert's way over a link, perhaps in chunks."""

    id: int
    key: int
    kind: int
    target: int
    ready: Callable[[], bool]
    """Whether its slot is free to be overwritten."""
    chunks: list[tuple[int, int]]
    """(nanoseconds, bytes) of what is left."""
    arrived: simpy.Event = field(repr=False)
    read: object = None
    """The disk read it waits for, None when the host has its bytes."""
    began: int = DEMAND
    """Its class when the running chunk began: that is what the chunk's row says."""

    def order(self) -> tuple[int, int, int]:
        """Return what arbitration compares: demands by id (they are of one layer step), prefetches by layer step, then id."""
        return (self.kind, 0 if self.kind == DEMAND else self.target, self.id)


class CopyEngine:
    """Moves one chunk at a time, choosing after everything else of an instant has happened."""

    def __init__(
        self, env: simpy.Environment, lanes: Lanes, lane: int, moved: Callable[[Transfer, int, int], None]
    ) -> None:
        self.env, self._lanes, self._lane, self._moved = env, lanes, lane, moved
        self._waiting: dict[int, Transfer] = {}
        self._begun: set[int] = set()
        """Transfers of which a chunk has moved, or is moving."""
        # (order, id) of everything waiting; entries whose order has changed since are passed over.
        self._heap: list[tuple[tuple[int, int, int], int]] = []
        self._running: Transfer | None = None
        self._called = False

    def submit(self, transfer: Transfer) -> None:
        """Queue a transfer."""
        self._wait(transfer)
        self.call()

    def _wait(self, transfer: Transfer) -> None:
        self._waiting[transfer.id] = transfer
        heapq.heappush(self._heap, (transfer.order(), transfer.id))

    def untouched_prefetches(self, layer_step: int) -> list[Transfer]:
        """Return the queued prefetches for `layer_step` or earlier of which nothing has moved, in the order of their turn.

        Those that must be read from disk first are left out: their reads have been asked for.
        """
        found = [
            t
            for t in self._waiting.values()
            if t.kind != DEMAND and t.target <= layer_step and t.id not in self._begun and t.read is None
        ]
        return sorted(found, key=Transfer.order)

    def drop(self, transfer: Transfer) -> None:
        """Take a queued transfer back; one behind it, which may start at once, is looked at."""
        del self._waiting[transfer.id]
        self.call()

    def promote(self, transfer_id: int) -> None:
        """Turn a queued or running prefetch into a demand; one that has arrived is left alone."""
        if transfer_id in self._waiting:
            self._waiting[transfer_id].kind = DEMAND
            self._wait(self._waiting[transfer_id])
        elif self._running is not None and self._running.id == transfer_id:
            self._running.kind = DEMAND
        self.call()

    def call(self) -> None:
        """Ask for one arbitration at the end of this instant."""
        if not self._called and not self._lanes.busy(self._lane):
            self._called = True
            at_end_of_instant(self.env, self._arbitrate)

    def _arbitrate(self) -> None:
        self._called = False
        if self._lanes.busy(self._lane) or not self._waiting:
            return
        while self._heap[0][1] not in self._waiting or self._waiting[self._heap[0][1]].order() != self._heap[0][0]:
            heapq.heappop(self._heap)
        first = self._waiting[self._heap[0][1]]
        if first.ready():
            heapq.heappop(self._heap)
            del self._waiting[first.id]
            self._running = first
            first.began = first.kind
            self._begun.add(first.id)
            done = self._lanes.run(self._lane, first.chunks[0][0])
            done.callbacks.append(self._chunk_done)

    def _chunk_done(self, event: simpy.Event) -> None:
        transfer, self._running = self._running, None
        if transfer is None:
            raise Internal("a copy ended that never began")
        _, num_bytes = transfer.chunks.pop(0)
        self._moved(transfer, event.value.started, num_bytes)
        if transfer.chunks:
            self._wait(transfer)
        else:
            self._begun.discard(transfer.id)
            transfer.arrived.succeed()
        self.call()
