"""An expert-parallel plan run for real beside its prediction: as many processes as it has ranks, schedules taking turns.

Modelled: model, placement, router, steps and schedules are the plan's; costs are those of a profile of this machine, in which so many
ranks were measured. All ranks run on this machine: one node's meet on its loopback interface; several nodes are network
namespaces with slow links between (`parallel.network`) or, where the system permits none, ranks that wait as long as such a link
would take. What is predicted is what runs: 32 bits outside of experts, no multiprocessors kept for exchanges, a shorter context
where this machine's memory ends. Ignored: plans for one device (`validate_plan`), prompts, slices of layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from ...base.errors import DoesNotFit, InputError
from ...base.units import NS_PER_S, format_rate
from ...devices.dense_part import DensePart
from ...devices.device import available_host_bytes
from ...devices.stores.slot_sizes import expert_layout
from ...planner.parallel.case import ParallelRequest, check_ep_match, evidence_of, plain_schedule, prepare_ep
from ...planner.parallel.replay import planned_candidate
from ...planner.parallel.search import EpSearch
from ...sim.parallel.runnable import as_run_on_cores, check_runnable
from ...sim.parallel.simulate import ParallelSimulation
from ...specs.machines.profile import Profile
from ...specs.models import ModelSpec
from ...specs.models.pass_shape import PassShape
from ...specs.schedules.parallel import ep_schedule_from_dict
from ...traces.recording import LoadProfile, RoutingTrace
from ..parallel.agreement import first_difference, rounding_bound, worst_error
from ..parallel.launch import RankRun, run_jobs
from ..parallel.network import Nodes, Unavailable, two_nodes
from ..parallel.prepare import Prepared, prepare_job, recorded_steps
from ..parallel.reference import reference_states
from ..running.execute import Progress, silent
from .agreement import Compared
from .rank_budget import rank_budget
from .rank_results import Contender, RanksValidated, RanksValidation, step_times
from .reduction import CountingDevice
from .validate import check_profile, dense_format

_MAX_STEPS = 8
_SECONDS = 120.0
_SHARE = 0.6
"""Of the memory that is free; libraries of every rank, activations and other programs get the rest."""
_RANK_BYTES = 300 * 2**20
"""What a process with torch takes before any weight."""


def validate_ranks(
    document: Mapping[str, Any],
    model: ModelSpec,
    recording: RoutingTrace | LoadProfile,
    *,
    profile: Profile,
    num_baselines: int = 2,
    steps: int | None = None,
    repeats: int = 3,
    seconds: float = _SECONDS,
    memory_bytes: int | None = None,
    timeout_s: float = 60.0,
    progress: Progress = silent,
) -> RanksValidation:
    """Return predicted and measured of an expert-parallel plan's best schedule, first, and of its fastest rivals.

    profile: of this machine, with exchanges between so many ranks. steps: recorded steps to run; None: as many as end in about
    `seconds`, 8 at most. memory_bytes: of this machine's memory, for all ranks together. timeout_s: after so long without an answer a
    rank is taken for dead.

    Raises InputError for schedules and steps that are only simulated, for a profile of another device, MissingCalibration where its
    exchanges are not between so many ranks, DoesNotFit where memory ends, ExecutionFailed where a rank does.
    """
    began = time.monotonic()
    check_profile(profile, "cpu")
    given = document["request"]
    request = ParallelRequest(**{each.name: given[each.name] for each in fields(ParallelRequest) if each.name in given})
    check_ep_match(model, recording, request)
    search, contenders = planned_contenders(document, model, profile, recording, request, num_baselines)
    asked = _MAX_STEPS if steps is None else steps
    recorded = {one.name: recorded_steps(search, one.candidate, asked) for one in contenders}
    context = _context_within(model, contenders, recorded, request.context_tokens, memory_bytes)
    simulation = simulation_of(model, profile, request, context)
    number = min([asked, *(len(each) for each in recorded.values())])
    with network_of(simulation) as (nodes, limit, network):
        made = [
            prepare_job(
                simulation, one.schedule, one.candidate, recorded[one.name][:number], repeats=repeats,
                timeout_s=timeout_s, inter_bytes_per_s=limit,
            )
            for one in contenders
        ]  # fmt: skip
        if steps is None:
            made = [first_steps(one, _steps_within(seconds, made, repeats + 1)) for one in made]
        found = run_jobs([one.job for one in made], nodes, seconds=max(600.0, 20 * seconds), progress=progress)
    references: dict[tuple[object, ...], list[torch.Tensor]] = {}
    validated = []
    for one, prepared, runs in zip(contenders, made, found, strict=True):
        pipeline = prepared.job.schedule.pipeline
        key = (pipeline.shortcut, pipeline.micro_batches, prepared.job.schedule.kernel.bits)
        if key not in references:
            references[key] = reference_states(prepared.job)
        validated.append(compare_runs(one, prepared, runs, references[key], simulation))
    return RanksValidation(
        validated=tuple(validated), profile=profile, network=network, seconds=time.monotonic() - began,
        reduced=_reduced(request.context_tokens, context),
        notes=_notes(model, request, made[0], repeats, network) + _classes(simulation, found),
    )  # fmt: skip


def planned_contenders(
    document: Mapping[str, Any],
    model: ModelSpec,
    profile: Profile,
    recording: RoutingTrace | LoadProfile,
    request: ParallelRequest,
    num_baselines: int,
) -> tuple[EpSearch, list[Contender]]:
    """Return a plan's search again, its best schedule and the fastest rivals that ranks on cores can run; raises InputError."""
    best = ep_schedule_from_dict(document["best"]["schedule"])
    search = prepare_ep(
        model, profile, evidence_of(model, recording, request), request, plain_schedule(best.kernel.bits)
    )
    told = as_run_on_cores(best, model)
    if told is None:
        check_runnable(best, model)
        raise InputError("plan.best", best.name, "simulated but not executed", "plan for ranks on cores")
    found = [Contender(name="best", schedule=told, candidate=planned_candidate(search, best, document))]
    seen = {repr(told.with_options(name=""))}
    for rival in sorted(document["baselines"], key=lambda one: float(one["step_s"])):
        if len(found) > num_baselines:
            break
        schedule = as_run_on_cores(ep_schedule_from_dict(rival["schedule"]), model)
        if schedule is None or (key := repr(schedule.with_options(name=""))) in seen:
            continue
        seen.add(key)
        found.append(
            Contender(name=str(rival["name"]), schedule=schedule, candidate=search.placements.candidate(schedule))
        )
    return search, found


