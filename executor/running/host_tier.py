"""Host memory as a bounded cache above a file of experts: which buffer holds which expert, and the thread that reads them.

Modelled: `sim.policies.host_tier` decides which experts the host holds and which copy needs a read; here are their bytes. An
expert's stay in memory is a `Held`: it begins with a read (or before the run) and ends when the policy has dropped the expert
and every copy from it has left. Reads are done one at a time in the order in which their copies were submitted, each into a
free buffer; there are a few more buffers than the policy counts, because a dropped expert's copy may still be queued. When
even these are taken, the copy engine moves dropped experts first, out of their turn, so that nobody waits for ever. A copy of
an expert whose read has not ended waits for it even where the policy asked for no read of its own; the simulator lets such
a copy go. Ignored: writing back to the file, schedules on one stream (both are refused by the schedule's own rules).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...devices.device import TO_HOST, Device, Mark
from ...devices.stores.disk import DiskStore
from ...sim.offload.simulators import decided_layer_steps
from ...sim.offload.workload import Workload
from ...sim.policies.state import Decision, PolicyConfig, PolicyState
from .copy_engine import Gate
from .failures import ExecutionFailed
from .rows import Rows
from .transfers import Transfer

LEAST_SPARE = 2
_LOOK_S = 1.0
_JOIN_S = 30.0


@dataclass(slots=True, eq=False)
class Held:
    """One expert's stay in the host's memory."""

    key: int
    step: int
    """Forward pass that asked for the read."""
    place: int = -1
    """Buffer, -1 until it has been read."""
    kept: bool = True
    """The policy still counts it as held."""
    asked: bool = False
    """Its read has been submitted."""
    copies: int = 0
    """Copies from it that have not left."""
    end: Mark | None = None
    """Where the last copy that has left ends."""


class HostTier:
    """The buffers, and a thread that fills them from the file.

    Made with the state in which the run begins: what the policy holds then is read at once, before anything is timed.
    """

    def __init__(
        self, device: Device, file: DiskStore, gate: Gate, state: PolicyState, *, num_spare: int, pinned: bool
    ) -> None:
        """Raises DoesNotFit where the host has too little memory, ExecutionFailed where the file cannot be read."""
        self._device, self._file, self._gate, self._state = device, file, gate, state
        first = np.flatnonzero(state.experts["in_host"]).tolist()
        count = len(first) + max(LEAST_SPARE, num_spare)
        self._memory = device.host_memory(
            count * file.slot_bytes, pinned=pinned, what=f"a host cache of {len(first)} experts"
        )
        self._memory.zero_()  # every page exists before anything is timed
        self._places = self._memory.view(count, file.slot_bytes)
        self._held: dict[int, Held] = {}
        self._free: deque[tuple[int, Mark | None]] = deque((place, None) for place in range(len(first), count))
        """Buffers that nobody will copy from any more, each once its mark is passed."""
        self._reads: deque[Held] = deque()
        self._reading = False
        self.starved = False
        """The next read has no buffer."""
        self.rows = Rows()
        self.most_taken = len(first)
        """Buffers in use at the same time, at most."""
        try:
            for place, key in enumerate(first):
                file.forget(key)
                file.read(self._places[place], key)
                self._held[key] = Held(key=key, step=0, place=place, asked=True)
        except OSError as error:
            self._release()
            raise _unreadable(error) from error
        self._thread = threading.Thread(target=self._work, name="moeplan disk", daemon=True)
        self._thread.start()

    @property
    def num_bytes(self) -> int:
        """Host memory taken."""
        return self._memory.numel()

    # --- called by the program ---------------------------------------------------------------------------------------

    def assign(self, step: int, out: Decision, transfers: Sequence[Transfer]) -> None:
        """Tell this layer step's transfers where their bytes come from, as the layer step's decision has it."""
        reads = out.moves["read"][: out.size[0].moves].tolist()
        with self._gate.change:
            for transfer, read in zip(transfers, reads, strict=True):
                if read >= 0:
                    before = self._held.pop(transfer.key, None)
                    if before is not None:  # dropped by this very layer step, and wanted again
                        self._drop(before)
                    self._held[transfer.key] = Held(key=transfer.key, step=step)
                held = self._held[transfer.key]
                held.copies += 1
                transfer.held, transfer.reads = held, read >= 0
            if max(reads, default=-1) >= 0:  # only a read drops anyone
                for key in [key for key in self._held if not self._state.experts["in_host"][key]]:
                    self._drop(self._held.pop(key))

    def _drop(self, held: Held) -> None:
        held.kept = False
        self._free_if_done(held)

    # --- called by the copy engine, which holds the gate --------------------------------------------------------------

    def submit(self, transfer: Transfer) -> None:
        """Queue the read that a transfer begins with, where it has one of its own."""
        held = transfer.held
        if held is not None and not held.asked:
            held.asked = True
            self._reads.append(held)
            self._gate.change.notify_all()

    def is_readable(self, transfer: Transfer) -> bool:
        """Return whether the host has a transfer's bytes."""
        return transfer.held is None or transfer.held.place >= 0

    def makes_room(self, transfer: Transfer) -> bool:
        """Return whether moving this transfer, out of its turn, helps a reader that has no buffer."""
        held = transfer.held
        return self.starved and held is not None and held.place >= 0 and not held.kept

    def source(self, transfer: Transfer) -> torch.Tensor:
        """Return uint8 [slot_bytes]: where a readable transfer's bytes lie."""
        if transfer.held is None:
            raise ExecutionFailed("a copy has no buffer in the host's memory", "please report this")
        return self._places[transfer.held.place]

    def has_left(self, transfer: Transfer, end: Mark) -> None:
        """Note that the last piece of a transfer is in its stream, up to `end`."""
        held = transfer.held
        if held is not None:
            held.copies -= 1
            held.end = end
            self._free_if_done(held)

    def lets_go(self, transfer: Transfer) -> None:
        """Note that a transfer was taken back before it began."""
        held = transfer.held
        if held is not None:
            held.copies -= 1
            self._free_if_done(held)

    @property
    def is_reading(self) -> bool:
        """Return whether any read is not done yet."""
        return self._reading or bool(self._reads)

    def _free_if_done(self, held: Held) -> None:
        if not held.kept and held.copies == 0 and held.place >= 0:
            self._free.append((held.place, held.end))
            held.place = -1
            self._gate.change.notify_all()

    # --- the reader --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with self._device.enter(TO_HOST):
                while (found := self._next()) is not None:
                    self._read(*found)
        except OSError as error:
            self._gate.fail(_unreadable(error))
        except BaseException as error:  # noqa: BLE001 - raised in the program's thread
            self._gate.fail(error)

    def _next(self) -> tuple[Held, int, Mark | None] | None:
        """Return the next read and the buffer it goes to, None when the run is over."""
        with self._gate.change:
            while not self._gate.stopping:
                if self._reads and self._free:
                    self.starved, self._reading = False, True
                    return self._reads.popleft(), *self._free.popleft()
                if self._reads and not self.starved:
                    self.starved = True
                    self._gate.change.notify_all()
                self._gate.change.wait(_LOOK_S)
        return None

    def _read(self, held: Held, place: int, free: Mark | None) -> None:
        if free is not None:
            free.wait()
        self._file.forget(held.key)
        begin = time.perf_counter_ns()
        self._file.read(self._places[place], held.key)
        self.rows.read(held.step, held.key, begin, time.perf_counter_ns(), self._file.slot_bytes)
        with self._gate.change:
            held.place, self._reading = place, False
            self.most_taken = max(self.most_taken, len(self._places) - len(self._free))
            self._free_if_done(held)
            self._gate.moved_at_s = time.monotonic()
            self._gate.change.notify_all()

    def close(self) -> None:
        """Stop the thread, whatever it still has to do, and give the buffers back; the copy engine must have stopped."""
        with self._gate.change:
            self._gate.stopping = True
            self._gate.change.notify_all()
        self._thread.join(_JOIN_S)
        with contextlib.suppress(RuntimeError):  # a device may still be copying from them
            self._device.synchronize()
        self._release()

    def _release(self) -> None:
        self._device.release_host(self._memory)
        self._held.clear()


def most_reads(config: PolicyConfig, workload: Workload, state: PolicyState) -> int:
    """Return the most reads that one layer step asks for; `state` is one in which the run begins, and is used up."""
    most, before = 0, int(state.counts[0].disk_reads)
    for _ in decided_layer_steps(config, workload, state):
        reads = int(state.counts[0].disk_reads)
        most, before = max(most, reads - before), reads
    return most


def _unreadable(error: OSError) -> ExecutionFailed:
    reason = error.strerror.lower() if error.strerror else str(error)
    return ExecutionFailed(f"an expert could not be read from disk ({reason})", "check the disk, then run it again")
