"""Small expert-parallel jobs, prepared as a plan's would be, for tests that really run them."""

from __future__ import annotations

import numpy as np

from executor_stages import small_model
from moeplan.executor.parallel.job import Step
from moeplan.executor.parallel.prepare import Prepared, prepare_job
from moeplan.planner.placement.comparison import Candidate
from moeplan.planner.placement.placement import contiguous
from moeplan.planner.placement.replica_choice import ReplicaChoice, StaticChoice, WeightedChoice, nearest_table
from moeplan.sim.parallel.simulate import ParallelSimulation
from moeplan.specs.machines.load import load_machine
from moeplan.specs.schedules.parallel import ExpertParallelSchedule, load_ep_preset

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def preset32(name: str, **changes: object) -> ExpertParallelSchedule:
    """Return a preset whose experts and tokens have 32 bits, so that nothing is rounded on the way."""
    exact = {
        "all_to_all__dispatch_bytes_per_value": 4.0,
        "all_to_all__combine_bytes_per_value": 4.0,
        "kernel__bits": "32",
    }
    return load_ep_preset(name).with_options(**(exact | changes))


TWO_RANKS = {
    "plain": preset32("ep"),
    "every choice": preset32("ep", all_to_all__kind="all-choices"),
    "groups of experts": preset32("eps-moe", pipeline__num_groups=2),
    "chunks of tokens": preset32("ep", pipeline__split="token", pipeline__num_groups=2),
    "two batches": preset32("tbo"),
    "batches and groups": preset32("tbo", pipeline__split="expert", pipeline__num_groups=2),
    "shortcut": preset32("scmoe"),
    "copies": preset32("eplb", placement__num_redundant=4, replica__choice="even"),
    "16 bits on the way": preset32(
        "ep", all_to_all__dispatch_bytes_per_value=2.0, all_to_all__combine_bytes_per_value=2.0
    ),
}
FOUR_RANKS = {
    "hierarchical": preset32("ep", all_to_all__kind="hierarchical"),
    "stages in turn": preset32("tutel"),
    "stages free": preset32("fsmoe"),
    "copies by node": preset32("eplb-hierarchical", placement__num_redundant=4),
}


def prepared(
    schedule: ExpertParallelSchedule, *, ranks: int = 2, nodes: int = 1, tokens: int = 12, steps: int = 1, seed: int = 0
) -> Prepared:
    """Return a job of random routing over contiguous experts, with its prediction."""
    draw = np.random.default_rng(seed)
    placement = contiguous(LAYERS, EXPERTS, EXPERTS + schedule.placement.num_redundant, ranks, nodes)
    router: ReplicaChoice = (
        WeightedChoice(seed=0) if schedule.replica.choice == "even" else StaticChoice(table=nearest_table(placement))
    )
    made = []
    for number in range(steps):
        experts = np.argsort(draw.random((tokens, LAYERS, EXPERTS)), axis=2)[:, :, :TOP_K].astype(np.int32)
        source = (np.arange(tokens) % ranks).astype(np.int32)
        slots = [router.slots(experts[:, layer], source, placement, layer, number) for layer in range(LAYERS)]
        made.append(Step(slots=np.stack(slots, axis=1).astype(np.int64), experts=experts.astype(np.int64),
                         source_rank=source.astype(np.int64)))  # fmt: skip
    simulation = ParallelSimulation(small_model(), load_machine("h100-sxm"), nodes, ranks // nodes, False, 16)
    return prepare_job(simulation, schedule, Candidate(placement=placement, router=router), made)