def simulation_of(model: ModelSpec, profile: Profile, request: ParallelRequest, context: int) -> ParallelSimulation:
    """Return what predicts these ranks; raises MissingCalibration where so many were not measured."""
    return ParallelSimulation(
        model, profile, request.num_nodes, request.ranks_per_node, request.prefill, context, dense_format("cpu")
    )


@contextlib.contextmanager
def network_of(simulation: ParallelSimulation) -> Iterator[tuple[Nodes | None, float, str]]:
    """Return a context with (nodes, bytes per second of the in-process limiter or 0, what joins ranks in words)."""
    if simulation.num_nodes == 1:
        yield None, 0.0, "all ranks in one node, over the loopback interface"
        return
    laws = simulation.costing.constants.ranks
    rate = simulation.costing.constants.tier(0).bytes_per_s if laws is None else laws.link_bytes_per_s
    if simulation.num_nodes != 2:
        yield None, rate, f"links between nodes of {format_rate(rate)} by a limiter inside each rank"
        return
    try:
        with two_nodes(rate) as nodes:
            yield nodes, 0.0, f"two network namespaces with {format_rate(rate)} between them"
    except Unavailable as reason:
        yield None, rate, f"links between nodes of {format_rate(rate)} by a limiter inside each rank ({reason})"


def first_steps(prepared: Prepared, number: int) -> Prepared:
    """Return a job's first steps."""
    short = dataclasses.replace(
        prepared.job, steps=tuple(prepared.job.steps[:number]), orders=list(prepared.job.orders)[:number]
    )
    return dataclasses.replace(
        prepared, job=short, loads=list(prepared.loads)[:number], tables=list(prepared.tables)[:number],
        outcomes=list(prepared.outcomes)[:number],
    )  # fmt: skip


def compare_runs(
    contender: Contender,
    prepared: Prepared,
    runs: Sequence[RankRun],
    reference: Sequence[torch.Tensor],
    simulation: ParallelSimulation,
) -> RanksValidated:
    """Return one schedule's prediction beside its measurements."""
    times = step_times(runs)[1:] / NS_PER_S  # [repeats, steps]
    measured = np.median(times, axis=0)
    predicted = np.array([outcome.makespan_ns for outcome in prepared.outcomes]) / NS_PER_S
    first, second = times[0::2], times[1::2]
    whole = simulation.predict(prepared.job.schedule, prepared.loads, check_memory=False)
    difference = first_difference(prepared, runs)
    error, bound = worst_error(prepared.job, runs, reference), rounding_bound(prepared.job)
    differences = [] if difference is None else [difference]
    compared = Compared(
        name=contender.name,
        group=prepared.job.schedule.kernel.bits,
        predicted_s=float(predicted.mean()),
        relative_uncertainty=whole.relative_uncertainty,
        measured_s=float(measured.mean()),
        measured_half_s=float(np.median(first, axis=0).mean()),
        measured_again_s=float(np.median(second, axis=0).mean()) if len(second) else None,
        tokens_per_step=float(np.mean([len(step.source_rank) for step in prepared.job.steps])),
        count_differences=tuple(differences),
        hit_rate_predicted=0.0,
        hit_rate_measured=0.0,
    )
    return RanksValidated(
        contender=contender, prepared=prepared, runs=runs, compared=compared, byte_difference=difference, error=error, bound=bound,
        budget=rank_budget(prepared, runs, compared.measured_s),
    )  # fmt: skip


