"""All-reduces that took no part in the calibration, beside what its laws say of them.

Modelled: sizes between and beyond the calibrated ones, over all ranks and in each node at once; a time is the median over runs, from when
the last rank began. Ignored: kernels beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from moeplan.base.units import MS_PER_S, NS_PER_S
from moeplan.calibrate.costs.rank_laws import REDUCE, RankLaws, exchange_law
from moeplan.executor.parallel.exchange import reduced_bytes
from moeplan.executor.parallel.job import BOTH, Step
from moeplan.executor.parallel.launch import run_jobs
from moeplan.executor.parallel.network import Nodes
from moeplan.executor.parallel.prepare import prepare_job
from moeplan.executor.running.execute import Progress, silent
from moeplan.planner.placement.comparison import Candidate
from moeplan.planner.placement.placement import contiguous
from moeplan.planner.placement.replica_choice import StaticChoice, nearest_table
from moeplan.sim.parallel.program import INTRA
from moeplan.sim.parallel.simulate import ParallelSimulation
from moeplan.specs.schedules.parallel import load_ep_preset

SIZES = (4_000, 30_000, 90_000, 200_000, 700_000)
"""Values of each rank."""


def run(
    simulation: ParallelSimulation,
    laws: RankLaws,
    nodes: Nodes | None,
    limit: float,
    repeats: int,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Return every size, as plain values."""
    model, ranks = simulation.model, laws.num_ranks
    placement = contiguous(model.num_moe_layers, model.num_experts, model.num_experts, ranks, laws.num_nodes)
    router = StaticChoice(table=nearest_table(placement))
    experts = np.tile(np.arange(model.top_k, dtype=np.int32), (ranks, model.num_moe_layers, 1))
    source = np.arange(ranks).astype(np.int32)
    layers = range(model.num_moe_layers)
    slots = np.stack([router.slots(experts[:, layer], source, placement, layer, 0) for layer in layers], axis=1)
    step = Step(slots=slots.astype(np.int64), experts=experts.astype(np.int64), source_rank=source.astype(np.int64))
    made = prepare_job(simulation, load_ep_preset("ep").with_options(kernel__bits="32"), Candidate(placement=placement, router=router),
                       [step], repeats=4 * repeats, inter_bytes_per_s=limit)  # fmt: skip
    asked = [(tier, size) for tier in ((BOTH, INTRA) if laws.num_nodes > 1 else (BOTH,)) for size in SIZES]
    runs = run_jobs([dataclasses.replace(made.job, reductions=asked)], nodes, progress=progress)[0]
    found = []
    for at, (tier, size) in enumerate(asked):
        spans = np.stack([each.reduced[at] for each in runs])[:, 1:]
        taken = (spans[..., 1].max(axis=0) - spans[..., 0].max(axis=0)) / NS_PER_S
        measured, predicted = float(np.median(taken)), predicted_s(laws, tier, size)
        halves = [float(np.median(taken[part::2])) for part in (0, 1)]
        found.append({
            "ranks": "each node's" if tier == INTRA else "all", "values": size, "predicted_s": predicted, "measured_s": measured,
            "error": predicted / measured - 1, "noise": abs(halves[0] - halves[1]) / measured,
        })  # fmt: skip
    return found


def predicted_s(laws: RankLaws, tier: int, size: int) -> float:
    """Return what the law of an all-reduce says of `size` values of each rank."""
    partners = laws.num_ranks if tier == BOTH else laws.num_ranks // laws.num_nodes
    moved, nothing = np.array([float(reduced_bytes(size, partners))]), np.zeros(1)
    across = tier == BOTH and laws.num_nodes > 1
    inter, intra = (moved, nothing) if across else (nothing, moved)
    return float(max(each[0] for each in laws.exchange_s(exchange_law(REDUCE, tier), inter, intra, nothing)))


def print_reductions(found: Sequence[dict[str, Any]]) -> None:
    """Print both times of every size."""
    print(
        "all-reduces of sizes that were not calibrated: ranks, values; predicted, measured milliseconds; error, noise"
    )
    for one in found:
        print(f"  {one['ranks']:12} {one['values']:8,} {one['predicted_s'] * MS_PER_S:8.2f} {one['measured_s'] * MS_PER_S:8.2f} "
              f"{one['error']:+7.1%} {one['noise']:6.1%}")  # fmt: skip
    print(f"  error, median: {np.median([abs(one['error']) for one in found]):.1%}")
