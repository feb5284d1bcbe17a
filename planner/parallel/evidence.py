"""What an expert-parallel plan knows of its routing: recorded tokens, or counts alone, behind one question.

Modelled: the question is "what would a step look like under this placement, this run-time router and this schedule?". Recorded
tokens answer it by replay, on three disjoint sets of requests: one to plan on, one to choose by, one to report on. Counts
answer it by expectation, taking choices as independent given how often each expert is used: earlier windows are planned on and later
ones reported; a single matrix is split by chance, and popularity drifts before it is served. Ignored: where placements come from
(`ep_candidates`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from ...sim.parallel.traffic import StepLoad, Topology, count_step, expect_step
from ...specs.schedules.parallel import ExpertParallelSchedule
from ...traces.recording import LoadProfile, RoutingTrace
from ...traces.synthesis.loads import ASSUMED, DRIFT
from ..placement.comparison import Candidate
from ..placement.placement import Placement
from ..placement.replica_choice import StaticChoice
from ..placement.splits import StepTokens, expert_load, request_batches, split_requests

PLAN, CHOOSE, REPORT = "plan", "choose", "report"
# Shares of the tokens to plan on, choose by and report on: search overfits, so most go to planning.
SPLIT_FRACTIONS = (0.55, 0.15, 0.3)
# Orders in which the planning requests are cut into steps; a static table planned on too few tokens does worse on others.
PLANNING_SHUFFLES = 2


class Evidence(Protocol):
    """Answers what a step would look like."""

    @property
    def exact(self) -> bool:
        """Whether tokens were recorded one by one."""
        ...  # pragma: no cover

    @property
    def load(self) -> npt.NDArray[np.float64]:
        """[layers, experts]: tokens per expert, of the part to plan on."""
        ...  # pragma: no cover

    @property
    def step_tokens(self) -> int:
        """Tokens of one step over all ranks."""
        ...  # pragma: no cover

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the routing."""
        ...  # pragma: no cover

    def loads(self, part: str, candidate: Candidate, schedule: ExpertParallelSchedule) -> list[StepLoad]:
        """Return the counts of every step of a part."""
        ...  # pragma: no cover


def topology_of(placement: Placement) -> Topology:
    """Return the simulator's view of a placement's machine."""
    return Topology(
        num_ranks=placement.num_ranks, num_nodes=placement.num_nodes, slots_per_rank=placement.slots_per_rank
    )


