"""Search for the best schedule: the function behind `moeplan plan`, for one device and for many.

Modelled: which search a request asks for, and formats named as in the checkpoint. Ignored: the searches (`planner/`), pages.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

from ..base.errors import InputError, UnknownName
from ..planner.emit.engines.llamacpp_commands import DIALECTS, check_kv_type
from ..planner.emit.runs import kernel_name, runs_of
from ..planner.offload.break_even import DRAFT_LENGTHS, surface
from ..planner.offload.drafts import Merit, choose_drafts, estimate_with, fixed_drafts
from ..planner.offload.make import make_plan
from ..planner.offload.plan import OffloadPlan, OffloadRequest
from ..planner.parallel.case import Ask, ParallelRequest, check_ep_match
from ..planner.parallel.drafts import choose_ep_drafts, fixed_ep_drafts
from ..planner.parallel.period.moves import WAYS
from ..planner.parallel.period.study import WINDOW_STEPS, Asked
from ..planner.parallel.plan import ParallelPlan, make_ep_plan
from ..planner.served.general import variants_of
from ..planner.served.plan import ServedPlan, best_setting, check_engine, make_served_plans, served_to_dict
from ..sim.offload.simulate import Simulation
from ..sim.policies.policy_file import PolicyFile, load_policy
from ..specs.machines.engines import load_engine
from ..specs.machines.profile import Profile
from ..specs.machines.serving import serving_engines
from ..specs.memory import kv_bytes_of
from ..specs.models import ModelSpec
from ..specs.schedules.parallel import EP_PRESETS
from ..traces.recording import LoadProfile
from .drafting import AcceptanceLike, DraftsAsked, drafts_asked
from .load import Recording, as_cluster_machine, as_model, as_recording, engine_meant, rank_recording
from .requests import LengthsLike
from .settings import Settings, SettingsLike, open_settings
from .subject import Subject, open_subject, rank_budget

Plan: TypeAlias = OffloadPlan | ParallelPlan
Progress: TypeAlias = Callable[[int, int, str], None]
"""Told (done, total, note) as the search goes on."""
WINDOW = 2000
"""Forward passes that an offload plan is searched on."""


@overload
def plan(
    model: str | os.PathLike[str] | ModelSpec,
    hardware: str | Profile,
    *,
    trace: str | os.PathLike[str] | Recording | None = ...,
    request: OffloadRequest | None = ...,
    memory: int | str | None = ...,
    dense_bits: str | None = ...,
    target: str | None = ...,
    engine: str | None = ...,
    quant: str | None = ...,
    prompt_tokens: int | None = ...,
    reply_tokens: int | None = ...,
    lengths: LengthsLike = ...,
    context: int | None = ...,
    kv_type: str = ...,
    reserve: int | str | None = ...,
    window: int | None = ...,
    settings: SettingsLike = ...,
    policy: str | os.PathLike[str] | None = ...,
    seconds: float | None = ...,
    speculative: bool = ...,
    draft_tokens: int | None = ...,
    acceptance: AcceptanceLike = ...,
    draft: str | os.PathLike[str] | None = ...,
    progress: Progress | None = ...,
) -> OffloadPlan: ...


@overload
def plan(
    model: str | os.PathLike[str] | ModelSpec,
    hardware: str | Profile,
    *,
    trace: str | os.PathLike[str] | Recording,
    request: ParallelRequest,
    memory: int | str | None = ...,
    dense_bits: str | None = ...,
    engine: str | None = ...,
    reserve: int | str | None = ...,
    target: str | None = ...,
    against: str | None = ...,
    factors: Mapping[str, str] | None = ...,
    seconds: float | None = ...,
    evaluate_on: Mapping[str, str | os.PathLike[str] | Recording] | None = ...,
    period: Sequence[str | os.PathLike[str] | Recording] | None = ...,
    rebalance_every: int | None = ...,
    count_window: int | None = ...,
    moves: str | None = ...,
    settings: SettingsLike = ...,
    progress: Progress | None = ...,
) -> ParallelPlan: ...


def plan(
    model: str | os.PathLike[str] | ModelSpec,
    hardware: str | Profile,
    *,
    trace: str | os.PathLike[str] | Recording | None = None,
    request: OffloadRequest | ParallelRequest | None = None,
    memory: int | str | None = None,
    dense_bits: str | None = None,
    target: str | None = None,
    engine: str | None = None,
    quant: str | None = None,
    prompt_tokens: int | None = None,
    reply_tokens: int | None = None,
    lengths: LengthsLike = None,
    context: int | None = None,
    kv_type: str = "f16",
    reserve: int | str | None = None,
    window: int | None = None,
    evaluate_on: Mapping[str, str | os.PathLike[str] | Recording] | None = None,
    period: Sequence[str | os.PathLike[str] | Recording] | None = None,
    rebalance_every: int | None = None,
    count_window: int | None = None,
    moves: str | None = None,
    against: str | None = None,
    factors: Mapping[str, str] | None = None,
    seconds: float | None = None,
    settings: SettingsLike = None,
    policy: str | os.PathLike[str] | None = None,
    speculative: bool = False,
    draft_tokens: int | None = None,
    acceptance: AcceptanceLike = None,
    draft: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> OffloadPlan | ParallelPlan:
    """Return the best schedule within a memory budget, what it beats, and what would help.

    request: an `OffloadRequest` plans for one device, a `ParallelRequest` for many; None: one device, the whole time of a request
    without a recording, tokens per second of the window with one. trace: a recording; None, for one device: routing of the model's
    family for requests of `prompt_tokens` + `reply_tokens` tokens; for many: the bundled one, where it is of this model, else loads as
    unevenly popular as published ones. memory: the budget of each device, bytes or a text such as "6GiB";
    None: all it has. dense_bits: weight format of everything but routed experts; None: the checkpoint's, 16 bits at most. settings:
    changes of machine, model and request. engine: whose constants, for many devices whose measured kernels, the plan is predicted
    with. For one device: target, the engine whose own settings are searched (as `--for`); quant, context, kv_type and reserve as
    `simulate` takes them; window, forward passes to search on (2000 of a recording); policy, a file with rules of one's own,
    which is run, and whose rules are tried too; draft_tokens, acceptance and draft as `simulate` takes them, with speculative the most
    guesses of a step, of which the search chooses how many, none included. seconds: after so long the search begins no further
    candidate. For many: target, the engine that only what it can be told is searched for; evaluate_on, further recordings by name;
    period, recordings or loads that are served one after the other, over which never, once and every `rebalance_every` steps are compared,
    placed from the counts of the last `count_window` steps, moved as `moves` says ("at-once", "layer-by-layer", "background"); against, the
    preset that the headline is against (the balancing that engines ship); factors, levels of the table of factors (`{"replicas": "32"}`).

    Raises InputError for what does not belong together, DoesNotFit where no schedule fits.
    """
    changes = open_settings(settings)
    changes.refuse("schedule", "the search chooses the schedule; machine., model. and request. can be set")
    one_device: dict[str, Any] = {
        "quant": quant, "prompt_tokens": prompt_tokens, "reply_tokens": reply_tokens, "lengths": lengths, "context": context,
        "window": window,
    }  # fmt: skip
    if isinstance(request, ParallelRequest):
        drafts = {
            "speculative": speculative or None,
            "draft_tokens": draft_tokens,
            "acceptance": acceptance,
            "draft": draft,
        }
        others = drafts | {"policy": policy, "kv_type": None if kv_type == "f16" else kv_type}
        for name, value in (one_device | others).items():
            if value is not None:
                raise InputError(f"--{name.replace('_', '-')}", value, "counts for one device only", "leave it out")
        for name, later in (("--evaluate-on", evaluate_on), ("--period", period)):
            if trace is None and later:
                raise InputError(
                    "--trace",
                    "(absent)",
                    f"{name} is served by what was placed for it",
                    "give the recording to place for",
                )
        asked = (memory, reserve, dense_bits, engine)
        if against is not None and against not in EP_PRESETS:
            raise UnknownName("--against", against, EP_PRESETS)
        ask = Ask(target=target, against=against, factors=factors or {}, seconds=seconds)
        served = _period(period, rebalance_every, count_window, moves)
        return _parallel(
            model, hardware, trace, request, asked, ask, evaluate_on or {}, changes, period=served, progress=progress
        )
    many = {
        "--period": None if not period else "(given)",
        "--rebalance-every": rebalance_every,
        "--count-window": count_window,
        "--moves": moves,
        "--evaluate-on": None if evaluate_on is None else sorted(evaluate_on),
        "--against": against,
        "--factor": factors,
    }
    for name, value in many.items():
        if value is not None:
            raise InputError(name, value, "counts for expert parallel only", "leave it out")
    request = request or OffloadRequest(objective="request_s" if trace is None else "tokens_per_s")
    if seconds is not None and request.seconds is not None:
        raise InputError("--seconds", seconds, "the request says it already", "give one of the two")
    if seconds is not None:
        request = dataclasses.replace(request, seconds=seconds)
    if trace is not None and window is None:
        one_device["window"] = WINDOW
    engine = engine_meant(hardware, _engine_of(target, engine), own_rules=trace is not None or policy is not None)
    one_device |= {"engine": engine, "reserve": reserve}
    kinds = _kv_types(kv_type)
    for kind in kinds if target in DIALECTS else ():
        check_kv_type(str(target), kind)
    drafted = drafts_asked(model, speculative=speculative, length=draft_tokens, acceptance=acceptance, draft=draft)
    subject = open_subject(
        model=model, hardware=hardware, trace=trace, memory=memory, dense_bits=dense_bits, kv_type=kinds[0], settings=changes,
        concurrency=None if request.concurrency == 1 else request.concurrency, ubatch=request.prefill_chunk_tokens,
        drafting=None if drafted is None else drafted.drafting, native=request.bits == ("native",), **one_device,
    )  # fmt: skip
    split = subject.simulation.split
    if split is not None and target is not None and target not in DIALECTS:
        raise InputError("--hardware", subject.simulation.profile.name, f"how {target} divides a model over several cards is not modelled",
                         "plan --for llama.cpp, leave out --for, or name one card")  # fmt: skip
    own = None
    if policy is not None:
        if target is not None:
            raise InputError(
                "--policy", str(policy), "an engine has its own rules, not yours", "leave out --policy or --for"
            )
        own = load_policy(policy)
        subject.simulation.own_rules = tuple(own.settings().items())
    return _offload(subject, kinds, request, target, changes, own, drafts=drafted, progress=progress)


def _period(recordings: Sequence[str | os.PathLike[str] | Recording] | None, every: int | None, window: int | None,
            moves: str | None) -> Asked | None:  # fmt: skip
    """Return what is asked of a served period; None where none is given. Raises InputError or UnknownName."""
    if not recordings:
        for name, value in (("--rebalance-every", every), ("--count-window", window), ("--moves", moves)):
            if value is not None:
                raise InputError(name, value, "no period is given over which experts could move", "add --period")
        return None
    for name, count in (("--rebalance-every", every), ("--count-window", window)):
        if count is not None and count < 1:
            raise InputError(name, count, "below one", "give a positive count of steps")
    if moves is not None and moves not in WAYS:
        raise UnknownName("--moves", moves, WAYS)
    return Asked(recordings=tuple(as_recording(one) for one in recordings), every_steps=every,
                 window_steps=WINDOW_STEPS if window is None else window, way=moves)  # fmt: skip


def _engine_of(target: str | None, engine: str | None) -> str | None:
    """Return the engine that a plan is predicted under; raises UnknownName, or InputError where it is not the one it is for."""
    if target is None:
        return engine
    check_engine(target)
    if engine not in (None, target):
        raise InputError("--engine", engine, f"--for {target} plans for {target}", "leave out one of the two")
    return target


def _kv_types(kv_type: str) -> tuple[str, ...]:
    """Return the types that keys and values may have, the preferred one first; raises InputError where none is named or one twice."""
    kinds = tuple(each.strip() for each in kv_type.split(","))
    if not all(kinds) or len(set(kinds)) < len(kinds):
        raise InputError("--kv-type", kv_type, "a type is missing or named twice", "write for instance f16,q8_0")
    return kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What one search ends in."""

    plan: OffloadPlan
    kind: str
    """Of keys and values."""
    served: ServedPlan | None = None
    ubatches: tuple[int | None, ...] = ()
    """Micro-batches that a plan for no engine chose from."""


