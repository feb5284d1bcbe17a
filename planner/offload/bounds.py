"""What no schedule can beat: fewest expert loads for a number of slots, and the time of a candidate that follows from them.

Modelled: a machine that is allowed to know the future, to load experts in any order, to let a set larger than the cache
stream through, and to overlap everything that the link, the stream and the host's cores permit. Its loads are those of
Belady's farthest next use over sets: after each layer step, of the experts held and the experts just used, those needed soonest
stay. Fetching ahead does not lower the number of loads, so the bound holds for prefetching schedules too. A load is charged
to the link only as far as nothing else may take its place: the cores compute any of the missing experts for schedules that
let them, and a second weight format counts as if every expert came in it. Activities run at speeds undisturbed by company.
Ignored: everything that would make the bound tighter but could make it wrong.

A time that must pass on the link, on the stream and on the cores bounds the run, and so does any weighted mean of the three.
Under given weights each use of an expert has a price as a hit and one as a miss (the cheaper of fetching it and computing it
on the cores), so the cheapest division of all uses is found use by use, with no search over divisions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...base.errors import Internal
from ...base.jit import jit
from ...sim.offload.costs import CostTables
from ...sim.offload.memory.device import STREAM_SLOTS
from ...sim.offload.simulate import Simulation
from ...sim.offload.simulators import fresh_state
from ...sim.offload.workload import Workload
from ...sim.policies.state import CACHED, STATIC
from ...specs.schedules.offload import OffloadSchedule
from .space import Candidate

Array = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Shares of (cores, link, stream) in the mean that bounds a run. The corners bound it by one of them alone; what lies between
# bounds schedules that divide misses between the cores and the link.
_FETCHING = ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
_DIVIDING = (*_FETCHING, (1.0, 0.0, 0.0), *((share, 1 - share, 0.0) for share in (0.2, 0.35, 0.5, 0.65, 0.8)),
             (0.5, 0.0, 0.5), (0.0, 0.5, 0.5), (0.34, 0.33, 0.33))  # fmt: skip
# Numbers of tokens an expert may have are told apart up to so many kinds; beyond that, neighbours share the least price of all.
_MOST_KINDS = 256
# What is left from a step on is computed for so many steps at most; other steps have what is left from the next of these on.
_MOST_MARKS = 128
# Sums of prices are floating-point numbers, exact to the nanosecond below 2**53; weights are not, and are rounded down by this.
_ROUNDING = 1e-9


@jit
def _fewest_loads(layer_step_start: Array, layer_step_expert: Array, next_use: Array, num_layers: int, num_experts: int, pooled: bool,
                  slots: int) -> Any:  # fmt: skip
    """Return each step's loads under the farthest-next-use rule with `slots` places per layer, or in one pool for all.

    What a pool holds lies in a heap with the farthest next use on top: a use only ever moves an expert towards the top, and only the
    top leaves.
    """
    num_keys = num_layers * num_experts
    heap = np.zeros(num_keys, np.int64)
    place = np.full(num_keys, -1, np.int64)
    upcoming = np.full(num_keys, 2**62, np.int64)
    size = np.zeros(1 if pooled else num_layers, np.int64)
    loads = np.zeros((layer_step_start.shape[0] - 1) // num_layers, np.int64)
    for layer_step in range(layer_step_start.shape[0] - 1):
        layer = layer_step % num_layers
        pool, low = (0, 0) if pooled else (layer, layer * num_experts)
        for index in range(layer_step_start[layer_step], layer_step_start[layer_step + 1]):
            key = layer * num_experts + layer_step_expert[index]
            upcoming[key] = next_use[index]
            at = place[key]
            if at < 0:
                loads[layer_step // num_layers] += 1
                at = size[pool]
                size[pool] += 1
            while at > 0:
                above = (at - 1) // 2
                other = heap[low + above]
                if upcoming[other] >= upcoming[key]:
                    break
                heap[low + at] = other
                place[other] = at
                at = above
            heap[low + at] = key
            place[key] = at
        while size[pool] > slots:
            place[heap[low]] = -1
            size[pool] -= 1
            key, at = heap[low + size[pool]], 0
            while 2 * at + 1 < size[pool]:
                below = 2 * at + 1
                if below + 1 < size[pool] and upcoming[heap[low + below + 1]] > upcoming[heap[low + below]]:
                    below += 1
                other = heap[low + below]
                if upcoming[other] <= upcoming[key]:
                    break
                heap[low + at] = other
                place[other] = at
                at = below
            if size[pool] > 0:
                heap[low + at] = key
                place[key] = at
    return loads


def fewest_loads(workload: Workload, slots: int, *, pooled: bool) -> Array:
    """Return, by step, expert loads whose sum no schedule with at most `slots` places (per layer, or pooled) can go below.

    The workload must carry next uses. With `slots` covering everything the sum is the number of distinct experts used.
    """
    steps = workload.steps
    loads: Array = _fewest_loads(steps.layer_step_start, steps.layer_step_expert, steps.layer_step_next_use, workload.num_layers,
                                 workload.num_experts, pooled, slots)  # fmt: skip
    return loads


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a candidate's run cannot take less than, in nanoseconds."""

    whole_ns: int
    """The whole run."""
    later_ns: Array
    """[num_steps + 1] each step and all later ones, whatever the cache then holds; 0 at the end."""
    decode_ns: int = 0
    """The steps that generate tokens, together."""

    def check(self, candidate: Candidate, step_end: Array, decode_ns: int | None = None) -> None:
        """Return nothing; raises Internal, naming the candidate, where a finished run beats this bound.

        decode_ns: what its steps that generate tokens took; None: not asked.
        """
        total = int(step_end[-1])
        begin = np.concatenate(([0], step_end[:-1]))
        if decode_ns is not None and decode_ns < self.decode_ns:
            raise Internal(
                f"a schedule generated in {decode_ns} ns, less than its bound of {self.decode_ns} ns allows: {candidate.words()}"
            )
        if total < self.whole_ns or np.any(begin + self.later_ns[:-1] > total):
            raise Internal(
                f"a schedule took {total} ns, less than its bound of {self.whole_ns} ns allows: {candidate.words()}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prices:
    """What uses of experts cost under one set of tables, by the number of tokens; and what is paid whatever is cached.

    rows: one for each marked step, of it and all later ones, and a last one of the steps that generate tokens.
    """

    chain_ns: Array
    """[rows] dense parts, and host work that nothing overlaps."""
    launch_ns: Array
    """[rows] besides, on the stream: launches that it must wait for."""
    base_ns: Array
    """[rows] besides, on the stream: what grouped launches cost themselves."""
    copy_ns: int
    submit_ns: int
    kernel_ns: Array
    """[kinds of token counts]"""
    cores_ns: Array | None
    """[kinds of token counts]; None where no expert may run on the cores."""


class Bounds:
    """Lower bounds of candidates on one window, keeping what it has computed."""

    def __init__(self, simulation: Simulation, base: OffloadSchedule) -> None:
        self._simulation = simulation
        self._workload: Workload = simulation.workload(base, with_next_use=True)
        self._loads: dict[tuple[int, bool], Array] = {}
        self._prices: dict[object, tuple[CostTables, _Prices]] = {}
        self._bounds: dict[object, Bound] = {}
        self._missed: dict[object, Array] = {}
        num_steps = self._workload.num_steps
        # Steps from which what is left is computed, the first and the end among them.
        self._marks = np.unique(np.linspace(0, num_steps, min(_MOST_MARKS, num_steps) + 1).astype(np.int64))
        self._decoding = self._workload.step_phase == 1
        steps = self._workload.steps
        self._step_of = np.repeat(
            np.arange(self._workload.num_steps), np.diff(steps.layer_step_start[:: self._workload.num_layers])
        )
        layer = np.arange(len(steps.layer_step_start) - 1) % self._workload.num_layers
        first_key = np.repeat(layer * self._workload.num_experts, np.diff(steps.layer_step_start))
        self._key_of = first_key + steps.layer_step_expert
        self._tokens, self._kind_of = np.unique(steps.layer_step_tokens, return_inverse=True)
        # Where bins of neighbouring kinds begin; one kind a bin as long as there are few.
        self._bins = np.unique(
            np.linspace(0, len(self._tokens), min(_MOST_KINDS, len(self._tokens)), endpoint=False).astype(np.int64)
        )
        self._bin_of = np.searchsorted(self._bins, self._kind_of, side="right") - 1
        # Each use's (span between marks, bin), as one number.
        span = np.searchsorted(self._marks, self._step_of, side="right") - 1
        self._place_of = span * len(self._bins) + self._bin_of
        self._uses = self._counted(np.ones(len(self._bin_of), bool))
        self._all_loads = np.bincount(self._step_of, minlength=num_steps)

    def of(self, candidate: Candidate) -> Bound:
        """Return what the candidate's run cannot take less than."""
        schedule, cache = candidate.schedule, candidate.schedule.cache
        tables = self._simulation.least_tables(schedule)
        if len(tables.stages):  # passes at work on several cards at once: only what one card does adds up
            last = tables.stages[:-2] == tables.stages[-2]
            each = tables.dense_ns[:, last].sum(axis=1) + tables.head_ns
            later = _from_each_on(each[tables.step_class])
            return Bound(whole_ns=int(later[0]), later_ns=later)
        prices = self._prices_of(schedule)
        guessing = schedule.predictor.kind != "none"
        if cache.policy == "static" and not guessing:
            return self._of_fixed(schedule, prices)
        if cache.policy == "none":
            slots, pooled = 0, True
        else:
            spare = schedule.predictor.staging + (STREAM_SLOTS if cache.policy == "static" else 0)
            pooled = cache.pooled_experts is not None
            slots = (
                max(cache.slots_by_cache(self._workload.num_layers)) + spare
            )  # as if every layer had as many as the first
        full = cache.policy == "static"
        # How far and how wide a schedule looks ahead, or what it evicts, bounds nothing: many candidates share a bound.
        key = (id(prices), slots, pooled, full, cache.policy == "none", schedule.copy.overlap, guessing)
        if key not in self._bounds:
            self._bounds[key] = self._of_changing(schedule, prices, slots, pooled=pooled)
        return self._bounds[key]

    # --- parts ------------------------------------------------------------------------------------------------------------

    def _of_changing(self, schedule: OffloadSchedule, prices: _Prices, slots: int, *, pooled: bool) -> Bound:
        """Return the bound of a cache with `slots` places (per layer, or pooled) whose content changes, or of none."""
        if schedule.cache.policy == "none":
            loads, places = self._all_loads, 0
        else:
            loads, places = self._fewest(slots, pooled=pooled), slots if pooled else slots * self._workload.num_layers
        # What the cache holds when a step begins may save that many loads: what a schedule has kept by then is not known.
        # (Starting from any content saves at most as many loads as there are places, against starting empty; and a
        # farthest-next-use run that already holds something never loads more than one that starts empty.)
        missing = np.maximum(self._rows(loads) - places, 0)
        missing[-1] = self._missing_in_decoding(loads, places)
        later = self._least(schedule, prices, self._uses, missing)
        if schedule.cache.policy == "static":  # starts full
            return self._bound(int(later[0]), later)
        whole = self._least(schedule, prices, self._uses[:1], np.array([loads.sum()]))
        return self._bound(int(whole[0]), later)

    def _bound(self, whole_ns: int, later: Array) -> Bound:
        """Return a bound; later: [rows] what is left from each mark on, and what the steps that generate tokens take."""
        following = np.searchsorted(self._marks, np.arange(self._workload.num_steps + 1))
        return Bound(whole_ns=whole_ns, later_ns=later[following], decode_ns=int(later[-1]))

    def _missing_in_decoding(self, loads: Array, places: int) -> int:
        """Return how many loads the steps that generate tokens need at least: what the cache held when each stretch began is free."""
        turns = np.flatnonzero(np.diff(self._decoding.astype(np.int8), prepend=0, append=0))
        total = np.concatenate(([0], np.cumsum(loads)))
        return int(np.maximum(total[turns[1::2]] - total[turns[::2]] - places, 0).sum())

    def _rows(self, values: Array) -> Array:
        """Return [rows] sums of `values` [num_steps]."""
        found: Array = np.append(_from_each_on(values)[self._marks], values[self._decoding].sum())
        return found

    def _of_fixed(self, schedule: OffloadSchedule, prices: _Prices) -> Bound:
        """Return the bound of a cache that never changes and guesses nothing: which uses miss is known."""
        cache = schedule.cache
        content = (cache.slots_by_cache(self._workload.num_layers), cache.placement)
        key = (id(prices), *content, schedule.copy.overlap)
        if key not in self._bounds:
            if content not in self._missed:
                self._missed[content] = self._counted(self._away(schedule))
            missed = self._missed[content]
            later = self._least(schedule, prices, self._uses - missed, None, missed=missed)
            self._bounds[key] = self._bound(int(later[0]), later)
        return self._bounds[key]

    def _away(self, schedule: OffloadSchedule) -> Any:
        """Return [uses] whether a cache that never changes lacks the expert."""
        given = self._simulation.given(schedule)
        if given.config.policy != STATIC:
            raise Internal("a cache that changes was taken for a fixed one")
        state = fresh_state(given.config, self._workload, given.capacities, given.weighed)
        return state.experts["where"][self._key_of] != CACHED

    def _least(self, schedule: OffloadSchedule, prices: _Prices, uses: Array, missing: Array | None,
               missed: Array | None = None) -> Array:  # fmt: skip
        """Return, for each row, a time that these uses of experts cannot take less than.

        uses: [n, kinds] of which at least `missing` [n] miss, which ones being free. missed: [n, kinds] that all miss, besides.
        """
        chain, launches, base = (each[: len(uses)] for each in (prices.chain_ns, prices.launch_ns, prices.base_ns))
        kernel, cores = prices.kernel_ns, prices.cores_ns
        on_stream = chain + launches + (0 if cores is not None else base)
        if (
            not schedule.copy.overlap
        ):  # copies and kernels add up, but launches and submissions may pass while a copy runs
            beside_copies, kernel_beside_copies = chain + (0 if cores is not None else base), kernel
        elif (
            schedule.predictor.kind == "none"
        ):  # a demand is made after its layer's routing and awaited before the next layer
            beside_copies, kernel_beside_copies = chain, np.zeros_like(kernel)
        else:
            beside_copies, kernel_beside_copies = np.zeros_like(chain), np.zeros_like(kernel)
        best = np.zeros(len(uses))
        for on_cores, on_link, on_device in _FETCHING if cores is None else _DIVIDING:
            hit = on_device * kernel + on_link * kernel_beside_copies
            # Submissions are made between a routing and the kernels that follow it: the stream waits for them.
            miss = hit + on_link * prices.copy_ns + on_device * prices.submit_ns
            if cores is not None:
                miss = np.minimum(miss, on_cores * cores)
            fixed = on_cores * chain + on_link * beside_copies + on_device * on_stream
            found = fixed + _divided(uses, self._bins, hit, miss, missing)
            if missed is not None:
                found = found + missed @ np.minimum.reduceat(miss, self._bins)
            best = np.maximum(best, found)
        whole: Array = np.floor(best * (1 - _ROUNDING)).astype(np.int64)
        return whole

    def _fewest(self, slots: int, *, pooled: bool) -> Array:
        most = self._simulation.num_experts if pooled else self._simulation.trace.num_experts
        key = (min(slots, most), pooled)
        if key not in self._loads:
            self._loads[key] = fewest_loads(self._workload, key[0], pooled=pooled)
        return self._loads[key]

    def _counted(self, which: Any) -> Array:
        """Return [rows, kinds] how many of the uses that `which` marks each row has, by tokens."""
        spans, kinds = len(self._marks) - 1, len(self._bins)
        later = _from_each_on(np.bincount(self._place_of[which], minlength=spans * kinds).reshape(spans, kinds))
        decoding = self._bin_of[which & self._decoding[self._step_of]]
        return np.concatenate((later, np.bincount(decoding, minlength=kinds)[None]))

    def _prices_of(self, schedule: OffloadSchedule) -> _Prices:
        tables = self._simulation.least_tables(schedule)
        grouped, cores = schedule.kernel.grouping == "grouped", schedule.kernel.miss != "fetch"
        key = (id(tables), grouped, cores)
        if key not in self._prices:  # the tables are kept with their prices, so that no others can have their id
            self._prices[key] = tables, self._priced(tables, grouped=grouped, cores=cores)
        return self._prices[key][1]

    def _priced(self, tables: CostTables, *, grouped: bool, cores: bool) -> _Prices:
        """Return the prices under these tables; of two weight formats the cheaper one counts."""
        steps, layers, host = self._workload.num_steps, self._workload.num_layers, tables.host_ns[0]
        dense = tables.dense_ns.sum(axis=1)[tables.step_class] + tables.head_ns[tables.step_class]
        each_step = int(host.step + host.kernel)
        copies = tables.chunk_ns[:, 0] * (tables.num_chunks - 1) + tables.chunk_ns[:, 1]
        return _Prices(
            chain_ns=self._rows(dense + layers * int(host.layer) + each_step),
            launch_ns=self._rows(np.full(steps, layers * int(host.kernel))),
            # Every layer step launches something, unless the cores may compute all of it.
            base_ns=self._rows(np.full(steps, layers * int(tables.grouped_ns[0]) * int(grouped))),
            copy_ns=int(copies.min()),
            submit_ns=int(host.transfer),
            kernel_ns=tables.kernel_ns.min(axis=0)[self._tokens],
            cores_ns=tables.cpu_ns.min(axis=0)[self._tokens] if cores else None,
        )


def _divided(uses: Array, bins: Array, hit: Floats, miss: Floats, missing: Array | None) -> Floats:
    """Return [n] the least that `uses` [n, bins] cost when at least `missing` [n] of them miss; none must where it is None.

    hit, miss: [kinds] the price of one use; kinds that share a bin share its least price.
    """
    if missing is None:
        none_misses: Floats = np.asarray(uses @ np.minimum.reduceat(hit, bins), np.float64)
        return none_misses
    least = np.minimum.reduceat(np.minimum(hit, miss), bins)
    extra = np.minimum.reduceat(np.maximum(miss - hit, 0.0), bins)
    order = np.argsort(extra, kind="stable")
    ranked = uses[:, order]
    before = np.cumsum(ranked, axis=1) - ranked
    paid: Floats = uses @ least + np.clip(missing[:, None] - before, 0, ranked) @ extra[order]
    return paid


def _from_each_on(values: Array) -> Array:
    """Return [n + 1, ...] sums of `values` from each place of the first axis to the end."""
    total = np.zeros((len(values) + 1, *values.shape[1:]), np.int64)
    total[:-1] = np.cumsum(values[::-1], axis=0)[::-1]
    return total
