"""The decisions once more, in plain Python, written from `docs/design-notes.md` ("What is decided, rule by rule") alone.

Modelled: lists and dictionaries instead of arrays, one rule a method. Ignored: what looks at costs or time (`predictor.benefit`,
`kernel.miss=cheaper` and `balanced`, `copy.cancel`) and what a run learns (`affinity`, `activation`); `covers` says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moeplan.sim.policies.state import PREFETCH
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.traces.format import RoutingTrace

FAR = 2**62


def covers(schedule: OffloadSchedule) -> bool:
    """Return whether the rules written here are all that a schedule needs."""
    return (
        schedule.cache.policy not in ("affinity", "activation")
        and schedule.predictor.kind not in ("activation", "synthetic")
        and not schedule.predictor.benefit
        and schedule.kernel.miss in ("fetch", "cpu")
        and not schedule.copy.cancel
    )


@dataclass
class Pass:
    """One forward pass: rows of the recording, in order, and whether a request starts with it."""

    rows: list[int]
    starts: bool


def line_up(trace: RoutingTrace, concurrency: int, chunk: int | None) -> list[Pass]:
    """Return the forward passes: requests take places in order, prompts run alone, places decode together."""
    requests: list[list[int]] = []
    for row, request in enumerate(trace.request.tolist()):
        if not requests or request != trace.request[row - 1]:
            requests.append([])
        requests[-1].append(row)
    passes: list[Pass] = []
    places: list[list[int]] = []
    new: set[int] = set()
    while requests or places:
        while requests and len(places) < concurrency:
            rows = requests.pop(0)
            prompt = [row for row in rows if trace.phase[row] == 0]
            size = chunk or max(1, len(prompt))
            pieces = [prompt[low : low + size] for low in range(0, len(prompt), size)]
            passes += [Pass(piece, starts=number == 0) for number, piece in enumerate(pieces)]
            decode = rows[len(prompt) :]
            if decode:
                places.append(decode)
                if not prompt:
                    new.add(decode[0])
        if places:
            rows = [place.pop(0) for place in places]
            passes.append(Pass(rows, starts=any(row in new for row in rows)))
            places = [place for place in places if place]
    return passes


@dataclass
class Expert:
    """What is known of one expert of one layer."""

    where: str = "absent"  # cached, staged or transient
    slot: int = -1
    used: bool = False
    format: int = 0
    touched: int = -1  # last layer step
    tokens: int = 0  # over the whole run, whatever is evicted
    target: int = -1
    sent_target: int = -1
    transfer: int = -1
    next_use: int = FAR
    in_host: bool = True
    merit: int = 0


@dataclass
class Slot:
    """What still uses a slot."""

    kernel: int = -1
    back: int = -1
    guess: tuple[int, int] | None = (
        None  # (transfer, the layer step it was sent for) of a guess that nobody has used yet
    )


@dataclass
class LayerStep:
    """What one layer step decides, in the columns of `sim.policies.state`."""

    items: list[list[int]] = field(default_factory=list)  # expert, tokens, format, kernel, transfer
    cores: list[list[int]] = field(default_factory=list)  # expert, tokens, format, read
    moves: list[list[int]] = field(
        default_factory=list
    )  # key, class, target, kernel, wait kernel, wait back, slot, format, read
    backs: list[list[int]] = field(default_factory=list)  # key, format, wait kernel, with move
    demanded: dict[int, int] = field(default_factory=dict)  # earlier transfer → layer step it was sent for
    kernels: int = 0


class Plain:
    """A run's decisions; `layer_steps` yields them in order."""

    def __init__(self, schedule: OffloadSchedule, trace: RoutingTrace, capacities: Sequence[int], formats: Sequence[int],
                 popularity: np.ndarray) -> None:  # fmt: skip
        self.schedule, self.trace = schedule, trace
        self.layers, self.num = trace.num_layers, trace.num_experts
        self.policy, self.staging = schedule.cache.policy, schedule.predictor.staging
        self.experts = [Expert(format=fmt) for fmt in formats]
        self.pooled = schedule.cache.pooled_experts is not None
        sizes = [] if self.policy == "none" else list(capacities)
        first = np.r_[0, np.cumsum(sizes)].astype(int).tolist()
        self.free = [list(range(high - 1, low - 1, -1)) for low, high in itertools.pairwise(first)]
        self.recency: list[list[int]] = [[] for _ in sizes]  # of each pool, the least recent first
        self.age = [0 for _ in sizes]
        self.buffers: list[tuple[int | None, int]] = [(None, first[-1] + at) for at in range(self.staging)]
        count = first[-1] + self.staging + (2 if self.policy == "static" else 0)
        self.slots = [Slot() for _ in range(count)]
        self.host: list[int] = []  # the least recent first
        self.next_transfer = self.next_kernel = self.next_back = self.next_stream = self.next_read = 0
        if self.policy == "static":
            self._fill_static(popularity)
        if schedule.copy.host_experts:
            wanted = sorted(
                range(len(self.experts)),
                key=lambda key: (self.experts[key].where == "cached", -popularity.ravel()[key]),
            )
            chosen = wanted[: schedule.copy.host_experts]  # what stays on the device comes last
            self.host = chosen[::-1]
            for key, expert in enumerate(self.experts):
                expert.in_host = key in chosen

    def _fill_static(self, popularity: np.ndarray) -> None:
        place = self.schedule.cache.placement
        for pool, free in enumerate(self.free):
            keys = (
                list(range(self.layers * self.num))
                if self.pooled
                else list(range(pool * self.num, (pool + 1) * self.num))
            )
            wanted = {
                "popularity": lambda key: -int(popularity.ravel()[key]), "uniform": lambda key: key % self.num,
                "front": lambda key: key // self.num, "back": lambda key: -(key // self.num),
            }[place]  # fmt: skip
            for key in sorted(keys, key=wanted)[: len(free)]:
                self.experts[key].where, self.experts[key].used, self.experts[key].slot = "cached", True, free.pop()

    def layer_steps(self, passes: Sequence[Pass]):
        """Yield (step, layer, decision) in order."""
        self.uses = self._uses(passes)
        for key, expert in enumerate(self.experts):
            expert.next_use = self._next_use(key, -1)
        for step, each in enumerate(passes):
            if each.starts and self.schedule.cache.reset == "request":
                self._reset()
            for layer in range(self.layers):
                yield step, layer, self._layer_step(passes, step, layer)

    def _uses(self, passes: Sequence[Pass]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for step, each in enumerate(passes):
            for layer in range(self.layers):
                for expert in {int(e) for row in each.rows for e in self.trace.experts[row, layer]}:
                    found.setdefault(layer * self.num + expert, []).append(step * self.layers + layer)
        return found

    def _next_use(self, key: int, layer_step: int) -> int:
        return next((use for use in self.uses.get(key, []) if use > layer_step), FAR)

    def _reset(self) -> None:
        for at, (key, slot) in enumerate(self.buffers):
            if key is not None:
                self.experts[key].where = "absent"
                self.buffers[at] = (None, slot)
        if self.policy != "static":
            for pool, keys in enumerate(self.recency):
                for key in reversed(keys):
                    self.experts[key].where = "absent"
                    self._forget(key)
                    self.free[pool].append(self.experts[key].slot)
                keys.clear()

    def _pool(self, key: int) -> int:
        return 0 if self.pooled else key // self.num

    # --- one layer step --------------------------------------------------------------------------------------------------------

    def _layer_step(self, passes: Sequence[Pass], step: int, layer: int) -> LayerStep:
        experts, rows = self.experts, passes[step].rows
        self.out = out = LayerStep()
        self.layer_step, self.first_transfer = step * self.layers + layer, self.next_transfer
        base = layer * self.num
        named = [base + int(expert) for row in rows for expert in self.trace.experts[row, layer]]
        chosen = list(dict.fromkeys(named))
        by_last_use = list(dict.fromkeys(reversed(named)))[::-1]
        rank = {key: min(int(np.flatnonzero(self.trace.experts[row, layer] == key - base)[0]) for row in rows
                         if key - base in self.trace.experts[row, layer]) for key in chosen}  # fmt: skip
        low_rank = self.schedule.experts.low_rank
        if low_rank is not None:
            for key in chosen:  # a coarse copy does not do for what is a better choice now
                if experts[key].format and experts[key].where == "cached" and rank[key] < low_rank:
                    self._give_slot_back(key)
        hits = [key for key in chosen if experts[key].where != "absent"]
        known = [key for key in hits if experts[key].used]
        guessed = sorted((key for key in hits if not experts[key].used), key=lambda key: experts[key].transfer)
        misses = [key for key in chosen if experts[key].where == "absent"]
        grouped = self.schedule.kernel.grouping == "grouped"
        for group in (known, guessed):
            for key in group:
                transfer = -1 if experts[key].used else experts[key].transfer
                out.items.append([key - base, named.count(key), experts[key].format, out.kernels, transfer])
                out.kernels += not grouped
            out.kernels += grouped and bool(group)
        for key in misses:
            if low_rank is not None:
                experts[key].format = int(rank[key] >= low_rank)
        if self.schedule.kernel.miss == "cpu":
            out.cores = [[key - base, named.count(key), experts[key].format, self._read(key)] for key in misses]
            misses = []
        for key in chosen:
            experts[key].touched = self.layer_step
            experts[key].tokens += named.count(key)
            self._appraise(key)
            experts[key].next_use = self._next_use(key, self.layer_step)
        self._use_hits(known + guessed, base)
        self._fetch_misses(misses, base, named, grouped)
        if self.schedule.copy.fetch != "routed":
            self._fetch_rest(base)
        for key in by_last_use:
            if experts[key].where == "cached" and self.policy != "static":
                self.recency[self._pool(key)].remove(key)
                self.recency[self._pool(key)].append(key)
        for distance in range(1, self.schedule.predictor.depth + 1):
            if self.schedule.predictor.kind != "none" and layer + distance < self.layers:
                self._fetch_ahead(passes, step, layer, distance)
        self.next_kernel += out.kernels
        if self.policy == "none":
            for key in range(base, base + self.num):
                experts[key].where = "absent"
        return out

    def _use_hits(self, hits: Sequence[int], base: int) -> None:
        for item, key in zip(self.out.items, hits, strict=True):
            expert = self.experts[key]
            if expert.slot >= 0 and expert.where in ("cached", "staged"):
                self.slots[expert.slot].kernel = self.next_kernel + item[3]
                self.slots[expert.slot].guess = None
            if not expert.used:
                expert.used = True
                self.out.demanded[expert.transfer] = expert.sent_target
        if self.policy == "none":  # the whole block is awaited
            for key in range(base, base + self.num):
                if self.experts[key].where == "transient":
                    self.out.demanded[self.experts[key].transfer] = self.experts[key].sent_target
        for key in hits:
            if self.experts[key].where == "staged" and self.policy != "static":
                at = [held for held, _ in self.buffers].index(key)
                freed, filled = self._room(key, guessing=False), self.buffers[at][1]
                self.buffers[at] = (None, freed)
                self._admit(key, filled)

    def _fetch_misses(self, misses: Sequence[int], base: int, named: Sequence[int], grouped: bool) -> None:
        kernel = self.out.kernels
        for number, key in enumerate(misses):
            slot = -1
            if self.policy == "static":
                slot = len(self.slots) - 2 + self.next_stream % 2
                self.next_stream += 1
            elif self.policy != "none":
                slot = self._room(key, guessing=False)
            if number and (not grouped or (slot >= 0 and self.slots[slot].kernel == self.next_kernel + kernel)):
                kernel += 1
            self.out.items.append([key - base, named.count(key), self.experts[key].format, kernel, self.next_transfer])
            self._move(key, 0, self.layer_step, kernel, slot)
            self.experts[key].used = True
            if slot >= 0:
                self.slots[slot].kernel = self.next_kernel + kernel
            if self.policy == "none":
                self.experts[key].where = "transient"
            elif self.policy != "static":
                self._admit(key, slot)
        self.out.kernels = kernel + 1 if misses else kernel

    def _fetch_rest(self, base: int) -> None:
        for key in range(base, base + self.num):
            if self.experts[key].where == "absent":
                self._move(key, 0, self.layer_step, 0, -1)
        whole = self.schedule.copy.fetch == "layer"
        for item in self.out.items if whole else self.out.items[-1:]:
            item[4] = self.next_transfer - 1
        for move in self.out.moves if whole else []:
            move[3] = 0

    # --- guesses ----------------------------------------------------------------------------------------------------------

    def _guesses(self, passes: Sequence[Pass], step: int, layer: int, distance: int) -> list[tuple[int, float]]:
        """Return (expert, score) of the guesses for `layer`, best first."""
        kind, rows = self.schedule.predictor.kind, passes[step].rows
        if kind == "all":
            return [(expert, 1.0) for expert in range(self.num)]
        if kind in ("pre-gate", "oracle"):
            return [(e, 1.0) for e in dict.fromkeys(int(e) for row in rows for e in self.trace.experts[row, layer])]
        scores: dict[int, float] = {}
        predicted, prob = self.trace.predicted, self.trace.predicted_prob
        if predicted is None or distance > predicted.shape[2]:
            return []
        for row in rows:
            guesses = predicted[row, layer, distance - 1]
            for rank, guess in enumerate(guesses[: self.width].tolist()):
                whole = (
                    len(guesses) - rank
                    if prob is None
                    else int(np.float32(prob[row, layer, distance - 1, rank]) * 32767)
                )
                if guess >= 0:
                    scores[guess] = scores.get(guess, 0) + (2 * whole + 1) / 65536
        return sorted(scores.items(), key=lambda pair: -pair[1])

    @property
    def width(self) -> int:
        return self.schedule.predictor.width or self.trace.top_k

    def _fetch_ahead(self, passes: Sequence[Pass], step: int, layer: int, distance: int) -> None:
        target = self.layer_step + distance
        for guess, score in self._guesses(passes, step, layer + distance, distance):
            key = (layer + distance) * self.num + guess
            expert = self.experts[key]
            if expert.where != "absent":
                if not expert.used:
                    expert.target = max(expert.target, target)
                continue
            if min(score, 1.0) < round(self.schedule.predictor.threshold * 65536) / 65536:
                return
            if self.schedule.experts.low_rank is not None:
                expert.format = 0
            slot = -1
            if self.policy == "none":
                expert.where = "transient"
            elif self.staging:
                at = self._buffer()
                if at is None:
                    return
                before, slot = self.buffers[at]
                if before is not None:
                    self.experts[before].where = "absent"
                self.buffers[at] = (key, slot)
                expert.where, expert.slot = "staged", slot
            else:
                slot = self._room(key, guessing=True)
                if slot < 0:
                    return
                self._admit(key, slot)
            self._move(key, PREFETCH, target, -1, slot)
            expert.used = False

    def _buffer(self) -> int | None:
        """Return an empty staging buffer, else the one whose guess was for the earliest layer step that is not to come."""
        empty = [at for at, (key, _) in enumerate(self.buffers) if key is None]
        over = [(self.experts[key].target, at) for at, (key, _) in enumerate(self.buffers) if key is not None]
        over = [pair for pair in over if pair[0] <= self.layer_step]
        return empty[0] if empty else min(over)[1] if over else None

    # --- places -----------------------------------------------------------------------------------------------------------

    def _admit(self, key: int, slot: int) -> None:
        self.experts[key].where, self.experts[key].slot = "cached", slot
        self._appraise(key)
        self.recency[self._pool(key)].append(key)

    def _appraise(self, key: int) -> None:
        if self.policy == "lfuda":
            self.experts[key].merit = self.experts[key].tokens + self.age[self._pool(key)]

    def _forget(self, key: int) -> None:
        if self.policy == "lfuda":
            self.experts[key].tokens = 0

    def _give_slot_back(self, key: int) -> None:
        self.experts[key].where = "absent"
        self._forget(key)
        self.recency[self._pool(key)].remove(key)
        self.free[self._pool(key)].append(self.experts[key].slot)

    def _room(self, key: int, *, guessing: bool) -> int:
        """Return a slot for `key`: a free one, else a victim's; -1 where a guess may not push anyone out."""
        pool = self._pool(key)
        if self.free[pool]:
            return self.free[pool].pop()
        victim = self._victim(pool, guessing=guessing)
        if victim is None:
            return -1
        expert = self.experts[victim]
        self.age[pool] = max(self.age[pool], expert.merit)
        self._forget(victim)
        self.recency[pool].remove(victim)
        expert.where = "absent"
        if self.schedule.copy.write_back and expert.used:
            self.out.backs.append([victim, expert.format, self.slots[expert.slot].kernel, len(self.out.moves)])
            self.slots[expert.slot].back = self.next_back
            self.next_back += 1
        return expert.slot

    def _victim(self, pool: int, *, guessing: bool) -> int | None:
        def own(key: int) -> bool:
            return self.experts[key].touched == self.layer_step

        def awaited(key: int) -> bool:
            return not own(key) and not self.experts[key].used and self.experts[key].target > self.layer_step

        keys = self.recency[pool]
        free = [key for key in keys if not own(key) and not awaited(key)]
        rounds = (
            [free] if guessing else [free, [key for key in keys if awaited(key)], [key for key in keys if own(key)]]
        )
        for candidates in rounds:
            if candidates:
                return min(candidates, key=self._worth)  # of equals the least recent
        return None

    def _worth(self, key: int) -> int:
        expert, here = self.experts[key], self.layer_step % self.layers
        if self.policy == "lfu":
            return expert.tokens
        if self.policy == "lfuda":
            return expert.merit
        if self.policy == "belady":
            return -expert.next_use
        if self.policy == "least-stale":
            turn = (key // self.num - here - 1) % self.layers
            stale = key // self.num <= here and expert.touched < self.layer_step - here
            return -(turn + self.layers * stale)
        return 0

    def _move(self, key: int, kind: int, target: int, kernel: int, slot: int) -> None:
        expert, wait, back = self.experts[key], -1, -1
        if slot >= 0:
            place = self.slots[slot]
            wait, back = place.kernel, place.back
            if place.guess is not None:  # it comes first, and the pass waits for it
                self.out.demanded[place.guess[0]] = place.guess[1]
            place.guess = (self.next_transfer, target) if kind == PREFETCH else None
        self.out.moves.append([key, kind, target, kernel, wait, back, slot, expert.format, self._read(key)])
        expert.transfer, expert.target, expert.sent_target = self.next_transfer, target, target
        self.next_transfer += 1

    def _read(self, key: int) -> int:
        """Make an expert the host's most recent; return the number of the read it needs, -1 for none."""
        if not self.schedule.copy.host_experts:
            return -1
        read = -1
        if self.experts[key].in_host:
            self.host.remove(key)
        else:
            self.experts[self.host.pop(0)].in_host = False
            self.experts[key].in_host = True
            read = self.next_read
            self.next_read += 1
        self.host.append(key)
        return read
