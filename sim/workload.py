"""Requests into forward passes: which tokens of a recording are computed together, and which experts each layer then needs.

Modelled: `concurrency` places; a request takes the first free place in recorded order, its prompt runs alone in chunks,
then it decodes one token a step together with the other places until its recording ends. Ignored: arrival times (requests
wait in line and are always there), prompts mixed into decode steps. A visit's experts are listed once each, in order of
first use; recency follows the order of last use, token by token and choice by choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from ..jit import jit
from ..schedule import WorkloadOptions
from ..traces.format import RoutingTrace
from .policies.state import FAR, Array

# Contexts are rounded up to this many tokens, so that the cost tables stay small; at 128 tokens the rounding changes
# the KV bytes of a pass by less than one part in thirty from 4,096 tokens of context on.
CONTEXT_BUCKET_TOKENS = 128
_PROB_ONE = 32767


class Steps(NamedTuple):
    """A run's logical input as arrays; `num_visits = num_steps * num_layers`."""

    visit_start: Array  # int64 [num_visits + 1]: where each visit's experts begin
    visit_expert: Array  # int16 [n]: distinct experts, in order of first use
    visit_tokens: Array  # int32 [n]: tokens of each
    visit_touch: Array  # int16 [n]: the same experts in order of last use
    visit_next_use: Array  # int64 [n]: next visit of the same layer that uses the expert, FAR when none does
    step_start: Array  # int64 [num_steps + 1]: where each step's tokens begin
    step_token: Array  # int64 [num_tokens]: rows of the recording
    visit_rank: Array  # uint8 [n]: best place an expert has among any token's choices, 0 the first
    step_phase: Array  # uint8 [num_steps]: 0 prefill, 1 decode
    step_first: Array  # uint8 [num_steps]: 1 where a request starts
    step_reset: Array  # uint8 [num_steps]: 1 where a new request starts and the cache is to be emptied
    experts: Array  # uint8 or uint16 [num_rows, num_layers, top_k]: the recording itself (for dial guesses)
    predicted: Array  # int16 [num_rows, num_layers, distance, width], or all lengths zero
    predicted_prob: Array  # int16, same shape: probability times 32767
    first_visit: int  # visits of the run before these steps (long recordings are replayed piece by piece)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Steps together with what their costs depend on."""

    steps: Steps
    step_tokens: Array
    """int64 [num_steps]: tokens of each forward pass."""
    step_context: Array
    """int64 [num_steps]: context tokens read by attention, summed over the pass's requests, rounded up."""
    first_use: Array
    """int64 [num_layers * num_experts]: first visit that uses each expert, FAR when none does."""
    popularity: Array
    """int64 [num_layers, num_experts]: tokens per expert, from `popularity_source`."""
    popularity_source: str
    num_layers: int
    num_experts: int
    top_k: int
    max_expert_tokens: int
    """Most tokens that one expert gets in one step."""
    num_tokens: int

    @property
    def num_steps(self) -> int:
        """Forward passes."""
        return int(self.step_tokens.shape[0])

    @property
    def num_expert_visits(self) -> int:
        """Distinct (step, layer, expert) triples: what an engine's speed is counted in."""
        return int(self.steps.visit_expert.shape[0])


def build_workload(trace: RoutingTrace, options: WorkloadOptions, *, reset_per_request: bool = False,
                   max_steps: int | None = None, with_next_use: bool = False) -> Workload:  # fmt: skip
    """Return the forward passes that replaying `trace` with `options` takes, at most the first `max_steps` of them.

    reset_per_request: mark the first step of each request (concurrency 1 only).
    with_next_use: also fill `visit_next_use` and `first_use`, which only belady reads.
    Raises InputError when `max_steps` is below one.
    """
    if max_steps is not None and max_steps < 1:
        raise InputError("window", max_steps, "fewer than one step", "give at least 1")
    tokens, starts, phase, first = _schedule_steps(trace, options, max_steps)
    num_layers = trace.num_layers
    rows = np.ascontiguousarray(trace.experts)
    start, expert, count, touch, rank, most = _gather_visits(rows, starts, tokens, trace.num_experts)
    if with_next_use:
        next_use, first_use = _next_uses(start, expert, num_layers, trace.num_experts)
    else:
        next_use = np.full(1, FAR, np.int64)
        first_use = np.full(num_layers * trace.num_experts, FAR, np.int64)
    predicted, prob = _guesses(trace)
    position = trace.position.astype(np.int64)
    context = _contexts(position[tokens], starts, phase)
    popularity, source = _popularity(trace, tokens)
    steps = Steps(
        visit_start=start, visit_expert=expert, visit_tokens=count, visit_touch=touch, visit_next_use=next_use,
        visit_rank=rank, step_start=starts, step_token=tokens, step_phase=phase, step_first=first,
        step_reset=(first if reset_per_request else np.zeros_like(first)),
        experts=rows, predicted=predicted, predicted_prob=prob,
        first_visit=0,
    )  # fmt: skip
    return Workload(
        steps=steps, step_tokens=np.diff(starts), step_context=context, first_use=first_use, popularity=popularity,
        popularity_source=source, num_layers=num_layers, num_experts=trace.num_experts, top_k=trace.top_k,
        max_expert_tokens=int(most), num_tokens=int(tokens.shape[0]),
    )  # fmt: skip


