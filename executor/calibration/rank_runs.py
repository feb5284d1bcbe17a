"""What stages of a step cost many ranks of this machine: real steps with routing made up at random, cut into stages.

    steps of several sizes · shapes of models · ways of exchanging ──► run by ranks in turns ──► stage times ──► samples

Modelled: a stage lasts from when the last rank was done with the stage before until the last one is done with it, so that the stages of a
step add up to it. Links between nodes are limited to a rate (`parallel.network`). Steps whose exchanges overlap kernels give one
factor: how many times as long what exchanges do on cores takes beside kernels. Ignored: recordings,
placements and models other than these: that costs carry over to them is what a validation checks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...base.units import MEGA, NS_PER_S
from ...calibrate.costs.rank_laws import (
    CORES,
    FIRST,
    LINK,
    STEP,
    TOGETHER,
    RankLaws,
    laws_of,
)
from ...calibrate.fitting.rank_fit import fit_ranks
from ...calibrate.microbenchmarks.standard_shapes import made_up_model
from ...calibrate.samples import Sample, SampleSet
from ...planner.placement.comparison import Candidate
from ...planner.placement.placement import contiguous
from ...planner.placement.replica_choice import StaticChoice, nearest_table
from ...sim.parallel.program import INTRA
from ...sim.parallel.rank_costs import tabulate_on_ranks
from ...sim.parallel.simulate import ParallelSimulation
from ...sim.parallel.simulators import run_ep_compiled
from ...sim.parallel.tiers import EpConstants, Tier
from ...specs.machines.load import load_machine
from ...specs.models import ModelSpec, weight_format
from ...specs.schedules.parallel import ExpertParallelSchedule
from ..parallel.job import BOTH, Step
from ..parallel.launch import RankRun, run_jobs
from ..parallel.network import Unavailable, two_nodes
from ..parallel.prepare import Prepared, prepare_job
from ..running.execute import Progress, silent
from .rank_stages import busy, reduced, stages

LINK_BYTES_PER_S = 20 * MEGA
"""Rate of the links between nodes where nothing else is asked for: slow beside a host's memory, as networks are beside links of cards."""
_SIZES = ((256, 256, 8), (512, 256, 4))
# Hidden and intermediate size and experts of each rank: of other numbers too, or what an expert costs is not told from its bytes.
_EXPERTS = 4
_LAYERS, _CONTEXT, _REPEATS = 2, 64, 8
# Keys and values of a longer context, several times what caches hold, for the smaller steps: those of large ones would fill the machine.
_LONG_CONTEXT, _LONG_SIZES = 2048, 2
_TOKENS = (16, 64, 192, 512)
_SKEW = 0.7
_FACTORS = np.geomspace(1.0, 8.0, 25)
_SEED = 20
Ran = tuple[Prepared, Sequence[RankRun]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankExtent:
    """Which ranks are measured."""

    ranks: int
    nodes: int = 1
    link_bytes_per_s: float = LINK_BYTES_PER_S
    repeats: int = _REPEATS
    tokens: tuple[int, ...] = _TOKENS
    """Of each rank in a step."""


def measure_ranks(
    extent: RankExtent, bits: Sequence[str], models: Sequence[ModelSpec] | None = None, progress: Progress = silent
) -> tuple[list[Sample], tuple[str, ...]]:
    """Return (samples of stages and facts, what a reader must know); raises ExecutionFailed where a rank fails.

    models: whose shapes are taken, in place of the standard ones.
    """
    made = []
    for model in _shapes(extent, models):
        schedules = _schedules(extent, bits)
        made += [
            _job(extent, model, each, () if number else _reductions(extent, model))
            for number, each in enumerate(schedules)
        ]
        few = dataclasses.replace(extent, tokens=extent.tokens[:_LONG_SIZES])
        made.append(_job(few, model, schedules[0], context=_LONG_CONTEXT))
    notes: tuple[str, ...] = ()
    jobs = [one.job for one in made]
    if extent.nodes == 2:
        try:
            with two_nodes(extent.link_bytes_per_s) as nodes:
                found = run_jobs(jobs, nodes, progress=progress)
        except Unavailable as reason:
            notes = (f"no network namespaces ({reason}): links between nodes are a limiter inside each rank",)
            found = run_jobs(
                [dataclasses.replace(job, inter_bytes_per_s=extent.link_bytes_per_s) for job in jobs], progress=progress
            )
    elif extent.nodes == 1:
        found = run_jobs(jobs, progress=progress)
    else:
        notes = ("links between nodes are a limiter inside each rank",)
        found = run_jobs(
            [dataclasses.replace(job, inter_bytes_per_s=extent.link_bytes_per_s) for job in jobs], progress=progress
        )
    samples = [
        sample
        for one, runs in zip(made, found, strict=True)
        if not one.job.schedule.overlaps
        for sample in (*stages(one, runs, extent.link_bytes_per_s), *busy(one, runs), *reduced(one, runs))
    ]
    facts = {CORES: float(_cores()), FIRST: float(all(run.exchanges_first for runs in found for run in runs))}
    if extent.nodes > 1:
        facts[LINK] = 1 / extent.link_bytes_per_s
    if not facts[FIRST]:
        notes += (
            "exchanges share a class of threads with kernels (the system permits no other): they wait for cores, and vary more",
        )
    known = [_fact(extent, what, (value,)) for what, value in facts.items()]
    ran = list(zip(made, found, strict=True))
    factor = _laws(extent, [*samples, *known], ran).together
    wrong = _left_out(extent, samples, known, ran)
    return [*samples, *known, _fact(extent, TOGETHER, (factor,)), _fact(extent, STEP, wrong)], notes


def _fact(extent: RankExtent, what: str, values: tuple[float, ...]) -> Sample:
    place = {"ranks": float(extent.ranks), "nodes": float(extent.nodes)}
    return Sample(kind="rank_fact", labels={"what": what}, arguments=place, seconds=values)


def _laws(extent: RankExtent, samples: Sequence[Sample], ran: Sequence[Ran]) -> RankLaws:
    """Return the laws of samples, with the factor of steps among `ran` that overlap."""
    alone = _fact(extent, TOGETHER, (1.0,))
    curves = fit_ranks(SampleSet(device={}, conditions={}, samples=(*samples, alone)), "a first fit")[0].curves
    laws = laws_of(curves, extent.ranks, extent.nodes)
    return dataclasses.replace(laws, together=_together(laws, [one for one in ran if one[0].job.schedule.overlaps]))


def _left_out(
    extent: RankExtent, samples: Sequence[Sample], known: Sequence[Sample], ran: Sequence[Ran]
) -> tuple[float, ...]:
    """Return how far off whole steps of a shape are (of one shape only: of a size) by laws that were fitted without it."""
    shapes = {prepared.job.model.name for prepared, _ in ran}
    keys = (
        [(name, None) for name in sorted(shapes)] if len(shapes) > 1 else [(None, tokens) for tokens in extent.tokens]
    )
    found = []
    for shape, tokens in keys:
        others = [
            each for each in samples
            if each.labels["shape"] != shape and each.arguments["tokens"] != (tokens or 0) * extent.ranks
        ]  # fmt: skip
        laws = _laws(extent, [*others, *known], [one for one in ran if one[0].job.model.name != shape])
        for prepared, runs in ran:
            for number, step in enumerate(prepared.job.steps):
                if shape in (None, prepared.job.model.name) and tokens in (None, len(step.source_rank) // extent.ranks):
                    found.append(abs(_predicted_s(laws, prepared, number) / _measured_s(runs, number) - 1))
    return tuple(found)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shapes(extent: RankExtent, models: Sequence[ModelSpec] | None) -> list[ModelSpec]:
    """Return the models that are run: a few layers, as many experts as all ranks hold evenly."""
    if models is None:
        sizes = [(hidden, inner, each, 2) for hidden, inner, each in _SIZES]
    else:
        most = _EXPERTS * extent.ranks
        sizes = [
            (model.hidden_size, model.expert_intermediate_size, _EXPERTS, min(model.top_k, most)) for model in models
        ]
    return [
        made_up_model(f"shape {hidden}x{inner}", hidden=max(256, hidden), intermediate=inner, num_layers=_LAYERS,
                      num_experts=each * extent.ranks, top_k=top_k, vocab=256)
        for hidden, inner, each, top_k in sizes
    ]  # fmt: skip


def _schedules(extent: RankExtent, bits: Sequence[str]) -> list[ExpertParallelSchedule]:
    """Return what is run of each shape: every way of exchanging, each format, two ways of overlapping."""
    plain = ExpertParallelSchedule(name="plain").with_options(kernel__bits=weight_format(bits[0]).name)
    found = [plain.with_options(kernel__bits=weight_format(each).name) for each in bits]
    found.append(plain.with_options(all_to_all__kind="all-choices"))
    if extent.nodes > 1:
        found.append(plain.with_options(all_to_all__kind="hierarchical", all_to_all__tiers="in-turn"))
    overlap = [
        plain.with_options(pipeline__micro_batches=2),
        plain.with_options(pipeline__split="expert", pipeline__num_groups=2),
    ]
    return [*found, *overlap]


def _reductions(extent: RankExtent, model: ModelSpec) -> list[tuple[int, int]]:
    """Return (tier, values) of the all-reduces that are measured: of a node's tokens, in each node and over all ranks."""
    sizes = [tokens * model.hidden_size * extent.ranks // extent.nodes for tokens in extent.tokens]
    return [(tier, size) for tier in ((BOTH, INTRA) if extent.nodes > 1 else (BOTH,)) for size in sizes]


def _job(
    extent: RankExtent,
    model: ModelSpec,
    schedule: ExpertParallelSchedule,
    reductions: Sequence[tuple[int, int]] = (),
    context: int = _CONTEXT,
) -> Prepared:
    """Return a job of steps of several sizes, with routing made up."""
    draw = np.random.default_rng(_SEED)
    placement = contiguous(model.num_moe_layers, model.num_experts, model.num_experts, extent.ranks, extent.nodes)
    router = StaticChoice(table=nearest_table(placement))
    chance = np.arange(1, model.num_experts + 1) ** -_SKEW
    steps = []
    for tokens in extent.tokens:
        count = tokens * extent.ranks
        keys = draw.random((count, model.num_moe_layers, model.num_experts)) ** (1 / draw.permutation(chance))
        experts = np.argsort(-keys, axis=2)[:, :, : model.top_k].astype(np.int32)
        source = (np.arange(count) % extent.ranks).astype(np.int32)
        slots = [router.slots(experts[:, layer], source, placement, layer, 0) for layer in range(model.num_moe_layers)]
        steps.append(Step(slots=np.stack(slots, axis=1).astype(np.int64), experts=experts.astype(np.int64),
                          source_rank=source.astype(np.int64)))  # fmt: skip
    # What anything costs is not known yet; without overlap the order of exchanges does not depend on it.
    link = Tier(bytes_per_s=extent.link_bytes_per_s, latency_s=1e-3, source="assumed", relative_uncertainty=1.0)
    simulation = ParallelSimulation(
        model, load_machine("t4"), extent.nodes, extent.ranks // extent.nodes, False, context, weight_format("32"),
        constants=EpConstants(inter=link if extent.nodes > 1 else None, intra=link),
    )  # fmt: skip
    prepared = prepare_job(
        simulation, schedule, Candidate(placement=placement, router=router), steps, repeats=extent.repeats
    )
    return dataclasses.replace(prepared, job=dataclasses.replace(prepared.job, reductions=reductions))


# --- overlap ----------------------------------------------------------------------------------------------------------------


def _measured_s(runs: Sequence[RankRun], number: int) -> float:
    """Return the seconds of a step, the median over runs."""
    spans = np.stack([run.spans[number] for run in runs])[:, 1:]  # [ranks, repeats, 2]
    return float(np.median(spans[..., 1].max(axis=0) - spans[..., 0].max(axis=0))) / NS_PER_S


def _together(laws: RankLaws, overlapped: Sequence[Ran]) -> float:
    """Return the factor `together` with which steps that overlap are predicted best, all counting alike."""
    cases = [
        (prepared, number, _measured_s(runs, number))
        for prepared, runs in overlapped
        for number in range(len(prepared.job.steps))
    ]
    off = []
    for factor in _FACTORS.tolist():
        with_it = dataclasses.replace(laws, together=factor)
        ratios = [np.log(_predicted_s(with_it, prepared, number) / seconds) for prepared, number, seconds in cases]
        off.append(float(np.mean(np.abs(ratios))))
    return float(_FACTORS[int(np.argmin(off))])


def _predicted_s(laws: RankLaws, prepared: Prepared, number: int) -> float:
    """Return the predicted seconds of one step."""
    job = prepared.job
    link = Tier(bytes_per_s=1.0, latency_s=0.0, source="assumed", relative_uncertainty=1.0)
    simulation = ParallelSimulation(
        job.model, load_machine("t4"), job.topology.num_nodes, job.topology.ranks_per_node, False, job.context_tokens,
        weight_format("32"), constants=EpConstants(inter=link, intra=link),
    )  # fmt: skip
    tables = tabulate_on_ranks(laws, simulation.costing, job.schedule, prepared.program, prepared.loads[number])
    return run_ep_compiled(prepared.program, tables).makespan_ns / NS_PER_S
