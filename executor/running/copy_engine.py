"""The worker thread that moves experts to the device, one piece at a time, and the one that moves evicted ones back.

Modelled: as in the simulator, the engine chooses when it is free, not when something is submitted; a transfer whose
slot is still read or written back, or whose bytes are still being read from disk (`host_tier`), holds up those behind it; a
transfer cut into pieces goes back in line after each.
On the CPU a piece is copied when the call returns. On CUDA pieces are asynchronous: up to two are in flight, so that
the link never waits for the host, but a whole prefetch is only started on an idle link, because a demand that comes
next must not wait for it. Ignored: what is decided (`sim.policies`), schedules without overlap (`stream_copies`).

A failure in a worker is kept, wakes everybody, and is raised in the program's thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ...base.units import MIB
from ...devices.device import TO_DEVICE, TO_HOST, Device, Mark, preemptions
from ...devices.stores.host import ExpertStore
from ...sim.policies.state import DEMAND
from .failures import ExecutionFailed
from .rows import Rows
from .slots import POISON, Slots
from .transfers import Transfer, Waiting, WriteBack

if TYPE_CHECKING:
    from .host_tier import HostTier

_IN_FLIGHT = 2
# A prefetch piece up to this size may wait behind another one in the stream: at 25 GB/s it delays a demand by 160 µs.
_SMALL_PIECE_BYTES = 4 * MIB
_STALL_LIMIT_S = 120.0
_LOOK_S = 1.0
_JOIN_S = 30.0


class Gate:
    """What the program and the workers share: how far kernels and write-backs are, and whether something went wrong."""

    def __init__(self) -> None:
        self.change = threading.Condition()
        self.kernels: list[Mark] = []
        self.backs: list[Mark] = []
        self.blocked = 0
        """Workers that wait with something to do: a kernel may be what they wait for. To wake the others costs the program its turn."""
        self.failure: BaseException | None = None
        self.stopping = False
        self.moved_at_s = time.monotonic()

    def kernel_launched(self, end: Mark) -> None:
        """Note that the next kernel is in the stream, and where it ends."""
        with self.change:
            self.kernels.append(end)
            self.moved_at_s = time.monotonic()  # where everything is on the device, nothing else moves
            if self.blocked:
                self.change.notify_all()

    def wait_for_change(self, *, blocked: bool) -> None:
        """Block a worker that holds `change` until something changes; blocked: it has something to do that waits for a kernel."""
        self.blocked += blocked
        try:
            self.change.wait()
        finally:
            self.blocked -= blocked

    def fail(self, error: BaseException) -> None:
        """Keep the first failure and wake everybody."""
        with self.change:
            self.failure = self.failure or error
            self.change.notify_all()

    def check(self) -> None:
        """Return nothing; raises ExecutionFailed when a worker failed or nothing has moved for long."""
        if isinstance(self.failure, ExecutionFailed):
            raise self.failure
        if self.failure is not None:
            raise ExecutionFailed(
                f"a copy failed ({self.failure})", "check memory and disk, or lower the cache size"
            ) from self.failure
        if time.monotonic() - self.moved_at_s > _STALL_LIMIT_S:
            raise ExecutionFailed(f"no expert has moved for {_STALL_LIMIT_S:.0f} s", "please report this")

    def wait_for(self, transfer: Transfer) -> None:
        """Block until `transfer` is in its stream as a whole (on the CPU: has arrived); raises ExecutionFailed."""
        while not transfer.issued.wait(_LOOK_S):
            self.check()
            if self.stopping:
                raise ExecutionFailed("it was stopped while a copy was waited for", "run it again")
        if transfer.end is None:
            self.check()

    def slot_is_free(self, kernel: int, back: int) -> bool:
        """Return whether the kernel and the write-back that used a slot are in their streams (on the CPU: done)."""
        return kernel < len(self.kernels) and back < len(self.backs)


class CopyEngine:
    """Moves experts to the device on a thread of its own."""

    def __init__(
        self,
        device: Device,
        stores: Sequence[ExpertStore],
        slots: Slots,
        gate: Gate,
        *,
        piece_bytes: int | None,
        poison: bool = False,
        tier: HostTier | None = None,
    ) -> None:
        self._device, self._stores, self._slots, self._gate, self._tier = device, stores, slots, gate, tier
        self._piece = piece_bytes or slots.slot_bytes
        self._poison = poison
        self._waiting = Waiting()
        self._running: Transfer | None = None
        self._in_flight: deque[Mark] = deque()
        self.rows = Rows()
        self.preempted = 0
        """How often the system has taken the worker's core away so far."""
        self._thread = threading.Thread(target=self._work, name="moeplan copies", daemon=True)
        self._thread.start()

    # --- called by the program ---------------------------------------------------------------------------------------

    def submit(self, transfer: Transfer) -> None:
        """Queue a transfer."""
        with self._gate.change:
            if self._tier is not None:
                self._tier.submit(transfer)
            self._waiting.add(transfer)
            self._gate.moved_at_s = time.monotonic()
            self._gate.change.notify_all()

    def promote(self, transfer_ids: list[int]) -> None:
        """Turn queued or running prefetches into demands; those that have arrived are left alone."""
        with self._gate.change:
            for number in transfer_ids:
                if not self._waiting.promote(number) and self._running is not None and self._running.id == number:
                    self._running.kind = DEMAND

    def release(self, transfers: list[Transfer]) -> None:
        """Take back the transient buffers of transfers whose layer step is over."""
        with self._gate.change:
            for transfer in transfers:
                self._slots.give_back(transfer)

    def cancel(self, layer_step: int, agreed: Callable[[Transfer], bool]) -> list[Transfer]:
        """Take back the guesses for `layer_step` or earlier that have not begun and that `agreed` lets go; return them."""
        with self._gate.change:
            gone = [transfer for transfer in self._waiting.untouched(layer_step) if agreed(transfer)]
            for transfer in gone:
                self._waiting.drop(transfer)
                if self._tier is not None:
                    self._tier.lets_go(transfer)
            self._gate.change.notify_all()
        return gone

    def drain(self) -> None:
        """Block until everything admitted has been moved; raises ExecutionFailed."""
        with self._gate.change:
            while len(self._waiting) or self._running is not None or (self._tier is not None and self._tier.is_reading):
                self._gate.change.wait(_LOOK_S)
                self._gate.check()
        for mark in list(self._in_flight):  # they are the worker's to take out: it may be doing so now
            mark.wait()
        self._gate.check()

    def close(self) -> None:
        """Stop the thread, whatever it still has to do."""
        with self._gate.change:
            self._gate.stopping = True
            self._gate.change.notify_all()
        self._thread.join(_JOIN_S)

    # --- the worker --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with self._device.enter(TO_DEVICE):
                while (transfer := self._next()) is not None:
                    self._move(transfer)
        except BaseException as error:  # noqa: BLE001 - whatever happens here must be raised in the program's thread
            self._gate.fail(error)
            self._wake_all()

    def _next(self) -> Transfer | None:
        """Return the transfer to move a piece of, taken out of the line; None when the run is over."""
        while True:
            while len(self._in_flight) >= _IN_FLIGHT:
                self._in_flight.popleft().wait()
            with self._gate.change:
                if self._gate.stopping:
                    return None
                first = self._startable()
                if first is None:
                    self._gate.wait_for_change(blocked=len(self._waiting) > 0)
                    continue
                if not self._in_flight or first.kind == DEMAND or self._piece <= _SMALL_PIECE_BYTES:
                    self._waiting.take(first)
                    self._running = first
                    return first
            self._in_flight.popleft().wait()

    def _startable(self) -> Transfer | None:
        """Return the transfer whose turn it is if it may start; or, where the disk's reader has no buffer, one that frees one."""
        first = self._waiting.first()
        if first is None or self._may_start(first):
            return first
        if self._tier is None or not self._tier.starved:
            return None
        tier = self._tier
        return next((one for one in self._waiting if tier.makes_room(one) and self._may_start(one)), None)

    def _may_start(self, transfer: Transfer) -> bool:
        """Return whether a transfer's slot is free and its bytes are in memory."""
        free = self._gate.slot_is_free(transfer.wait_kernel, transfer.wait_back)
        return free and (self._tier is None or self._tier.is_readable(transfer))

    def _move(self, transfer: Transfer) -> None:
        device, gate = self._device, self._gate
        began = transfer.kind
        with gate.change:
            slot = self._slots.destination(transfer)
        target = self._slots.bytes_of(slot)
        low = transfer.moved_bytes
        high = min(low + self._piece, transfer.num_bytes)
        if low == 0:  # whatever used the slot before is in its stream by now; this stream goes behind it
            if transfer.wait_kernel >= 0:
                device.follow(gate.kernels[transfer.wait_kernel])
            if transfer.wait_back >= 0:
                device.follow(gate.backs[transfer.wait_back])
            if self._poison:
                target.fill_(POISON)
        begin = device.mark()
        if self._tier is None:
            self._stores[transfer.format].bring(device, target, transfer.key, low, high)
        else:
            device.copy(target[low:high], self._tier.source(transfer)[low:high])
        end = device.mark()
        if device.asynchronous:
            self._in_flight.append(end)
        self.rows.copied(transfer, began, begin, end, high - low)
        self.preempted = preemptions()
        with gate.change:
            transfer.moved_bytes = high
            self._running = None
            gate.moved_at_s = time.monotonic()
            if high < transfer.num_bytes:
                self._waiting.add(transfer)
            else:
                transfer.end = end
                transfer.issued.set()
                if self._tier is not None:
                    self._tier.has_left(transfer, end)
            gate.change.notify_all()

    def _wake_all(self) -> None:
        """Let everybody who waits for a transfer see the failure."""
        with self._gate.change:
            if self._running is not None:
                self._running.issued.set()
            for transfer in self._waiting:
                transfer.issued.set()