def _schedule_steps(
    trace: RoutingTrace, options: WorkloadOptions, max_steps: int | None
) -> tuple[Array, Array, Array, Array]:
    """Return (step_token, step_start, step_phase, step_first) by playing the requests through the places."""
    change = np.flatnonzero(np.diff(trace.request)) + 1
    bounds = np.concatenate(([0], change, [trace.num_tokens]))
    limit = max_steps if max_steps is not None else trace.num_tokens
    chunk = options.prefill_chunk_tokens or trace.num_tokens
    tokens: list[Array] = []
    lengths: list[int] = []
    phases: list[int] = []
    firsts: list[int] = []
    waiting = iter(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    decoding: list[list[int]] = []  # [next row, end row] of each busy place
    phase = trace.phase
    more = True
    while len(lengths) < limit:
        while more and len(decoding) < options.concurrency and len(lengths) < limit:
            place = next(waiting, None)
            if place is None:
                more = False
                break
            begin, end = place
            prompt_end = begin + int(np.count_nonzero(phase[begin:end] == 0))
            new = 1
            for low in range(begin, prompt_end, chunk):
                if len(lengths) >= limit:
                    break
                high = min(low + chunk, prompt_end)
                tokens.append(np.arange(low, high))
                lengths.append(high - low)
                phases.append(0)
                firsts.append(new)
                new = 0
            if prompt_end < end:
                decoding.append([prompt_end, end, new])
        if not decoding:
            if not more:
                break
            continue
        if len(lengths) >= limit:
            break
        if len(decoding) == 1 and (options.concurrency == 1 or not more):  # one request to its end: no need to loop
            row, end, new = decoding.pop()
            steps = min(end - row, limit - len(lengths))
            tokens.append(np.arange(row, row + steps))
            lengths.extend([1] * steps)
            phases.extend([1] * steps)
            firsts.extend([new] + [0] * (steps - 1))
            continue
        tokens.append(np.array([place[0] for place in decoding]))
        lengths.append(len(decoding))
        phases.append(1)
        firsts.append(max(place[2] for place in decoding))
        decoding = [[row + 1, end, 0] for row, end, _ in decoding if row + 1 < end]
    starts = np.zeros(len(lengths) + 1, np.int64)
    starts[1:] = np.cumsum(lengths)
    return (
        np.concatenate(tokens).astype(np.int64) if tokens else np.zeros(0, np.int64),
        starts, np.array(phases, np.uint8), np.array(firsts, np.uint8),
    )  # fmt: skip


@jit
def _gather_visits(
    experts: Array, starts: Array, tokens: Array, num_experts: int
) -> tuple[Array, Array, Array, Array, Array, int]:
    """Return (visit_start, visit_expert, visit_tokens, visit_touch, visit_rank, most tokens of one expert in one visit)."""
    num_steps, num_layers, top_k = starts.shape[0] - 1, experts.shape[1], experts.shape[2]
    start = np.zeros(num_steps * num_layers + 1, np.int64)
    seen = np.full(num_experts, -1, np.int64)
    total = 0
    for step in range(num_steps):
        for layer in range(num_layers):
            visit = step * num_layers + layer
            for row in range(starts[step], starts[step + 1]):
                for choice in range(top_k):
                    chosen = experts[tokens[row], layer, choice]
                    if seen[chosen] != visit:
                        seen[chosen] = visit
                        total += 1
            start[visit + 1] = total
    expert = np.zeros(total, np.int16)
    count = np.zeros(total, np.int32)
    touch = np.zeros(total, np.int16)
    rank = np.full(total, 255, np.uint8)
    place = np.zeros(num_experts, np.int64)
    last = np.full(num_experts, -1, np.int64)
    seen[:] = -1
    most = 1
    for step in range(num_steps):
        for layer in range(num_layers):
            visit = step * num_layers + layer
            at = start[visit]
            for row in range(starts[step], starts[step + 1]):
                for choice in range(top_k):
                    chosen = experts[tokens[row], layer, choice]
                    if seen[chosen] != visit:
                        seen[chosen] = visit
                        place[chosen] = at
                        expert[at] = chosen
                        at += 1
                    count[place[chosen]] += 1
                    rank[place[chosen]] = min(rank[place[chosen]], choice)
                    last[chosen] = row * top_k + choice
            for index in range(start[visit], at):  # insertion sort by last use; sets are small or nearly sorted
                chosen = expert[index]
                most = max(most, count[index])
                slot = index
                while slot > start[visit] and last[touch[slot - 1]] > last[chosen]:
                    touch[slot] = touch[slot - 1]
                    slot -= 1
                touch[slot] = chosen
    return start, expert, count, touch, rank, most


@jit
def _next_uses(start: Array, expert: Array, num_layers: int, num_experts: int) -> tuple[Array, Array]:
    """Return (visit_next_use, first_use) by walking the visits backwards."""
    upcoming = np.full(num_layers * num_experts, 2**62, np.int64)
    next_use = np.zeros(expert.shape[0], np.int64)
    for visit in range(start.shape[0] - 2, -1, -1):
        base = (visit % num_layers) * num_experts
        for index in range(start[visit], start[visit + 1]):
            next_use[index] = upcoming[base + expert[index]]
        for index in range(start[visit], start[visit + 1]):
            upcoming[base + expert[index]] = visit
    return next_use, upcoming


def _guesses(trace: RoutingTrace) -> tuple[Array, Array]:
    """Return the recording's guesses and their probabilities as int16, or empty arrays."""
    if trace.predicted is None:
        return np.zeros((0, 0, 0, 0), np.int16), np.zeros((0, 0, 0, 0), np.int16)
    if trace.predicted_prob is None:  # rank order stands in for probability
        width = trace.predicted.shape[3]
        rank = np.arange(width, 0, -1, dtype=np.int16)
        return np.ascontiguousarray(trace.predicted), np.broadcast_to(rank, trace.predicted.shape).copy()
    prob = np.nan_to_num(trace.predicted_prob.astype(np.float32)) * _PROB_ONE
    return np.ascontiguousarray(trace.predicted), prob.clip(0, _PROB_ONE).astype(np.int16)


def _contexts(position: Array, starts: Array, phase: Array) -> Array:
    """Return context tokens per step: a chunk reads its last token's context, a decode step the sum over requests."""
    upto = position + 1
    total = np.add.reduceat(upto, starts[:-1]) if len(phase) else np.zeros(0, np.int64)
    longest = np.maximum.reduceat(upto, starts[:-1]) if len(phase) else np.zeros(0, np.int64)
    context = np.where(phase == 0, longest, total)
    return -(-context // CONTEXT_BUCKET_TOKENS) * CONTEXT_BUCKET_TOKENS


def _popularity(trace: RoutingTrace, tokens: Array) -> tuple[Array, str]:
    """Return tokens per (layer, expert) and where they were counted.

    Counting on the tokens that are then replayed would let a static cache see its own exam. So the rest of the recording
    is counted where it holds at least a quarter of the tokens; otherwise the window itself is, and the source says so.
    """
    rest = np.ones(trace.num_tokens, bool)
    rest[tokens] = False
    held_back = int(rest.sum()) * 4 >= trace.num_tokens
    rows = np.flatnonzero(rest) if held_back else tokens
    counts = np.zeros((trace.num_layers, trace.num_experts), np.int64)
    for layer in range(trace.num_layers):
        counts[layer] = np.bincount(np.asarray(trace.experts[rows, layer]).ravel(), minlength=trace.num_experts)
    where = "tokens outside the window" if held_back else "the same tokens (in sample: optimistic)"
    return counts, where
