"""Requests of stated lengths, put together from what was recorded.

Modelled: each request takes its prompt from recorded prompts and its reply from recorded replies, in the order of the recording,
and goes on where the request before it stopped, from the beginning again when the recording is at its end. Rows stay whole: choices,
weights and guesses of a token belong together. Nothing is taken twice within one request. Ignored: that a text ends where its
segment does, so that experts change there as they would between two requests.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from ..lengths import RequestLengths
from ..recording import DECODE, PREFILL, RoutingTrace

_SHORTER = "ask for shorter requests, or leave out --trace: routing is then the model family's"


def assemble(trace: RoutingTrace, lengths: RequestLengths) -> RoutingTrace:
    """Return a recording of `lengths`, made of `trace`'s rows.

    Raises InputError for a request that is longer than everything recorded of its phase.
    """
    columns = []
    for phase, counts, option in (
        (PREFILL, lengths.computed, "--prompt-tokens"), (DECODE, np.array(lengths.reply, np.int64), "--reply-tokens"),
    ):  # fmt: skip
        recorded = np.flatnonzero(trace.phase == phase)
        most = int(counts.max())
        if most > len(recorded):
            word = "prompts" if phase == PREFILL else "replies"
            raise InputError(option, most, f"the recording has {len(recorded)} tokens of {word}", _SHORTER)
        columns.append(_consecutive(recorded, counts))
    rows = [np.concatenate(pair) for pair in zip(*columns, strict=True)]
    taken = np.concatenate(rows)
    sizes = np.array([len(one) for one in rows])
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    cached = np.repeat(np.array(lengths.cached, np.int64), sizes)
    request = np.repeat(np.arange(len(sizes)), sizes)
    used = len(np.unique(trace.request[taken]))
    return dataclasses.replace(
        trace, experts=trace.experts[taken], request=request.astype(np.int32),
        position=(np.arange(len(taken)) - first + cached).astype(np.int32), phase=trace.phase[taken],
        weights=None if trace.weights is None else trace.weights[taken],
        predicted=None if trace.predicted is None else trace.predicted[taken],
        predicted_prob=None if trace.predicted_prob is None else trace.predicted_prob[taken],
        source=f"{trace.source}; {lengths.words()}, put together from segments of {used} recorded requests", metadata={},
    )  # fmt: skip


def _consecutive(recorded: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Return `counts[i]` entries of `recorded` for each i, one after another and around its end."""
    starts = np.cumsum(counts) - counts
    return [
        recorded[np.arange(start, start + count) % max(1, len(recorded))] for start, count in zip(starts, counts, strict=True)
    ]  # fmt: skip
