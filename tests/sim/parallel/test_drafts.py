"""Steps that check drafted tokens: what they compute, hold and yield, and that both simulators agree on them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moeplan.base.errors import InputError
from moeplan.calibrate.costs.load import load_costs
from moeplan.planner.parallel.case import ParallelRequest, plain_schedule
from moeplan.planner.parallel.simulate import answer_ep
from moeplan.sim.parallel.draft_layers import with_draft_layers
from moeplan.sim.parallel.memory import RankShape, rank_memory
from moeplan.sim.parallel.program import OP_DENSE, OP_EXPERT, OP_HEAD
from moeplan.specs.machines.serving import load_server, serving_machine
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import EP_PRESETS, load_ep_preset
from moeplan.traces.recording import LoadProfile

MODEL = load_model("glm-4.7-flash")
MACHINE = serving_machine(load_server("h200"), "sglang")
LOADS = LoadProfile(
    counts=np.random.default_rng(3).integers(50, 900, (MODEL.num_moe_layers, MODEL.num_experts)), model="", source="made up",
    layer_ids=tuple(MODEL.moe_layers), licence="", top_k=MODEL.top_k,
)  # fmt: skip
ASKED = ParallelRequest(ranks_per_node=4, tokens_per_rank=16, context_tokens=2048)
DRAFTED = dataclasses.replace(ASKED, draft_tokens=2, acceptance="0.8,0.5")


@pytest.mark.parametrize("name", sorted(EP_PRESETS))
def test_both_simulators_agree_on_every_preset(name: str) -> None:
    preset = load_ep_preset(name).with_options(kernel__bits="16", placement__num_redundant=0, pipeline__num_groups=1,
                                               pipeline__split="none", placement__policy="eplb", replica__choice="nearest")  # fmt: skip
    if preset.parallel.experts in ("tensor", "node"):
        preset = preset.with_options(placement__policy="contiguous")
    found = answer_ep(MODEL, MACHINE, LOADS, DRAFTED, preset, engine="both")
    assert found.prediction.step_s > 0


def test_a_step_yields_the_accepted_tokens_and_costs_the_drafted_ones() -> None:
    plain = answer_ep(MODEL, MACHINE, LOADS, ASKED, plain_schedule("16"))
    drafted = answer_ep(MODEL, MACHINE, LOADS, DRAFTED, plain_schedule("16"))
    assert drafted.request.tokens_a_step == pytest.approx(1 + 0.8 + 0.5)
    step = drafted.prediction.step_s
    assert step > plain.prediction.step_s
    assert drafted.prediction.tokens_per_s == pytest.approx(16 * 4 * 2.3 / step)
    assert drafted.tokens_per_s_per_user == pytest.approx(2.3 / step)
    assert drafted.latency.tpot_s == pytest.approx(step / 2.3)
    # Nothing accepted: as many tokens as without drafts, later.
    none = answer_ep(MODEL, MACHINE, LOADS, dataclasses.replace(DRAFTED, acceptance="0"), plain_schedule("16"))
    assert none.prediction.step_s == step and none.prediction.tokens_per_s < plain.prediction.tokens_per_s


def test_the_program_ends_with_passes_of_the_draft_layer() -> None:
    answer = answer_ep(MODEL, MACHINE, LOADS, DRAFTED, plain_schedule("16"))
    simulation, schedule = answer.search.simulation, plain_schedule("16")
    program, layers = simulation.program(schedule), MODEL.num_moe_layers
    of_drafts = [int(kind) for kind, layer in zip(program.op_kind, program.op_layer, strict=True) if layer >= layers]
    assert (of_drafts.count(OP_DENSE), of_drafts.count(OP_EXPERT), of_drafts.count(OP_HEAD)) == (2, 2, 2)
    load = answer.search.evidence.loads("report", answer.search.placements.candidate(schedule), schedule)[0]
    tables = simulation.tables(schedule, load)
    first, second = (
        next(op for op in range(len(program.op_kind)) if program.op_layer[op] == layers + turn and program.op_kind[op] == OP_DENSE)
        for turn in (0, 1)
    )  # fmt: skip
    # The first pass runs over everything that was checked, later ones over a token of each sequence.
    assert tables.op_tokens[first].tolist() == [48] * 4 and tables.op_tokens[second].tolist() == [16] * 4


def test_loads_of_later_passes_are_a_part_of_the_last_layers() -> None:
    answer = answer_ep(MODEL, MACHINE, LOADS, DRAFTED, plain_schedule("16"))
    schedule = plain_schedule("16")
    load = answer.search.evidence.loads("report", answer.search.placements.candidate(schedule), schedule)[0]
    found = with_draft_layers(load, schedule, 2)
    assert found.num_layers == load.num_layers + 2
    assert (found.slot_rows[-2] == load.slot_rows[-1]).all()
    assert found.slot_rows[-1].sum() == load.slot_rows[-1].sum() // 3
    assert found.expected is not None and load.expected is not None
    assert found.expected.rows[-1].sum() == pytest.approx(load.expected.rows[-1].sum() / 3)
    # Fewer tokens miss more experts, but not in proportion.
    fewer, all_of_them = found.expected.active[-1], load.expected.active[-1]
    assert (fewer <= all_of_them).all() and (fewer >= all_of_them / 3 - 1e-12).all()
    assert with_draft_layers(load, schedule, 0) is load


def test_memory_holds_a_layer_more_and_the_drafted_tokens() -> None:
    model = load_model("deepseek-v3")
    shape = RankShape(
        num_nodes=4, ranks_per_node=8, slots_per_rank=8, context_tokens=4096, prefill=False, kv_bytes_per_value=2,
        dense_format=weight_format("8"), runtime_bytes=10**9,
    )  # fmt: skip
    schedule = load_ep_preset("ep").with_options(kernel__bits="8")
    plain = rank_memory(model, schedule, shape, 128)
    drafted = rank_memory(model, schedule, dataclasses.replace(shape, tokens_per_request=2), 256)
    each = model.expert_bytes(weight_format("8"))
    assert drafted.num_bytes("expert weights") - plain.num_bytes("expert weights") == 8 * each
    assert drafted.num_bytes("kv cache") == 128 * 4097 * 62 * 576 * 2
    assert drafted.num_bytes("other weights") > plain.num_bytes("other weights")


def test_attention_over_drafts_reads_a_cache_once() -> None:
    """Checking two tokens of a sequence takes less than decoding two sequences, more than one."""
    costs = load_costs(
        MACHINE, load_model("deepseek-v3"), tables=False, dense_format=weight_format("8"), kv_bytes_per_value=2
    )
    one, checked, two = (
        costs.dense_layer(10, tokens, context, requests).seconds
        for tokens, context, requests in ((32, 32 * 8192, 32), (64, 32 * 8192, 32), (64, 64 * 8192, 64))
    )
    assert one < checked < two


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"acceptance": "1.2"}, "outside 0..1"),
        ({"acceptance": "0.5,0.9"}, "rises"),
        ({"acceptance": None}, "how many drafts are accepted"),
        ({"acceptance": "0.8,0.5", "draft_tokens": 3}, "known for 2 positions"),
        ({"draft_tokens": 0}, "nothing is drafted"),
        ({"prefill": True}, "nothing is drafted for prompts"),
        ({"prefill_share": 1.0}, "--prefill-share"),
        ({"ttft_s": 1.0}, "compute no prompts"),
        ({"tpot_s": -1.0}, "--tpot"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        answer_ep(MODEL, MACHINE, LOADS, dataclasses.replace(DRAFTED, **changes), plain_schedule("16"))  # type: ignore[arg-type]


def test_a_model_without_a_draft_layer_drafts_nothing() -> None:
    model = load_model("olmoe-1b-7b")
    loads = dataclasses.replace(LOADS, counts=np.ones((16, 64), np.int64), layer_ids=tuple(range(16)), top_k=8)
    with pytest.raises(InputError, match="bring no draft"):
        answer_ep(model, MACHINE, loads, DRAFTED, plain_schedule("16"))