def _offload(
    subject: Subject,
    kinds: tuple[str, ...],
    request: OffloadRequest,
    target: str | None,
    changes: Settings,
    own: PolicyFile | None,
    *,
    drafts: DraftsAsked | None,
    progress: Progress | None,
) -> OffloadPlan:
    fixed = request.prefill_chunk_tokens is not None or "prefill_chunk_tokens" in changes.request
    request = dataclasses.replace(request, concurrency=subject.concurrency, prefill_chunk_tokens=subject.ubatch)
    request = changes.changed_request(request)
    ubatch = request.prefill_chunk_tokens if fixed else None

    def search(simulation: Simulation, wanted: OffloadRequest) -> _Answer:
        each = _with_each(simulation, kinds)
        if target is None:
            mine = variants_of(each, request.prefill_chunk_tokens, fixed=fixed, concurrency=request.concurrency)
            plan = make_plan(simulation, wanted, variants=mine, progress=progress)
            kind = kinds[0] if plan.variant is None else plan.variant.kv_type
            return _Answer(plan=plan, kind=kind, ubatches=tuple(dict.fromkeys(one.ubatch for one in mine.every)))
        kind, served = make_served_plans(each, wanted, target, ubatch=ubatch, progress=progress)
        return _Answer(plan=served.plan, kind=kind, served=served)

    def estimate(simulation: Simulation, answer: _Answer) -> tuple[Merit, dict[str, float | None]]:
        there = _with_each(simulation, (kinds[0], answer.kind) if answer.kind != kinds[0] else kinds[:1])[answer.kind]
        if target is None or answer.served is None:
            return estimate_with(there, answer.plan, request)
        return best_setting(there, request, target, answer.served.chosen.ubatch)

    drafting = None
    if drafts is None:
        answer = search(subject.simulation, request)
    elif drafts.chosen:
        chosen = choose_drafts(subject.simulation, request, drafts.lengths, search, lambda one: one.plan, estimate)
        answer, drafting = chosen.answer, chosen.drafting
    else:
        answer, drafting = search(subject.simulation, request), fixed_drafts(drafts.drafting)
    found, kind = answer.plan, answer.kind
    if drafting is not None and drafts is not None:
        over = found.simulation.over(found.simulation.trace, drafting=drafts.drafting)
        wanted = {*DRAFT_LENGTHS, *([drafting["length"]] if drafting["length"] else [])}
        pays = surface(over, found.best.schedule, lengths=tuple(sorted(wanted)))
        drafting["break_even"] = None if pays is None else pays.to_dict()
    served = None
    if answer.served is not None and target is not None:
        served = served_to_dict(answer.served, target, load_engine(target).checked)
    return dataclasses.replace(
        found,
        served=served,
        asked=subject.asked | {"kv_type": kind} | ({"kv_types": list(kinds)} if len(kinds) > 1 else {}),
        notes=(*_notes_of(subject, found), *_chosen(found, kinds, kind, answer.ubatches)),
        set_by_user=tuple(changes.made),
        policy=None if own is None else own.to_dict(),
        drafting=drafting,
    )


