"""What ranks predicted and measured of an expert-parallel plan, and the document that says so.

Modelled: schedules with their placements, runs and predictions; step times; timelines of all ranks on one clock. Ignored: running
(`ranks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...base.errors import InputError
from ...base.units import NS_PER_S
from ...planner.placement.comparison import Candidate
from ...sim.parallel.timeline import EP_END, EP_START, EpTimeline, ep_canonical
from ...sim.policies.state import Array
from ...specs.machines.profile import Profile
from ...specs.schedules.parallel import ExpertParallelSchedule
from ..parallel.agreement import other_bytes, port_bytes
from ..parallel.launch import RankRun
from ..parallel.prepare import Prepared
from .agreement import Compared, summary
from .error_budget import median_budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A schedule with its placement and router, to be run."""

    name: str
    schedule: ExpertParallelSchedule
    candidate: Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksValidated:
    """One schedule, predicted and measured on all ranks."""

    contender: Contender
    prepared: Prepared
    runs: Sequence[RankRun]
    compared: Compared
    byte_difference: str | None
    """The first port or link whose bytes were not the predicted ones."""
    error: float
    """Largest distance of a token's final state from one process's, relative to its norm."""
    bound: float
    """What rounding may make of it."""
    budget: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return everything of it as plain values."""
        found = {key: value for key, value in self.compared.to_dict().items() if not key.startswith("hit_rate")}
        steps = range(len(self.prepared.job.steps))
        sent = np.sum([port_bytes(self.prepared.job, self.runs, step).sum(axis=(0, 2)) for step in steps], axis=0)
        return found | {
            "schedule": self.contender.schedule.to_dict(),
            "bytes_equal": self.byte_difference is None,
            "inter_node_bytes": int(sent[0]),
            "intra_node_bytes": int(sent[1]),
            "other_bytes": other_bytes(self.runs),
            "states_error": self.error,
            "states_bound": self.bound,
            "error_budget": dict(self.budget),
            "measured_steps_s": (step_times(self.runs)[1:] / NS_PER_S).tolist(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksValidation:
    """A plan's best schedule, first, and its rivals."""

    validated: tuple[RanksValidated, ...]
    profile: Profile
    notes: tuple[str, ...]
    reduced: Mapping[str, Any] | None
    network: str
    """What joins the ranks, in words."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `moeplan validate --json` prints."""
        return {
            "kind": "expert-parallel",
            **summary([one.compared for one in self.validated]),
            "bytes_equal": all(one.byte_difference is None for one in self.validated),
            "states_equal": all(one.error <= one.bound for one in self.validated),
            "error_budget": median_budget([one.budget for one in self.validated]),
            "configurations": [one.to_dict() for one in self.validated],
            "num_ranks": self.validated[0].prepared.job.topology.num_ranks,
            "num_nodes": self.validated[0].prepared.job.topology.num_nodes,
            "network": self.network,
            "layer_names": [str(layer) for layer in self.validated[0].prepared.job.model.moe_layers],
            "clocks": {
                "largest_offset_s": max(abs(run.clock[0]) for one in self.validated for run in one.runs) / NS_PER_S,
                "known_to_s": max(run.clock[1] for one in self.validated for run in one.runs) / NS_PER_S,
            },
            "profile": self.profile.name,
            "calibrated_in_the_same_run": False,
            "warnings": [],
            "wrong": self.wrong(),
            "notes": list(self.notes),
            "reduced": None if self.reduced is None else dict(self.reduced),
            "seconds": self.seconds,
            "drift": None,
            "without_drift": None,
        }

    def best_to_dict(self) -> dict[str, Any]:
        """Return the plan's own figures."""
        one = self.validated[0].compared
        return {
            "predicted_step_s": one.predicted_s,
            "measured_step_s": one.measured_s,
            "relative_error": one.relative_error,
        }

    def wrong(self) -> list[str]:
        """Return what must never be, in words: bytes that were not predicted, states that are not one process's."""
        found = [
            f"{one.contender.name}: {one.byte_difference}" for one in self.validated if one.byte_difference is not None
        ]
        return found + [
            f"{one.contender.name}: states are {one.error:.2g} from those of one process, rounding allows {one.bound:.2g}"
            for one in self.validated if not one.error <= one.bound
        ]  # fmt: skip

    def timelines(self, name: str | None = None) -> tuple[EpTimeline, EpTimeline]:
        """Return (predicted, measured) rows of the first step of a schedule, the plan's by default; measured: of the middle run."""
        one = next((each for each in self.validated if each.contender.name == name), self.validated[0])
        predicted = one.prepared.outcomes[0].timeline
        if predicted is None:
            raise InputError("timeline", one.contender.name, "its rows were not kept", "validate again")
        times = step_times(one.runs)[1:, 0]
        run = 1 + int(np.argsort(times)[len(times) // 2])
        return predicted, measured_timeline(one.runs, 0, run)


def step_times(runs: Sequence[RankRun]) -> Array:
    """Return int64 [repeats + 1, steps]: nanoseconds from when the last rank began a step until the last one ended it."""
    spans = np.stack([np.stack(run.spans) for run in runs])  # [ranks, steps, repeats + 1, 2]
    found: Array = (spans[..., 1].max(axis=0) - spans[..., 0].max(axis=0)).T
    return found


def measured_timeline(runs: Sequence[RankRun], step: int, repeat: int) -> EpTimeline:
    """Return the rows of all ranks in one run of a step, from when the last rank began; all clocks are the machine's one clock."""
    began = max(int(run.spans[step][repeat][0]) for run in runs)
    rows = np.concatenate([run.rows[step][repeat] for run in runs]).copy()
    rows[:, [EP_START, EP_END]] = np.maximum(rows[:, [EP_START, EP_END]] - began, 0)
    rows = rows[rows[:, EP_END] > rows[:, EP_START]]
    return EpTimeline(rows=ep_canonical(rows), step=step)
