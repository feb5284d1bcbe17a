"""The layer steps of a run: learn the routing, decide, submit copies, launch experts, note what ran when.

Modelled: the life of a layer step as `sim.offload.simpy_model` tells it, with real work in place of durations. Decisions are made
by `decide_layer_step` on the same arrays; what is added here is only where bytes physically are: a hit's slot is read
before the decision, because a large set may push it out again while its kernel still reads it. Ignored: what lies between layer
steps (each program has its own), and what anything costs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...devices.device import Device, preemptions
from ...devices.runners.runner import ExpertRunner, LayerStep
from ...sim.policies.offload import cancel_prefetch, decide_layer_step
from ...sim.policies.state import (
    DEMAND,
    NONE,
    PREFETCH,
    Array,
    Decided,
    Decision,
    PolicyConfig,
    PolicyState,
    read_decision,
)
from ...sim.policies.steps import Steps
from ...sim.timeline import (
    OP_EXPERT,
    OP_HOST_LAUNCH,
    OP_HOST_LAYER,
    OP_HOST_SUBMIT,
)
from .copy_engine import CopyEngine, Gate
from .host_cores import CoreExpert, CpuTask
from .rows import Rows
from .stream_copies import StreamCopies
from .transfers import Transfer, WriteBack
from .workers import Workers


@dataclass(slots=True)
class Launch:
    """One expert kernel of a layer step."""

    experts: list[int]
    formats: list[int]
    slots: list[int | Transfer]
    """Where each lies; a transient one is asked for its buffer when it has arrived."""
    needs: list[Transfer]
    tokens: int


class LayerSteps:
    """The layer steps of one run, whoever computes what lies between them; the base of every program."""

    def __init__(
        self,
        config: PolicyConfig,
        steps: Steps,
        state: PolicyState,
        out: Decision,
        *,
        device: Device,
        experts: Sequence[ExpertRunner],
        expert_bytes: Sequence[int],
        gate: Gate,
        workers: Workers,
    ) -> None:
        self._config, self._steps, self._state, self._out = config, steps, state, out
        self._device, self._experts, self._gate = device, experts, gate
        self._expert_bytes = expert_bytes
        """By weight format, like the runners."""
        self._copies, self._backs, self._cores, self._tier = workers.copies, workers.backs, workers.cores, workers.tier
        self._cpu_task: CpuTask | None = None
        """What the cores are busy with: this layer step's answers are not complete before."""
        self._known: dict[int, Transfer] = {}
        self._transients: dict[int, Transfer] = {}
        self._leaving: list[Transfer] = []
        self._clearing: list[Transfer] = []
        """What the last layer step demanded of earlier transfers."""
        self.rows = Rows()
        self.ready_hits = 0
        self.late_hits = 0
        self.step_end_ns: list[int] = []
        self.parts: list[tuple[int, int]] = []
        """(time, how often the system had taken a core away so far) at the start of every layer step, and at the end of every step."""
        self.tokens_computed = 0

    def _end(self) -> None:
        """Give back what the last layer step held, and wait until everything admitted has been moved."""
        self._copies.release(self._leaving)
        self._copies.drain()
        if self._backs is not None:
            self._backs.drain()

    def _decided(self, number: int) -> int:
        """Return which of `steps` pass `number` is."""
        return number

    def _await_cores(self) -> None:
        """Wait for what the last layer step sent to the host's cores: the stream's next operation needs all answers."""
        if self._cpu_task is not None and self._cores is not None:
            self._cores.wait_for(self._cpu_task)

    def _await_places(self) -> None:
        """Wait for guesses whose places the last layer step gave to others: places are finite, so the pass runs no further ahead."""
        for transfer in self._clearing:
            self._gate.wait_for(transfer)
            if transfer.end is not None:
                self._device.follow(transfer.end)
        self._clearing = []

    def _answered(self, layer_step: LayerStep) -> torch.Tensor:
        """Return what a layer step computed [T, H]; where the cores had a part in it, it is only added up now."""
        if self._cpu_task is not None:
            self._experts[0].finish(layer_step)
            self._cpu_task = None
        return layer_step.x

    def _note_part(self, now: int) -> None:
        """Note that a part of a step ends here."""
        workers = self._copies.preempted
        if self._cores is not None:
            workers = 0 if self._cores.takes_turns else workers + self._cores.preempted
        self.parts.append((now, preemptions() + workers))

    def _layer_step(self, number: int, layer: int, layer_step: LayerStep, began_ns: int) -> None:
        """Decide one layer step, submit its copies and launch its kernels; `began_ns`: when its routing was known."""
        config, state, out = self._config, self._state, self._out
        base = layer * config.num_experts
        if config.cancel:
            self._cancel_wrong_guesses(number, layer)
        places = state.experts["slot"].copy()
        decide_layer_step(config, self._steps, state, out, self._decided(number), layer)
        decided = read_decision(
            out
        )  # once: to read an array's records one by one costs the host more than the decision did
        self._count_ready(decided)
        # The last layer step's kernels are over: this one's dense part stood behind them.
        self._copies.release(self._leaving)
        promoted = [promotion.transfer for promotion in decided.promotions]
        cpu_task = self._send_to_cores(number, layer, layer_step, decided)
        transfers = self._transfers(decided)
        if self._tier is not None:
            self._tier.assign(number, out, transfers)
        demanded = {transfer: self._known[transfer] for transfer in promoted}
        launches = self._launches(base, places, transfers, decided)
        for transfer in demanded:
            self._known.pop(transfer, None)  # nobody else will wait for it
        # On one stream what was demanded stands before whatever comes now.
        self._clearing = list(demanded.values()) if isinstance(self._copies, CopyEngine) else []
        if (
            config.policy == NONE and launches
        ):  # without a cache a block that was fetched ahead is waited for as a whole
            launches[0].needs.extend(self._clearing)
        self._leaving = self._drop_transients(base) if config.policy == NONE else []
        backs = self._write_backs(number, places, transfers, decided)
        self.rows.hosted(OP_HOST_LAYER, number, layer, began_ns, time.perf_counter_ns())
        if cpu_task is not None and self._cores is not None:
            self._cores.submit(cpu_task)
            self._cpu_task = cpu_task
        if promoted and isinstance(self._copies, CopyEngine):
            self._copies.promote(promoted)
        later = self._submit_all(number, layer, decided, transfers, backs, len(launches))
        for place, launch in enumerate(launches):
            for copy in later[place]:
                self._put(copy)
            self._launch(number, layer, launch, layer_step, last=place == len(launches) - 1 and cpu_task is None)
        for copy in later[-1]:
            self._put(copy)

    def _submit_all(
        self, number: int, layer: int, decided: Decided, transfers: list[Transfer], backs: list[WriteBack], num_launches: int
    ) -> list[list[Transfer | WriteBack]]:  # fmt: skip
        """Submit transfers, each behind the write-backs of its slot; return what, on one stream, waits for its kernel."""
        together = [back.move for back in decided.backs]
        later: list[list[Transfer | WriteBack]] = [[] for _ in range(num_launches + 1)]
        back = 0
        for move, transfer in enumerate(transfers):
            place = decided.moves[move].kernel if transfer.kind == DEMAND else num_launches
            while back < len(backs) and together[back] <= move:
                self._submit(number, layer, backs[back], later, place)
                back += 1
            self._submit(number, layer, transfer, later, place)
        for rest in backs[back:]:
            self._submit(number, layer, rest, later, num_launches)
        return later

    def _submit(
        self, number: int, layer: int, copy: Transfer | WriteBack, later: list[list[Transfer | WriteBack]], place: int
    ) -> None:
        began = time.perf_counter_ns()
        if isinstance(self._copies, StreamCopies):
            if place:
                later[place].append(copy)
            else:
                self._copies.put(copy)
            return
        if isinstance(copy, Transfer):
            self._copies.submit(copy)
        elif self._backs is not None:
            self._backs.submit(copy)
        self.rows.hosted(OP_HOST_SUBMIT, number, layer, began, time.perf_counter_ns())

    def _put(self, copy: Transfer | WriteBack) -> None:
        if isinstance(self._copies, StreamCopies):
            self._copies.put(copy)

    def _launch(self, number: int, layer: int, launch: Launch, layer_step: LayerStep, *, last: bool) -> None:
        """Launch one kernel behind the transfers it needs."""
        for transfer in launch.needs:
            self._gate.wait_for(transfer)
            if transfer.end is not None:
                self._device.follow(transfer.end)
        launched = time.perf_counter_ns()
        slots = [seat.slot if isinstance(seat, Transfer) else seat for seat in launch.slots]
        begin = self._device.mark()
        for fmt, runner in enumerate(self._experts):
            mine = [at for at, each in enumerate(launch.formats) if each == fmt]
            if mine:
                runner.run(layer_step, [launch.experts[at] for at in mine], [slots[at] for at in mine])
        if last:
            self._experts[0].finish(layer_step)
        end = self._device.mark()
        self._gate.kernel_launched(end)
        self._launched(number, layer, launched)
        self.tokens_computed += launch.tokens
        self.rows.computed(
            OP_EXPERT, number, layer, launch.experts[0] if len(launch.experts) == 1 else -1, begin, end, launch.tokens
        )

    def _launched(self, number: int, layer: int, began: int) -> None:
        """Note the host's share of a launch, where launching and running are two things."""
        if self._device.asynchronous:
            self.rows.hosted(OP_HOST_LAUNCH, number, layer, began, time.perf_counter_ns())

    def _cancel_wrong_guesses(self, number: int, layer: int) -> None:
        """Drop prefetches for this layer step that have not begun and turn out wrong: that depends on how far copies have come."""
        if not isinstance(self._copies, CopyEngine):
            return
        config, steps, state = self._config, self._steps, self._state
        step = self._decided(number)
        layer_step = steps.first_layer_step + step * config.num_layers + layer
        gone = self._copies.cancel(
            layer_step, lambda guess: bool(cancel_prefetch(config, steps, state, step, layer, guess.key, guess.id))
        )
        for guess in gone:
            self._known.pop(guess.id, None)
            if self._transients.get(guess.key) is guess:
                del self._transients[guess.key]

    # --- from a decision to objects ----------------------------------------------------------------------------------

    def _count_ready(self, decided: Decided) -> None:
        """Count guessed hits by whether their bytes have arrived at the moment of the decision."""
        for item in decided.items:
            if 0 <= item.transfer < decided.size.first_transfer:
                if self._known[item.transfer].arrived():
                    self.ready_hits += 1
                else:
                    self.late_hits += 1

    def _send_to_cores(self, number: int, layer: int, layer_step: LayerStep, decided: Decided) -> CpuTask | None:
        """Return what this layer step computes on the host's cores, None where that is nothing."""
        if not decided.cores:
            return None
        base = layer * self._config.num_experts
        experts = [
            CoreExpert(expert=item.expert, key=base + item.expert, format=item.format, tokens=item.tokens)
            for item in decided.cores
        ]
        return CpuTask(step=number, layer=layer, layer_step=layer_step, experts=experts)

    def _transfers(self, decided: Decided) -> list[Transfer]:
        found = []
        for number, move in enumerate(decided.moves, decided.size.first_transfer):
            transfer = Transfer(
                id=number,
                key=move.key,
                kind=move.kind,
                target=move.target,
                slot=move.slot,
                transient=move.slot < 0,
                wait_kernel=move.wait_kernel,
                wait_back=move.wait_back,
                format=move.format,
                num_bytes=self._expert_bytes[move.format],
            )
            if move.kind == PREFETCH:
                self._known[number] = transfer
            if transfer.transient:
                self._transients[move.key] = transfer
            found.append(transfer)
        return found

    def _launches(self, base: int, places: Array, transfers: list[Transfer], decided: Decided) -> list[Launch]:
        """Return the layer step's kernels: which experts, where they lie, which transfers each must wait for."""
        first = decided.size.first_transfer
        fetched = {transfer.key: transfer for transfer in transfers if transfer.kind == DEMAND}
        launches = [Launch([], [], [], [], 0) for _ in range(decided.size.kernels)]
        for item in decided.items:
            key, number = base + item.expert, item.transfer
            launch = launches[item.kernel]
            transfer = fetched.get(key) or self._transients.get(key)
            if transfer is None:
                seat: int | Transfer = int(places[key])
            else:
                seat = transfer if transfer.transient else transfer.slot
            launch.experts.append(item.expert)
            launch.formats.append(item.format)
            launch.slots.append(seat)
            launch.tokens += item.tokens
            if number >= 0:
                launch.needs.append(transfers[number - first] if number >= first else self._known[number])
        for item in decided.items:
            self._known.pop(item.transfer, None)  # nobody will wait for it again
        return launches

    def _drop_transients(self, base: int) -> list[Transfer]:
        """Return this layer's transient transfers: their buffers are given back when the layer step is over, used or not."""
        found = (self._transients.pop(base + expert, None) for expert in range(self._config.num_experts))
        return [transfer for transfer in found if transfer is not None]

    def _write_backs(self, number: int, places: Array, transfers: list[Transfer], decided: Decided) -> list[WriteBack]:
        """Return this layer step's write-backs: an evicted expert lies where it lay before, or where this very layer step put it."""
        slots = {transfer.key: transfer.slot for transfer in transfers if transfer.kind == DEMAND}
        return [
            WriteBack(
                id=at,
                key=back.key,
                step=number,
                slot=slots.get(back.key, int(places[back.key])),
                wait_kernel=back.wait_kernel,
                format=back.format,
                num_bytes=self._expert_bytes[back.format],
            )
            for at, back in enumerate(decided.backs, decided.size.first_back)
        ]
