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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...base.units import MEGA, NS_PER_S
from ...calibrate.costs.rank_laws import (
    BUSY,
    COMBINE,
    CORES,
    DENSE,
    DISPATCH,
    EXPERT,
    HEAD,
    HEADER_BYTES_PER_CHOICE,
    LINK,
    REDUCE,
    TOGETHER,
    RankLaws,
    dense_features,
    exchange_law,
    expert_features,
    head_features,
    laws_of,
)
from ...calibrate.fitting.rank_fit import fit_ranks
from ...calibrate.microbenchmarks.standard_shapes import made_up_model
from ...calibrate.samples import Sample, SampleSet
from ...planner.placement.comparison import Candidate
from ...planner.placement.placement import contiguous
from ...planner.placement.replica_choice import StaticChoice, nearest_table
from ...sim.parallel.program import INTER, INTRA, OP_COMBINE, OP_DENSE, OP_DISPATCH, OP_EXPERT, OP_HEAD
from ...sim.parallel.rank_costs import tabulate_on_ranks
from ...sim.parallel.simulate import ParallelSimulation
from ...sim.parallel.simulators import run_ep_compiled
from ...sim.parallel.tiers import EpConstants, Tier
from ...sim.parallel.timeline import EP_END, EP_GROUP, EP_LANE, EP_LAYER, EP_MICRO, EP_OP, LANE_COMPUTE
from ...specs.machines.load import load_machine
from ...specs.models import ModelSpec, weight_format
from ...specs.schedules.parallel import ExpertParallelSchedule
from ..parallel.exchange import reduced_bytes
from ..parallel.job import BOTH, Step
from ..parallel.launch import RankRun, run_jobs
from ..parallel.network import Unavailable, two_nodes
from ..parallel.prepare import Prepared, prepare_job
from ..running.execute import Progress, silent

