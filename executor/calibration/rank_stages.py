"""Steps of ranks cut into stages: what each took, and what it had to do.

Modelled: a stage lasts from when the last rank was done with the stage before until the last one is done with it, so that the stages of a
step add up to it; what all ranks keep cores for during an exchange, and all-reduces, stand beside them. Ignored: which runs are made
(`rank_runs`), and what laws come of them (`calibrate.fitting.rank_fit`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ...base.units import NS_PER_S
from ...calibrate.costs.rank_laws import (
    BUSY,
    COMBINE,
    DENSE,
    DISPATCH,
    EXPERT,
    HEAD,
    HEADER_BYTES_PER_CHOICE,
    REDUCE,
    Array,
    dense_features,
    exchange_law,
    expert_features,
    head_features,
    still_to_pass,
)
from ...calibrate.samples import Sample
from ...sim.parallel.program import INTER, INTRA, OP_COMBINE, OP_DENSE, OP_DISPATCH, OP_EXPERT, OP_HEAD
from ...sim.parallel.timeline import EP_END, EP_GROUP, EP_LANE, EP_LAYER, EP_MICRO, EP_OP, EP_START, LANE_COMPUTE
from ...specs.models import weight_format
from ..parallel.exchange import reduced_bytes
from ..parallel.job import BOTH
from ..parallel.launch import RankRun
from ..parallel.prepare import Prepared


def stages(prepared: Prepared, runs: Sequence[RankRun], link_bytes_per_s: float) -> Iterator[Sample]:
    """Yield the stages of every step without overlap; link_bytes_per_s: between nodes."""
    job = prepared.job
    place = {"ranks": float(job.topology.num_ranks), "nodes": float(job.topology.num_nodes)}
    for number, step in enumerate(job.steps):
        found: dict[tuple[str, str], list[float]] = {}
        before = _begun_before(prepared, runs, number)
        for repeat in range(1, job.repeats + 1):
            for what, features, seconds in cut(prepared, runs, number, repeat, before, link_bytes_per_s):
                found.setdefault((what, features), []).append(seconds)
        for (what, features), seconds_of in found.items():
            yield Sample(
                kind="rank_stage", labels={"what": what, "shape": job.model.name, "features": features},
                arguments=place | {"tokens": float(len(step.source_rank))}, seconds=tuple(seconds_of),
            )  # fmt: skip


def reduced(prepared: Prepared, runs: Sequence[RankRun]) -> Iterator[Sample]:
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


def busy(prepared: Prepared, runs: Sequence[RankRun]) -> Iterator[Sample]:
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


def _begun_before(prepared: Prepared, runs: Sequence[RankRun], number: int) -> dict[int, Array]:
    """Return, for the way back of each layer, how many seconds before the last rank each one began: [ranks], the median over runs."""
    found: dict[int, list[list[float]]] = {}
    for repeat in range(1, prepared.job.repeats + 1):
        begins: dict[int, dict[int, int]] = {}
        for rank, run in enumerate(runs):
            rows = run.rows[number][repeat]
            for row in rows[(rows[:, EP_OP] == OP_COMBINE) & (rows[:, EP_LANE] != LANE_COMPUTE)].tolist():
                mine = begins.setdefault(row[EP_LAYER], {})
                mine[rank] = min(mine.get(rank, row[EP_START]), row[EP_START])
        for layer, of_rank in begins.items():
            last = max(of_rank.values())
            found.setdefault(layer, []).append(
                [(last - of_rank.get(rank, last)) / NS_PER_S for rank in range(len(runs))]
            )
    return {layer: np.median(before, axis=0) for layer, before in found.items()}


def cut(
    prepared: Prepared,
    runs: Sequence[RankRun],
    number: int,
    repeat: int,
    before_s: Mapping[int, Array],
    link_bytes_per_s: float,
) -> Iterator[tuple[str, str, float]]:
    """Yield (stage, features of its ranks, seconds) of one run of a step, in order.

    before_s: of each layer [ranks], how long before the last rank each one began to send sums back.
    """
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
            features = _exchange(prepared, number, layer, tier, back=back)
            if back and tier == BOTH and layer in before_s and features[0][1]:
                left = _left(prepared, number, layer, before_s[layer], link_bytes_per_s)
                features = [[one, left, *others] for one, _, *others in features]
            yield exchange_law(COMBINE if back else DISPATCH, tier), _text(features), seconds


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


def _left(prepared: Prepared, number: int, layer: int, before_s: Array, link_bytes_per_s: float) -> float:
    """Return the bytes that the link between nodes still has to pass when the last rank begins to send sums back."""
    job, load = prepared.job, prepared.loads[number]
    each = job.schedule.all_to_all.combine_bytes_per_value * job.model.expert_hidden
    came, sent = (part[layer][:, INTER].sum(axis=0) * float(each) for part in (load.sent, load.received))
    return float(still_to_pass(sent, came, before_s, link_bytes_per_s, job.topology.ranks_per_node))


def _exchange(prepared: Prepared, number: int, layer: int, tier: int, *, back: bool) -> list[list[float]]:
    """Return the terms of an exchange that all ranks begin at once, [ranks, 4]."""
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