@dataclass(slots=True)
class TokenEvidence:
    """Recorded tokens in three parts of whole requests."""

    parts: dict[str, list[StepTokens]]
    num_experts: int
    notes: tuple[str, ...] = ()
    weight: int = 1
    """Tokens that each recorded token stands for, where a recording is too short for steps of the size asked for."""
    _slots: dict[tuple[str, int, int], tuple[Candidate, list[npt.NDArray[np.int64]]]] = field(default_factory=dict)
    _loads: dict[tuple[object, ...], list[StepLoad]] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Tokens were recorded one by one."""
        return True

    @property
    def load(self) -> npt.NDArray[np.float64]:
        """[layers, experts]: tokens per expert, of the part to plan on."""
        return expert_load(self.parts[PLAN], self.num_experts).astype(np.float64)

    @property
    def step_tokens(self) -> int:
        """Tokens of one step over all ranks."""
        return self.parts[REPORT][0].num_tokens * self.weight

    def loads(self, part: str, candidate: Candidate, schedule: ExpertParallelSchedule) -> list[StepLoad]:
        """Return the counts of every step of a part, replayed once for each division of the work."""
        pipeline = schedule.pipeline
        parallelism = (
            schedule.parallel,
            schedule.all_to_all.kind,
            pipeline.micro_batches,
            pipeline.split,
            schedule.num_groups,
        )
        key = (part, id(candidate.placement), id(candidate.router), *parallelism)
        if key not in self._loads:
            topology = topology_of(candidate.placement)
            steps = self.parts[part]
            self._loads[key] = [
                count_step(slots, step.source_rank, topology, schedule).times(self.weight)
                for slots, step in zip(self.routed(part, candidate), steps, strict=True)
            ]
        return self._loads[key]

    def routed(self, part: str, candidate: Candidate) -> list[npt.NDArray[np.int64]]:
        """Return the slots [tokens, layers, top_k] the router picks in every step."""
        key = (part, id(candidate.placement), id(candidate.router))
        if key not in self._slots:
            placement, router = candidate.placement, candidate.router
            found = [
                np.stack([router.slots(step.experts[:, layer], step.source_rank, placement, layer, number)
                          for layer in range(placement.num_layers)], axis=1)
                for number, step in enumerate(self.parts[part])
            ]  # fmt: skip
            self._slots[key] = (candidate, found)  # the candidate is kept, so that its ids stay its own
        return self._slots[key][1]


def token_evidence(
    trace: RoutingTrace, *, num_ranks: int, step_tokens: int, prefill: bool, seed: int = 0, sequence_tokens: int = 1
) -> TokenEvidence:
    """Return the evidence of a recording, in steps of about `step_tokens` tokens of one phase, `sequence_tokens` at once of each request.

    Where a part is shorter, each of its tokens stands for several: kernels then work at the size asked for, and steps are
    as uneven as the recorded sample.

    Raises InputError where the phase has no tokens or too few requests for three parts.
    """
    phase = 0 if prefill else 1
    rows = np.flatnonzero(np.asarray(trace.phase) == phase)
    notes = []
    if len(rows) == 0:
        rows = np.arange(trace.num_tokens)
        notes.append(
            f"the recording holds no {'prefill' if prefill else 'decode'} tokens: its other tokens stand for them"
        )
    request, experts = np.asarray(trace.request)[rows], np.asarray(trace.experts)[rows]
    sets = split_requests(request, SPLIT_FRACTIONS, seed)
    parts = {}
    most = min(step_tokens, *(int(np.isin(request, ids).sum()) for ids in sets))
    # As few recorded tokens as standing for whole ones leaves of the size asked for: steps of other sizes are compared with these.
    most -= most % sequence_tokens
    weight = -(-step_tokens // max(1, most))
    size = step_tokens // weight // sequence_tokens * sequence_tokens
    if size < num_ranks:
        size, weight = most, max(1, step_tokens // max(1, most))
    if size < num_ranks:
        raise InputError(
            "trace", f"{len(rows)} tokens", f"too few for steps over {num_ranks} ranks", "record more tokens"
        )
    if weight > 1:
        notes.append(f"steps have {size} recorded tokens, the shortest part of the recording, each of which stands for {weight}: "
                     "real steps of that size are a little more even")  # fmt: skip
    if size * weight < step_tokens:
        notes.append(f"steps have {size * weight} tokens instead of {step_tokens}")
    if sequence_tokens > 1:
        notes.append(f"the {sequence_tokens} tokens of a sequence that a step checks are consecutive recorded ones: refused drafts "
                     "are taken to be routed like them")  # fmt: skip
    for name, ids, shuffles in ((PLAN, sets[0], PLANNING_SHUFFLES), (CHOOSE, sets[1], 1), (REPORT, sets[2], 1)):
        parts[name] = request_batches(
            experts, request, ids, batch_tokens=size, num_ranks=num_ranks, seed=seed, shuffles=shuffles,
            together=sequence_tokens,
        )  # fmt: skip
    return TokenEvidence(parts, trace.num_experts, tuple(notes), weight)


@dataclass(slots=True)
class CountEvidence:
    """Counts per expert: those that are planned on, and those that are served."""

    counts: npt.NDArray[np.float64]
    """[layers, experts]: tokens that chose each expert, to plan on and choose by."""
    top_k: int
    num_tokens: int
    """Tokens of one step over all ranks."""
    notes: tuple[str, ...] = ()
    served: npt.NDArray[np.float64] | None = None
    """[layers, experts]: what is reported on; None: the same counts."""
    _loads: dict[tuple[object, ...], tuple[Candidate, list[StepLoad]]] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Tokens were not recorded one by one."""
        return False

    @property
    def load(self) -> npt.NDArray[np.float64]:
        """[layers, experts]: tokens per expert."""
        return self.counts

    @property
    def step_tokens(self) -> int:
        """Tokens of one step over all ranks."""
        return self.num_tokens

    def loads(self, part: str, candidate: Candidate, schedule: ExpertParallelSchedule) -> list[StepLoad]:
        """Return the expected counts of one step under the part's counts."""
        pipeline = schedule.pipeline
        parallelism = (
            schedule.parallel,
            schedule.all_to_all.kind,
            pipeline.micro_batches,
            pipeline.split,
            schedule.num_groups,
        )
        counts = self.counts if self.served is None or part != REPORT else self.served
        key = (counts is self.counts, id(candidate.placement), id(candidate.router), *parallelism)
        if key not in self._loads:
            placement = candidate.placement
            ranks = placement.num_ranks
            tokens = np.diff(np.rint(np.arange(ranks + 1) * self.num_tokens / ranks).astype(np.int64))
            load = expect_step(self.slot_chance(candidate, counts), tokens, topology_of(placement), schedule)
            self._loads[key] = (candidate, [load])
        return self._loads[key][1]

    def slot_chance(
        self, candidate: Candidate, counts: npt.NDArray[np.float64] | None = None
    ) -> npt.NDArray[np.float64]:
        """Return [layers, ranks or 1, slots]: the chance that a token of a source rank takes a slot, by the planned counts where None."""
        # Chance that a token takes an expert: its share of all choices times choices a token, at most certain.
        counts = self.counts if counts is None else counts
        total = counts.sum(axis=1, keepdims=True)
        chance = np.minimum(1.0, counts * self.top_k / np.where(total > 0, total, 1.0))
        return _slot_chance(chance, candidate)