LINK_BYTES_PER_S = 20 * MEGA
"""Rate of the links between nodes where nothing else is asked for: slow beside a host's memory, as networks are beside links of cards."""
_SIZES = ((256, 256), (512, 256))
_LAYERS, _CONTEXT, _REPEATS = 2, 64, 8
# Keys and values of a longer context, beyond what caches hold, for the smaller steps: those of large ones would fill the machine.
_LONG_CONTEXT, _LONG_SIZES = 512, 2
_TOKENS = (16, 64, 192, 512)
_SKEW = 0.7
_FACTORS = np.geomspace(1.0, 8.0, 49)
_SEED = 20


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
        for sample in (*_stages(one, runs), *_busy(one, runs), *_reduced(one, runs))
    ]
    facts = {CORES: float(_cores())} | ({LINK: 1 / extent.link_bytes_per_s} if extent.nodes > 1 else {})
    place = {"ranks": float(extent.ranks), "nodes": float(extent.nodes)}
    known = [
        Sample(kind="rank_fact", labels={"what": what}, arguments=place, seconds=(value,))
        for what, value in facts.items()
    ]
    alone = Sample(kind="rank_fact", labels={"what": TOGETHER}, arguments=place, seconds=(1.0,))
    curves = fit_ranks(SampleSet(device={}, conditions={}, samples=(*samples, *known, alone)), "a first fit")[0].curves
    laws = laws_of(curves, extent.ranks, extent.nodes)
    factor = _together(laws, [(one, runs) for one, runs in zip(made, found, strict=True) if one.job.schedule.overlaps])
    return [*samples, *known, dataclasses.replace(alone, seconds=(factor,))], notes


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shapes(extent: RankExtent, models: Sequence[ModelSpec] | None) -> list[ModelSpec]:
    """Return the models that are run: a few layers, as many experts as all ranks hold evenly."""
    experts = 4 * extent.ranks
    if models is None:
        sizes = [(hidden, inner, 2) for hidden, inner in _SIZES]
    else:
        sizes = [(model.hidden_size, model.expert_intermediate_size, min(model.top_k, experts)) for model in models]
    return [
        made_up_model(f"shape {hidden}x{inner}", hidden=max(256, hidden), intermediate=inner, num_layers=_LAYERS,
                      num_experts=experts, top_k=top_k, vocab=256)
        for hidden, inner, top_k in sizes
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


# --- stages ---------------------------------------------------------------------------------------------------------------


def _stages(prepared: Prepared, runs: Sequence[RankRun]) -> Iterator[Sample]:
    """Yield the stages of every step without overlap."""
    job = prepared.job
    place = {"ranks": float(job.topology.num_ranks), "nodes": float(job.topology.num_nodes)}
    for number, step in enumerate(job.steps):
        found: dict[tuple[str, str], list[float]] = {}
        for repeat in range(1, job.repeats + 1):
            for what, features, seconds in _cut(prepared, runs, number, repeat):
                found.setdefault((what, features), []).append(seconds)
        for (what, features), seconds_of in found.items():
            yield Sample(
                kind="rank_stage", labels={"what": what, "shape": job.model.name, "features": features},
                arguments=place | {"tokens": float(len(step.source_rank))}, seconds=tuple(seconds_of),
            )  # fmt: skip


def _reduced(prepared: Prepared, runs: Sequence[RankRun]) -> Iterator[Sample]:
    """Yield the all-reduces of a job, from when the last rank began one until the last one was done."""
    job = prepared.job
    num_ranks, num_nodes = job.topology.num_ranks, job.topology.num_nodes
    for at, (tier, size) in enumerate(job.reductions):
        spans = np.stack([run.reduced[at] for run in runs])[:, 1:]  # [ranks, repeats, 2]
        taken = spans[..., 1].max(axis=0) - spans[..., 0].max(axis=0)
        moved = float(reduced_bytes(size, num_ranks if tier == BOTH else job.topology.ranks_per_node))
        # A ring of all ranks leaves each node once, and its slowest port is that.
        row = [1.0, moved, 0.0, 0.0] if tier == BOTH and num_nodes > 1 else [1.0, 0.0, moved, 0.0]
        yield Sample(
            kind="rank_stage",
            labels={"what": exchange_law(REDUCE, tier), "shape": job.model.name, "features": _text([row] * num_ranks)},
            arguments={"ranks": float(num_ranks), "nodes": float(num_nodes), "tokens": size / job.model.hidden_size},
            seconds=tuple(np.maximum(taken, 1) / NS_PER_S),
        )


def _busy(prepared: Prepared, runs: Sequence[RankRun]) -> Iterator[Sample]:
    """Yield for how long all ranks together kept cores in the stages of every exchange of a step without overlap."""
    job, program = prepared.job, prepared.program
    ranks = job.topology.num_ranks
    place = {"ranks": float(ranks), "nodes": float(job.topology.num_nodes)}
    for number, step in enumerate(job.steps):
        found: dict[tuple[str, str], list[float]] = {}
        kept = np.sum([np.stack(run.busy[number][1:]) for run in runs], axis=0)  # [repeats, exchanges, stages]
        for ex, stage, tier in np.asarray(job.orders[number]).tolist():
            back = program.ex_kind[ex] == OP_COMBINE
            total = _exchange(prepared, number, int(program.ex_layer[ex]), tier, back=back)[0][-1]
            what = f"{BUSY}.{exchange_law(COMBINE if back else DISPATCH, tier)}"
            key = (what, _text([[1 / ranks, total / ranks]] * ranks))
            found.setdefault(key, []).extend(np.maximum(kept[:, ex, stage], 1) / NS_PER_S)
        for (what, features), seconds in found.items():
            yield Sample(
                kind="rank_stage", labels={"what": what, "shape": job.model.name, "features": features},
                arguments=place | {"tokens": float(len(step.source_rank))}, seconds=tuple(float(each) for each in seconds),
            )  # fmt: skip


def _cut(prepared: Prepared, runs: Sequence[RankRun], number: int, repeat: int) -> Iterator[tuple[str, str, float]]:
    """Yield (stage, features of its ranks, seconds) of one run of a step, in order."""
    job = prepared.job
    rows = np.concatenate([run.rows[number][repeat] for run in runs])
    before = max(int(run.spans[number][repeat][0]) for run in runs)
    stages: dict[tuple[int, ...], int] = {}
    for row in rows.tolist():
        both = row[EP_LANE] != LANE_COMPUTE and job.schedule.all_to_all.kind != "hierarchical"
        tier = BOTH if both or row[EP_LANE] == LANE_COMPUTE else row[EP_LANE] - 1
        key = (row[EP_OP], row[EP_LAYER], row[EP_MICRO], row[EP_GROUP], tier)
        stages[key] = max(stages.get(key, 0), row[EP_END])
    for stage, end in sorted(stages.items(), key=lambda item: item[1]):
        kind, layer, _, _, tier = stage
        seconds = max(1, end - before) / NS_PER_S
        before = end
        if kind == OP_EXPERT:
            yield f"{EXPERT}.{job.schedule.kernel.bits}", _text(_expert(prepared, number, layer)), seconds
        elif kind == OP_DENSE:
            yield DENSE, _text(_dense(prepared, number, layer)), seconds
        elif kind == OP_HEAD:
            tokens = np.bincount(job.steps[number].source_rank, minlength=job.topology.num_ranks)
            yield HEAD, _text([head_features(job.model, count) for count in tokens.tolist()]), seconds
        elif kind in (OP_DISPATCH, OP_COMBINE):
            back = kind == OP_COMBINE
            yield (
                exchange_law(COMBINE if back else DISPATCH, tier),
                _text(_exchange(prepared, number, layer, tier, back=back)),
                seconds,
            )


def _dense(prepared: Prepared, number: int, layer: int) -> list[list[float]]:
    job = prepared.job
    tokens = np.bincount(job.steps[number].source_rank, minlength=job.topology.num_ranks)
    return [
        dense_features(job.model, [job.model.moe_layers[layer]], count, job.context_tokens) for count in tokens.tolist()
    ]


def _expert(prepared: Prepared, number: int, layer: int) -> list[list[float]]:
    job, load = prepared.job, prepared.loads[number]
    rows = load.slot_rows[layer].sum(axis=0).reshape(job.topology.num_ranks, -1).astype(np.float64)
    found: list[list[float]] = expert_features(
        job.model, weight_format(job.schedule.kernel.bits), rows.sum(axis=1), (rows > 0).sum(axis=1).astype(np.float64)
    ).tolist()
    return found


def _exchange(prepared: Prepared, number: int, layer: int, tier: int, *, back: bool) -> list[list[float]]:
    job, load = prepared.job, prepared.loads[number]
    exchange, topology = job.schedule.all_to_all, job.topology
    forth, receive = (
        each[layer].sum(axis=0).astype(np.float64) for each in (load.sent, load.received)
    )  # [tiers, ranks]
    each = (exchange.combine_bytes_per_value if back else exchange.dispatch_bytes_per_value) * job.model.expert_hidden
    each += 0 if back else HEADER_BYTES_PER_CHOICE * job.model.top_k
    sent, came = (receive, forth) if back else (forth, receive)
    node = np.maximum(*(part[INTER].reshape(topology.num_nodes, -1).sum(axis=1) for part in (sent, came)))
    inter = np.repeat(node, topology.ranks_per_node) * each * (tier != INTRA)
    intra = np.maximum(sent[INTRA], came[INTRA]) * each * (tier != INTER)
    tiers = [INTER, INTRA] if tier == BOTH else [tier]
    total = np.full(topology.num_ranks, float(sent[tiers].sum() * each))
    return np.stack([np.ones_like(total), inter, intra, total], axis=1).tolist()  # type: ignore[no-any-return]


def _text(features: Sequence[Sequence[float]]) -> str:
    return ";".join(",".join(f"{value:.9g}" for value in row) for row in features)


# --- overlap ----------------------------------------------------------------------------------------------------------------


def _together(laws: RankLaws, overlapped: Sequence[tuple[Prepared, Sequence[RankRun]]]) -> float:
    """Return the factor `together` with which steps that overlap are predicted best, all counting alike."""
    cases: list[tuple[Prepared, int, float]] = []
    for prepared, runs in overlapped:
        for number in range(len(prepared.job.steps)):
            spans = np.stack([run.spans[number] for run in runs])  # [ranks, repeats + 1, 2]
            times = (spans[:, 1:, 1].max(axis=0) - spans[:, 1:, 0].max(axis=0)) / NS_PER_S
            cases.append((prepared, number, float(np.median(times))))
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
