"""Experts sliced inside nodes (Parm) and spread inside each node (PPMoE): who gets what, what it costs, what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.base.errors import InputError
from moeplan.base.units import NS_PER_S
from moeplan.calibrate.costs.cost_model import CostModel
from moeplan.sim.parallel.costs import EpCosting, tabulate_ep
from moeplan.sim.parallel.program import GATHER, OP_EXPERT, OP_REDUCE, Shape, build_program
from moeplan.sim.parallel.simulate import ParallelSimulation
from moeplan.sim.parallel.tiers import constants_of
from moeplan.sim.parallel.traffic import Topology, count_step, expect_step
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import ExpertParallelSchedule, load_ep_preset

MODEL, HARDWARE = load_model("deepseek-v2-lite"), load_hardware("h800-sxm")
TOPOLOGY = Topology(num_ranks=4, num_nodes=2, slots_per_rank=16)


def drawn(seed: int, num_tokens: int = 64, layers: int = 1, top_k: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Return distinct slots [tokens, layers, top_k] and source ranks."""
    rng = np.random.default_rng(seed)
    slots = np.argsort(rng.random((num_tokens, layers, TOPOLOGY.num_slots)), axis=2)[:, :, :top_k]
    return slots, np.arange(num_tokens) % 4


@given(st.integers(0, 2**32), st.sampled_from(["per-rank", "all-choices"]))
@settings(max_examples=examples(40), deadline=None)
def test_a_token_goes_to_every_rank_of_each_node_it_needs(seed: int, kind: str) -> None:
    slots, source = drawn(seed)
    load = count_step(slots, source, TOPOLOGY, load_ep_preset("parm").with_options(all_to_all__kind=kind))
    links = np.zeros((4, 4), int)
    for choices, rank in zip(slots[:, 0].tolist(), source.tolist(), strict=True):
        nodes = [slot // 32 for slot in choices]
        for node in nodes if kind == "all-choices" else set(nodes):
            for member in (2 * node, 2 * node + 1):
                links[rank, member] += member != rank
    assert np.array_equal(load.links, links)
    near = np.arange(4)[:, None] // 2 == np.arange(4)[None, :] // 2
    for tier, mask in ((0, ~near), (1, near)):
        assert np.array_equal(load.sent[0, 0, tier], (links * mask).sum(axis=1))
        assert np.array_equal(load.received[0, 0, tier], (links * mask).sum(axis=0))


@pytest.mark.parametrize("kind", ["per-rank", "all-choices"])
def test_certain_choices_are_expected_as_they_are_counted(kind: str) -> None:
    schedule = load_ep_preset("parm").with_options(all_to_all__kind=kind)
    chosen = np.array([[0, 1, 20], [40, 41, 50], [3, 33, 60], [17, 18, 19]])  # slots of every token of a source rank
    slots, source = np.repeat(chosen, 5, axis=0)[:, None, :], np.repeat(np.arange(4), 5)
    chance = np.zeros((1, 4, 64))
    np.put_along_axis(chance[0], chosen, 1.0, axis=1)
    expected = expect_step(chance, np.full(4, 5), TOPOLOGY, schedule)
    counted = count_step(slots, source, TOPOLOGY, schedule)
    for name in ("sent", "received", "slot_rows", "links"):
        assert np.array_equal(getattr(expected, name), getattr(counted, name)), name


@pytest.mark.parametrize("name", ["ppmoe", "tensor-parallel"])
def test_ranks_that_hold_all_tokens_send_none(name: str) -> None:
    slots, source = drawn(1)
    load = count_step(slots, source, TOPOLOGY, load_ep_preset(name))
    assert load.slot_rows.sum() == slots.size
    assert load.sent.sum() == load.received.sum() == load.links.sum() == 0


def tables_of(schedule: ExpertParallelSchedule):
    slots, source = drawn(2, num_tokens=512)
    costing = EpCosting(
        CostModel(HARDWARE, MODEL, dense_format=weight_format("16")), constants_of(HARDWARE, 2), True, 128
    )
    program = build_program(schedule, Shape(num_layers=1, has_shared=True))
    load = count_step(slots, source, TOPOLOGY, schedule)
    return costing, program, tabulate_ep(costing, schedule, program, load), load


def test_sliced_experts_take_their_nodes_rows_at_a_share_each() -> None:
    costing, program, tables, load = tables_of(load_ep_preset("parm"))
    rows = load.slot_rows[0, 0].reshape(2, 32)
    each = costing.item_s(rows, weight_format("16"), rate=1.0).sum(axis=1) / 2 + costing.costs.grouped_base().seconds
    expert = tables.work_ns[program.op_kind == OP_EXPERT][0]
    assert expert.tolist() == np.ceil(np.repeat(each, 2) * NS_PER_S).astype(int).tolist()
    sizes = {
        int(group): tables.ex_bytes[at, 1]
        for at, group in enumerate(program.ex_group)
        if program.ex_kind[at] == OP_REDUCE
    }
    # Of 256 tokens in a node, a reduction moves 2 (n-1)/n and a gather (n-1)/n of 2048 values of 2 bytes.
    assert sizes[0].tolist() == [256 * 2048 * 2] * 4
    assert sizes[GATHER].tolist() == [256 * 2048] * 4


def test_experts_spread_in_each_node_serve_that_nodes_tokens() -> None:
    costing, program, tables, load = tables_of(load_ep_preset("ppmoe"))
    half = -(-load.slot_rows[0, 0] // 2).reshape(
        2, 32
    )  # a node has half of the tokens, one of its ranks half of the experts
    each = costing.item_s(half, weight_format("16"), rate=1.0).sum(axis=1) + costing.costs.grouped_base().seconds
    expert = tables.work_ns[program.op_kind == OP_EXPERT][0]
    assert expert.tolist() == np.ceil(np.tile(each, 2) * NS_PER_S).astype(int).tolist()
    assert tables.ex_bytes[:, 0].sum() == 0  # nothing crosses between nodes


@pytest.mark.parametrize("name", ["parm", "ppmoe"])
def test_both_engines_agree_and_memory_is_counted(name: str) -> None:
    simulation = ParallelSimulation(MODEL, HARDWARE, 2, 2, True, 128)
    slots, source = drawn(3, num_tokens=256, layers=26)
    schedule = load_ep_preset(name)
    load = count_step(slots, source, TOPOLOGY, schedule)
    found = simulation.predict(schedule, [load], engine="both")
    assert found.step_s > 0
    experts = {"parm": 16, "ppmoe": 32}[name] * 26 * MODEL.expert_bytes(weight_format("16"))
    parts = [
        {item.name: item.num_bytes for item in simulation.memory_of(each, load.topology.slots_per_rank, 128).items}
        for each in (schedule, load_ep_preset("parallel-folding"))
    ]
    one, plain = parts
    assert one["expert weights"] == experts
    assert plain["expert weights"] == 16 * 26 * MODEL.expert_bytes(weight_format("16"))
    # Where every node has all experts, nothing crosses between nodes and no all-to-all needs room.
    assert (one["exchange buffers"] == 0) == (name == "ppmoe") and plain["exchange buffers"] > 0
    others = set(plain) - {"expert weights", "exchange buffers"}
    assert {key: one[key] for key in others} == {key: plain[key] for key in others}


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("ppmoe", {"parallel__attention": "data"}, "must hold the same tokens"),
        ("ppmoe", {"placement__num_redundant": 8}, "neither exchanged, grouped nor copied"),
        ("ppmoe", {"pipeline__split": "token", "pipeline__num_groups": 2}, "neither exchanged, grouped nor copied"),
        ("parm", {"all_to_all__kind": "hierarchical"}, "all ranks of a node at once"),
        ("parm", {"pipeline__shortcut": True}, "all ranks of a node at once"),
    ],
)
def test_parallelisms_that_make_no_sense_are_refused(preset: str, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_ep_preset(preset).with_options(**changes)


def costing_of(name: str, context: int, prefill: bool = False) -> EpCosting:
    model, machine = load_model(name), load_hardware("h800-sxm")
    costs = CostModel(machine, model, dense_format=weight_format("16"), kv_bytes_per_value=2)
    return EpCosting(costs, constants_of(machine, 2), prefill, context)


def test_ranks_that_share_attention_each_read_the_whole_latent() -> None:
    longer, shorter = (costing_of("deepseek-v2-lite", context) for context in (8192, 4096))
    device, model = HARDWARE.device, MODEL
    reach = device.memory_bytes_per_s.value * device.memory_efficiency.value
    more_s = 64 * 4096 * model.attention.kv_values_per_token * 2 / reach
    apart = [longer.dense_s(1, 64, share)[0] - shorter.dense_s(1, 64, share)[0] for share in (1, 8)]
    # What memory is read for grows with the context as much for each of eight ranks as for one alone.
    assert apart[1] == pytest.approx(more_s, rel=0.02)
    assert apart[1] <= apart[0] * 1.001


def test_ranks_divide_keys_and_values_by_heads_as_far_as_there_are_any() -> None:
    longer, shorter = (
        costing_of("qwen3-30b-a3b", context) for context in (8192, 4096)
    )  # four heads of keys and values
    read = [longer.dense_s(1, 64, share)[0] - shorter.dense_s(1, 64, share)[0] for share in (1, 2, 4, 8)]
    assert read[1:3] == pytest.approx([read[0] / 2, read[0] / 4], rel=0.02)
    assert read[3] == pytest.approx(read[2], rel=0.02)


def test_prompts_are_computed_so_that_reading_a_latent_twice_costs_nothing() -> None:
    model, machine = load_model("deepseek-v2-lite"), load_hardware("h800-sxm")
    plain = CostModel(machine, model, dense_format=weight_format("16"), kv_bytes_per_value=2)
    both = [
        EpCosting(dataclasses.replace(plain, kv_bytes_per_value=size), constants_of(machine, 2), True, 4096)
        for size in (1, 2)
    ]
    assert both[0].dense_s(1, 8192, 8)[0] == both[1].dense_s(1, 8192, 8)[0]


@pytest.mark.parametrize("share", [2, 8])
def test_what_every_rank_needs_whole_is_not_divided(share: int) -> None:
    """Routers, projections to latents and a start of every kernel are each rank's own."""
    costing = costing_of("deepseek-v2-lite", 4096)
    part = costing.of_share(share)
    for tokens in (1, 256):
        own = part.dense_layer(1, tokens, tokens * 4096, tokens).seconds
        assert costing.dense_s(1, tokens, share)[0] == pytest.approx(own)
        assert own >= costing.costs.dense_layer(1, tokens, tokens * 4096, tokens).seconds / share
    assert part.model.attention.kv_lora_rank == MODEL.attention.kv_lora_rank