def _with_each(simulation: Simulation, kinds: tuple[str, ...]) -> dict[str, Simulation]:
    """Return the simulation by type of keys and values; `simulation` has the first."""
    found = {kinds[0]: simulation}
    for kind in kinds[1:]:
        found[kind] = simulation.with_kv(kv_bytes_of(kind, simulation.model))
    return found


def _chosen(found: OffloadPlan, kinds: tuple[str, ...], kind: str, ubatches: tuple[int | None, ...]) -> list[str]:
    """Return lines on what was chosen of what might be: the micro-batch, where no engine's setting says it, the type of keys and values."""
    notes = []
    if found.variant is not None and len(ubatches) > 1:
        notes.append(f"micro-batch: {found.variant.ubatch} tokens, of {', '.join(map(str, ubatches))}")
    if len(kinds) > 1:
        notes.append(f"keys and values: {kind}, of {', '.join(kinds)}; a later one only where it gains something")
    return notes


def _notes_of(subject: Subject, found: OffloadPlan) -> tuple[str, ...]:
    """Return a plan's notes; of several cards, how the search divided them."""
    split = found.simulation.split if found.simulation is not None else None
    if split is None:
        return subject.notes
    return (*(note for note in subject.notes if not note.startswith("cards: ")), f"cards: {split.words}")


