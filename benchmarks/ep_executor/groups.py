"""How many groups of experts: EPS-MoE's rule and the simulator's answer beside what is fastest.

    gain = C (1 - 1/N) - (k N + b), C: the shorter of exchanging and computing;  so N* = sqrt(C / k)

Modelled: layers of several sizes on the ranks that were calibrated, each run with every N that divides a rank's experts; k is what one more
group adds by the laws: an exchange's two starts and a launch; the rule takes the N among them whose gain is largest, 1 where none is above
zero (arXiv 2410.12247). Ignored: k and b fitted to the runs that they are then held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeplan.base.units import MS_PER_S, NS_PER_S
from moeplan.calibrate.costs.rank_laws import COMBINE, DISPATCH, EXPERT, RankLaws
from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.executor.parallel.job import Step
from moeplan.executor.parallel.launch import run_jobs
from moeplan.executor.parallel.network import Nodes
from moeplan.executor.parallel.prepare import Prepared, prepare_job
from moeplan.executor.running.execute import Progress, silent
from moeplan.executor.validation.rank_results import step_times
from moeplan.planner.placement.comparison import Candidate
from moeplan.planner.placement.placement import contiguous
from moeplan.planner.placement.replica_choice import StaticChoice, nearest_table
from moeplan.sim.parallel.program import OP_EXPERT
from moeplan.sim.parallel.simulate import ParallelSimulation
from moeplan.specs.machines.profile import Profile
from moeplan.specs.models import weight_format
from moeplan.specs.schedules.parallel import load_ep_preset

GROUPS = (1, 2, 4, 8)
SIZES = (
    (256, 192, 32),
    (256, 192, 128),
    (256, 192, 512),
    (256, 1024, 128),
    (256, 1024, 512),
    (512, 256, 128),
    (512, 256, 512),
)
"""Hidden and intermediate size, and tokens of each rank."""
_LAYERS, _CONTEXT, _TOP_K = 2, 16, 2


def jobs(
    profile: Profile, ranks: int, nodes: int, repeats: int, limit: float
) -> list[tuple[tuple[int, int, int], int, Prepared]]:
    """Return (size, groups, job) of everything that is run."""
    found = []
    for size in SIZES:
        hidden, inner, tokens = size
        model = made_up_model(f"{hidden}x{inner}", hidden=hidden, intermediate=inner, num_layers=_LAYERS,
                              num_experts=max(GROUPS) * ranks, top_k=_TOP_K, vocab=256)  # fmt: skip
        placement = contiguous(_LAYERS, model.num_experts, model.num_experts, ranks, nodes)
        router = StaticChoice(table=nearest_table(placement))
        draw = np.random.default_rng(0)
        experts = np.argsort(draw.random((tokens * ranks, _LAYERS, model.num_experts)), axis=2)[:, :, :_TOP_K].astype(
            np.int32
        )
        source = (np.arange(tokens * ranks) % ranks).astype(np.int32)
        slots = np.stack(
            [router.slots(experts[:, layer], source, placement, layer, 0) for layer in range(_LAYERS)], axis=1
        )
        step = Step(slots=slots.astype(np.int64), experts=experts.astype(np.int64), source_rank=source.astype(np.int64))
        simulation = ParallelSimulation(model, profile, nodes, ranks // nodes, False, _CONTEXT, weight_format("32"))
        for count in GROUPS:
            schedule = load_ep_preset("ep").with_options(kernel__bits="32")
            if count > 1:
                schedule = schedule.with_options(pipeline__split="expert", pipeline__num_groups=count)
            found.append((size, count, prepare_job(simulation, schedule, Candidate(placement=placement, router=router), [step],
                                                   repeats=repeats, inter_bytes_per_s=limit)))  # fmt: skip
    return found


def rule(laws: RankLaws, whole: Prepared) -> int:
    """Return the N that EPS-MoE's rule picks for the layers of a job that is not split."""
    tables = whole.tables[0]
    exchange_s = float(tables.ex_ns.max(axis=(1, 2)).sum()) / _LAYERS / NS_PER_S
    compute_s = float(tables.work_ns[whole.program.op_kind == OP_EXPERT].max(axis=1).sum()) / _LAYERS / NS_PER_S
    more_s = float(laws.seconds[DISPATCH][0] + laws.seconds[COMBINE][0] + laws.seconds[f"{EXPERT}.32"][0])
    hidden_s = min(exchange_s, compute_s)
    gain = {count: hidden_s * (1 - 1 / count) - more_s * (count - 1) for count in GROUPS}
    return max(gain, key=lambda count: (gain[count], -count))


def run(
    profile: Profile, laws: RankLaws, nodes: Nodes | None, limit: float, repeats: int, progress: Progress = silent
) -> dict[str, Any]:
    """Return for every size what is measured with each N, and what the rule and the simulator pick."""
    made = jobs(profile, laws.num_ranks, laws.num_nodes, repeats, limit)
    runs = run_jobs([one.job for _, _, one in made], nodes, progress=progress)
    cases = []
    for size in SIZES:
        mine = [(count, one, ran) for (at, count, one), ran in zip(made, runs, strict=True) if at == size]
        measured = {str(count): float(np.median(step_times(ran)[1:, 0])) / NS_PER_S for count, _, ran in mine}
        predicted = {str(count): one.outcomes[0].makespan_ns / NS_PER_S for count, one, _ in mine}
        cases.append({
            "hidden": size[0], "inner": size[1], "tokens_per_rank": size[2], "measured_s": measured, "predicted_s": predicted,
            "best": _best(measured), "rule": rule(laws, mine[0][1]), "simulated": _best(predicted),
        })  # fmt: skip
    return {
        "cases": cases,
        "rule_within_a_step": _within(cases, "rule"),
        "simulated_within_a_step": _within(cases, "simulated"),
    }


def _best(seconds: dict[str, float]) -> int:
    return int(min(seconds, key=lambda count: seconds[count]))


def _within(cases: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([abs(GROUPS.index(one[name]) - GROUPS.index(one["best"])) <= 1 for one in cases]))


def print_groups(found: dict[str, Any]) -> None:
    """Print what each size is fastest with, and what was picked."""
    print("groups of experts: hidden x inner, tokens of a rank: milliseconds by N; fastest, EPS-MoE's rule, simulated")
    for one in found["cases"]:
        times = "  ".join(f"{count}: {one['measured_s'][str(count)] * MS_PER_S:7.2f}" for count in GROUPS)
        print(
            f"  {one['hidden']}x{one['inner']}, {one['tokens_per_rank']:4}   {times}   {one['best']} {one['rule']} {one['simulated']}"
        )
    rule_right, simulated_right = found["rule_within_a_step"], found["simulated_within_a_step"]
    print(f"  within one step of the fastest: the rule {rule_right:.0%}, the simulator {simulated_right:.0%}")
