"""Where ranks share a host's memory, its cores or a port, the objective of our placement search still is the simulator's own layer."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibration_samples import lawful_samples
from exchange_samples import FOUR_ON_TWO_CORES, lawful_exchanges
from long_runs import examples
from moeplan.base.errors import InputError
from moeplan.base.units import NS_PER_S
from moeplan.calibrate.costs.all_to_all_table import ExchangeTable
from moeplan.calibrate.fitting.fit import fit_profile
from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.planner.parallel.evidence import REPORT, TokenEvidence
from moeplan.planner.parallel.objective import inside_table, layer_costs
from moeplan.planner.placement.comparison import Candidate, evaluate
from moeplan.planner.placement.objective import LayerCosts
from moeplan.planner.placement.placement import Placement, contiguous
from moeplan.planner.placement.replica_choice import CappedChoice, StaticChoice, nearest_table
from moeplan.planner.placement.search import SearchSettings, search_placement
from moeplan.planner.placement.sharing import InsideTable, NodeSharing
from moeplan.planner.placement.splits import StepTokens
from moeplan.sim.parallel.program import INTRA, OP_DENSE, OP_HEAD
from moeplan.sim.parallel.simulate import ParallelSimulation
from moeplan.sim.parallel.tiers import constants_of
from moeplan.specs.machines.profile import Constant, Profile
from moeplan.specs.schedules.parallel import ALL_TO_ALLS, ExpertParallelSchedule
from placement_cases import clustered_step, drawn_row

LAYERS, EXPERTS, TOP_K = 2, 16, 3
MODEL = dataclasses.replace(
    made_up_model("small", hidden=512, intermediate=256, num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K),
    num_shared_experts=1,
    shared_intermediate_size=256,
)
# Hosts and ranks of each; how a port between hosts is shared.
MACHINES = {
    "two ranks of one host": (1, 2, {}),
    "four ranks of one host": (1, 4, {}),
    "two hosts of two ranks": (2, 2, {}),
    "two hosts with one port each": (2, 2, {"shared_nic": True}),
    "two hosts with half-duplex ports": (2, 2, {"half_duplex_nic": True}),
    "three hosts with one half-duplex port each": (3, 2, {"shared_nic": True, "half_duplex_nic": True}),
}


@functools.cache
def fitted() -> Profile:
    """Return a profile fitted to a machine whose ranks share memory, four of them two cores, and with a network."""
    whole = lawful_samples()
    exchanges = [sample for ranks in (2, 4) for sample in lawful_exchanges(ranks, noise=0.05, seed=ranks)]
    profile = fit_profile(dataclasses.replace(whole, samples=(*whole.samples, *exchanges))).profile
    assert profile.node is not None

    def of_network(value: float) -> Constant:
        return Constant(value=value, source="datasheet", citation="a network", relative_uncertainty=0.1)

    node = dataclasses.replace(profile.node, nic_bytes_per_s=of_network(1.25e9), nic_latency_s=of_network(2e-5))
    return dataclasses.replace(profile, node=node)


@functools.cache
def simulation(machine: str) -> ParallelSimulation:
    nodes, ranks, ports = MACHINES[machine]
    constants = dataclasses.replace(constants_of(fitted(), nodes, ranks), **ports)
    return ParallelSimulation(MODEL, fitted(), nodes, ranks, context_tokens=16, constants=constants)


def costs_of(case: ParallelSimulation, num_tokens: int, weight: int = 1) -> dict[str, LayerCosts]:
    found = layer_costs(case.costing, ExpertParallelSchedule(), step_tokens=num_tokens * weight, num_ranks=case.num_ranks,
                        ranks_per_node=case.ranks_per_node, weight=weight)  # fmt: skip
    return dict(found)


def table_of(case: ParallelSimulation) -> ExchangeTable:
    table = case.costing.constants.intra.table
    assert table is not None
    return table


def drawn_placement(case: ParallelSimulation, copies: int, seed: int) -> Placement:
    ranks, rng = case.num_ranks, np.random.default_rng(seed)
    rows = [drawn_row(rng, EXPERTS, ranks, min(EXPERTS, -(-EXPERTS // ranks) + copies)) for _ in range(LAYERS)]
    return Placement(physical_to_logical=np.array(rows, np.int32), num_logical=EXPERTS, num_ranks=ranks,
                     num_nodes=case.num_nodes)  # fmt: skip


def drawn_steps(case: ParallelSimulation, num_tokens: int, seed: int, concentration: float) -> list[StepTokens]:
    """Return two steps of tokens that prefer some experts."""
    rng = np.random.default_rng(seed)
    weight = rng.dirichlet(np.full(EXPERTS, concentration)) + 1e-3
    found = []
    for _ in range(2):
        keys = rng.random((num_tokens, LAYERS, EXPERTS)) ** (1 / weight)
        experts = np.argsort(-keys, axis=2)[:, :, :TOP_K].astype(np.int32)
        found.append(StepTokens(experts=experts, source_rank=(np.arange(num_tokens) % case.num_ranks).astype(np.int32)))
    return found


@given(
    machine=st.sampled_from(sorted(MACHINES)),
    kind=st.sampled_from(ALL_TO_ALLS),
    copies=st.integers(0, 2),
    capped=st.booleans(),
    tokens_per_rank=st.integers(3, 100),
    weight=st.sampled_from((1, 1, 7)),
    concentration=st.sampled_from((0.1, 1.0, 50.0)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
def test_objective_is_the_simulated_layer_to_the_nanosecond_of_each_operation(
    machine: str,
    kind: str,
    copies: int,
    capped: bool,
    tokens_per_rank: int,
    weight: int,
    concentration: float,
    seed: int,
) -> None:
    case = simulation(machine)
    num_tokens = tokens_per_rank * case.num_ranks
    placement, steps = drawn_placement(case, copies, seed), drawn_steps(case, num_tokens, seed, concentration)
    router = CappedChoice() if capped else StaticChoice(table=nearest_table(placement))
    candidate = Candidate(placement=placement, router=router)
    schedule = ExpertParallelSchedule().with_options(all_to_all__kind=kind)
    evidence = TokenEvidence({REPORT: steps}, EXPERTS, weight=weight)
    loads = evidence.loads(REPORT, candidate, schedule)
    program, tables = case.program(schedule), [case.tables(schedule, load) for load in loads]
    fixed = np.isin(program.op_kind, (OP_DENSE, OP_HEAD))
    dense_s = np.mean([each.work_ns[fixed].max(axis=1).sum() for each in tables]) / NS_PER_S
    predicted = evaluate(candidate, steps, costs_of(case, num_tokens, weight)[kind]).layer_s.sum() + dense_s
    simulated = case.predict(schedule, loads, engine="both", check_memory=False).step_s
    # Rounded: each of a rank's slots (before cores that are shared slow it), the launch, the stretched kernels of experts and shared
    # experts, two exchanges of two tiers; two layers.
    slow = table_of(case).compute_slowdown
    rounding_s = LAYERS * ((placement.slots_per_rank / 2 + 2) * slow + 2 + 4) / NS_PER_S
    assert predicted == pytest.approx(simulated, rel=0, abs=rounding_s)


def test_what_ranks_share_cannot_be_told_from_the_busiest_port() -> None:
    """Cores and bandwidths of one's own would be far from the simulated layer; skew costs little where all send through one memory."""
    case = simulation("four ranks of one host")
    steps, even = drawn_steps(case, 400, 0, 1.0), contiguous(LAYERS, EXPERTS, EXPERTS, 4, 1)
    candidate, costs = Candidate(placement=even, router=CappedChoice()), costs_of(case, 400, 50)["per-rank"]
    whole = evaluate(candidate, steps, costs)
    alone = evaluate(candidate, steps, dataclasses.replace(costs, sharing=None, row_s=1 / NS_PER_S))
    assert whole.compute_s.sum() == pytest.approx(FOUR_ON_TWO_CORES * alone.compute_s.sum(), rel=0.05)
    assert (whole.layer_s - whole.compute_s).sum() < 0.97 * (alone.layer_s - alone.compute_s).sum()