# --- what fits ----------------------------------------------------------------------------------------------------------


def _context_within(
    model: ModelSpec,
    contenders: Sequence[Contender],
    recorded: Mapping[str, Sequence[Any]],
    context: int,
    memory_bytes: int | None,
) -> int:
    """Return the context that all ranks' caches leave room for, the plan's or less; raises DoesNotFit where weights do not fit."""
    room = int(available_host_bytes() * _SHARE) if memory_bytes is None else memory_bytes
    weights = 0
    for one in contenders:
        slots = one.candidate.placement.physical_to_logical.size
        weights += (slots + model.num_moe_layers * model.num_experts) * expert_layout(
            model, one.schedule.kernel.bits
        ).slot_bytes
    topology = contenders[0].candidate.placement.num_ranks
    tokens = max(int(np.bincount(step.source_rank).max()) for steps in recorded.values() for step in steps)
    weights += topology * _RANK_BYTES

    def dense(each: int) -> int:
        device = CountingDevice()
        shape = PassShape(tokens=tokens, context_tokens=tokens * each, requests=tokens)
        DensePart(model, device, dtype=torch.float32, largest=shape)
        return device.used_bytes

    # Every batch of every rank has caches, and one process holds a batch's for the reference.
    copies = topology * (1 + max(one.schedule.pipeline.micro_batches > 1 for one in contenders)) + 1
    while weights + copies * dense(context) > room:
        if context == 1:
            needs = weights + copies * dense(1)
            raise DoesNotFit(
                f"{topology} ranks of {model.name} need {needs:,} bytes of this machine's memory, of {room:,}",
                needs - room,
            )
        context = max(1, context // 2)
    return context


def _reduced(planned: int, run: int) -> dict[str, Any] | None:
    """Return what a document says of a shorter context; None where it is the plan's."""
    if planned == run:
        return None
    notes = [
        f"requests have {run} tokens of context instead of {planned}: caches of all ranks must fit into this machine's memory"
    ]
    return {"context_tokens": {"planned": planned, "run": run}, "notes": notes}


def _steps_within(seconds: float, made: Sequence[Prepared], rounds: int) -> int:
    """Return how many steps end within `seconds` by their predictions, at least one."""
    per_step = [sum(one.outcomes[step].makespan_ns for one in made) for step in range(len(made[0].outcomes))]
    total = rounds * np.cumsum(per_step) / NS_PER_S
    return max(1, int(np.searchsorted(total, seconds, side="right")))


def _classes(simulation: ParallelSimulation, found: Sequence[Sequence[RankRun]]) -> tuple[str, ...]:
    """Return, in words, whether exchanges went before kernels, and whether they did when this machine was measured."""
    laws = simulation.costing.constants.ranks
    first = all(run.exchanges_first for runs in found for run in runs)
    said = "threads that exchange go before those that compute" if first else (
        "threads that exchange share a class with those that compute: the system permits no other"
    )  # fmt: skip
    measured = None if laws is None else bool(laws.exchanges_first)
    if measured in (None, first):
        return (said,)
    return (
        said,
        f"the profile was measured {'with' if measured else 'without'} exchanges going first: calibrate again",
    )


def _notes(
    model: ModelSpec, request: ParallelRequest, prepared: Prepared, repeats: int, network: str
) -> tuple[str, ...]:
    """Return, in words, what ran."""
    job = prepared.job
    tokens = sum(len(step.source_rank) for step in job.steps)
    found = [
        f"{model.name} with random weights, 32 bits outside of experts; {job.topology.num_ranks} processes share this machine's cores",
        network,
        f"{len(job.steps)} recorded steps with {tokens} tokens in all, each request with {job.context_tokens} tokens of context",
        f"each schedule ran {repeats} times after a warm-up, in turns; noise compares two halves of these runs",
        "a step takes from when the last rank began until the last one was done; all ranks read one clock",
    ]
    if request.dense_bits not in (None, "32"):
        found.append(
            f"the plan stores everything but routed experts in {request.dense_bits} bits; ranks run 32, and so does the prediction"
        )
    return tuple(found)
