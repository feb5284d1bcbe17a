"""The SimPy model of one device whose experts do not all fit: the readable reference of the compiled simulator.

Modelled: one host program (launch the dense part, wait for its routing, decide, submit copies, launch experts, go on), a
compute stream that runs launches in program order and waits for the bytes they need, a host→device engine (demands before
prefetches), a device→host engine for write-backs, the host's cores for misses that are not fetched, and a disk in order of
submission. Ignored: the contents of decisions (`policies.offload`), and what
anything costs (`costs`). Life of one layer step:

1. The host launches the dense part; the stream runs it once the kernels before it are done.
2. The host learns the routing (`per_layer`), and the layer step is decided.
3. Prefetches that are awaited, or in the way, are promoted; misses, then prefetches are submitted one by one (`per_transfer` each).
4. The host launches the experts' kernels (`per_kernel` each) and the next dense part without waiting for them.
5. Each kernel runs when its experts have arrived and the stream is free.
6. The next dense part, or the head, runs when also the guesses have arrived whose places this layer step gave to others.
"""

from __future__ import annotations

import itertools

from collections import deque
from collections.abc import Callable

import numpy as np
import simpy

from .compiled.rows import kernel_work
from ..timeline import COMPUTE, CPU, D2H, DISK, H2D, HOST
from .costs import HOST_COSTS, CostTables
from .simpy_work import Back, Launch, Read
from ..lanes import CopyEngine, Lanes, Process, Transfer
from ..policies.offload import begin_step, cancel_prefetch, decide_layer_step
from ..policies.state import (
    DEMAND, NONE, Array, Decided, Decision, PolicyConfig, PolicyState, read_decision,
)  # fmt: skip
from ..timeline import (
    OP_BACK, OP_CPU, OP_DEMAND, OP_DENSE, OP_DISK, OP_EXPERT, OP_HEAD, OP_HOST_LAUNCH, OP_HOST_LAYER, OP_HOST_STEP, OP_HOST_SUBMIT,
    OP_PREFETCH,
    LANE_NAMES, OP_NAMES, ROW_FIELDS,
)  # fmt: skip
from ..policies.steps import Steps


