"""The objective of our placement search is the simulator's own layer, and what it finds is never worse than a heuristic."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moeplan.base.units import NS_PER_S
from moeplan.planner.parallel.candidates import STARTS
from moeplan.planner.parallel.case import ParallelRequest, evidence_of, plain_schedule, prepare_ep
from moeplan.planner.parallel.evidence import CHOOSE, PLAN, REPORT
from moeplan.planner.parallel.objective import kernel_ns
from moeplan.planner.parallel.search import EpSearch
from moeplan.planner.placement.comparison import Candidate, evaluate
from moeplan.planner.placement.replica_choice import CappedChoice
from moeplan.sim.parallel.program import OP_DENSE, OP_HEAD
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import ExpertParallelSchedule, load_ep_preset
from strategies import make_trace

MODEL = dataclasses.replace(load_model("deepseek-v2-lite"), num_layers=3, moe_layers=(1, 2), num_experts=16, top_k=3)
REQUEST = ParallelRequest(
    num_nodes=2,
    ranks_per_node=2,
    num_redundant=4,
    context_tokens=40,
    tokens_per_rank=128,
    search_moves=4000,
    bits=None,
)


def search_over(prefill: bool = True, shared: bool = True, tokens_per_rank: int = 128) -> EpSearch:
    model = MODEL if shared else dataclasses.replace(MODEL, num_shared_experts=0, shared_intermediate_size=0)
    trace = make_trace(
        np.random.default_rng(1), num_layers=2, num_experts=16, top_k=3, requests=[(60, 0)] * 40, skew=0.15
    )
    request = dataclasses.replace(REQUEST, prefill=prefill, tokens_per_rank=tokens_per_rank)
    evidence = evidence_of(model, dataclasses.replace(trace, layer_ids=(1, 2)), request)
    return prepare_ep(model, load_hardware("h800-sxm"), evidence, request, plain_schedule("16"))


def dense_s(search: EpSearch, schedule: ExpertParallelSchedule, part: str) -> float:
    """Return the seconds of a step in which nothing depends on placement: dense parts and the head."""
    load = search.evidence.loads(part, search.placements.candidate(schedule), schedule)[0]
    program, tables = search.simulation.program(schedule), search.simulation.tables(schedule, load)
    fixed = np.isin(program.op_kind, (OP_DENSE, OP_HEAD))
    return float(tables.work_ns[fixed].max(axis=1).sum()) / NS_PER_S


@pytest.mark.parametrize("kind", ["per-rank", "hierarchical", "all-choices"])
@pytest.mark.parametrize("policy", ["contiguous", "eplb", "occult", "search"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens_per_rank", [64, 1000])
def test_objective_is_the_simulated_step_to_the_nanosecond_of_each_operation(
    kind: str, policy: str, shared: bool, tokens_per_rank: int
) -> None:
    search = search_over(shared=shared, tokens_per_rank=tokens_per_rank)
    schedule = plain_schedule("16").with_options(
        placement__policy=policy, placement__num_redundant=4, replica__choice="capped", all_to_all__kind=kind
    )
    simulated = search.predict(schedule, REPORT)
    steps = search.evidence.parts[REPORT]
    layers = evaluate(search.placements.candidate(schedule), steps, search.placements.layer_costs[kind]).layer_s
    # Rounded: each of a rank's five kernels, a launch, two exchanges of two tiers, shared experts; two layers.
    rounding_s = 2 * (5 + 1 + 2 + 1) / NS_PER_S
    assert layers.sum() + dense_s(search, schedule, REPORT) == pytest.approx(simulated.step_s, abs=rounding_s)


def test_kernels_between_looked_up_row_counts_are_as_the_cost_model_says() -> None:
    search = search_over()
    costing, schedule = search.simulation.costing, plain_schedule("16")
    table = kernel_ns(costing, schedule, 20_000)
    at = np.array([1, 2, 100, 511, 700, 1234, 9999, 20_000])
    exact = costing.item_s(at, weight_format("16"), rate=costing.constants.grouped_rate) * NS_PER_S
    assert len(table) == 20_001 and table[0] == 0
    assert table[at] == pytest.approx(exact, rel=1e-3, abs=1)
    assert (np.diff(table) >= 0).all()


@pytest.mark.parametrize("prefill", [True, False])
def test_every_layer_of_ours_beats_every_heuristic_where_it_is_chosen(prefill: bool) -> None:
    search = search_over(prefill)
    for kind in ("per-rank", "hierarchical"):
        ours, costs = search.placements.searched(4, kind, planned=False), search.placements.layer_costs[kind]
        steps, router = search.evidence.parts[CHOOSE], CappedChoice()
        mine = evaluate(Candidate(placement=ours.placement, router=router), steps, costs).layer_s
        for name in STARTS:
            rival = search.placements.placement(name, 4)
            theirs = evaluate(Candidate(placement=rival, router=router), steps, costs).layer_s
            assert (mine <= theirs).all(), name
        held = ours.placement.physical_to_logical[np.arange(2)[:, None, None], ours.table]
        assert np.array_equal(held, np.broadcast_to(np.arange(16)[None, :, None], held.shape))


def test_search_minimises_what_it_is_asked_for() -> None:
    """On the planning requests, each kind of exchange is best served by the placement searched for it."""
    search = search_over()
    steps, router = search.evidence.parts[PLAN], CappedChoice()
    found = {
        kind: search.placements.searched(4, kind, planned=False).placement for kind in ("per-rank", "hierarchical")
    }
    eplb = search.placements.placement("eplb", 4)
    for kind, placement in found.items():
        costs = search.placements.layer_costs[kind]
        mine = evaluate(Candidate(placement=placement, router=router), steps, costs).mean_layer_s
        assert mine < evaluate(Candidate(placement=eplb, router=router), steps, costs).mean_layer_s


@pytest.mark.parametrize("prefill", [True, False])
def test_best_schedule_is_at_least_as_fast_as_every_heuristic_however_overlapped(prefill: bool) -> None:
    search = search_over(prefill)
    ranked = search.best(load_ep_preset("ep"), (4,), CHOOSE)
    assert ranked == sorted(ranked, key=lambda each: each.prediction.step_s)
    rivals = [each for each in ranked if each.schedule.placement.policy != "search"]
    assert any(each.schedule.overlaps for each in rivals)
    assert ranked[0].prediction.step_s <= min(each.prediction.step_s for each in rivals)


def test_a_short_recording_stands_for_the_steps_asked_for() -> None:
    small, large = search_over(tokens_per_rank=64).evidence, search_over(tokens_per_rank=1000).evidence
    assert small.step_tokens == 256
    # 15 % of 2,400 tokens are the shortest part: less than a twelfth of 4,000, so a twelfth of these is recorded tokens.
    assert large.step_tokens == 333 * 12
    assert any("333 recorded tokens" in note and "each of which stands for 12" in note for note in large.notes)
    search = search_over(tokens_per_rank=1000)
    plain = plain_schedule("16")
    load = search.evidence.loads(REPORT, search.placements.candidate(plain), plain)[0]
    assert load.num_tokens == 3996 and load.rank_rows().sum(axis=1).tolist() == [3996 * 3] * 2
    assert (load.sent % 12 == 0).all() and (load.links % 12 == 0).all()