@given(machine=st.sampled_from(sorted(MACHINES)), token_bytes=st.floats(1, 2**16), data=st.data())
@settings(max_examples=examples(40), deadline=None)
def test_tabulated_exchanges_are_the_measured_ones(machine: str, token_bytes: float, data: st.DataObject) -> None:
    table, most = table_of(simulation(machine)), 500
    found = inside_table(table, token_bytes, most)
    total = np.array(data.draw(st.lists(st.integers(1, most), min_size=1, max_size=8)))
    port = np.array([data.draw(st.integers(1, int(most_of))) for most_of in total])
    exact = table.seconds(port * token_bytes, total * token_bytes)
    assert found.seconds[total] + port * found.token_s[total] == pytest.approx(exact, rel=1e-12)


def test_hosts_do_not_share_each_others_memory() -> None:
    """What ranks of another host send to each other costs nothing here, in the simulator and in the objective."""
    case, schedule = simulation("two hosts of two ranks"), ExpertParallelSchedule()
    placement = contiguous(LAYERS, EXPERTS, EXPERTS, 4, 2)
    slots = np.full((120, LAYERS, TOP_K), -1, np.int64)
    slots[:] = np.arange(TOP_K) + 4 * (np.arange(120) % 4 ^ 1)[:, None, None]  # to the other rank of the own host
    step = StepTokens(experts=slots.astype(np.int32), source_rank=(np.arange(120) % 4).astype(np.int32))
    here = np.flatnonzero(step.source_rank < 2)
    half = StepTokens(experts=step.experts[here], source_rank=step.source_rank[here])
    times, ports = [], []
    candidate = Candidate(placement=placement, router=CappedChoice())
    for each in (step, half):
        load = TokenEvidence({REPORT: [each]}, EXPERTS).loads(REPORT, candidate, schedule)[0]
        ports.append(case.tables(schedule, load).ex_ns[0, INTRA])
        times.append(evaluate(candidate, [each], costs_of(case, 120)["per-rank"]).layer_s)
    assert ports[0][:2].tolist() == ports[1][:2].tolist() and ports[1][2:].tolist() == [0, 0] and ports[0].min() > 0
    assert times[0] == pytest.approx(times[1], rel=1e-12)


