"""Policies of rebalancing over a served period, each with what it saves and what it costs.

    never        experts in the order in which engines load them
    once         placed from stored statistics before serving: nothing moves
    every K      placed anew every K steps from the counts of the last window, moved in one of three ways
    then every K placed from stored statistics before serving, then anew every K steps (SGLang's `--init-expert-location`, `--enable-eplb`)

Modelled: a placement made from counts that were served before it takes effect, with the sampling noise of so many tokens; steps under the
counts of their own window; the cost of counting in every step, of planning and of moving. Ignored: that a background move takes effect
layer by layer; that batches shrink while a server stands still.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ....base.errors import InputError
from ....sim.parallel.simulate import EpPrediction, ParallelSimulation
from ....specs.models import weight_format
from ....specs.schedules.parallel import ExpertParallelSchedule
from ...placement.comparison import Candidate
from ...placement.eplb import rebalance
from ...placement.placement import Placement, contiguous
from ...placement.replica_choice import WeightedChoice
from ..difference import Gain, gain
from ..evidence import CountEvidence
from .moves import (
    COUNTING_S_PER_LAYER,
    STALL_UNCERTAINTY,
    WAY_WORDS,
    Rearrangement,
    longest_pause_s,
    rearrangement,
    stall_s,
)
from .windows import Counts, Window, mixed

NEVER, ONCE, EVERY, THEN = "never", "once", "every", "once-then-every"
_COUNTED = (EVERY, THEN)
"""Policies that count choices in every step."""
MOST_MOVES = 200
"""Rearrangements of a period that are simulated."""
_NINE_IN_TEN = 1.645


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When experts are placed anew, and how they move."""

    kind: str
    every_steps: int = 0
    way: str = ""

    @property
    def words(self) -> str:
        """The policy for people."""
        if self.kind == NEVER:
            return "never: experts in their order"
        if self.kind == ONCE:
            return "once, from stored statistics, before serving"
        first = "once from stored statistics, then " if self.kind == THEN else ""
        return f"{first}every {self.every_steps:,} steps, moved {WAY_WORDS[self.way]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """A policy over the period."""

    policy: Policy
    whole_s: float
    """All steps, counting and standing still."""
    steps_s: float
    counting_s: float
    stalled_s: float
    num_moves: int
    longest_pause_s: float
    saved: Gain
    """Against never, over the whole period."""
    scatter_s: float
    """Of the doubt, what differs from window to window: a longer period lowers it."""
    pays_from_step: int | None
    """The step from which on the policy is ahead for good; None where it never is."""
    max_over_mean_load: float


@dataclass(slots=True, kw_only=True)
class Period:
    """A period on one machine under one schedule."""

    simulation: ParallelSimulation
    schedule: ExpertParallelSchedule
    windows: Sequence[Window]
    step_tokens: int
    num_redundant_slots: int
    """Slots of a layer under a balanced placement."""
    stored: Counts
    """[layers, experts]: what was counted before the period."""
    window_steps: int
    num_groups: int = 1
    seed: int = 0
    progress: Callable[[str], None] | None = None
    _steps: dict[tuple[int, int], EpPrediction] = field(default_factory=dict)
    _kept: list[Placement] = field(default_factory=list)
    _placed: dict[tuple[str, int], list[tuple[int, Placement]]] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Steps of the period."""
        return sum(window.num_steps for window in self.windows)

    def run(self, policies: Sequence[Policy]) -> list[PolicyResult]:
        """Return every policy over the period, in the order given; raises InputError for an interval that does not fit it."""
        never = self._timed(Policy(kind=NEVER))
        return [self._result(policy, never) for policy in policies]

    # --- one policy ---------------------------------------------------------------------------------------------------

    def _result(self, policy: Policy, never: list[tuple[int, int, EpPrediction]]) -> PolicyResult:
        if self.progress is not None:
            self.progress(policy.words)
        mine = never if policy.kind == NEVER else self._timed(policy)
        moves = self._moves(policy)
        costing = self.simulation.costing
        shared = costing.constants.shared_speed
        stalls = [stall_s(policy.way, move, shared) for _, move in moves]
        counted = policy.kind in _COUNTED
        counting = COUNTING_S_PER_LAYER * self.simulation.model.num_moe_layers * self.num_steps if counted else 0.0
        steps_s = math.fsum((last - first) * one.step_s for first, last, one in mine)
        before_s = math.fsum((last - first) * one.step_s for first, last, one in never)
        whole = steps_s + counting + math.fsum(stalls)
        terms = [((last - first), one) for first, last, one in never] + [
            (-(last - first), one) for first, last, one in mine
        ]
        saved = gain(terms, self.simulation.uncertainties(), of_s=before_s, exact=False)
        scatter = 0.0 if policy.kind == NEVER else self._scatter_s(policy, never, mine)
        extra = math.hypot(scatter, STALL_UNCERTAINTY * math.fsum(stalls), 0.5 * counting)
        saved = Gain(
            saved_s=before_s - whole,
            uncertainty_s=0.0 if policy.kind == NEVER else math.hypot(saved.uncertainty_s, extra),
            of_s=before_s,
        )
        layers = self.simulation.model.num_moe_layers
        return PolicyResult(
            policy=policy, whole_s=whole, steps_s=steps_s, counting_s=counting, stalled_s=math.fsum(stalls), num_moves=len(moves),
            longest_pause_s=max((longest_pause_s(policy.way, move, layers) for _, move in moves), default=0.0), saved=saved,
            scatter_s=scatter, pays_from_step=self._ahead_from(never, mine, [step for step, _ in moves], stalls, counting),
            max_over_mean_load=math.fsum((last - first) * one.max_over_mean_load for first, last, one in mine) / self.num_steps,
        )  # fmt: skip

    def _ahead_from(self, never: list[tuple[int, int, EpPrediction]], mine: list[tuple[int, int, EpPrediction]], at: list[int],
                    stalls: list[float], counting: float) -> int | None:  # fmt: skip
        """Return the step from which on a policy stays ahead of never; None where it ends behind."""
        edges = sorted({0, *at, *(last for _, last, _ in never), *(last for _, last, _ in mine)})
        ahead, since = 0.0, None
        each = counting / self.num_steps
        for first, last in itertools.pairwise(edges):
            ahead -= math.fsum(stall for step, stall in zip(at, stalls, strict=True) if step == first)
            rate = _at(never, first).step_s - _at(mine, first).step_s - each
            before, ahead = ahead, ahead + rate * (last - first)
            if ahead <= 0:
                since = None
            elif since is None or before < 0:
                since = first + (math.ceil(-before / rate) if rate > 0 and before < 0 else 0)
        return since

    def _scatter_s(
        self, policy: Policy, never: list[tuple[int, int, EpPrediction]], mine: list[tuple[int, int, EpPrediction]]
    ) -> float:
        """Return the doubt that a period of so few windows leaves about what a policy saves; one window says nothing of drift."""
        begin, saved, steps = 0, [], []
        for window in self.windows:
            middle = begin + window.num_steps // 2
            saved.append(_at(never, middle).step_s - _at(mine, middle).step_s)
            steps.append(window.num_steps)
            begin += window.num_steps
        if len(saved) < 2:
            return abs(saved[0]) * self.num_steps
        return float(_NINE_IN_TEN * np.std(saved, ddof=1) / math.sqrt(len(saved)) * sum(steps))

    def _timed(self, policy: Policy) -> list[tuple[int, int, EpPrediction]]:
        """Return (first step, step after the last, prediction of each) of every stretch in which neither counts nor placement change."""
        placements = self._placements(policy)
        found, begin = [], 0
        for at, window in enumerate(self.windows):
            end = begin + window.num_steps
            starts = [step for step, _ in placements]
            cuts = [begin, *(step for step in starts if begin < step < end), end]
            for first, last in itertools.pairwise(cuts):
                placement = next(one for step, one in reversed(placements) if step <= first)
                found.append((first, last, self._step(at, placement)))
            begin = end
        return found

    def _placements(self, policy: Policy) -> list[tuple[int, Placement]]:
        """Return (first step, placement) of a policy, in order; made once, however the experts move."""
        key = (policy.kind, policy.every_steps)
        if key not in self._placed:
            self._placed[key] = self._placed_anew(policy)
        return self._placed[key]

    def _placed_anew(self, policy: Policy) -> list[tuple[int, Placement]]:
        order = self._in_order()
        if policy.kind == NEVER:
            return [(0, order)]
        if policy.kind == ONCE:
            return [(0, self._balanced(self.stored))]
        if policy.kind == THEN:
            # What is counted while serving does not depend on the placement that serves.
            later = self._placements(Policy(kind=EVERY, every_steps=policy.every_steps))[1:]
            return [*self._placements(Policy(kind=ONCE)), *later]
        every = policy.every_steps
        if not 0 < every < self.num_steps:
            raise InputError("--rebalance-every", every, f"the period has {self.num_steps:,} steps", "give fewer steps")
        if self.num_steps // every > MOST_MOVES:
            rule = f"{self.num_steps // every:,} rearrangements in this period, above {MOST_MOVES}"
            raise InputError("--rebalance-every", every, rule, "give more steps, or a shorter period")
        found = [(0, order)]
        for step in range(every, self.num_steps, every):
            share = mixed(self.windows, max(0, step - self.window_steps), step)
            tokens = min(step, self.window_steps) * self.step_tokens * self.simulation.model.top_k
            rng = np.random.default_rng([self.seed, step])
            found.append((step, self._balanced(rng.poisson(share * tokens).astype(float))))
        return found

    def _moves(self, policy: Policy) -> list[tuple[int, Rearrangement]]:
        """Return (step, cost) of every rearrangement during the period."""
        if policy.kind not in _COUNTED:
            return []
        fmt = weight_format(self.schedule.kernel.bits)
        model, constants = self.simulation.model, self.simulation.costing.constants
        placements = self._placements(policy)
        return [
            (step, rearrangement(model, before, after, model.expert_bytes(fmt), constants))
            for (_, before), (step, after) in itertools.pairwise(placements)
        ]

    # --- steps and placements -------------------------------------------------------------------------------------------

    def _in_order(self) -> Placement:
        simulation = self.simulation
        experts, ranks = simulation.model.num_experts, simulation.num_ranks
        slots = -(-experts // ranks) * ranks
        return self._kept_as(contiguous(simulation.model.num_moe_layers, experts, slots, ranks, simulation.num_nodes))

    def _balanced(self, counts: Counts) -> Placement:
        simulation = self.simulation
        return self._kept_as(
            rebalance(counts, self.num_redundant_slots, simulation.num_ranks, simulation.num_nodes, self.num_groups)
        )

    def _kept_as(self, placement: Placement) -> Placement:
        """Return the placement that was met before and is the same, so that its steps are predicted once."""
        for kept in self._kept:
            if kept.num_slots == placement.num_slots and np.array_equal(
                kept.physical_to_logical, placement.physical_to_logical
            ):
                return kept
        self._kept.append(placement)
        return placement

    def _step(self, window: int, placement: Placement) -> EpPrediction:
        key = (window, id(placement))
        if key not in self._steps:
            model = self.simulation.model
            evidence = CountEvidence(self.windows[window].counts, model.top_k, self.step_tokens)
            candidate = Candidate(placement=placement, router=WeightedChoice())
            groups = min(self.schedule.num_groups, placement.slots_per_rank)
            schedule = self.schedule
            if schedule.pipeline.split == "expert" and groups != schedule.num_groups:
                schedule = schedule.with_options(pipeline__num_groups=max(1, groups))
            loads = evidence.loads("report", candidate, schedule)
            self._steps[key] = self.simulation.predict(schedule, loads, parts=True, check_memory=False)
        return self._steps[key]


def _at(stretches: list[tuple[int, int, EpPrediction]], step: int) -> EpPrediction:
    return next(one for first, last, one in stretches if first <= step < last)