class OffloadModel:
    """One run; `run()` returns rows, step ends and the makespan."""

    def __init__(self, config: PolicyConfig, steps: Steps, costs: CostTables, state: PolicyState, out: Decision, *,
                 serial: bool, keep_rows: bool = True) -> None:  # fmt: skip
        self.env = simpy.Environment()
        self.config, self.steps, self.costs, self.state, self.out, self.serial = (
            config,
            steps,
            costs,
            state,
            out,
            serial,
        )
        self.lanes = Lanes(self.env, costs.rate)
        self.rows: list[tuple[int, ...]] = []
        self.busy = [0] * len(OP_NAMES)
        """Time of each operation over all rows, kept or not."""
        self.moved_bytes = [0] * len(LANE_NAMES)
        self.bytes_after = [0] * len(LANE_NAMES)
        """The part of the bytes moved that moved after the last step had ended."""
        self._end: int | None = None
        self._keep_rows = keep_rows
        self.kernels_done = 0
        self.backs_done = 0
        self.reads_done = 0
        self.ready_hits = 0
        self.late_hits = 0
        self.copies = CopyEngine(self.env, self.lanes, H2D, self._moved)
        self._stream: deque[Launch | Transfer | Back] = deque()
        self._stream_call = self.env.event()
        self._awaited: dict[int, simpy.Event] = {}
        self._backs: deque[Back] = deque()
        self._back_call = self.env.event()
        self._reads: deque[Read] = deque()
        self._read_call = self.env.event()
        self._read_done = self.env.event()
        self._cores: list[simpy.Event] = []
        """The host's cores at work: what the next operation of the stream that is no expert's must wait for."""
        self._cores_end = 0
        self._clearing: list[simpy.Event] = []
        """Guesses whose places were given away: the same operation waits for their arrival."""
        self._host = {name: int(costs.host_ns[0][name]) for name in HOST_COSTS.names or ()}
        self.stall_copy = 0
        self.stall_host = 0
        self.stall_cpu = 0
        self._compute_end = 0
        self._copied = 0
        self._last = 0

    def run(self) -> tuple[Array, Array, int]:
        """Return (rows [num_rows, ROW_FIELDS] unsorted, none unless kept; step_end [num_steps]; makespan), in nanoseconds."""
        self._step_end = np.zeros(self.steps.step_phase.shape[0], np.int64)
        self.env.process(self._stream_process())
        self.env.process(self._back_process())
        self.env.process(self._disk_process())
        self.env.run(self.env.process(self._host_program()))
        self.env.run()  # transfers that were admitted finish, wanted or not
        rows = np.array(self.rows, np.int64).reshape(-1, ROW_FIELDS)
        return rows, self._step_end, max(self._last, int(self._step_end[-1]) if len(self._step_end) else 0)

    # --- the host ---------------------------------------------------------------------------------------------------

    def _host_program(self) -> Process:
        for step in range(self.steps.step_phase.shape[0]):
            begin_step(self.config, self.steps, self.state, step)
            tokens = int(self.steps.step_start[step + 1] - self.steps.step_start[step])
            line = int(self.costs.step_class[step])
            for layer in range(self.config.num_layers):
                yield from self._host_time("kernel", OP_HOST_LAUNCH, step, max(layer - 1, 0))
                dense = self._launch(OP_DENSE, step, layer, -1, tokens, int(self.costs.dense_ns[line, layer]), [])
                yield dense.done
                yield from self._layer_step(step, layer)
            yield from self._host_time("kernel", OP_HOST_LAUNCH, step, self.config.num_layers - 1)
            head = self._launch(
                OP_HEAD, step, self.config.num_layers - 1, -1, tokens, int(self.costs.head_ns[line]), []
            )
            yield head.done
            yield from self._host_time("step", OP_HOST_STEP, step, self.config.num_layers - 1)
            self._step_end[step] = self.env.now
        self._end = self.env.now

    def _layer_step(self, step: int, layer: int) -> Process:
        """Decide one layer step, submit its copies and launch its kernels; the kernels run on while the host goes on."""
        if self.config.cancel:
            self._cancel_wrong_guesses(step, layer)
        decide_layer_step(self.config, self.steps, self.state, self.out, step, layer)
        decided = read_decision(self.out)
        self._count_late(decided)
        yield from self._host_time("layer", OP_HOST_LAYER, step, layer)
        if decided.cores:
            self._cores_end = 0
            for item in decided.cores:
                if item.read >= 0:
                    self._ask_disk(Read(layer * self.config.num_experts + item.expert, item.format, step))
            self._cores = [self.env.process(self._run_on_cores(step, layer, decided))]
        for promotion in decided.promotions:
            self.copies.promote(promotion.transfer)
        moves = self._transfers(step, decided)
        backs = [
            Back(decided.size.first_back + at, back.key, back.format, step, back.wait_kernel)
            for at, back in enumerate(decided.backs)
        ]
        self._clearing = self._demanded_guesses(decided)
        launches = self._kernels(step, layer, decided)
        if (
            self.config.policy == NONE and launches
        ):  # without a cache a block that was fetched ahead is waited for as a whole
            launches[0].needs += self._clearing
        in_stream: list[list[Transfer | Back]] = [[] for _ in range(len(launches) + 1)]
        back = 0
        for move, transfer in enumerate(moves):
            due: list[Transfer | Back] = []
            while back < len(backs) and decided.backs[back].move <= move:
                due.append(backs[back])
                back += 1
            place = decided.moves[move].kernel if transfer.kind == DEMAND else len(launches)
            for copy in (*due, transfer):
                yield from self._host_time("transfer", OP_HOST_SUBMIT, step, layer)
                self._submit(copy, in_stream[place], at_once=place == 0)
        for copy in backs[back:]:
            yield from self._host_time("transfer", OP_HOST_SUBMIT, step, layer)
            self._submit(copy, in_stream[-1], at_once=False)
        for place, launch in enumerate(launches):
            for entry in in_stream[place]:
                self._enqueue(entry)
            yield from self._host_time("kernel", OP_HOST_LAUNCH, step, layer)
            self._put(launch)
        for entry in in_stream[-1]:
            self._enqueue(entry)

    def _host_time(self, kind: str, op: int, step: int, layer: int) -> Process:
        if self._host[kind]:
            begin = self.env.now
            yield self.env.timeout(self._host[kind])
            self._row(HOST, op, step, layer, -1, begin)

    def _count_late(self, decided: Decided) -> None:
        """Count guessed hits by whether their bytes have arrived at the moment of the decision."""
        for item in decided.items:
            if 0 <= item.transfer < decided.size.first_transfer:
                if self.serial or self._awaited[item.transfer].triggered:
                    self.ready_hits += 1
                else:
                    self.late_hits += 1

    def _demanded_guesses(self, decided: Decided) -> list[simpy.Event]:
        """Return the arrivals of earlier transfers that this layer step demands, used or not."""
        if self.serial:
            return []  # on one stream they stand before whatever comes now
        return [self._awaited[promotion.transfer] for promotion in decided.promotions]

    def _transfers(self, step: int, decided: Decided) -> list[Transfer]:
        """Return this layer step's transfers, each knowing what must be done with its slot before it may start."""
        costs, found = self.costs, []
        for number, move in enumerate(decided.moves, decided.size.first_transfer):
            fmt = move.format
            count = int(costs.num_chunks[fmt])
            chunks = [
                (int(costs.chunk_ns[fmt, int(c == count - 1)]), int(costs.chunk_bytes[fmt, int(c == count - 1)]))
                for c in range(count)
            ]
            self._awaited[number] = self.env.event()
            found.append(
                Transfer(number, move.key, move.kind, move.target, self._slot_free(move.wait_kernel, move.wait_back, move.read),
                         chunks, self._awaited[number], read=Read(move.key, fmt, step) if move.read >= 0 else None)
            )  # fmt: skip
        return found

    def _slot_free(self, kernel: int, back: int, read: int) -> Callable[[], bool]:
        """Return whether, when asked, the slot's last kernel and last write-back are done with it, and the bytes are read."""
        return lambda: self.kernels_done > kernel and self.backs_done > back and self.reads_done > read

    def _cancel_wrong_guesses(self, step: int, layer: int) -> None:
        """Drop prefetches for this layer step that have not begun and turn out wrong."""
        layer_step = self.steps.first_layer_step + step * self.config.num_layers + layer
        for transfer in self.copies.untouched_prefetches(layer_step):
            if cancel_prefetch(self.config, self.steps, self.state, step, layer, transfer.key, transfer.id):
                self.copies.drop(transfer)
                self._awaited.pop(transfer.id, None)

    def _kernels(self, step: int, layer: int, decided: Decided) -> list[Launch]:
        """Return this layer step's launches with the arrivals each must wait for."""
        launches, first = [], 0
        for _, grouped in itertools.groupby(decided.items, lambda item: item.kernel):
            items = list(grouped)
            expert = items[0].expert if len(items) == 1 else -1
            work = int(kernel_work(self.costs, self.out, first, first + len(items)))
            needs = [] if self.serial else [self._awaited[item.transfer] for item in items if item.transfer >= 0]
            tokens = sum(item.tokens for item in items)
            launches.append(Launch(OP_EXPERT, step, layer, expert, tokens, work, needs, self.env.event()))
            first += len(items)
        for line in (*decided.items, *decided.promotions):
            self._awaited.pop(line.transfer, None)  # nobody will wait for it again
        return launches

    # --- the device -------------------------------------------------------------------------------------------------

    def _submit(self, copy: Transfer | Back, in_stream: list[Transfer | Back], *, at_once: bool) -> None:
        """Hand a copy to its engine or, on one stream, put it there at once or keep it for its place between kernels."""
        if self.serial:
            if at_once:
                self._enqueue(copy)
            else:
                in_stream.append(copy)
        elif isinstance(copy, Transfer):
            if isinstance(copy.read, Read):
                self._ask_disk(copy.read)
            self.copies.submit(copy)
        else:
            self._backs.append(copy)
            self._call_back()

    def _launch(
        self, op: int, step: int, layer: int, expert: int, tokens: int, work: int, needs: list[simpy.Event]
    ) -> Launch:
        needs = [*needs, *self._cores, *self._clearing]
        launch = Launch(op, step, layer, expert, tokens, work, needs, self.env.event())
        self._cores, self._clearing = [], []
        self._put(launch)
        return launch

    def _put(self, launch: Launch) -> None:
        launch.launched = self.env.now
        self._enqueue(launch)

    def _enqueue(self, entry: Launch | Transfer | Back) -> None:
        self._stream.append(entry)
        if not self._stream_call.triggered:
            self._stream_call.succeed()

    def _book_stall(self, launch: Launch) -> None:
        """Book the stream's idle time before a launch: up to the launch it waited for the host, then for cores, then for bytes."""
        idle = self.env.now - self._compute_end
        if self.serial:  # copies on the stream itself are the waiting for bytes
            waited_for_bytes = self._copied
        else:
            waited_for_bytes = idle - max(0, min(self.env.now, launch.launched) - self._compute_end)
        waited_for_cores = 0
        if launch.op != OP_EXPERT and not self.serial:
            waited_for_cores = max(0, self._cores_end - (self.env.now - waited_for_bytes))
        self.stall_cpu += waited_for_cores
        self.stall_copy += waited_for_bytes - waited_for_cores
        self.stall_host += idle - waited_for_bytes
        self._copied = 0

    def _stream_process(self) -> Process:
        """Run the stream's operations in program order."""
        while True:
            while not self._stream:
                self._stream_call = self.env.event()
                yield self._stream_call
            entry = self._stream.popleft()
            if isinstance(entry, Transfer):
                entry.began = entry.kind
                for duration, num_bytes in entry.chunks:
                    begin = self.env.now
                    yield self.env.timeout(duration)
                    self._moved(entry, begin, num_bytes)
                    self._copied += duration
                entry.arrived.succeed()
            elif isinstance(entry, Back):
                begin = self.env.now
                yield self.env.timeout(int(self.costs.back_ns[entry.format]))
                self._backed(entry, begin)
                self._copied += self.env.now - begin
            else:
                for arrival in entry.needs:
                    if not arrival.processed:
                        yield arrival
                begin = self.env.now
                self._book_stall(entry)
                yield self.lanes.run(COMPUTE, entry.work)
                self._compute_end = self.env.now
                self._row(COMPUTE, entry.op, entry.step, entry.layer, entry.expert, begin, tokens=entry.tokens)
                if entry.op == OP_EXPERT:
                    self.kernels_done += 1
                    self.copies.call()
                    self._call_back()
                entry.done.succeed()

    def _back_process(self) -> Process:
        """Copy evicted experts to the host in order, each once the kernels that read it are done."""
        while True:
            while not (self._backs and self.kernels_done > self._backs[0].wait_kernel):
                self._back_call = self.env.event()
                yield self._back_call
            back = self._backs.popleft()
            begin = self.env.now
            yield self.lanes.run(D2H, int(self.costs.back_ns[back.format]))
            self._backed(back, begin)
            self.backs_done += 1
            self.copies.call()

    def _run_on_cores(self, step: int, layer: int, decided: Decided) -> Process:
        """Run a layer step's experts on the host's cores, one after the other, each once it is in the host's memory."""
        for item in decided.cores:
            while self.reads_done <= item.read:
                self._read_done = self.env.event()
                yield self._read_done
            begin = self.env.now
            yield self.lanes.run(CPU, int(self.costs.cpu_ns[item.format, item.tokens]))
            self._row(CPU, OP_CPU, step, layer, item.expert, begin, tokens=item.tokens)
        self._cores_end = self.env.now

    def _disk_process(self) -> Process:
        """Read experts from disk in the order in which they were asked for."""
        while True:
            while not self._reads:
                self._read_call = self.env.event()
                yield self._read_call
            read = self._reads.popleft()
            begin = self.env.now
            yield self.env.timeout(int(self.costs.disk_ns[read.format]))
            layer, expert = divmod(read.key, self.config.num_experts)
            num_bytes = int(self.costs.expert_bytes[read.format])
            self._row(DISK, OP_DISK, read.step, layer, expert, begin, num_bytes=num_bytes)
            self.reads_done += 1
            self.copies.call()
            if not self._read_done.triggered:
                self._read_done.succeed()

    def _ask_disk(self, read: Read) -> None:
        self._reads.append(read)
        if not self._read_call.triggered:
            self._read_call.succeed()

    def _call_back(self) -> None:
        if not self._back_call.triggered:
            self._back_call.succeed()

    # --- rows -------------------------------------------------------------------------------------------------------

    def _moved(self, transfer: Transfer, begin: int, num_bytes: int) -> None:
        step = (transfer.target - self.steps.first_layer_step) // self.config.num_layers
        layer, expert = divmod(transfer.key, self.config.num_experts)
        op = OP_DEMAND if transfer.began == DEMAND else OP_PREFETCH
        self._row(H2D, op, step, layer, expert, begin, num_bytes=num_bytes)

    def _backed(self, back: Back, begin: int) -> None:
        layer, expert = divmod(back.key, self.config.num_experts)
        num_bytes = int(self.costs.expert_bytes[back.format])
        self._row(D2H, OP_BACK, back.step, layer, expert, begin, num_bytes=num_bytes)

    def _row(
        self, lane: int, op: int, step: int, layer: int, expert: int, begin: int, *, num_bytes: int = 0, tokens: int = 0
    ) -> None:
        now = self.env.now
        self._last = now
        self.busy[op] += now - begin
        self.moved_bytes[lane] += num_bytes
        if self._end is not None and now > self._end:
            self.bytes_after[lane] += num_bytes
        if self._keep_rows:
            self.rows.append((lane, op, step, layer, expert, begin, now, num_bytes, tokens))
