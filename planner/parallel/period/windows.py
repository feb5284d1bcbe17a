"""A served period as windows of counts, in the order in which they were served.

Modelled: a file of loads is one window; a recording of single tokens is cut into windows of so many steps, in its own order. Ignored:
pauses between windows, other batch sizes than the plan's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ....base.errors import InputError
from ....specs.models import ModelSpec
from ....traces.recording import LoadProfile, RoutingTrace
from ..case import ParallelRequest, Recording, check_ep_match

Counts = npt.NDArray[np.float64]
_MOST_WINDOWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Steps that are alike."""

    counts: Counts
    """[layers, experts]: tokens that chose each expert."""
    num_tokens: int
    """Tokens of the window."""
    num_steps: int
    """Steps of the plan's size that they make."""


def counts_of(recording: Recording) -> Counts:
    """Return [layers, experts]: tokens that chose each expert."""
    if isinstance(recording, LoadProfile):
        return recording.counts.astype(np.float64)
    return _counted(np.asarray(recording.experts), recording.num_experts)


def windows_of(
    model: ModelSpec, recordings: Sequence[Recording], request: ParallelRequest, window_steps: int
) -> list[Window]:
    """Return the windows of a period; raises InputError where it is shorter than one window, or of another model."""
    step, found = request.step_tokens, []
    for recording in recordings:
        check_ep_match(model, recording, request)
        if isinstance(recording, RoutingTrace):
            found += _cut(recording, step, window_steps)
            continue
        counts = counts_of(recording)
        tokens = round(float(counts.sum(axis=1).mean()) / model.top_k)
        found.append(Window(counts=counts, num_tokens=tokens, num_steps=tokens // step))
    steps = sum(window.num_steps for window in found)
    if not found or steps < window_steps:
        rule = f"shorter than one window of counts ({window_steps:,} steps of {step:,} tokens)"
        raise InputError("--period", f"{steps:,} steps", rule, "serve longer, or give a smaller --count-window")
    if len(found) > _MOST_WINDOWS:
        raise InputError(
            "--period", f"{len(found):,} windows", f"above {_MOST_WINDOWS:,}", "give a larger --count-window"
        )
    return [window for window in found if window.num_steps]


def _cut(recording: RoutingTrace, step: int, window_steps: int) -> list[Window]:
    tokens = step * window_steps
    found = []
    for first in range(0, recording.num_tokens, tokens):
        part = np.asarray(recording.experts[first : first + tokens])
        found.append(
            Window(counts=_counted(part, recording.num_experts), num_tokens=len(part), num_steps=len(part) // step)
        )
    return found


def _counted(experts: npt.NDArray[np.integer], num_experts: int) -> Counts:
    return np.stack(
        [np.bincount(experts[:, layer].ravel(), minlength=num_experts) for layer in range(experts.shape[1])]
    ).astype(float)


def mixed(windows: Sequence[Window], first: int, last: int) -> Counts:
    """Return [layers, experts]: shares of choices in the steps first to last (not included) of a period, each window by its steps."""
    total, begin = np.zeros_like(windows[0].counts), 0
    for window in windows:
        steps = max(0, min(last, begin + window.num_steps) - max(first, begin))
        if steps:
            total += steps * window.counts / window.counts.sum(axis=1, keepdims=True)
        begin += window.num_steps
    return np.asarray(total / total.sum(axis=1, keepdims=True))