class BackEngine:
    """Moves evicted experts to the host, in order, on a thread of its own."""

    def __init__(self, device: Device, stores: Sequence[ExpertStore], slots: Slots, gate: Gate) -> None:
        self._device, self._stores, self._slots, self._gate = device, stores, slots, gate
        self._waiting: deque[WriteBack] = deque()
        self._busy = False
        self.rows = Rows()
        self._thread = threading.Thread(target=self._work, name="moeplan write-backs", daemon=True)
        self._thread.start()

    def submit(self, back: WriteBack) -> None:
        """Queue a write-back."""
        with self._gate.change:
            self._waiting.append(back)
            self._gate.change.notify_all()

    def drain(self) -> None:
        """Block until everything is back; raises ExecutionFailed."""
        with self._gate.change:
            while self._waiting or self._busy:
                self._gate.change.wait(_LOOK_S)
                self._gate.check()
        if self._gate.backs:
            self._gate.backs[-1].wait()

    def close(self) -> None:
        """Stop the thread."""
        with self._gate.change:
            self._gate.stopping = True
            self._gate.change.notify_all()
        self._thread.join(_JOIN_S)

    def _work(self) -> None:
        try:
            with self._device.enter(TO_HOST):
                while (back := self._next()) is not None:
                    self._move(back)
        except BaseException as error:  # noqa: BLE001 - raised in the program's thread
            self._gate.fail(error)

    def _next(self) -> WriteBack | None:
        with self._gate.change:
            while not self._gate.stopping:
                if self._waiting and self._waiting[0].wait_kernel < len(self._gate.kernels):
                    self._busy = True
                    return self._waiting.popleft()
                self._gate.wait_for_change(blocked=len(self._waiting) > 0)
        return None

    def _move(self, back: WriteBack) -> None:
        device = self._device
        if back.wait_kernel >= 0:
            device.follow(self._gate.kernels[back.wait_kernel])
        begin = device.mark()
        source = self._slots.bytes_of(back.slot)[: back.num_bytes]
        self._stores[back.format].take_back(device, source, back.key)
        end = device.mark()
        self.rows.written_back(back, begin, end, back.num_bytes)
        with self._gate.change:
            self._gate.backs.append(end)
            self._busy = False
            self._gate.moved_at_s = time.monotonic()
            self._gate.change.notify_all()
