"""What a user of a cluster waits for: the first token, each further one, and the largest batch at which that stays within limits.

    a further token   (decode step + prompt tokens that come in meanwhile ÷ tokens of a prompt step · prompt step) ÷ tokens a step yields
    the first token   passes of the prompt, each beside a decode step where prompts are mixed in

Modelled: a share of the server's tokens are of prompts, computed in steps of a chunk on every rank between the decode steps (as public
figures of mixed servers are predicted, `papers.field.parallel.serving`), over the same placement. Ignored: queues, arrivals, prefix caches;
what a prompt step and a decode step save in one launch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...base.errors import OutOfReach
from ...specs.machines.engines import prompt_chunk_on
from ...specs.machines.profile import Profile
from ...specs.schedules.parallel import ExpertParallelSchedule
from .case import ParallelRequest, Recording, evidence_of, prepare_ep
from .evidence import REPORT
from .search import EpSearch

CHUNK_TOKENS = 8192
"""Prompt tokens of a step of a server that mixes prompts in, where a machine's kernels are no engine's (the engines' usual limit)."""


def chunk_of(profile: Profile, schedule: ExpertParallelSchedule, ranks_per_node: int) -> int:
    """Return the prompt tokens that each rank brings to a prompt step; ranks that share attention bring one chunk together."""
    return max(1, (prompt_chunk_on(profile) or CHUNK_TOKENS) // schedule.parallel.group(ranks_per_node))


def mixed_s(decode_s: float, prompt_s: float, prompt_steps: float) -> float:
    """Return seconds of a decode step and of the `prompt_steps` steps of prompts that come in meanwhile."""
    return decode_s + prompt_s * prompt_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """What users of one schedule wait for, and the rates that go with it."""

    tpot_s: float | None
    """A further token of a user; None in prefill."""
    ttft_s: float | None
    """The first token without any queue; None where no prompts are computed."""
    prompt_step_s: float | None
    """A step of prompts, where they are mixed in."""
    prompt_share: float
    """Of all tokens, those of prompts."""
    tokens_per_s: float
    """Generated tokens of all ranks (prompt tokens in prefill)."""
    largest_within: int | None
    """Most sequences on a rank that memory and --tpot allow; None without that limit."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return dataclasses.asdict(self)

    def misses(self, request: ParallelRequest) -> str:
        """Return in words which limits of a request are not kept; nothing where they are."""
        found = []
        for name, limit, value in (("--ttft", request.ttft_s, self.ttft_s), ("--tpot", request.tpot_s, self.tpot_s)):
            if limit is not None and value is not None and value > limit:
                found.append(f"{name} {limit:.4g} s: {value:.4g} s")
        return ", ".join(found)

    def check(self, request: ParallelRequest, name: str) -> None:
        """Return nothing; raises OutOfReach where a limit is not kept."""
        missed = self.misses(request)
        if missed:
            more = (
                ""
                if self.largest_within is None
                else f"; with {name} {self.largest_within} sequences on each GPU would keep --tpot"
            )
            raise OutOfReach(f"no schedule found keeps the limits; {name} comes nearest: {missed}{more}")


def latency(
    search: EpSearch, recording: Recording, request: ParallelRequest, schedule: ExpertParallelSchedule, step_s: float, most_tokens: int
) -> Latency:  # fmt: skip
    """Return what users of `schedule` wait for, whose step at the request's own batch takes `step_s`.

    most_tokens: of a rank in a step, what memory has room for.
    """
    simulation = search.simulation
    share = request.prefill_share or 0.0
    if request.prefill:
        each = search.evidence.step_tokens / simulation.num_ranks
        each *= schedule.parallel.group(simulation.ranks_per_node)
        first = step_s * math.ceil(request.context_tokens / each)
        return Latency(tpot_s=None, ttft_s=first, prompt_step_s=None, prompt_share=1.0, largest_within=None,
                       tokens_per_s=search.evidence.step_tokens / step_s)  # fmt: skip
    prompt_s = _prompt_step_s(search, recording, request, schedule) if share else 0.0
    chunk = chunk_of(simulation.profile, schedule, simulation.ranks_per_node)
    yielded = simulation.kept_share

    def with_prompts(decode_s: float, step_tokens: float) -> float:
        steps = step_tokens * yielded * share / (1 - share) / (chunk * simulation.num_ranks)
        return mixed_s(decode_s, prompt_s, steps)

    whole = with_prompts(step_s, search.evidence.step_tokens)
    first = math.ceil(_prompt_tokens(request) / (chunk * schedule.parallel.group(simulation.ranks_per_node)))
    largest = None
    if request.tpot_s is not None:
        largest = _largest(search, recording, request, schedule, most_tokens, with_prompts)
    return Latency(
        tpot_s=whole / request.tokens_a_step, ttft_s=first * (prompt_s + step_s) if share else None,
        prompt_step_s=prompt_s if share else None, prompt_share=share, largest_within=largest,
        tokens_per_s=search.evidence.step_tokens * yielded / whole,
    )  # fmt: skip


def _prompt_tokens(request: ParallelRequest) -> int:
    """Return the length of a prompt; where only a context is stated, that."""
    return request.prompt_tokens or request.context_tokens


def _prompt_step_s(
    search: EpSearch, recording: Recording, request: ParallelRequest, schedule: ExpertParallelSchedule
) -> float:
    """Return seconds of a step of prompts under a decode step's placement, sent as engines send prompts."""
    simulation, model = search.simulation, search.simulation.model
    prompts = dataclasses.replace(
        request, prefill=True, concurrency=None, draft_tokens=0, acceptance=None, context_tokens=_prompt_tokens(request),
        tokens_per_rank=chunk_of(simulation.profile, schedule, simulation.ranks_per_node),
    )  # fmt: skip
    mine = prepare_ep(model, simulation.profile, evidence_of(model, recording, prompts), prompts, schedule)
    if schedule.all_to_all.kind == "all-choices":
        kind = "hierarchical" if simulation.num_nodes > 1 and schedule.parallel.experts != "sharded" else "per-rank"
        schedule = schedule.with_options(all_to_all__kind=kind)
    loads = mine.evidence.loads(REPORT, search.placements.candidate(schedule), schedule)
    return mine.simulation.predict(schedule, loads, check_memory=False).step_s


def _largest(search: EpSearch, recording: Recording, request: ParallelRequest, schedule: ExpertParallelSchedule, most_tokens: int,
             with_prompts: Callable[[float, float], float]) -> int:  # fmt: skip
    """Return the most sequences of a rank whose further tokens keep the limit; 0 where not even one's do."""
    simulation, limit = search.simulation, request.tpot_s or 0.0
    candidate = search.placements.candidate(schedule)
    least = schedule.pipeline.micro_batches

    def keeps(sequences: int) -> bool:
        asked = dataclasses.replace(request, concurrency=None, tokens_per_rank=sequences)
        evidence = evidence_of(simulation.model, recording, asked)
        found = simulation.predict(schedule, evidence.loads(REPORT, candidate, schedule), check_memory=False)
        return with_prompts(found.step_s, evidence.step_tokens) / request.tokens_a_step <= limit

    high = most_tokens // (request.draft_tokens + 1)
    if high < least or not keeps(least):
        return 0
    if keeps(high):
        return high
    low = least
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low
