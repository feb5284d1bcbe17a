"""Moves of experts on the compute stream itself: what a schedule without overlap does.

Modelled: a copy handed over runs where it stands in the program, between the kernels before and after it; nothing
waits for a slot, because everything that used it stands earlier in the same stream. Ignored: priorities; there is only
program order.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...devices.device import Device
from ...devices.stores.host import ExpertStore
from .copy_engine import Gate
from .rows import Rows
from .slots import POISON, Slots
from .transfers import Transfer, WriteBack


class StreamCopies:
    """Copies on the calling thread's stream."""

    def __init__(
        self,
        device: Device,
        stores: Sequence[ExpertStore],
        slots: Slots,
        gate: Gate,
        *,
        piece_bytes: int | None,
        poison: bool = False,
    ) -> None:
        self._device, self._stores, self._slots, self._gate = device, stores, slots, gate
        self._piece = piece_bytes or slots.slot_bytes
        self._poison = poison
        self.rows = Rows()
        self.preempted = 0
        """Of its own: nothing, it has no thread."""

    def put(self, copy: Transfer | WriteBack) -> None:
        """Put a copy into the stream now."""
        device = self._device
        if isinstance(copy, WriteBack):
            begin = device.mark()
            source = self._slots.bytes_of(copy.slot)[: copy.num_bytes]
            self._stores[copy.format].take_back(device, source, copy.key)
            end = device.mark()
            self.rows.written_back(copy, begin, end, copy.num_bytes)
            self._gate.backs.append(end)
            return
        target = self._slots.bytes_of(self._slots.destination(copy))
        if self._poison:
            target.fill_(POISON)
        begin = device.mark()
        while copy.moved_bytes < copy.num_bytes:
            low, high = copy.moved_bytes, min(copy.moved_bytes + self._piece, copy.num_bytes)
            self._stores[copy.format].bring(device, target, copy.key, low, high)
            end = device.mark()
            self.rows.copied(copy, copy.kind, begin, end, high - low)
            begin, copy.moved_bytes, copy.end = end, high, end
        copy.issued.set()

    def release(self, transfers: list[Transfer]) -> None:
        """Take back the transient buffers of transfers whose layer step is over."""
        for transfer in transfers:
            self._slots.give_back(transfer)

    def drain(self) -> None:
        """Block until everything is done."""
        self._device.synchronize()

    def close(self) -> None:
        """Nothing to stop."""
