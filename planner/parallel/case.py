"""The case an expert-parallel plan or simulation is about: model, machine and recording bound together and checked.

Modelled: what a plan is asked for, the evidence that a recording gives, and a search ready to score schedules on them. Ignored:
which schedules are scored (`ep_search`, `ep_plan`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ...base.errors import InputError
from ...sim.parallel.simulate import ParallelSimulation
from ...specs.drafting import has_drafts, read_acceptance, tokens_per_step
from ...specs.machines.profile import Profile
from ...specs.memory import kv_bytes_of
from ...specs.models import ModelSpec, WeightFormat, weight_format
from ...specs.schedules.parallel import ExpertParallelSchedule
from ...traces.match import check_layers
from ...traces.recording import LoadProfile, RoutingTrace
from ..placement.placement import Placement
from ..placement.search import SearchSettings
from ..trials import Progress, Trials
from .candidates import Placements
from .evidence import CountEvidence, TokenEvidence, count_evidence, token_evidence
from .objective import layer_costs
from .search import EpSearch

Recording: TypeAlias = RoutingTrace | LoadProfile
# Tokens on each rank in a step where the request does not say: DeepEP's published settings (its README), prefill and decode.
PREFILL_TOKENS_PER_RANK, DECODE_TOKENS_PER_RANK = 4096, 128
# 8-bit tokens with a 32-bit scale for 128 values, as 8-bit models are dispatched.
_FP8_BYTES = 1 + 4 / 128

# Formats with fewer bits than this are made for experts alone: attention and shared experts stay at 16 bits, as in
# gpt-oss's and Kimi-K2's own 4-bit checkpoints.
_LEAST_DENSE_BITS = 8
# Beyond, arrays of a step outgrow memory long before any machine serves it.
_MOST = {
    "num_nodes": 2**12, "ranks_per_node": 2**12, "context_tokens": 2**30, "tokens_per_rank": 2**20, "workers": 2**12,
    "kept_context_tokens": 2**30, "concurrency": 2**26, "prompt_tokens": 2**30, "attention_ranks": 2**12,
}  # fmt: skip
_MOST_ASKED = 10**9
# Moves of a placement search where none are asked for: for each layer, and for all of a model's together.
LAYER_MOVES, ALL_MOVES = 50_000, 1_500_000
# Beyond, a server computes prompts and hardly anything else.
_MOST_PREFILL = 0.999
# Slots more on every rank that are tried where the number of copies is searched.
_MORE_SLOTS = (1, 2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelRequest:
    """What is asked of a plan for many devices."""

    num_nodes: int = 1
    ranks_per_node: int = 8
    num_redundant: int | None = 0
    """Slots of a layer beyond one per expert, over all ranks; None: how many is searched."""
    prefill: bool = False
    """Whether steps are of prompts; else of decoding."""
    context_tokens: int = 4096
    """Context of every request that a step is timed at; in prefill, the length of a prompt."""
    kept_context_tokens: int | None = None
    """Context of every request that memory is kept for; None: the one that a step is timed at."""
    tokens_per_rank: int | None = None
    """Tokens on each rank in a step (sequences where each brings drafts too); None takes 4096 in prefill and 128 in decode,
    fewer where these do not fit."""
    draft_tokens: int = 0
    """Tokens that the model's own draft layer (MTP) drafts in a decode step for every sequence, all of which the next step checks."""
    acceptance: str | None = None
    """How many of them are accepted, as `specs.drafting.read_acceptance` reads it: a chance, or the shares of drafts by position."""
    speculative: bool = False
    """How many of at most `draft_tokens` are drafted is chosen, none included; 0: as many as are worth a look."""
    concurrency: int | None = None
    """Requests decoded together over all ranks, in place of tokens on each rank."""
    prompt_tokens: int | None = None
    """Length of a prompt, where prompts are mixed into decoding; None: the context that steps are timed at."""
    prefill_share: float | None = None
    """Of all tokens that a decoding server computes, those of prompts that it takes in meanwhile; None: none."""
    ttft_s: float | None = None
    """Most that the first token may take."""
    tpot_s: float | None = None
    """Most that each further token may take."""
    kv_type: str = "f16"
    """How keys and values are kept, by a name of `specs.memory.KV_TYPES`."""
    bits: str | None = "native"
    """Weight format of experts; native: the checkpoint's; None takes 16, or 8 where only that fits."""
    dense_bits: str | None = None
    """Weight format of everything but routed experts; native: the checkpoint's; None takes the checkpoint's, 16 at most, beside
    native experts, else the experts' where that has 8 bits or more, else 16."""
    memory_bytes: int | None = None
    """Memory of each device; None takes the profile's."""
    num_groups: int | None = None
    """The model's expert groups, for hierarchical EPLB."""
    attention_ranks: int | None = None
    """Ranks that share each attention layer in every schedule that is searched: 1 is data parallel, others tensor parallel, inside a node
    or over whole nodes; None: data parallel and the ranks of a node are tried."""
    search_moves: int | None = None
    """Moves our placement search proposes for each layer; None: 50,000, or fewer, so that all layers have 1,500,000 together."""
    workers: int = 1
    """Threads of that search; they do not change the result."""
    seed: int = 0

    @property
    def usual_tokens(self) -> int:
        """Tokens on each rank in a step (sequences where each brings drafts too) where the request does not say."""
        return PREFILL_TOKENS_PER_RANK if self.prefill else DECODE_TOKENS_PER_RANK

    @property
    def step_tokens(self) -> int:
        """Tokens of one step over all ranks."""
        drafted = self.draft_tokens + 1
        if self.concurrency is not None:
            return self.concurrency * drafted
        return (self.tokens_per_rank or self.usual_tokens) * self.num_nodes * self.ranks_per_node * drafted

    @property
    def tokens_a_step(self) -> float:
        """Tokens that a decode step yields for every sequence in the mean."""
        if self.acceptance is None or not self.draft_tokens:
            return 1.0
        return tokens_per_step(self.draft_tokens, read_acceptance(self.acceptance))

    def of_model(self, model: ModelSpec) -> ParallelRequest:
        """Return the request with formats that are the checkpoint's by name."""
        dense = self.dense_bits
        if dense == "native":
            dense = model.native_dense_bits
        elif dense is None and self.bits == "native":
            dense = model.usual_dense_bits
        return dataclasses.replace(
            self, bits=model.native_bits if self.bits == "native" else self.bits, dense_bits=dense
        )

    def dense_format(self, expert_bits: str) -> WeightFormat:
        """Return the weight format of everything but routed experts, whose own is `expert_bits`."""
        if self.dense_bits is not None:
            return weight_format(self.dense_bits)
        fmt = weight_format(expert_bits)
        return fmt if fmt.bits >= _LEAST_DENSE_BITS else weight_format("16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is asked of a search beside its request; nothing of it is needed to make a finished plan's figures again."""

    target: str | None = None
    """The engine that the plan is for."""
    runs: Callable[[ExpertParallelSchedule, Placement], ExpertParallelSchedule | None] | None = None
    """What that engine makes of a schedule."""
    against: str | None = None
    """The preset that the headline is against; None: the balancing that engines ship."""
    factors: Mapping[str, str] = field(default_factory=dict)
    """Levels of the table of factors, by factor."""
    seconds: float | None = None
    """After so long no further candidate is begun."""


def check_ep_match(model: ModelSpec, recording: Recording, request: ParallelRequest) -> None:
    """Return nothing; raises InputError when the recording is not of this model, or ranks do not suit it."""
    check_layers(model, recording.layer_ids)
    pairs = [
        ("experts", model.num_experts, recording.num_experts),
    ]
    if recording.top_k is not None:
        pairs.append(("choices a token", model.top_k, recording.top_k))
    for name, mine, theirs in pairs:
        if mine != theirs:
            raise InputError("trace", f"{theirs} {name}", f"{model.name} has {mine}", "choose the recorded model")
    for name, most in _MOST.items():
        value = getattr(request, name)
        if value is not None and value < 1:
            raise InputError(name, value, "below one", "give a positive count")
        if value is not None and value > most:
            raise InputError(name, value, f"above {most:,}", "give a smaller count")
    for name, count in (("redundant", request.num_redundant or 0), ("search_moves", request.search_moves or 0)):
        if count < 0:
            raise InputError(name, count, "below zero", "give a count")
        if count > _MOST_ASKED:
            raise InputError(name, count, f"above {_MOST_ASKED:,}", "give a smaller count")
    if request.concurrency is not None and request.tokens_per_rank is not None:
        raise InputError(
            "concurrency", request.concurrency, "tokens on each rank say it already", "give one of the two"
        )
    if request.concurrency is not None and request.prefill:
        raise InputError("concurrency", request.concurrency, "counts in decode steps; a prefill step has tokens of prompts",
                         "give tokens on each rank")  # fmt: skip
    _check_drafts(model, request)
    _check_latency(request)
    ranks = request.num_nodes * request.ranks_per_node
    if ranks > model.num_experts:
        raise InputError("ranks", ranks, "more ranks than experts of a layer", f"use at most {model.num_experts}")


def _check_drafts(model: ModelSpec, request: ParallelRequest) -> None:
    name = "--speculative" if request.speculative else "--draft-tokens"
    value = request.draft_tokens or "(given)"
    if not request.draft_tokens and not request.speculative:
        if request.acceptance is not None:
            rule = "nothing is drafted that could be accepted"
            raise InputError("--acceptance", request.acceptance, rule, "add --draft-tokens, or leave it out")
        return
    if request.prefill:
        raise InputError(name, value, "nothing is drafted for prompts", "leave it out, or plan decode")
    if not has_drafts(model):
        raise InputError(name, value, f"{model.name}'s checkpoints bring no draft (MTP) layer", "leave it out")
    if request.acceptance is None:
        raise InputError(
            name,
            value,
            "how many drafts are accepted is not said",
            "add --acceptance, a number or one for each position",
        )
    tokens_per_step(request.draft_tokens, read_acceptance(request.acceptance))


def _check_latency(request: ParallelRequest) -> None:
    share = request.prefill_share
    if share is not None:
        if request.prefill:
            raise InputError("--prefill-share", share, "a step of prompts has nothing else", "leave it out")
        if not 0 < share <= _MOST_PREFILL:
            rule = f"not above 0 and up to {_MOST_PREFILL:g}"
            raise InputError("--prefill-share", share, rule, "give the prompts' share of all tokens, or leave it out")
    for name, value in (("--ttft", request.ttft_s), ("--tpot", request.tpot_s)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(name, value, "not a time above zero", "give seconds")
    if request.ttft_s is not None and not request.prefill and share is None:
        raise InputError(
            "--ttft", request.ttft_s, "decode steps compute no prompts", "add --prefill-share, or plan --phase prefill"
        )
    if request.tpot_s is not None and request.prefill:
        raise InputError("--tpot", request.tpot_s, "prompts have no further tokens", "leave it out, or plan decode")


def redundant_counts(request: ParallelRequest, num_experts: int) -> tuple[int, ...]:
    """Return the redundant slots that are searched: the number asked for, else one, two and four more on every rank."""
    if request.num_redundant is not None:
        return (request.num_redundant,)
    ranks = request.num_nodes * request.ranks_per_node
    spare = -num_experts % ranks
    most = (ranks - 1) * num_experts
    return tuple(spare + more * ranks for more in _MORE_SLOTS if spare + more * ranks <= most)


def evidence_of(model: ModelSpec, recording: Recording, request: ParallelRequest) -> TokenEvidence | CountEvidence:
    """Return what a recording tells of routing, in steps as the request wants them; raises InputError."""
    if isinstance(recording, LoadProfile):
        return count_evidence(
            recording, top_k=model.top_k, step_tokens=request.step_tokens, sequence_tokens=request.draft_tokens + 1
        )
    ranks = request.num_nodes * request.ranks_per_node
    return token_evidence(
        recording, num_ranks=ranks, step_tokens=request.step_tokens, prefill=request.prefill, seed=request.seed,
        sequence_tokens=request.draft_tokens + 1,
    )  # fmt: skip


def dispatch_bytes_per_value(bits: str) -> float:
    """Return the bytes of a value that travels to experts stored in `bits`: 8-bit experts are sent 8-bit tokens."""
    return _FP8_BYTES if bits == "8" else 2.0


def plain_schedule(bits: str) -> ExpertParallelSchedule:
    """Return plain expert parallelism with experts in `bits`; 8-bit experts are sent 8-bit tokens."""
    return ExpertParallelSchedule(name="ep").with_options(
        kernel__bits=bits, all_to_all__dispatch_bytes_per_value=dispatch_bytes_per_value(bits)
    )


def prepare_ep(
    model: ModelSpec,
    profile: Profile,
    evidence: TokenEvidence | CountEvidence,
    request: ParallelRequest,
    schedule: ExpertParallelSchedule,
    progress: Progress | None = None,
) -> EpSearch:
    """Return a search that scores schedules with the weight format and exchange sizes of `schedule`.

    Raises InputError where redundant slots do not divide over ranks, MissingCalibration where the profile lacks a tier.
    """
    bits = schedule.kernel.bits
    simulation = ParallelSimulation(
        model,
        profile,
        request.num_nodes,
        request.ranks_per_node,
        request.prefill,
        request.context_tokens,
        request.dense_format(bits),
        memory_bytes=request.memory_bytes,
        kv_bytes_per_value=kv_bytes_of(request.kv_type, model),
        kept_context_tokens=request.kept_context_tokens,
        draft_tokens=request.draft_tokens,
        tokens_a_step=request.tokens_a_step,
    )
    costs = layer_costs(
        simulation.costing, schedule, step_tokens=evidence.step_tokens, num_ranks=simulation.num_ranks,
        ranks_per_node=request.ranks_per_node, weight=evidence.weight if isinstance(evidence, TokenEvidence) else 1,
    )  # fmt: skip
    moves = request.search_moves
    if moves is None:
        moves = min(LAYER_MOVES, ALL_MOVES // model.num_moe_layers)
    placements = Placements(
        evidence, model.num_experts, simulation.num_ranks, request.num_nodes, costs,
        SearchSettings(num_moves=moves, seed=request.seed), request.num_groups, request.workers,
    )  # fmt: skip
    placements.num_slots(request.num_redundant or 0)
    return EpSearch(
        simulation, evidence, placements, Trials(progress=progress), attention_ranks=request.attention_ranks
    )


def batch_that_fits(
    model: ModelSpec, profile: Profile, recording: Recording, request: ParallelRequest, schedules: Sequence[ExpertParallelSchedule]
) -> tuple[ParallelRequest, tuple[str, ...]]:  # fmt: skip
    """Return the request with the largest batch that fits, and that in words, where the usual batch, none being asked for, does not fit.

    schedules: that may be run; one of them is enough. Where not even one token fits, the request stays for whoever runs it to refuse.
    """
    if request.tokens_per_rank is not None or request.concurrency is not None:
        return request, ()
    usual, most = request.usual_tokens, 0
    for schedule in schedules:
        asked = dataclasses.replace(request, bits=schedule.kernel.bits)
        search = prepare_ep(model, profile, evidence_of(model, recording, asked), asked, schedule)
        most = max(most, search.memory(schedule)[1] // (request.draft_tokens + 1))
        if most >= usual:
            return request, ()
    if not most:
        return request, ()
    what = "tokens" if request.prefill else "sequences"
    words = f"batch: {usual:,} {what} on each GPU, as usual, do not fit; {most:,} are taken, as many as do (--tokens-per-rank says another)"
    return dataclasses.replace(request, tokens_per_rank=most), (words,)
