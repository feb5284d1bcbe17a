"""What a run did: the same logical counts as a prediction, a measured timeline, and step times.

Modelled: counts are those of the decisions, except bytes and tokens, which are counted where bytes and tokens really
moved. Ignored: how a run is compared with a prediction (`agreement`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...sim.offload.simulators import Outcome
from ...sim.policies.state import Array
from ...sim.timeline import D2H, DISK, H2D, OP_CPU, OP_EXPERT, ROW_BYTES, ROW_LANE, ROW_OP, ROW_TOKENS, Timeline

COMPARED = (
    "hits",
    "hits_guessed",
    "misses",
    "prefetches",
    "prefetches_used",
    "prefetches_dropped",
    "extra_fetches",
    "writebacks",
    "evictions",
    "peak_transient",
    "next_kernel",
    "next_transfer",
    "guesses_true",
    "truths",
    "cpu_runs",
    "disk_reads",
    "low_fetches",
)
"""Counts in which a run and a replay must agree, by their names in `sim.policies.records`."""


_UNDECIDED = ("guesses_true", "truths")


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One run of a schedule on a real device."""

    counts: Any
    """Logical counts: one record of `sim.policies.records.COUNTS`."""
    timeline: Timeline
    step_ns: Array
    """int64 [num_steps]: duration of each forward pass."""
    part_ns: Array
    """int64 [num_steps, num_layers]: each step cut where the next layer's dense part begins."""
    disturbed: Array
    """bool [num_steps, num_layers]: another program was given one of the run's cores meanwhile."""
    makespan_ns: int
    ready_hits: int
    late_hits: int
    slot_bytes: int
    outputs: tuple[torch.Tensor, ...]
    """[T, H] of each step's last layer, where they were asked for."""
    notes: tuple[str, ...]
    """What is not as the schedule or the model says: a shrunken model, memory that could not be page-locked."""
    expert_bytes: tuple[int, ...] = ()
    """Bytes that one expert's copy moves, by weight format: of the first, and of the second where there is one."""

    @property
    def bytes_copied(self) -> int:
        """Bytes that really went to the device."""
        return int(self.timeline.rows[self.timeline.rows[:, ROW_LANE] == H2D, ROW_BYTES].sum())

    @property
    def bytes_decided(self) -> int:
        """Bytes of the transfers that the decisions asked for and did not cancel."""
        counts, low = self.counts, self.counts.low_fetches
        asked = counts.misses + counts.prefetches + counts.extra_fetches - counts.cpu_runs
        first, *second = self.expert_bytes
        return int((asked - low) * first + low * sum(second))

    @property
    def bytes_written_back(self) -> int:
        """Bytes that really went back to the host."""
        return int(self.timeline.rows[self.timeline.rows[:, ROW_LANE] == D2H, ROW_BYTES].sum())

    @property
    def bytes_read(self) -> int:
        """Bytes that were really read from disk."""
        return int(self.timeline.rows[self.timeline.rows[:, ROW_LANE] == DISK, ROW_BYTES].sum())

    @property
    def expert_tokens(self) -> int:
        """Tokens that experts really computed, on the device and on the host's cores."""
        computed = np.isin(self.timeline.rows[:, ROW_OP], (OP_EXPERT, OP_CPU))
        return int(self.timeline.rows[computed, ROW_TOKENS].sum())

    @property
    def core_experts(self) -> int:
        """Experts that the host's cores really computed."""
        return int(np.count_nonzero(self.timeline.rows[:, ROW_OP] == OP_CPU))


def count_differences(
    execution: Execution, outcome: Outcome, expert_tokens: int, *, timing_dependent: bool = False
) -> list[str]:
    """Return what differs between a run and its prediction among hits, misses, bytes and tokens; nothing when all are equal.

    expert_tokens: tokens times top-k over all layers of the workload. timing_dependent: decisions looked at how far copies had come,
    so that only what no decision changes can be equal: tokens, steps, how many guesses were true; and bytes moved are those that
    the run itself decided to move.
    """
    found = []
    for name in _UNDECIDED if timing_dependent else COMPARED:
        if execution.counts[name] != outcome.counts[name]:
            found.append(f"{name}: predicted {outcome.counts[name]}, measured {execution.counts[name]}")
    decided = execution.counts if timing_dependent else outcome.counts
    pairs = {
        "expert tokens": (expert_tokens, execution.expert_tokens),
        "steps": (len(outcome.step_end), len(execution.step_ns)),
        "guessed hits": (int(decided.hits_guessed), execution.ready_hits + execution.late_hits),
        "experts on the host's cores": (int(decided.cpu_runs), execution.core_experts),
        "bytes read": (int(decided.disk_reads) * execution.slot_bytes, execution.bytes_read),
        "bytes copied": (
            execution.bytes_decided if timing_dependent else int(outcome.clock.bytes_h2d),
            execution.bytes_copied,
        ),
    }
    if not timing_dependent:
        pairs["bytes written back"] = int(outcome.clock.bytes_d2h), execution.bytes_written_back
    return found + [
        f"{name}: predicted {one}, measured {other}" for name, (one, other) in pairs.items() if one != other
    ]


def median_steps(executions: list[Execution]) -> Array:
    """Return float64 [num_steps]: each step's duration, the sum over its parts of their medians over repeated runs, in nanoseconds.

    A run repeats the same decisions, so a part always does the same work: the median drops what disturbed one of them. Parts
    during which another program had one of the cores do not count, unless all repetitions of a part were disturbed.
    """
    taken = np.stack([execution.part_ns for execution in executions]).astype(float)
    disturbed = np.stack([execution.disturbed for execution in executions])
    disturbed &= ~disturbed.all(axis=0)
    steps: Array = np.nanmedian(np.where(disturbed, np.nan, taken), axis=0).sum(axis=1)
    return steps