def _slot_chance(chance: npt.NDArray[np.float64], candidate: Candidate) -> npt.NDArray[np.float64]:
    """Return [layers, ranks or 1, slots]: the chance of each slot, by a static router's table, else split evenly."""
    placement, router = candidate.placement, candidate.router
    row = placement.physical_to_logical.astype(np.int64)
    if isinstance(router, StaticChoice):
        layers, ranks = placement.num_layers, placement.num_ranks
        found = np.zeros((layers, ranks, placement.num_slots))
        table = router.table.astype(np.int64).transpose(0, 2, 1)  # [layers, ranks, experts]
        np.put_along_axis(found, table, np.broadcast_to(chance[:, None, :], table.shape), axis=2)
        return found
    share = chance / placement.replica_counts()
    return np.take_along_axis(share, row, axis=1)[:, None, :]


def count_evidence(profile: LoadProfile, *, top_k: int, step_tokens: int, sequence_tokens: int = 1) -> CountEvidence:
    """Return the evidence of counts; raises InputError where a layer has none. sequence_tokens: of each request in a step."""
    empty = np.flatnonzero(profile.counts.sum(axis=1) == 0)
    if len(empty):
        raise InputError(f"counts[{empty[0]}]", 0, "the layer has no tokens", "leave dense layers out of the recording")
    planned, served, how = _planned_and_served(profile)
    notes = [
        *([profile.metadata[ASSUMED]] if ASSUMED in profile.metadata else []),
        "counts only: traffic assumes that a token's choices are independent given how often each expert is used",
        how,
    ]
    if sequence_tokens > 1:
        notes.append(f"the {sequence_tokens} tokens of a sequence that a step checks are taken to choose independently: "
                     "consecutive ones share experts, so that real steps read fewer")  # fmt: skip
    return CountEvidence(planned, top_k, step_tokens, tuple(notes), served)


_Counts: TypeAlias = npt.NDArray[np.float64]


def _planned_and_served(profile: LoadProfile) -> tuple[_Counts, _Counts | None, str]:
    """Return (counts to plan on, counts to report on, how they were told apart)."""
    counts = profile.counts.astype(np.float64)
    if (profile.counts == profile.counts[:, :1]).all():
        return counts, None, "all experts are chosen equally often, in what is planned on and in what is served"
    windows = profile.windows
    if windows is not None and len(windows) > 1:
        first = windows[: len(windows) // 2].sum(axis=0)
        later = windows[len(windows) // 2 :].sum(axis=0)
        if (first.sum(axis=1) > 0).all() and (later.sum(axis=1) > 0).all():
            how = f"planned on the first {len(windows) // 2} of {len(windows)} windows of the counts, reported on the others"
            return first.astype(np.float64), later.astype(np.float64), how
    rng = np.random.default_rng(int(profile.counts.sum()) % (1 << 32))
    part = rng.binomial(profile.counts, 0.5)
    rest = profile.counts - part
    if not ((part.sum(axis=1) > 0).all() and (rest.sum(axis=1) > 0).all()):
        part = rest = profile.counts
    drifted = rest * np.exp(DRIFT * rng.standard_normal(counts.shape))
    how = (
        f"planned on one half of the counts, drawn by chance, and reported on the other after a drift of {DRIFT:.0%} in each expert's "
        "popularity, as between published recordings of one phase: give counts in windows, or recorded tokens, to be judged on your own"
    )
    return part.astype(np.float64), np.asarray(drifted, np.float64), how


def num_steps(evidence: Evidence, part: str) -> int:
    """Return the steps of a part."""
    return len(evidence.parts[part]) if isinstance(evidence, TokenEvidence) else 1
