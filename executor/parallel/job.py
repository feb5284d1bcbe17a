"""What every rank of a run is given: model, schedule, placement, recorded routing and the order of exchanges, in two files.

Modelled: `job.json` (plain values) and `job.npz` (arrays, never unpickled), written by the process that starts the ranks and
read by each of them; their hash is compared by all ranks before anything runs. Exchanges are collective, so all ranks must do
them in one order: that of the predicted step. Ignored: how ranks find each other (`launch`), and what they do (`rank`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...sim.parallel.program import FREE, IN_TURN, Program
from ...sim.parallel.simulators import EpOutcome
from ...sim.parallel.timeline import EP_GROUP, EP_LANE, EP_LAYER, EP_MICRO, EP_OP, EP_START, LANE_INTER
from ...sim.parallel.traffic import Topology
from ...sim.policies.state import Array
from ...specs.models import ModelSpec
from ...specs.provenance import model_from_values
from ...specs.schedules.parallel import ExpertParallelSchedule, ep_schedule_from_dict
from .moving import Move

# A line of an order: exchange, stage, tier. A stage of both tiers at once is of tier BOTH.
BOTH = 2
_JOB, _ARRAYS = "job.json", "job.npz"
ROUNDS = "rounds"
"""File in which the first rank says how many rounds are done."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """Recorded tokens of one step, with the copies the router picked."""

    slots: npt.NDArray[np.int64]
    """[tokens, layers, top_k]."""
    experts: npt.NDArray[np.int64]
    """[tokens, layers, top_k]: logical experts."""
    source_rank: npt.NDArray[np.int64]
    """[tokens]."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One schedule to run on some steps."""

    model: ModelSpec
    schedule: ExpertParallelSchedule
    topology: Topology
    physical_to_logical: npt.NDArray[np.int64]
    """[layers, slots]."""
    steps: Sequence[Step]
    orders: Sequence[Array]
    """Of each step, int64 [stages, 3]: exchange, stage and tier, in the order in which they are done."""
    context_tokens: int
    repeats: int = 1
    """How often each step runs; one more run before them warms up."""
    seed: int = 0
    timeout_s: float = 60.0
    """After so long without an answer another rank is taken for dead."""
    move: Move | None = None
    """A change of placement while the steps run."""
    inter_bytes_per_s: float = 0.0
    """Rate of the in-process limiter between nodes; 0 where the network itself is slow."""
    reductions: Sequence[tuple[int, int]] = ()
    """(tier, values of each rank) of all-reduces that every rank takes part in after each run of the steps: BOTH for all ranks in one."""


def exchange_order(schedule: ExpertParallelSchedule, program: Program, outcome: EpOutcome) -> Array:
    """Return int64 [stages, 3]: every stage of every exchange as the predicted step begins them; outcome: with its timeline.

    An exchange of one stage is of tier BOTH. Stages that move nothing still take place: ranks cannot know that of each other.
    """
    begins = np.asarray(outcome.ex_start)
    if schedule.all_to_all.kind != "hierarchical":
        order = np.lexsort((np.arange(len(begins)), begins))
        return np.stack([order, np.zeros_like(order), np.full_like(order, BOTH)], axis=1)
    rows = {} if outcome.timeline is None else _first_starts(outcome.timeline.rows)
    found = []
    for ex in range(len(begins)):
        first = int(program.ex_first[ex])
        for stage, tier in enumerate((first, 1 - first)):
            key = (program.ex_kind[ex], program.ex_layer[ex], program.ex_micro[ex], program.ex_group[ex], tier)
            at = rows.get(tuple(int(part) for part in key), int((outcome.ex_start, outcome.ex_end)[stage][ex]))
            if program.ex_mode[ex] not in (FREE, IN_TURN):
                at = int(begins[ex])  # pipelined in the prediction: here one stage ends before the next begins
            found.append((at, ex, stage, tier))
    found.sort()
    return np.array([each[1:] for each in found], np.int64).reshape(-1, 3)


def _first_starts(rows: Array) -> dict[tuple[int, ...], int]:
    """Return when the first port of every stage begins."""
    found: dict[tuple[int, ...], int] = {}
    for row in rows[rows[:, EP_LANE] >= LANE_INTER].tolist():
        key = (row[EP_OP], row[EP_LAYER], row[EP_MICRO], row[EP_GROUP], row[EP_LANE] - LANE_INTER)
        found[key] = min(found.get(key, row[EP_START]), row[EP_START])
    return found


def write_job(folder: Path, job: Job) -> str:
    """Write a job into a folder; return its hash."""
    values = {
        "model": dataclasses.asdict(job.model), "schedule": job.schedule.to_dict(), "topology": dataclasses.asdict(job.topology),
        "num_steps": len(job.steps), "context_tokens": job.context_tokens, "repeats": job.repeats, "seed": job.seed,
        "timeout_s": job.timeout_s, "inter_bytes_per_s": job.inter_bytes_per_s,
        "reductions": [list(each) for each in job.reductions],
    }  # fmt: skip
    arrays: dict[str, Any] = {"physical_to_logical": job.physical_to_logical}
    for number, (step, order) in enumerate(zip(job.steps, job.orders, strict=True)):
        arrays |= {f"slots{number}": step.slots, f"experts{number}": step.experts, f"source{number}": step.source_rank,
                   f"order{number}": order}  # fmt: skip
    if job.move is not None:
        values["move"] = {"way": job.move.way, "begin": job.move.begin}
        arrays["after"] = job.move.physical_to_logical
        arrays |= {f"after{number}": slots for number, slots in enumerate(job.move.slots)}
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    (folder / _ARRAYS).write_bytes(packed.getvalue())
    (folder / _JOB).write_text(json.dumps(values))
    return job_sha256(folder)


def job_folders(folder: Path) -> list[Path]:
    """Return the folders of the jobs that ranks run in turns, in order."""
    return sorted(folder.glob("job-*"))


def job_sha256(folder: Path) -> str:
    """Return the hash of a job's two files."""
    return hashlib.sha256((folder / _JOB).read_bytes() + (folder / _ARRAYS).read_bytes()).hexdigest()


def read_job(folder: Path) -> Job:
    """Return the job in a folder."""
    values = json.loads((folder / _JOB).read_text())
    with np.load(folder / _ARRAYS, allow_pickle=False) as arrays:
        steps = [
            Step(slots=arrays[f"slots{n}"], experts=arrays[f"experts{n}"], source_rank=arrays[f"source{n}"])
            for n in range(values["num_steps"])
        ]
        orders = [arrays[f"order{n}"] for n in range(values["num_steps"])]
        placed = arrays["physical_to_logical"]
        told, move = values.get("move"), None
        if told is not None:
            move = Move(
                way=told["way"], begin=told["begin"], physical_to_logical=arrays["after"],
                slots=tuple(arrays[f"after{n}"] for n in range(values["num_steps"])),
            )  # fmt: skip
    return Job(
        model=model_from_values(values["model"]), schedule=ep_schedule_from_dict(values["schedule"]),
        topology=Topology(**values["topology"]), physical_to_logical=placed, steps=steps, orders=orders,
        context_tokens=values["context_tokens"], repeats=values["repeats"], seed=values["seed"], timeout_s=values["timeout_s"],
        inter_bytes_per_s=values["inter_bytes_per_s"], move=move,
        reductions=[(int(tier), int(size)) for tier, size in values["reductions"]],
    )  # fmt: skip
