"""One step of one rank: operations in program order on one thread, exchanges beside them in the order of the job.

Modelled: an operation waits for the exchanges that it needs, an exchange for what it follows; exchanges run on one thread, or on one for
each tier where the schedule lets these overlap. Ignored: what a rank is and how steps follow one another (`rank`).
"""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...devices.runners.runner import gate
from ...sim.parallel.program import INTER, INTRA, OP_COMBINE, OP_DENSE, OP_DISPATCH, OP_EXPERT, OP_HEAD
from ...sim.parallel.timeline import LANE_COMPUTE, LANE_INTER
from .exchange import Counted, Rows
from .job import BOTH
from .priority import go_first
from .reason import reason
from .routes import IntArray, parts_of_tokens, slots_of_group
from .work import hidden_states

if TYPE_CHECKING:
    from .rank import Rank

CLOCK = time.perf_counter_ns  # set beside the other ranks' by `clock`
_NAMES = {OP_DISPATCH: "dispatch", OP_COMBINE: "combine"}


class StepRun:
    """One step of this rank, while it runs."""

    def __init__(self, rank: Rank, number: int) -> None:
        self._rank, self._job, self._program = rank, rank.job, rank.program
        job = rank.job
        step = job.steps[number]
        mine = np.flatnonzero(step.source_rank == rank.rank)
        batch, self._chunk = parts_of_tokens(len(mine), job.schedule)
        self._slots, self._experts = rank.slots_of(number)[mine], torch.from_numpy(step.experts[mine])
        self._of_batch = [np.flatnonzero(batch == micro) for micro in range(job.schedule.pipeline.micro_batches)]
        states = hidden_states(job.model, len(step.source_rank), number, job.seed)[torch.from_numpy(mine)]
        self._x = [states[torch.from_numpy(at)] for at in self._of_batch]
        self._tokens = mine
        exchanges = len(self._program.ex_kind)
        self._ready = [threading.Event() for _ in range(exchanges)]
        self._done = [threading.Event() for _ in range(exchanges)]
        self._half = [threading.Event() for _ in range(exchanges)]
        self._kept: dict[tuple[int, int, int], Rows] = {}
        self._gated: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._sums: dict[tuple[int, int, int], torch.Tensor] = {}
        self._after_ex: dict[int, list[int]] = {}
        for ex, before in enumerate(self._program.ex_after_ex.tolist()):
            if before >= 0:
                self._after_ex.setdefault(before, []).append(ex)
        self.rows: list[tuple[int, ...]] = []
        self.payload = np.zeros((exchanges, job.topology.num_ranks), np.int64)
        self.other = np.zeros_like(self.payload)
        self.busy = np.zeros((exchanges, 2), np.int64)
        """Nanoseconds that this process kept cores during each stage of each exchange; of overlapped steps kernels' too."""
        self._order = job.orders[number]

    # --- the two kinds of threads -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Do the step; raises what any of its threads raised."""
        program = self._program
        failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        tiers = (INTER, INTRA) if self._rank.two_channels else (None,)
        threads = [
            threading.Thread(
                target=self._exchange_all, args=(tier, failures), name=f"moeplan exchanges {tier}", daemon=True
            )
            for tier in tiers
        ]
        for thread in threads:
            thread.start()
        followers: dict[int, list[int]] = {}
        for ex, after in enumerate(program.ex_after_op.tolist()):
            if after >= 0:
                followers.setdefault(after, []).append(ex)
        for op in range(len(program.op_kind)):
            for ex in program.wait_list[program.wait_start[op] : program.wait_start[op + 1]].tolist():
                self._wait(self._done[ex], failures)
            self._compute(op)
            for ex in followers.get(op, ()):
                self._ready[ex].set()
        for thread in threads:
            thread.join()
        if not failures.empty():
            raise failures.get()

    def _wait(self, event: threading.Event, failures: queue.SimpleQueue[BaseException]) -> None:
        while not event.wait(0.05):
            if not failures.empty():
                raise failures.get()

    def _exchange_all(self, tier: int | None, failures: queue.SimpleQueue[BaseException]) -> None:
        """Do all stages of a tier, or of both, in order."""
        torch.set_num_threads(1)
        go_first()
        try:
            with torch.inference_mode():
                for ex, stage, at in self._order.tolist():
                    if tier is not None and at != tier:
                        continue
                    self._wait(self._half[ex] if stage else self._ready[ex], failures)
                    self._stage(ex, stage, at)
        except BaseException as error:  # noqa: BLE001 - the other thread raises it
            failures.put(error)

    # --- operations ---------------------------------------------------------------------------------------------------

    def _compute(self, op: int) -> None:
        program = self._program
        kind, layer, micro, group = (
            int(column[op]) for column in (program.op_kind, program.op_layer, program.op_micro, program.op_group)
        )
        began = CLOCK()
        for ex in program.wait_list[program.wait_start[op] : program.wait_start[op + 1]].tolist():
            if program.ex_kind[ex] == OP_COMBINE:
                self._take_in(ex)
        if kind == OP_DENSE:
            tokens = len(self._x[micro])
            x, h, logits = self._rank.dense[micro, tokens].group(layer, self._x[micro])
            self._x[micro] = x
            experts = self._experts[torch.from_numpy(self._of_batch[micro]), layer]
            self._gated[layer, micro] = (h, gate(logits, experts))
        elif kind == OP_EXPERT:
            rows = self._kept[layer, micro, group]
            tokens = len(rows.slots)
            first = self._rank.rank * self._job.topology.slots_per_rank
            slots = np.where(rows.slots >= 0, rows.slots - first, -1)
            held = self._rank.experts_of(layer)
            self._sums[layer, micro, group] = held.run(layer, rows.payload, slots, rows.weights)
            tokens = int((slots >= 0).sum())
        elif kind == OP_HEAD:
            tokens = len(self._x[micro])
            self._rank.dense[micro, tokens].head(self._x[micro])
        else:
            raise AssertionError(f"operation {kind} is refused before a run")
        self._row(LANE_COMPUTE, kind, layer, micro, group, began, 0, tokens)

    def _take_in(self, ex: int) -> None:
        """Add what a combine brought to the states of its tokens."""
        key = self._key(ex)
        _, micro, group = key
        at, _ = self._members(micro, group)
        self._x[micro].index_add_(0, torch.from_numpy(at), self._sums.pop(key))
        del self._kept[key]

    # --- exchanges ----------------------------------------------------------------------------------------------------

    def _key(self, ex: int) -> tuple[int, int, int]:
        program = self._program
        return int(program.ex_layer[ex]), int(program.ex_micro[ex]), int(program.ex_group[ex])

    def _members(self, micro: int, group: int) -> tuple[IntArray, IntArray]:
        """Return which tokens of a batch are of a group (places in the batch, places among all of the rank's)."""
        places = self._of_batch[micro]
        if self._job.schedule.pipeline.split == "token":
            inside = np.flatnonzero(self._chunk[places] == group)
            return inside, places[inside]
        return np.arange(len(places)), places

    def _stage(self, ex: int, stage: int, tier: int) -> None:
        kind, key = int(self._program.ex_kind[ex]), self._key(ex)
        began, busy = CLOCK(), time.process_time_ns()
        try:
            counted = self._forth(key, stage, tier) if kind == OP_DISPATCH else self._back(key, tier)
        except RuntimeError as error:
            raise RuntimeError(
                f"{_NAMES[kind]} of layer {key[0]}, batch {key[1]}, group {key[2]}: {reason(error)}"
            ) from None
        self.busy[ex, stage] = time.process_time_ns() - busy
        self.payload[ex] += counted.payload
        self.other[ex] += counted.other
        self._ports(kind, key, began, counted)
        if stage == 0 and tier != BOTH:
            self._half[ex].set()
            return
        self._done[ex].set()
        for follower in self._after_ex.get(ex, ()):
            self._ready[follower].set()

    def _forth(self, key: tuple[int, int, int], stage: int, tier: int) -> Counted:
        layer, micro, group = key
        network = self._rank.network
        if stage == 0:
            inside, places = self._members(micro, group)
            h, weights = self._gated[layer, micro]
            at = torch.from_numpy(inside)
            slots = slots_of_group(
                self._slots[places, layer].astype(np.int64), self._job.topology, self._job.schedule, group
            )
            self._kept[key] = Rows(
                payload=h.index_select(0, at).to(network.forth), slots=slots, weights=weights.index_select(0, at)
            )
        every = self._job.schedule.all_to_all.kind == "all-choices"
        self._kept[key], counted = network.dispatch(self._kept[key], self._rank.peers[tier], every)
        return counted

    def _back(self, key: tuple[int, int, int], tier: int) -> Counted:
        passage = self._kept[key].passages.pop()
        self._sums[key], counted = self._rank.network.combine(self._sums[key], passage)
        return counted

    def _ports(self, kind: int, key: tuple[int, int, int], began: int, counted: Counted) -> None:
        """Note what a stage kept busy: the port of each tier that it sent bytes through."""
        topology = self._job.topology
        node = np.arange(topology.num_ranks) // topology.ranks_per_node
        away = node != self._rank.rank // topology.ranks_per_node
        for tier, members in ((INTER, away), (INTRA, ~away)):
            num_bytes = int(counted.payload[members].sum())
            if num_bytes:
                self._row(LANE_INTER + tier, kind, *key, began, num_bytes, 0)

    def _row(
        self, lane: int, kind: int, layer: int, micro: int, group: int, began: int, num_bytes: int, tokens: int
    ) -> None:
        self.rows.append((self._rank.rank, lane, kind, layer, micro, group, began, CLOCK(), num_bytes, tokens))

    def outputs(self) -> tuple[IntArray, torch.Tensor]:
        """Return (tokens of this rank, the states [tokens, H] they end in)."""
        found = torch.empty((len(self._tokens), self._job.model.hidden_size))
        for at, x in zip(self._of_batch, self._x, strict=True):
            found[torch.from_numpy(at)] = x
        return self._tokens, found
