"""Attention shared by other groups of ranks than a node's: what is allowed, what it costs, and that both simulators agree."""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.base.errors import InputError
from moeplan.planner.parallel.evidence import CountEvidence
from moeplan.planner.placement.comparison import Candidate
from moeplan.planner.placement.placement import contiguous
from moeplan.planner.placement.replica_choice import WeightedChoice
from moeplan.sim.parallel.program import INTER, INTRA, OP_REDUCE
from moeplan.sim.parallel.simulate import ParallelSimulation
from moeplan.specs.machines.serving import load_server, serving_machine
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import ExpertParallelSchedule

MODEL = load_model("deepseek-v2-lite")
MACHINE = serving_machine(load_server("h200"), "sglang")
NODES, EACH = 2, 8
START_S, PORT = 108e-6, 50e9


def simulation() -> ParallelSimulation:
    return ParallelSimulation(MODEL, MACHINE, NODES, EACH, prefill=False, context_tokens=1024)


def schedule(ranks: int, experts: str = "expert") -> ExpertParallelSchedule:
    options = {"parallel__attention": "tensor", "parallel__experts": experts, "parallel__attention_ranks": ranks}
    return ExpertParallelSchedule(name=f"{ranks}").with_options(**options)


def step(ranks: int, tokens: int = 256, experts: str = "expert"):
    one, chosen = simulation(), schedule(ranks, experts)
    counts = np.random.default_rng(0).lognormal(0.0, 0.5, (26, 64)) * 1e6
    candidate = Candidate(placement=contiguous(26, 64, 64, NODES * EACH, NODES), router=WeightedChoice())
    loads = CountEvidence(counts, MODEL.top_k, tokens).loads("report", candidate, chosen)
    return one, chosen, loads


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("tokens", [3, 256])
def test_both_simulators_agree_for_every_group_and_with_fewer_requests_than_ranks(ranks: int, tokens: int) -> None:
    one, chosen, loads = step(ranks, tokens)
    found = one.predict(chosen, loads, engine="both", check_memory=False)
    assert loads[0].num_tokens == tokens and found.step_s > 0
    program, tables = one.program(chosen), one.tables(chosen, loads[0])
    reductions = program.ex_kind == OP_REDUCE
    assert (tables.ex_ns[reductions][:, INTRA].max(axis=1) > 0).all()
    assert (tables.ex_ns[reductions][:, INTER] > 0).any() == (ranks > EACH)


def test_reductions_move_what_they_must() -> None:
    hidden = MODEL.hidden_size
    for ranks in (2, 4, 8, 16):
        one, chosen, loads = step(ranks)
        program, tables = one.program(chosen), one.tables(chosen, loads[0])
        first = int(np.flatnonzero(program.ex_kind == OP_REDUCE)[0])
        tensor = 256 // 16 * ranks * hidden * 2
        inside, nodes = min(ranks, EACH), max(1, ranks // EACH)
        assert (tables.ex_bytes[first, INTRA] == 2 * tensor * (inside - 1) // inside).all()
        between = 2 * tensor // inside * (nodes - 1) // nodes
        assert (tables.ex_bytes[first, INTER] == between).all()
        if nodes > 1:  # each rank adds its part up with its peer over its own port
            assert tables.ex_ns[first, INTER, 0] == pytest.approx((START_S + between / PORT) * 1e9, abs=2)


def test_a_larger_group_holds_less_of_the_weights_and_more_of_a_latent() -> None:
    held = [simulation().memory_of(schedule(ranks), 4, 16) for ranks in (2, 4, 8, 16)]
    names = [{item.name: item.num_bytes for item in each.items} for each in held]
    weights, kept = ([each[name] for each in names] for name in ("other weights", "kv cache"))
    assert weights == sorted(weights, reverse=True) and weights[0] == pytest.approx(8 * weights[3], rel=1e-6)
    assert kept == sorted(kept) and kept[3] == 8 * kept[0]
    # Experts of all ranks that hold the same tokens: half of them on each rank where two nodes are one replica.
    sliced = [simulation().memory_of(schedule(ranks, "tensor"), 4, 16).items[0].num_bytes for ranks in (8, 16)]
    assert sliced[0] == pytest.approx(2 * sliced[1], rel=1e-6)


@pytest.mark.parametrize(("ranks", "experts", "words"), [
    (3, "expert", "do not divide into groups of 3"),
    (12, "expert", "do not divide into groups of 12"),
    (32, "expert", "do not divide into groups of 32"),
    (4, "tensor", "tensor experts wait for no token"),
    (2, "node", "node experts wait for no token"),
    (16, "sharded", "exactly one node"),
    (4, "sharded", "exactly one node"),
])  # fmt: skip
def test_groups_that_cannot_be_are_named(ranks: int, experts: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        simulation().program(schedule(ranks, experts))
    with pytest.raises(InputError, match=words):
        simulation().memory_of(schedule(ranks, experts), 4, 16)


def test_a_reduction_over_nodes_is_doubted_more() -> None:
    inside, over = (step(ranks, 3) for ranks in (8, 16))
    doubts = [
        one.predict(chosen, loads, check_memory=False).relative_uncertainty for one, chosen, loads in (inside, over)
    ]
    assert doubts[1] > doubts[0] + 0.1


def test_groups_need_shared_attention() -> None:
    with pytest.raises(InputError, match="attention layers of its own"):
        ExpertParallelSchedule(name="x").with_options(parallel__attention_ranks=2)
    with pytest.raises(InputError, match="one rank shares nothing"):
        schedule(1)
    assert schedule(8).parallel.group(EACH) == schedule(0).parallel.group(EACH) == EACH
    assert schedule(16).parallel.replica_ranks(EACH) == 16 and schedule(2).parallel.replica_ranks(EACH) == EACH
