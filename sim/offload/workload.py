"""Requests into forward passes: which tokens of a recording are computed together, and which experts each layer then needs.

Modelled: `concurrency` places; a request takes the first free place in recorded order, its prompt runs alone in chunks,
then it decodes one token a step together with the other places until its recording ends. A layer step's experts are listed
once each, in order of first use; recency follows the order of last use, token by token and choice by choice. The layer steps of
a long recording are far larger than the recording itself, so they are gathered piece by piece when a run comes to them.
Ignored: arrival times (requests wait in line and are always there), prompts mixed into decode steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ...base.errors import InputError
from ...base.records import records
from ...calibrate.costs.estimate import Estimate
from ...specs.schedules.offload import WorkloadOptions
from ...traces.counting import add_loads
from ...traces.format import RoutingTrace
from ...traces.validate import release_pages, row_chunks
from ..policies.prefetching import SURE, guesses_key, tabulate_guesses
from ..policies.records import GUESS, GUESSED
from ..policies.state import FAR, Array, PolicyConfig
from ..policies.steps import Steps
from .drafting.draft import Drafting
from .drafting.passes import Verifying, verifying
from .layer_steps import count_sizes, gather_layer_steps, mark_uses, next_uses

# Contexts are rounded up to this many tokens, so that the cost tables stay small; at 128 tokens the rounding changes
# the KV bytes of a pass by less than one part in thirty from 4,096 tokens of context on.
CONTEXT_BUCKET_TOKENS = 128
PROBABILITY_ONE = 32767
# Gathered layer steps take 8 bytes an entry (an expert of a layer step), 16 with next uses. Runs of up to the first number are
# gathered once and kept; longer ones in pieces of the second, anew for every run.
_KEPT_ENTRIES, _PIECE_ENTRIES = 1 << 24, 1 << 22
# Guesses found beforehand take 8 bytes each; so many are kept for one set of forward passes.
_KEPT_GUESSES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The forward passes of a run, with what their costs depend on."""

    step_start: Array
    """int64 [num_steps + 1]: where each step's tokens begin in `step_token`."""
    step_token: Array
    """int64 [num_tokens]: rows of the recording."""
    step_phase: Array
    """uint8 [num_steps]: 0 prefill, 1 decode."""
    step_first: Array
    """uint8 [num_steps]: 1 where a request starts."""
    step_reset: Array
    """uint8 [num_steps]: 1 where a new request starts and the cache is to be emptied."""
    step_tokens: Array
    """int64 [num_steps]: tokens of each forward pass."""
    step_context: Array
    """int64 [num_steps]: context tokens read by attention, summed over the pass's requests, rounded up."""
    first_use: Array
    """int64 [num_layers * num_experts]: first layer step that uses each expert, FAR when none does."""
    popularity: Array
    """int64 [num_layers, num_experts]: tokens per expert, from `popularity_source`."""
    popularity_source: str
    num_layers: int
    num_experts: int
    top_k: int
    layer_step_sizes: Array
    """int64 [max_expert_tokens + 1]: how many (step, layer, expert) triples have 0 (none), 1, 2, … tokens."""
    num_tokens: int
    prompts: Array
    """int64 [n, 2]: first and last step of each prompt that was computed whole."""
    requests: Array
    """int64 [n, 2]: first and last step of each request that generated something and came to its end."""
    experts: Array
    """uint8 or uint16 [num_rows, num_layers, top_k]: the recording itself."""
    predicted: Array
    predicted_prob: Array
    piece_start: Array
    """int64 [num_pieces + 1]: first step of each piece."""
    step_yield: Array | None = None
    """int64 [num_steps]: tokens that come out of each pass, where some of those computed are guesses; None: all."""
    step_drafted: Array | None = None
    """int64 [num_steps]: guesses among each pass's tokens; None: none."""
    guess: tuple[Estimate, ...] = ()
    """What drafting one token of each of 1, 2, … requests takes, on the device, before the pass; empty: nothing."""
    upcoming: Array
    """int64 [num_pieces, num_layers * num_experts]: first use of each expert after each piece; empty where not wanted."""
    _kept: list[Steps] = field(default_factory=list, init=False)
    _guessed: dict[PolicyConfig, Steps] = field(default_factory=dict, init=False)

    @property
    def yields(self) -> Array:
        """int64 [num_steps]: tokens that come out of each pass."""
        return self.step_tokens if self.step_yield is None else self.step_yield

    @property
    def num_steps(self) -> int:
        """Forward passes."""
        return int(self.step_tokens.shape[0])

    @property
    def max_expert_tokens(self) -> int:
        """Most tokens that one expert gets in one step."""
        return int(self.layer_step_sizes.shape[0]) - 1

    @property
    def num_expert_uses(self) -> int:
        """Distinct (step, layer, expert) triples: what an engine's speed is counted in."""
        return int(self.layer_step_sizes.sum())

    @property
    def steps(self) -> Steps:
        """The whole run in one piece, gathered on first use and kept, however large."""
        if not self._kept:
            self._kept.append(self._gathered(0, self.num_steps, self.upcoming[-1:]))
        return self._kept[0]

    def pieces(self, config: PolicyConfig | None = None) -> Iterator[Steps]:
        """Return the run piece by piece: all of it at once where it is kept, else one piece in memory at a time.

        config: decisions whose guesses are found beforehand, once for all runs that guess alike, where there is room to keep them.
        """
        if self._kept or len(self.piece_start) <= 2:
            yield self.steps if config is None else self._with_guesses(config)
            return
        for number in range(len(self.piece_start) - 1):
            first, last = int(self.piece_start[number]), int(self.piece_start[number + 1])
            yield self._gathered(first, last, self.upcoming[number : number + 1])
            release_pages(self.experts)

    def _with_guesses(self, config: PolicyConfig) -> Steps:
        """Return the whole run with the guesses that decisions of `config` are given, if the recording alone decides them."""
        key, steps = guesses_key(config), self.steps
        if key is None:
            return steps
        if key not in self._guessed:
            most = np.minimum(self.step_tokens * key.width, self.num_experts)
            room = int(most.sum()) * self.num_layers * key.depth
            # A score is a sum over a pass's tokens, each of which may name an expert again and again.
            if int(self.step_tokens.max(initial=0)) * key.width * (SURE + 1) >= 1 << 31:
                return steps
            kept = list(self._guessed.values())  # other threads may add to them meanwhile
            if room + sum(len(each.guessed) for each in kept) > _KEPT_GUESSES:
                return steps
            start, guessed = (
                np.zeros(self.num_steps * self.num_layers * key.depth + 1, np.int64),
                records(GUESSED, room),
            )
            tabulate_guesses(key, steps, records(GUESS, self.num_experts), start, guessed)
            self._guessed[key] = steps._replace(guessed_start=start, guessed=guessed[: start[-1]].copy())
        return self._guessed[key]

    def _gathered(self, first: int, last: int, upcoming: Array) -> Steps:
        """Return steps `first` to `last` (exclusive); `upcoming` [1 or 0, num_keys]: first uses after them."""
        low, high = int(self.step_start[first]), int(self.step_start[last])
        starts, tokens = self.step_start[first : last + 1] - low, self.step_token[low:high]
        start, expert, count, touch, rank = gather_layer_steps(self.experts, starts, tokens, self.num_experts)
        before = first * self.num_layers
        next_use = np.full(1, FAR, np.int64)
        if len(upcoming):
            next_use = next_uses(start, expert, before, self.num_layers, self.num_experts, upcoming[0].copy())
        return Steps(
            layer_step_start=start, layer_step_expert=expert, layer_step_tokens=count, layer_step_touch=touch, layer_step_next_use=next_use,
            layer_step_rank=rank, step_start=starts, step_token=tokens, step_phase=self.step_phase[first:last],
            step_first=self.step_first[first:last], step_reset=self.step_reset[first:last], experts=self.experts, predicted=self.predicted,
            predicted_prob=self.predicted_prob, first_layer_step=before,
        )  # fmt: skip