def test_search_minimises_what_all_ranks_send_where_they_share_a_memory() -> None:
    """On the planning steps the placement searched with what ranks share is the better one where they share it."""
    steps = [clustered_step(seed, num_ranks=4) for seed in range(2)]
    case = simulation("four ranks of one host")
    # Exchanges alone: kernels of this machine would hide most of the difference.
    costs = dataclasses.replace(costs_of(case, steps[0].num_tokens)["per-rank"], row_s=0.0, beside_s=0.0)
    blind = dataclasses.replace(costs, sharing=None)
    starts = {"contiguous": contiguous(2, 16, 20, 4, 1)}
    found = {
        name: search_placement(steps, starts, each, SearchSettings(num_moves=20_000))
        for name, each in (("shared", costs), ("blind", blind))
    }
    seconds = {
        name: evaluate(
            Candidate(placement=each.placement, router=StaticChoice(table=each.table)), steps, costs
        ).mean_layer_s
        for name, each in found.items()
    }
    assert seconds["shared"] == pytest.approx(np.mean([layer.best_s for layer in found["shared"].layers]), rel=1e-12)
    assert seconds["shared"] < 0.985 * seconds["blind"]


def test_what_was_not_tabulated_is_refused() -> None:
    case = simulation("two ranks of one host")
    costs = costs_of(case, 20)["all-choices"]
    placement = contiguous(LAYERS, EXPERTS, EXPERTS, 2, 1)
    steps = drawn_steps(case, 400, 3, 1.0)
    with pytest.raises(InputError, match="costs reach to 60"):
        search_placement(steps, {"contiguous": placement}, costs)
    with pytest.raises(InputError, match="costs reach to 60"):
        evaluate(Candidate(placement=placement, router=CappedChoice()), steps, costs)
    one = InsideTable(seconds=np.ones(3), token_s=np.ones(3))
    with pytest.raises(InputError, match="tables of one length"):
        NodeSharing(ranks_per_node=2, dispatch=one)
    with pytest.raises(InputError, match="tables of one length"):
        NodeSharing(ranks_per_node=2, dispatch=one, combine=InsideTable(seconds=np.ones(4), token_s=np.ones(4)))
    with pytest.raises(InputError, match="finite and positive"):
        NodeSharing(ranks_per_node=2, dispatch=one, combine=InsideTable(seconds=-np.ones(3), token_s=np.ones(3)))