def _parallel(
    model: str | os.PathLike[str] | ModelSpec,
    hardware: str | Profile,
    trace: str | os.PathLike[str] | Recording | None,
    request: ParallelRequest,
    asked: tuple[int | str | None, int | str | None, str | None, str | None],
    ask: Ask,
    evaluate_on: Mapping[str, str | os.PathLike[str] | Recording],
    changes: Settings,
    *,
    period: Asked | None,
    progress: Progress | None,
) -> ParallelPlan:
    spec, profile = changes.changed_model(as_model(model)), changes.changed_machine(as_cluster_machine(hardware))
    memory, reserve, dense_bits, engine = asked
    if dense_bits is not None and request.dense_bits is not None:
        raise InputError("--dense-bits", dense_bits, "the request says it already", "give one of the two")
    request = dataclasses.replace(
        request, memory_bytes=rank_budget(memory, reserve, request.memory_bytes, profile),
        dense_bits=request.dense_bits if dense_bits is None else dense_bits,
    )  # fmt: skip
    target = ask.target
    if target is not None:
        if engine is not None:
            raise InputError("--engine", engine, f"--for {target} plans for {target}", "leave out one of the two")
        ask = dataclasses.replace(ask, runs=runs_of(target, spec, decode=not request.prefill))
        # Its own kernels where they were measured on this card or on the one that it is made like.
        mine = kernel_name(target)
        engine = mine if mine in serving_engines(profile) else None
    request = changes.changed_request(request)
    recording = rank_recording(trace, spec, prefill=request.prefill)
    if request.search_moves is not None and isinstance(recording, LoadProfile):
        raise InputError("--search-moves", request.search_moves, "no placement is searched from counts alone",
                         "leave it out, or record single tokens")  # fmt: skip
    others = {name: as_recording(one) for name, one in evaluate_on.items()}

    def search(wanted: ParallelRequest) -> ParallelPlan:
        return make_ep_plan(
            spec, profile, recording, wanted, progress=progress, others=others, engine=engine, ask=ask, period=period
        )

    if request.speculative:
        check_ep_match(spec, recording, request.of_model(spec))
        found = choose_ep_drafts(request, recording, search)
    else:
        found = dataclasses.replace(search(request), drafting=fixed_ep_drafts(request))
    return dataclasses.replace(found, set_by_user=tuple(changes.made))
