"""Costs and predictions of expert parallelism: formulas on small cases, conservation, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ep_strategies import ep_schedules
from long_runs import examples
from moeplan.base.errors import DoesNotFit, InputError, MissingCalibration, UnknownName
from moeplan.sim.parallel.expert_stage import kernels_s, stage_rows
from moeplan.sim.parallel.program import OP_COMBINE, OP_DENSE, OP_DISPATCH, OP_EXPERT, OP_REDUCE, OP_SHARED
from moeplan.sim.parallel.simulate import ParallelSimulation
from moeplan.sim.parallel.tiers import EpConstants, Tier, constants_of
from moeplan.sim.parallel.traffic import count_step
from moeplan.specs.machines.load import load_machine
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import (
    EP_PRESETS,
    ExpertParallelSchedule,
    apply_ep_settings,
    ep_schedule_from_dict,
    load_ep_preset,
    parse_ep_setting,
)

MODEL = dataclasses.replace(load_model("deepseek-v2-lite"), num_layers=3, moe_layers=(1, 2))
HARDWARE = load_hardware("h800-sxm")
HIDDEN = MODEL.hidden_size


def tier(bytes_per_s: float, latency_s: float = 0.0) -> Tier:
    return Tier(bytes_per_s=bytes_per_s, latency_s=latency_s, source="published", relative_uncertainty=0.1)


def simulation(**options: object) -> ParallelSimulation:
    return ParallelSimulation(MODEL, HARDWARE, 2, 2, **options)  # type: ignore[arg-type]


def routed(tokens: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((tokens, 2, 64)), axis=2)[:, :, :6], np.arange(tokens) % 4


def load_of(case: ParallelSimulation, schedule: ExpertParallelSchedule, tokens: int = 64):
    return count_step(*routed(tokens), case.topology(64), schedule)


def test_port_time_is_latency_and_bytes_over_bandwidth():
    port = Tier(bytes_per_s=2e9, latency_s=3e-6, half_size_bytes=1000, source="published", relative_uncertainty=0.1)
    assert port.port_ns(np.array([0, 1000, 5000])).tolist() == [0, 4000, 6000]
    assert port.port_ns(np.array([5000]), speed=0.5).tolist() == [9000]


def test_exchange_takes_the_larger_of_sent_and_received_and_the_slower_tier():
    case = simulation(constants=EpConstants(inter=tier(1e9), intra=tier(1e12)))
    schedule = ExpertParallelSchedule()
    load = load_of(case, schedule)
    program, tables = case.program(schedule), case.tables(schedule, load)
    for exchange in range(len(program.ex_kind)):
        layer, back = program.ex_layer[exchange], program.ex_kind[exchange] == OP_COMBINE
        port = np.maximum(load.sent, load.received)[layer, 0, 0] * HIDDEN * 2
        assert tables.ex_ns[exchange, 0].tolist() == port.tolist()  # 1e9 bytes/s is a byte a nanosecond
        sent = load.received if back else load.sent
        assert tables.ex_bytes[exchange].tolist() == (sent[layer, 0] * HIDDEN * 2).tolist()
    run = case.run(schedule, load, engine="both")
    assert ((run.ex_end - run.ex_start) == tables.ex_ns[:, 0].max(axis=1)).all()


def test_a_shared_half_duplex_port_carries_what_the_node_sends_and_receives():
    shared = EpConstants(inter=tier(1e9), intra=tier(1e12), shared_nic=True, half_duplex_nic=True)
    case, schedule = simulation(constants=shared), ExpertParallelSchedule()
    load = load_of(case, schedule)
    node = (load.sent + load.received)[0, 0, 0].reshape(2, 2).sum(axis=1) * HIDDEN * 2
    assert case.tables(schedule, load).ex_ns[0, 0].tolist() == np.repeat(node, 2).tolist()


def test_expert_time_counts_every_slot_once():
    case, schedule = simulation(), ExpertParallelSchedule()
    load = load_of(case, schedule)
    costing, stage = case.costing, stage_rows(load, 4)
    rows = load.slot_rows[0, 0].reshape(4, 16)
    fmt = weight_format("16")
    items = np.vectorize(lambda n: costing.costs.grouped_item(int(n), fmt).seconds if n else 0.0)(rows)
    launch = costing.costs.grouped_base().seconds
    assert kernels_s(costing, stage, schedule, 1.0)[0, 0] == pytest.approx(items.sum(1) + launch)
    dense = kernels_s(costing, stage, schedule.with_options(kernel__choice="dense"), 1.0)
    assert dense[0, 0] == pytest.approx(items.sum(1) + launch * (rows > 0).sum(1))
    best = schedule.with_options(kernel__choice="best")
    assert (kernels_s(costing, stage, best, 1.0) <= dense).all()


def test_shared_experts_leave_the_dense_part_when_they_are_an_operation_of_their_own():
    case = simulation()
    apart, together = ExpertParallelSchedule(), ExpertParallelSchedule().with_options(pipeline__shared_overlap=False)
    load = load_of(case, apart)
    split, whole = case.tables(apart, load), case.tables(together, load)
    dense = split.work_ns[case.program(apart).op_kind == OP_DENSE]
    shared = split.work_ns[case.program(apart).op_kind == OP_SHARED]
    one = whole.work_ns[case.program(together).op_kind == OP_DENSE]
    assert np.abs(dense + shared - one).max() <= 1  # two roundings instead of one
    assert (shared > 0).all()


def test_reductions_of_four_ranks_move_twice_three_quarters():
    case = ParallelSimulation(MODEL, HARDWARE, 1, 4)
    schedule = load_ep_preset("parallel-folding")
    load = load_of(case, schedule)
    program, tables = case.program(schedule), case.tables(schedule, load)
    reduction = int(np.flatnonzero(program.ex_kind == OP_REDUCE)[0])
    assert tables.ex_bytes[reduction, 1].tolist() == [64 * HIDDEN * 2 * 2 * 3 // 4] * 4


@given(ep_schedules(), st.integers(0, 2**31))
@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
def test_predictions_conserve_and_both_engines_agree(schedule, seed):
    case = simulation()
    slots, source = routed(40, seed)
    load = count_step(slots, source, case.topology(64), schedule)
    found = case.predict(schedule, [load], engine="both")
    program, tables = case.program(schedule), case.tables(schedule, load)
    moved = np.isin(program.ex_kind, [OP_DISPATCH, OP_COMBINE])
    if moved.any():
        assert tables.ex_tokens[moved].sum() == 2 * load.sent.sum()  # there and back
    expert = tables.op_tokens[program.op_kind == OP_EXPERT]
    if schedule.parallel.experts == "expert":
        assert expert.sum() == slots.size
    assert found.inter_node_bytes + found.intra_node_bytes == tables.ex_bytes.sum()
    assert found.step_s >= found.compute_s > 0
    assert 0 < found.relative_uncertainty < 1


def test_overlap_cannot_beat_the_busiest_lane_and_hides_something():
    case = simulation()
    steps = {}
    for name in ("ep", "comet"):
        schedule = load_ep_preset(name)
        steps[name] = case.predict(schedule, [load_of(case, schedule, 20_000)])
    assert steps["comet"].step_s < steps["ep"].step_s
    assert steps["comet"].step_s >= max(steps["comet"].compute_s, steps["comet"].exchange_s)


def test_memory_of_a_rank_is_respected():
    model = load_model("deepseek-v3")
    case = ParallelSimulation(model, HARDWARE, 1, 8, context_tokens=128)
    slots = np.zeros((8, 58, 1), np.int64)
    load = count_step(slots, np.arange(8), case.topology(256), ExpertParallelSchedule())
    with pytest.raises(DoesNotFit, match="on every rank"):
        case.predict(ExpertParallelSchedule(), [load])


def test_what_is_missing_or_wrong_is_named():
    with pytest.raises(MissingCalibration, match="describes no server"):
        constants_of(load_hardware("rtx-3090"), 1)
    bare = dataclasses.replace(HARDWARE, node=dataclasses.replace(HARDWARE.node, nic_bytes_per_s=None))
    with pytest.raises(MissingCalibration, match="no network"):
        constants_of(bare, 2)
    with pytest.raises(InputError, match="not divisible by 4 ranks"):
        simulation().topology(63)
    case = simulation()
    short = count_step(routed()[0][:, :1], routed()[1], case.topology(64), ExpertParallelSchedule())
    with pytest.raises(InputError, match="1 MoE layers"):
        case.predict(ExpertParallelSchedule(), [short])


@pytest.mark.parametrize("name", sorted(EP_PRESETS))
def test_presets_survive_a_file(name):
    schedule = load_ep_preset(name)
    assert schedule.name == name
    assert ep_schedule_from_dict(schedule.to_dict()) == schedule


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"all_to_all.tiers": "in-turn"}, "has no stages"),
        ({"pipeline.num_groups": 4}, "nothing is split"),
        ({"pipeline.shortcut": True, "pipeline.micro_batches": 2}, "within one batch"),
        ({"parallel.experts": "tensor", "placement.num_redundant": 8}, "neither exchanged"),
        ({"pipeline.all_to_all_sm_fraction": 2.0}, "not a number from 0 to 0.9"),
        ({"kernel.choice": "fast"}, "not one of"),
    ],
)
def test_options_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        apply_ep_settings(ExpertParallelSchedule(), settings)


def test_settings_are_parsed_by_type():
    assert parse_ep_setting("pipeline.num_groups=5") == ("pipeline.num_groups", 5)
    assert parse_ep_setting("pipeline.shortcut=yes") == ("pipeline.shortcut", True)
    with pytest.raises(UnknownName, match=r"pipeline\.num_groups"):
        parse_ep_setting("pipeline.groups=5")
    with pytest.raises(UnknownName, match="eps-moe"):
        load_ep_preset("eps")


@pytest.mark.parametrize(
    ("hardware", "words"),
    [
        ("8xH200", "--gpus-per-node 8; cards in one box"),
        ("4x RTX PRO 6000", "--gpus-per-node 4"),
        ("rtx-4090", "write 4 x rtx-4090"),
    ],
)
def test_a_machine_that_is_no_server_is_answered_with_what_to_ask(hardware, words):
    with pytest.raises(MissingCalibration, match=words):
        constants_of(load_machine(hardware, "vllm"), 1, 8)
