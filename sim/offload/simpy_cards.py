"""The SimPy model of layers over cards where a prompt's passes follow each other: the readable reference of `compiled.over_cards`.

Modelled: a process for each pass, a resource for each card. Passes ask for a card in their order and keep it until its last kernel has
ended and what follows is launched; the last card until the host has done its share of the pass. A pass of a prompt begins when the one
before has left its first card, and when fewer passes are under way than may be; every other pass when the one before has ended. Decisions
depend on no time, so they are taken first. Ignored: copies; everything lies on the cards.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from ...base.errors import Internal
from ..lanes import Process
from ..policies.offload import begin_step, decide_layer_step
from ..policies.state import Array, Decision, PolicyConfig, PolicyState, read_decision
from ..policies.steps import Steps
from ..timeline import (
    COMPUTE,
    HOST,
    LANE_NAMES,
    OP_DENSE,
    OP_EXPERT,
    OP_HEAD,
    OP_HOST_LAUNCH,
    OP_HOST_LAYER,
    OP_HOST_STEP,
    OP_NAMES,
    ROW_FIELDS,
)  # fmt: skip
from .compiled.rows import kernel_work
from .costs import HOST_COSTS, CostTables


@dataclass(frozen=True, slots=True)
class _Kernel:
    """One launch of experts."""

    expert: int
    tokens: int
    work: int


@dataclass(slots=True)
class _Pass:
    """One forward pass on its way."""

    step: int
    kernels: list[list[_Kernel]]
    """Of each layer."""
    left_first: simpy.Event
    ended: simpy.Event
    idle_since: int
    """Since when nothing but the host keeps it."""


class CardsModel:
    """One run; `run()` returns rows, step ends and the makespan, as that of `simpy_model` does."""

    def __init__(self, config: PolicyConfig, steps: Steps, costs: CostTables, state: PolicyState, out: Decision, *,
                 keep_rows: bool = True) -> None:  # fmt: skip
        self.env = simpy.Environment()
        self.config, self.steps, self.costs, self.state, self.out = config, steps, costs, state, out
        self.rows: list[tuple[int, ...]] = []
        self.busy = [0] * len(OP_NAMES)
        self.moved_bytes = self.bytes_after = [0] * len(LANE_NAMES)
        self.ready_hits = self.late_hits = self.stall_copy = self.stall_host = self.stall_cpu = 0
        self._keep_rows = keep_rows
        self._host = {name: int(costs.host_ns[0][name]) for name in HOST_COSTS.names or ()}
        *layers, self._head_card, self._most = costs.stages.tolist()
        self._card_of: list[int] = layers
        self._cards = {card: simpy.Resource(self.env) for card in {*layers, self._head_card}}
        self._idle = dict.fromkeys(self._cards, 0)
        """When the last kernel of each card ended."""
        self._compute_end = 0

    def run(self) -> tuple[Array, Array, int]:
        """Return (rows [num_rows, ROW_FIELDS] unsorted, none unless kept; step_end [num_steps]; makespan), in nanoseconds."""
        self._step_end = np.zeros(self.steps.step_phase.shape[0], np.int64)
        self.env.run(self.env.process(self._passes()))
        rows = np.array(self.rows, np.int64).reshape(-1, ROW_FIELDS)
        return rows, self._step_end, int(self._step_end[-1]) if len(self._step_end) else 0

    def _passes(self) -> Process:
        """Let the passes begin one after the other."""
        under_way: list[_Pass] = []  # of the prompt at hand
        for step, (phase, first) in enumerate(zip(self.steps.step_phase, self.steps.step_first, strict=True)):
            kernels = self._decided(step)
            one = _Pass(step, kernels, self.env.event(), self.env.event(), 0)
            follows = bool(under_way) and phase == 0 and first == 0
            if follows:
                yield under_way[-1].left_first
                one.idle_since = self._idle[self._card_of[0]]
                if len(under_way) >= self._most:
                    yield under_way[-self._most].ended
                    ended = int(self._step_end[under_way[-self._most].step])
                    one.idle_since = max(one.idle_since, ended - self._host["step"])
            else:
                for before in under_way[-1:]:
                    yield before.ended
                one.idle_since = self._compute_end
                under_way = []
            self.env.process(self._pass(one))
            under_way.append(one)
            if phase != 0:
                yield one.ended
                under_way = []
        for before in under_way[-1:]:
            yield before.ended

    def _decided(self, step: int) -> list[list[_Kernel]]:
        """Take a step's decisions; return the kernels of its layers."""
        begin_step(self.config, self.steps, self.state, step)
        found = []
        for layer in range(self.config.num_layers):
            decide_layer_step(self.config, self.steps, self.state, self.out, step, layer)
            decided = read_decision(self.out)
            if decided.moves or decided.backs or decided.cores:
                raise Internal("a prompt's passes follow each other over cards, but something is not on them")
            kernels, at = [], 0
            for _, grouped in itertools.groupby(decided.items, lambda item: item.kernel):
                items = list(grouped)
                work = int(kernel_work(self.costs, self.out, at, at + len(items)))
                expert = items[0].expert if len(items) == 1 else -1
                kernels.append(_Kernel(expert, sum(item.tokens for item in items), work))
                at += len(items)
            found.append(kernels)
        return found

    def _pass(self, one: _Pass) -> Process:
        """Take one pass over the cards."""
        step, env = one.step, self.env
        tokens = int(self.steps.step_start[step + 1] - self.steps.step_start[step])
        line = int(self.costs.step_class[step])
        before = one.idle_since
        ready = env.now + self._host["kernel"]
        self._row(HOST, OP_HOST_LAUNCH, step, 0, -1, env.now, ready)
        first_card = card = self._card_of[0]
        with_card = self._cards[card].request()
        yield with_card
        for layer in range(self.config.num_layers + 1):
            is_head = layer == self.config.num_layers
            place = self._head_card if is_head else self._card_of[layer]
            if place != card:
                yield self._until(max(before, ready))
                self._release(card, with_card, before)
                if card == first_card and not one.left_first.triggered:
                    one.left_first.succeed()
                card, with_card = place, self._cards[place].request()
                yield with_card
            yield self._until(max(before, ready))
            begin = env.now
            self.stall_host += begin - max(before, min(begin, self._idle[card]))
            op = OP_HEAD if is_head else OP_DENSE
            work = int(self.costs.head_ns[line] if is_head else self.costs.dense_ns[line, layer])
            yield env.timeout(work)
            self._row(COMPUTE, op, step, min(layer, self.config.num_layers - 1), -1, begin, env.now, tokens)
            if not is_head:
                ready = yield from self._experts(step, layer, one.kernels[layer])
                before = env.now
        self._compute_end = env.now
        begin = env.now
        yield env.timeout(self._host["step"])
        self._row(HOST, OP_HOST_STEP, step, self.config.num_layers - 1, -1, begin, env.now)
        self._step_end[step] = env.now
        self._release(card, with_card, begin)
        if not one.left_first.triggered:
            one.left_first.succeed()
        one.ended.succeed()

    def _experts(self, step: int, layer: int, kernels: list[_Kernel]) -> Generator[simpy.Event, Any, int]:
        """Run a layer's kernels; return when what follows them is launched, which may be later than now."""
        launched = self.env.now + self._host["layer"]
        self._row(HOST, OP_HOST_LAYER, step, layer, -1, self.env.now, launched)
        for kernel in kernels:
            launched = self._launch(step, layer, launched)
            idle = self.env.now
            yield self._until(launched)
            begin = self.env.now
            self.stall_host += begin - idle
            yield self.env.timeout(kernel.work)
            self._row(COMPUTE, OP_EXPERT, step, layer, kernel.expert, begin, self.env.now, kernel.tokens)
        return self._launch(step, layer, launched)

    def _launch(self, step: int, layer: int, begin: int) -> int:
        """Book one launch from `begin` on; return when it is done."""
        end = begin + self._host["kernel"]
        self._row(HOST, OP_HOST_LAUNCH, step, layer, -1, begin, end)
        return end

    def _release(self, card: int, request: simpy.resources.resource.Request, idle_since: int) -> None:
        self._idle[card] = idle_since
        self._cards[card].release(request)

    def _until(self, then: int) -> simpy.Event:
        return self.env.timeout(max(0, then - self.env.now))

    def _row(
        self, lane: int, op: int, step: int, layer: int, expert: int, begin: int, end: int, tokens: int = 0
    ) -> None:
        self.busy[op] += end - begin
        if self._keep_rows and end > begin:
            self.rows.append((lane, op, step, layer, expert, begin, end, 0, tokens))
