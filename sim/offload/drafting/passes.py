"""Decode steps that verify drafted tokens: for every request one certain token and k guesses, of which some are accepted.

Modelled: a pass routes k + 1 tokens of each request that it decodes, so that it needs the union of their experts; accepted guesses are
the recording's next tokens; the experts of rejected ones are fetched in vain, and stay for later passes as any others do. A request that
gets further gives its place to the next one earlier. Ignored: what a rejected guess would have routed to (another token's routing of the
recording's replies stands for it).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ....specs.drafting import Acceptance, counts_of_steps
from ....traces.recording import RoutingTrace
from ...policies.state import Array

_STRIDE, _PLACE = 2_654_435_761, 40_503  # whole numbers without a common pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifying:
    """Passes with drafts; arrays as `workload.Workload` has them."""

    step_token: Array
    step_start: Array
    step_phase: Array
    step_first: Array
    prompts: Array
    requests: Array
    step_yield: Array
    """int64 [num_steps]: tokens that come out of each pass."""
    step_drafted: Array
    """int64 [num_steps]: guesses that it verifies."""
    step_upto: Array
    """int64 [num_steps]: tokens of context that a decode pass reads, summed over its requests; 0 of a prompt's."""


@dataclass(slots=True)
class _Request:
    """What a run without drafts computes of one request."""

    chunks: list[tuple[int, int]] = field(default_factory=list)
    """Rows of each pass of its prompt."""
    begin: int = -1
    """First row that is decoded, -1 for none."""
    end: int = -1
    """Row after the last one that is decoded."""


@dataclass(slots=True)
class _Passes:
    """Passes as they are made."""

    tokens: list[Array] = field(default_factory=list)
    phase: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    yields: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    upto: list[int] = field(default_factory=list)

    def add(self, rows: Array, phase: int, first: int, yields: int, drafted: int, upto: int) -> None:
        """Append one."""
        self.tokens.append(rows)
        for column, value in (
            (self.phase, phase), (self.first, first), (self.yields, yields), (self.drafted, drafted), (self.upto, upto),
        ):  # fmt: skip
            column.append(value)


@dataclass(slots=True)
class _Place:
    """A request that is being decoded."""

    row: int
    end: int
    new: int
    """1 before its first pass."""
    arrived: int


def verifying(
    trace: RoutingTrace, step_token: Array, step_start: Array, step_phase: Array, *, concurrency: int, length: int, acceptance: Acceptance
) -> Verifying:  # fmt: skip
    """Return the passes that compute the same tokens with drafts of `length` guesses verified.

    step_token, step_start, step_phase: the passes without drafts (see `workload.Workload`), with up to `concurrency` requests decoded
    together: what of each request they compute is computed here too.
    """
    replies = np.flatnonzero(trace.phase == 1)
    change = np.flatnonzero(np.diff(trace.request)) + 1
    bounds = np.concatenate(([0], change, [trace.num_tokens]))
    waiting = iter(_requests(bounds, step_token, step_start, step_phase).items())
    made, prompts, requests = _Passes(), [], []
    places: list[_Place] = []
    number, more = 0, True
    while True:
        while more and len(places) < concurrency:
            found = next(waiting, None)
            if found is None:
                more = False
                break
            at, one = found
            arrived = len(made.phase)
            for low, high in one.chunks:
                made.add(np.arange(low, high), 0, int(len(made.phase) == arrived), high - low, 0, 0)
            last = one.chunks[-1][1] if one.chunks else -1
            if one.chunks and (last == bounds[at + 1] or trace.phase[last] == 1):
                prompts.append((arrived, len(made.phase) - 1))
            if one.end > 0:
                places.append(_Place(one.begin, one.end, int(len(made.phase) == arrived), arrived))
        if not places:
            if not more:
                break
            continue
        rows, yields, upto = [], 0, 0
        first = max(place.new for place in places)
        for place in places:
            accepted = min(counts_of_steps(length, acceptance, number, 1)[0], place.end - place.row - 1)
            others = replies[(number * _STRIDE + np.arange(accepted, length) * _PLACE) % len(replies)]
            rows += [np.arange(place.row, place.row + 1 + accepted), others]
            yields += 1 + accepted
            upto += int(trace.position[place.row]) + 1 + length
            place.row, place.new = place.row + 1 + accepted, 0
            number += 1
        made.add(np.concatenate(rows), 1, first, yields, length * len(places), upto)
        ended = [place for place in places if place.row == place.end]
        requests += [(place.arrived, len(made.phase) - 1) for place in ended if place.end in bounds]
        places = [place for place in places if place.row < place.end]
    sizes = np.array([len(one) for one in made.tokens], np.int64)
    return Verifying(
        step_token=np.concatenate(made.tokens).astype(np.int64), step_start=np.concatenate(([0], np.cumsum(sizes))),
        step_phase=np.array(made.phase, np.uint8), step_first=np.array(made.first, np.uint8),
        prompts=np.array(prompts, np.int64).reshape(-1, 2), requests=np.array(requests, np.int64).reshape(-1, 2),
        step_yield=np.array(made.yields, np.int64), step_drafted=np.array(made.drafted, np.int64),
        step_upto=np.array(made.upto, np.int64),
    )  # fmt: skip


def _requests(bounds: Array, step_token: Array, step_start: Array, step_phase: Array) -> dict[int, _Request]:
    """Return what of each request (by number, the order in which they get places) is computed; bounds: first row of each, and the end."""
    found: dict[int, _Request] = {}
    number = np.searchsorted(bounds, step_token, side="right") - 1
    for step in range(len(step_phase)):
        low, high = int(step_start[step]), int(step_start[step + 1])
        if step_phase[step] == 0:
            one = found.setdefault(int(number[low]), _Request())
            one.chunks.append((int(step_token[low]), int(step_token[high - 1]) + 1))
            continue
        for at in range(low, high):
            one = found.setdefault(int(number[at]), _Request())
            row = int(step_token[at])
            one.begin = row if one.begin < 0 else one.begin
            one.end = row + 1
    return dict(sorted(found.items()))