def build_workload(trace: RoutingTrace, options: WorkloadOptions, *, reset_per_request: bool = False,
                   max_steps: int | None = None, with_next_use: bool = False,
                   piece_entries: int | None = None, drafting: Drafting | None = None,
                   guess: tuple[Estimate, ...] = ()) -> Workload:  # fmt: skip
    """Return the forward passes that replaying `trace` with `options` takes, at most the first `max_steps` of them.

    drafting: decode steps verify guesses, each of which takes `guess` (by requests); `max_steps` counts passes as they are without.

    reset_per_request: mark the first step of each request (concurrency 1 only).
    with_next_use: also fill `layer_step_next_use` and `first_use`, which only policies that know the future read.
    piece_entries: cut the run where a piece might hold more experts of layer steps than this; None: only very long ones are cut.
    Raises InputError when `max_steps` is below one.
    """
    if max_steps is not None and max_steps < 1:
        raise InputError("window", max_steps, "fewer than one step", "give at least 1")
    tokens, starts, phase, first, prompts, requests = _schedule_steps(trace, options, max_steps)
    drafted: Verifying | None = None
    if drafting is not None and drafting.length:
        drafted = verifying(
            trace, tokens, starts, phase, concurrency=options.concurrency, length=drafting.length, acceptance=drafting.acceptance
        )  # fmt: skip
        tokens, starts, phase, first = drafted.step_token, drafted.step_start, drafted.step_phase, drafted.step_first
        prompts, requests = drafted.prompts, drafted.requests
    num_layers, num_experts = trace.num_layers, trace.num_experts
    rows = np.ascontiguousarray(trace.experts)
    step_tokens = np.diff(starts)
    borders = _borders(np.minimum(step_tokens * trace.top_k, num_experts) * num_layers, piece_entries)
    first_use = np.full(num_layers * num_experts, FAR, np.int64)
    upcoming = np.zeros((len(borders) - 1 if with_next_use else 0, len(first_use)), np.int64)
    sizes = np.zeros(2 + int(step_tokens.max(initial=0)), np.int64)
    for number in range(len(borders) - 2, -1, -1):
        begin, end = int(borders[number]), int(borders[number + 1])
        low, high = int(starts[begin]), int(starts[end])
        mine, inside = starts[begin : end + 1] - low, tokens[low:high]
        count_sizes(rows, mine, inside, num_experts, sizes)
        if with_next_use:
            upcoming[number] = first_use
            mark_uses(rows, mine, inside, begin * num_layers, num_experts, first_use)
        release_pages(rows)
    predicted, prob = _guesses(trace)
    context = _contexts(trace.position[tokens].astype(np.int64), starts, phase)
    if drafted is not None:  # a request's keys and values are read once, whatever is verified
        context = np.where(phase == 0, context, -(-drafted.step_upto // CONTEXT_BUCKET_TOKENS) * CONTEXT_BUCKET_TOKENS)
    popularity, source = _popularity(trace, tokens)
    return Workload(
        step_start=starts, step_token=tokens, step_phase=phase, step_first=first,
        step_reset=(first if reset_per_request else np.zeros_like(first)), step_tokens=step_tokens,
        step_context=context, first_use=first_use, popularity=popularity, popularity_source=source, num_layers=num_layers,
        num_experts=num_experts, top_k=trace.top_k, layer_step_sizes=sizes[: int(np.flatnonzero(sizes).max(initial=1)) + 1],
        num_tokens=int(tokens.shape[0]), prompts=prompts, requests=requests,
        experts=rows, predicted=predicted, predicted_prob=prob, piece_start=borders, upcoming=upcoming,
        step_yield=None if drafted is None else drafted.step_yield, step_drafted=None if drafted is None else drafted.step_drafted,
        guess=() if drafted is None else guess,
    )  # fmt: skip


def picked(workload: Workload, which: Array) -> Workload:
    """Return the steps `which` (rising numbers) of a workload as a run of their own; popularity stays that of the whole.

    Prompts and requests are those all of whose steps are there.
    """
    tokens = workload.step_tokens[which]
    rows = [workload.step_token[workload.step_start[at] : workload.step_start[at + 1]] for at in which]
    place = np.searchsorted(
        which, np.arange(workload.num_steps + 1)
    )  # of each step among those picked, or of the next that is

    def spans(whole: Array) -> Array:
        first, after = place[whole[:, 0]], place[whole[:, 1] + 1]
        kept = after - first == whole[:, 1] + 1 - whole[:, 0]
        found: Array = np.stack([first, after - 1], 1)[kept]
        return found

    return dataclasses.replace(
        workload, step_start=np.concatenate(([0], np.cumsum(tokens))), step_token=np.concatenate(rows),
        step_phase=workload.step_phase[which], step_first=workload.step_first[which], step_reset=workload.step_reset[which],
        step_tokens=tokens, step_context=workload.step_context[which],
        # A share of the whole's, so that what a mean layer step is predicted to take stays what it was.
        layer_step_sizes=workload.layer_step_sizes * len(which) // workload.num_steps, piece_start=np.array([0, len(which)], np.int64),
        prompts=spans(workload.prompts), requests=spans(workload.requests),
        step_yield=None if workload.step_yield is None else workload.step_yield[which],
        step_drafted=None if workload.step_drafted is None else workload.step_drafted[which],
    )  # fmt: skip


def _borders(entries: Array, piece_entries: int | None) -> Array:
    """Return the first step of each piece and the end, given the most `entries` [num_steps] each step's layer steps can have."""
    total = np.concatenate(([0], np.cumsum(entries)))
    if piece_entries is None:
        piece_entries = _PIECE_ENTRIES if int(total[-1]) > _KEPT_ENTRIES else max(1, int(total[-1]))
    borders = [0]
    while borders[-1] < len(entries):
        reach = int(np.searchsorted(total, total[borders[-1]] + piece_entries, side="right")) - 1
        borders.append(max(reach, borders[-1] + 1))  # a piece has at least one step
    return np.array(borders if len(borders) > 1 else [0, 0], np.int64)


def _schedule_steps(
    trace: RoutingTrace, options: WorkloadOptions, max_steps: int | None
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Return (step_token, step_start, step_phase, step_first, prompts, requests) by playing the requests through the places."""
    change = np.flatnonzero(np.diff(trace.request)) + 1
    bounds = np.concatenate(([0], change, [trace.num_tokens]))
    limit = max_steps if max_steps is not None else trace.num_tokens
    chunk = options.prefill_chunk_tokens or trace.num_tokens
    tokens: list[Array] = []
    lengths: list[int] = []
    phases: list[int] = []
    firsts: list[int] = []
    waiting = iter(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    prompts: list[tuple[int, int]] = []
    requests: list[tuple[int, int]] = []
    decoding: list[list[int]] = []  # [next row, end row, 1 before its first step, its first step] of each busy place
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
            new, arrived = 1, len(lengths)
            for low in range(begin, prompt_end, chunk):
                if len(lengths) >= limit:
                    break
                high = min(low + chunk, prompt_end)
                tokens.append(np.arange(low, high))
                lengths.append(high - low)
                phases.append(0)
                firsts.append(new)
                new = 0
                if high == prompt_end:
                    prompts.append((arrived, len(lengths) - 1))
            if prompt_end < end:
                decoding.append([prompt_end, end, new, arrived])
        if not decoding:
            if not more:
                break
            continue
        if len(lengths) >= limit:
            break
        if len(decoding) == 1 and (options.concurrency == 1 or not more):  # one request to its end: no need to loop
            row, end, new, arrived = decoding.pop()
            steps = min(end - row, limit - len(lengths))
            tokens.append(np.arange(row, row + steps))
            lengths.extend([1] * steps)
            phases.extend([1] * steps)
            firsts.extend([new] + [0] * (steps - 1))
            if row + steps == end:
                requests.append((arrived, len(lengths) - 1))
            continue
        tokens.append(np.array([place[0] for place in decoding]))
        lengths.append(len(decoding))
        phases.append(1)
        firsts.append(max(place[2] for place in decoding))
        requests += [(begin, len(lengths) - 1) for row, end, _, begin in decoding if row + 1 == end]
        decoding = [[row + 1, end, 0, begin] for row, end, _, begin in decoding if row + 1 < end]
    starts = np.zeros(len(lengths) + 1, np.int64)
    starts[1:] = np.cumsum(lengths)
    return (
        np.concatenate(tokens).astype(np.int64) if tokens else np.zeros(0, np.int64),
        starts, np.array(phases, np.uint8), np.array(firsts, np.uint8),
        np.array(prompts, np.int64).reshape(-1, 2), np.array(requests, np.int64).reshape(-1, 2),
    )  # fmt: skip


def _guesses(trace: RoutingTrace) -> tuple[Array, Array]:
    """Return the recording's guesses and their probabilities as int16, or empty arrays."""
    if trace.predicted is None:
        return np.zeros((0, 0, 0, 0), np.int16), np.zeros((0, 0, 0, 0), np.int16)
    if trace.predicted_prob is None:  # rank order stands in for probability
        width = trace.predicted.shape[3]
        rank = np.arange(width, 0, -1, dtype=np.int16)
        return np.ascontiguousarray(trace.predicted), np.broadcast_to(rank, trace.predicted.shape).copy()
    prob = np.empty(trace.predicted.shape, np.int16)
    for start, stop in row_chunks(len(prob), 4 * int(np.prod(prob.shape[1:]))):
        prob[start:stop] = guess_scores(trace.predicted_prob[start:stop])
    return np.ascontiguousarray(trace.predicted), prob


def guess_scores(probability: Array) -> Array:
    """Return float16 probabilities of guesses as the whole numbers that decisions see: times 32767, what is no number as 0."""
    wide = np.multiply(probability, np.float32(PROBABILITY_ONE), dtype=np.float32)
    np.fmin(np.fmax(wide, 0, out=wide), PROBABILITY_ONE, out=wide)  # of a number and none, both take the number
    found: Array = wide.astype(np.int16)
    return found


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
    counted = np.ones(trace.num_tokens, bool)
    counted[tokens] = False
    held_back = int(counted.sum()) * 4 >= trace.num_tokens
    if not held_back:
        counted = ~counted
    counts = np.zeros((trace.num_layers, trace.num_experts), np.int64)
    for start, stop in row_chunks(trace.num_tokens, trace.num_layers * trace.top_k * trace.experts.itemsize):
        add_loads(np.asarray(trace.experts[start:stop])[counted[start:stop]], counts)
        release_pages(trace.experts)
    where = "tokens outside the window" if held_back else "the same tokens (in sample: optimistic)"
    return counts, where
