"""Moving experts while ranks serve, run for real beside its prediction.

    pause         all layers (at-once) or one (layer-by-layer): of each layer, the law of an exchange for the bytes of its weights
    beside        (background) a piece of weights takes a start, in which the link is free, and its bytes' time on the link; while both want
                  the link, tokens and weights get half of it each

Modelled: the laws that steps are predicted by (`calibrate.costs.rank_laws`); a move lasts as many steps as its weights need of what steps
leave of the link. Results are compared with one process's in every step before, during and after. Ignored: what copying weights inside a
node costs the cores, and moves of less than a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...base.errors import InputError
from ...base.units import NS_PER_S
from ...calibrate.costs.rank_laws import COMBINE, DISPATCH, RankLaws
from ...devices.stores.slot_sizes import expert_layout
from ...planner.parallel.period.moves import BACKGROUND, LAYER_BY_LAYER
from ...planner.placement.comparison import Candidate
from ...sim.parallel.simulate import ParallelSimulation
from ...sim.policies.state import Array
from ...specs.schedules.parallel import ExpertParallelSchedule
from ..parallel.agreement import rounding_bound
from ..parallel.job import Job, Step
from ..parallel.launch import RankRun, run_jobs
from ..parallel.moving import PIECE_BYTES, Move, fetches, moved_slots
from ..parallel.network import Nodes
from ..parallel.prepare import Prepared, prepare_job
from ..parallel.reference import reference_states

_ROUNDS_BEFORE = 4
"""Rounds under the old placement, the first of which warms up; as many follow under the new one."""
_ROOM = 2.0
"""So many times as long as predicted a move may take before a run is too short to see its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveValidated:
    """One move, predicted and measured."""

    way: str
    num_bytes: int
    """Of weights, over all links."""
    predicted_pause_s: float
    measured_pause_s: float
    """All time in which no step runs."""
    predicted_moving_s: float
    measured_moving_s: float
    """From when the first rank began to move until the last one was done."""
    predicted_slowdown: float
    measured_slowdown: float
    """A step beside the move over one before it; 1 where steps and moves take turns."""
    noise: float
    """What two halves of the steps before the move differ by."""
    error: float
    """Largest distance of a token's state from one process's, in any step."""
    bound: float
    steps_s: tuple[float, ...]
    """Every step, in order."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return dataclasses.asdict(self)


def validate_move(
    simulation: ParallelSimulation,
    schedule: ExpertParallelSchedule,
    steps: Sequence[tuple[Step, Step]],
    candidates: tuple[Candidate, Candidate],
    way: str,
    *,
    nodes: Nodes | None,
    limit_bytes_per_s: float,
) -> MoveValidated:
    """Return what moving from one placement to another takes; steps: the same tokens routed under either.

    Raises InputError without laws of these ranks, ExecutionFailed where a rank fails.
    """
    laws = simulation.costing.constants.ranks
    if laws is None:
        raise InputError(
            "hardware", simulation.profile.name, "no steps of these ranks were measured", "calibrate --ranks"
        )
    old, new = (
        prepare_job(simulation, schedule, one, [each[at] for each in steps], inter_bytes_per_s=limit_bytes_per_s)
        for at, one in enumerate(candidates)
    )
    slot_bytes = expert_layout(simulation.model, schedule.kernel.bits).slot_bytes
    layers = [
        moved_slots(each, old.job.topology) * slot_bytes
        for each in fetches(old.job.physical_to_logical, new.job.physical_to_logical, old.job.topology)
    ]
    alone = [_exchange_s(laws, each, old.job) for each in layers]
    step_s = _mean_step_s(old)
    beside_s = step_s
    moving_s = sum(alone)
    if way == BACKGROUND:
        pieces = [
            np.clip(each - first, 0, PIECE_BYTES) for each in layers for first in range(0, int(each.max()), PIECE_BYTES)
        ]
        taken_s = [_exchange_s(laws, each, old.job, COMBINE) for each in pieces]
        begin_s = laws.start_s(COMBINE)
        busy = sum(one - begin_s for one in taken_s) / max(sum(taken_s), 1e-12)
        link_s = _link_s(laws, old)
        beside_s = step_s + busy * link_s
        moving_s = sum(taken_s) * (1 + busy * min(1.0, (1 + busy) * link_s / beside_s))
    before = _ROUNDS_BEFORE
    rounds = 2 * before + int(np.ceil(_ROOM * moving_s / (step_s * len(steps)))) * (way == BACKGROUND)
    rounds += -(-len(layers) // len(steps))
    move = Move(
        way=way, physical_to_logical=new.job.physical_to_logical, slots=tuple(step.slots for step in new.job.steps), begin=before,
    )  # fmt: skip
    job = dataclasses.replace(old.job, move=move, repeats=rounds)
    runs = run_jobs([job], nodes)[0]
    taken, beside = _steps(job, runs)
    first = job.move.begin * len(job.steps) if job.move is not None else 0
    calm = taken[len(job.steps) : first]
    pieces = [run.moved.spans for run in runs if run.moved is not None]
    began, ended = np.min([each[:, 1] for each in pieces], axis=0), np.max([each[:, 2] for each in pieces], axis=0)
    return MoveValidated(
        way=way, num_bytes=int(sum(each.sum() for each in layers)),
        predicted_pause_s=0.0 if way == BACKGROUND else sum(alone),
        measured_pause_s=0.0 if way == BACKGROUND else _taken_s(way, began, ended),
        predicted_moving_s=moving_s,
        measured_moving_s=_taken_s(way, began, ended),
        predicted_slowdown=beside_s / step_s,
        measured_slowdown=float(np.median(beside) / np.median(calm)) if len(beside) else 1.0,
        noise=abs(float(np.median(calm[0::2]) / np.median(calm[1::2])) - 1),
        error=_worst_error(job, runs), bound=rounding_bound(job), steps_s=tuple((taken / NS_PER_S).tolist()),
    )  # fmt: skip


def _taken_s(way: str, began: Array, ended: Array) -> float:
    """Return the seconds of pieces that began and ended so, by the first and the last rank; steps run between those of layers."""
    whole = (ended - began).sum() if way == LAYER_BY_LAYER else ended[-1] - began[0]
    return float(whole) / NS_PER_S


def _exchange_s(laws: RankLaws, sent: Array, job: Job, law: str = DISPATCH) -> float:
    """Return the seconds of one transfer of sent: [from rank, to rank] bytes."""
    if not sent.any():
        return 0.0
    node = np.arange(len(sent)) // job.topology.ranks_per_node
    away = node[:, None] != node[None, :]
    out = np.array([(sent * away)[node == each].sum() for each in range(job.topology.num_nodes)])
    into = np.array([(sent * away)[:, node == each].sum() for each in range(job.topology.num_nodes)])
    inside = np.maximum((sent * ~away).sum(axis=1), (sent * ~away).sum(axis=0))
    parts = laws.exchange_s(law, np.maximum(out, into).max(), inside.max(), np.float64(sent.sum()))  # type: ignore[arg-type]
    return float(max(np.max(part) for part in parts))


def _mean_step_s(prepared: Prepared) -> float:
    return float(np.mean([outcome.makespan_ns for outcome in prepared.outcomes])) / NS_PER_S


def _link_s(laws: RankLaws, prepared: Prepared) -> float:
    """Return how long a step's tokens keep the link busy, in seconds."""
    per_node = prepared.job.topology.ranks_per_node
    if not laws.link_bytes_per_s:
        return 0.0
    link = 0.0
    for tables in prepared.tables:
        of_node = tables.ex_bytes[:, 0].reshape(len(tables.ex_bytes), -1, per_node).sum(axis=2).max(axis=1)
        link += float(of_node.sum()) / laws.link_bytes_per_s
    return link / len(prepared.tables)


def _steps(job: Job, runs: Sequence[RankRun]) -> tuple[Array, Array]:
    """Return nanoseconds of (every step in order, those that ran while weights moved beside them)."""
    spans = np.stack([np.stack(run.spans, axis=1) for run in runs])  # [ranks, rounds, steps, 2]
    begins, ends = spans[..., 0].max(axis=0).ravel(), spans[..., 1].max(axis=0).ravel()
    taken: Array = ends - begins
    moved = [run.moved.spans for run in runs if run.moved is not None]
    first, last = min(int(each[0, 1]) for each in moved), min(int(each[-1, 2]) for each in moved)
    return taken, taken[(begins >= first) & (ends <= last)]


def _worst_error(job: Job, runs: Sequence[RankRun]) -> float:
    worst = 0.0
    for number, expected in enumerate(reference_states(job)):
        for run in runs:
            mine = expected[torch.from_numpy(run.tokens[number])]
            for states in run.moved.states[number] if run.moved is not None else ():
                worst = max(worst, float(((torch.from_numpy(states) - mine).norm(dim=1) / mine.norm(dim=1)).max()))
    return worst
