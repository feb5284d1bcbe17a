"""What came of a run of a model: tokens, counts, times, and the recording of the routing that it made itself.

Modelled: all of it as plain arrays, in the terms of a run of a recording. Ignored: figures made of it (`figures`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...sim.policies.state import Array, Prices
from ...sim.timeline import Timeline
from ...traces.recording import RoutingTrace
from ..running.execution import Execution
from .loading.assembly import Assembled
from .passes import Kept

_FALLBACK_NAME = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRun:
    """What one schedule did while a model generated."""

    tokens: tuple[tuple[int, ...], ...]
    """Generated ids of each request."""
    prompts: tuple[int, ...]
    """Tokens of each prompt."""
    counts: Any
    """Logical counts: one record of `sim.policies.records.COUNTS`."""
    ready_hits: int
    late_hits: int
    expert_bytes: int
    timeline: Timeline
    step_begin_ns: Array
    """int64 [num_steps], from the start of the run, and so `step_end_ns`."""
    step_end_ns: Array
    step_request: Array
    step_phase: Array
    recording: RoutingTrace
    device_bytes: int
    part_ns: Array
    """int64 [num_steps, num_layers]: each step, from the end of the one before, cut where the next layer's dense part begins."""
    disturbed: Array
    """bool [num_steps, num_layers]: another program was given one of the run's cores meanwhile."""
    guess_ns: Array
    """int64: how long each guess for one later layer took, of one token."""
    logits: tuple[torch.Tensor, ...]
    """[T, V] of every pass, where they were asked for."""
    popularity: Array | None
    """What a static cache was filled by, int [num_layers, num_experts]."""
    prices: Prices | None
    """What decisions that weigh costs went by."""

    def execution(self) -> Execution:
        """Return the run as the run of a recording: what a prediction of the same decisions is compared with."""
        ends = self.step_end_ns
        return Execution(
            counts=self.counts, timeline=self.timeline, step_ns=np.diff(ends, prepend=0), part_ns=self.part_ns,
            disturbed=self.disturbed, makespan_ns=int(ends[-1]), ready_hits=self.ready_hits, late_hits=self.late_hits,
            slot_bytes=self.expert_bytes, outputs=(), notes=(), expert_bytes=(self.expert_bytes,),
        )  # fmt: skip


def recording_of(kept: Kept, assembled: Assembled) -> RoutingTrace:
    """Return everything kept as one recording."""
    guessed = bool(kept.predicted)
    return RoutingTrace(
        experts=np.concatenate(kept.experts),
        weights=np.concatenate(kept.weights),
        predicted=np.concatenate(kept.predicted) if guessed else None,
        predicted_prob=np.concatenate(kept.probability) if guessed else None,
        request=np.concatenate(kept.request),
        position=np.concatenate(kept.position),
        phase=np.concatenate(kept.phase),
        num_experts=assembled.spec.num_experts,
        model=assembled.spec.name or _FALLBACK_NAME,
        layer_ids=tuple(layer.number for layer in assembled.layers),
        source="a model run by moeplan",
        licence="",
    )
