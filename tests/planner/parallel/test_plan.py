"""The expert-parallel plan on small recordings, on counts, and on DeepSeek-R1's loads where they are at hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from moeplan.base.errors import DoesNotFit, InputError
from moeplan.planner.parallel.case import ParallelRequest, evidence_of, plain_schedule, prepare_ep
from moeplan.planner.parallel.links import link_tokens
from moeplan.planner.parallel.migration import migration
from moeplan.planner.parallel.plan import ep_plan_to_dict, make_ep_plan
from moeplan.planner.parallel.simulate import simulate_ep
from moeplan.planner.placement.placement import Placement, contiguous
from moeplan.sim.parallel.simulate import INDEPENDENCE_UNCERTAINTY
from moeplan.sim.parallel.tiers import EpConstants, Tier
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import EP_PRESETS, ep_schedule_from_dict, load_ep_preset
from moeplan.traces.recording import LoadProfile
from strategies import make_trace

MODEL = dataclasses.replace(load_model("deepseek-v2-lite"), num_layers=3, moe_layers=(1, 2), num_experts=16, top_k=3)
HARDWARE = load_hardware("h800-sxm")
REQUEST = ParallelRequest(
    num_nodes=2,
    ranks_per_node=2,
    num_redundant=4,
    prefill=True,
    context_tokens=40,
    tokens_per_rank=128,
    search_moves=2000,
    bits=None,
)
LOADS = Path(__file__).resolve().parents[4] / "shared" / "data" / "loads"


def recording(skew: float = 0.15):
    trace = make_trace(
        np.random.default_rng(1), num_layers=2, num_experts=16, top_k=3, requests=[(60, 0)] * 40, skew=skew
    )
    return dataclasses.replace(trace, layer_ids=(1, 2))


def counts(skew: float = 0.15) -> LoadProfile:
    load = np.round(1000 * np.exp(-skew * np.arange(16))).astype(np.int64)
    return LoadProfile(
        counts=np.stack([load, load[::-1]]), model="", layer_ids=(1, 2), source="made up", licence="", top_k=3
    )


@pytest.fixture(scope="module")
def plan():
    return make_ep_plan(MODEL, HARDWARE, recording(), REQUEST, others={"flat": recording(0.0), "counts": counts()})


def test_best_beats_every_baseline_that_is_a_candidate(plan):
    plain = {each.schedule.name: each for each in plan.baselines}
    assert set(plain) | set(plan.left_out) == set(EP_PRESETS) - {"comet", "scmoe"}
    # Chosen on other requests than it is reported on, so a hair of slack is honest.
    for name in ("ep", "eplb", "occult", "grace", "tutel", "tbo"):
        assert plan.best.step_s <= plain[name].step_s * 1.01
    assert plan.best.step_s >= plan.lower_bound_step_s > 0
    assert plan.optimality_gap == pytest.approx(plan.best.step_s / plan.lower_bound_step_s - 1)


def test_plan_is_plain_values_with_the_keys_others_rely_on(plan):
    data = json.loads(json.dumps(ep_plan_to_dict(plan), allow_nan=False))
    for entry in (*data["baselines"], data["best"]):
        assert {"name", "step_s", "max_over_mean_load", "inter_node_bytes", "intra_node_bytes"} <= set(entry)
    assert ep_schedule_from_dict(data["best"]["schedule"]) == plan.best.schedule
    rows = np.array(data["placement"]["physical_to_logical"], np.int32)
    again = Placement(physical_to_logical=rows, num_logical=16, num_ranks=4, num_nodes=2)
    assert again.same_as(plan.placement)
    assert "step time" in data["verdict"] or "stay with" in data["verdict"]
    assert "\n" not in data["verdict"]


def test_links_add_up_to_the_bytes_of_the_dispatch(plan):
    """Half of all bytes (16 bits there, 16 bits back) cross in the dispatch; no expert groups, so every token once."""
    plain = next(each for each in plan.baselines if each.schedule.name == "ep")
    before = np.array(plan.links["before"], float)
    assert before.sum() * 2 == pytest.approx(plain.inter_node_bytes + plain.intra_node_bytes, rel=1e-6)
    near = np.arange(4)[:, None] // 2 == np.arange(4)[None, :] // 2
    assert before[~near].sum() * 2 == pytest.approx(plain.inter_node_bytes, rel=1e-6)
    assert np.diag(before).sum() == 0
    for rows in plan.rank_rows.values():
        assert np.array(rows).sum(axis=1).tolist() == [plan.search.evidence.step_tokens * 3] * 2


@pytest.mark.parametrize("kind", ["per-rank", "hierarchical", "all-choices"])
def test_expected_links_add_up_too(kind):
    schedule = load_ep_preset("ep").with_options(all_to_all__kind=kind)
    found = make_ep_plan(MODEL, HARDWARE, counts(), REQUEST)
    candidate = found.search.placements.candidate(schedule)
    tokens = link_tokens(found.search.evidence, candidate, schedule)
    load = found.search.evidence.loads("report", candidate, schedule)[0]
    assert tokens.sum() == pytest.approx(load.sent.sum(), rel=0.01)
    near = np.arange(4)[:, None] // 2 == np.arange(4)[None, :] // 2
    assert tokens[~near].sum() == pytest.approx(load.sent[:, :, 0].sum(), rel=0.01)


def test_one_schedule_is_simulated_by_both_engines():
    found = simulate_ep(
        MODEL, HARDWARE, recording(), REQUEST, load_ep_preset("eps-moe").with_options(pipeline__num_groups=2), rows=True
    )
    assert found.schedule.name == "eps-moe"
    assert found.outcome.timeline is not None
    assert set(found.outcome.timeline.frame().device) == {f"rank {rank}" for rank in range(4)}


def test_ablation_leads_from_plain_to_best(plan):
    added = [row for row in plan.ablation if row["kind"] == "added"]
    assert [row["ingredient"] for row in added] == [
        "none", "parallelism", "all-to-all", "placement", "replication", "routing", "pipeline", "kernels",
    ]  # fmt: skip
    plain = next(each for each in plan.baselines if each.schedule.name == "ep")
    assert added[0]["step_s"] == plain.step_s
    assert added[-1]["step_s"] == plan.best.step_s
    product = np.prod([1 + row["change_fraction"] for row in added])
    assert product == pytest.approx(plan.best.step_s / plain.step_s)


def test_staleness_compares_the_stale_plan_with_a_fresh_one(plan):
    flat, same = plan.staleness
    assert (flat["recording"], same["recording"]) == ("flat", "counts")
    # Without skew there is little to balance: copies of the wrong experts do not help.
    assert flat["plan_max_over_mean_load"] >= flat["replanned_eplb_max_over_mean_load"] - 0.02
    assert flat["change_fraction"] == pytest.approx(flat["plan_step_s"] / flat["plain_step_s"] - 1)


def test_plans_repeat_byte_for_byte():
    one, two = (json.dumps(ep_plan_to_dict(make_ep_plan(MODEL, HARDWARE, counts(), REQUEST))) for _ in range(2))
    assert one == two


def test_counts_say_that_they_are_counts():
    found = make_ep_plan(MODEL, HARDWARE, counts(), REQUEST)
    assert {"grace", "occult", "metro"} <= set(found.left_out)
    assert any("independent" in each for each in found.assumptions)
    loads = found.search.evidence.loads(
        "report", found.search.placements.candidate(found.best.schedule), found.best.schedule
    )
    exact = [dataclasses.replace(load, exact=True) for load in loads]
    sure = found.search.simulation.predict(found.best.schedule, exact).relative_uncertainty
    assert found.best.relative_uncertainty == pytest.approx(sure + INDEPENDENCE_UNCERTAINTY)
    assert found.overfit_fraction == 0.0


def test_level_loads_leave_nothing_to_gain_from_placement():
    found = make_ep_plan(MODEL, HARDWARE, counts(0.0), dataclasses.replace(REQUEST, num_redundant=0))
    steps = {each.schedule.name: each.step_s for each in found.baselines}
    assert steps["eplb"] == pytest.approx(steps["ep"], rel=0.01)
    assert found.best.max_over_mean_load == pytest.approx(1.0, abs=0.01)


def test_migration_counts_what_is_fetched_from_where():
    before = contiguous(1, 4, 4, 4, 2)
    after = Placement(physical_to_logical=np.array([[1, 0, 3, 2]], np.int32), num_logical=4, num_ranks=4, num_nodes=2)
    tier = {"latency_s": 0.0, "source": "published", "relative_uncertainty": 0.1}
    constants = EpConstants(inter=Tier(bytes_per_s=1e9, **tier), intra=Tier(bytes_per_s=4e9, **tier))
    near = migration(before, after, expert_bytes=10**9, constants=constants, before_s=3 / 64, after_s=2 / 64)
    assert (near.num_experts, near.num_bytes, near.stall_s) == (4, 4 * 10**9, 0.25)
    assert near.steps_to_pay_back == 16
    crossed = Placement(physical_to_logical=np.array([[2, 1, 0, 3]], np.int32), num_logical=4, num_ranks=4, num_nodes=2)
    far = migration(before, crossed, expert_bytes=10**9, constants=constants, before_s=0.02, after_s=0.03)
    assert (far.num_experts, far.stall_s, far.steps_to_pay_back) == (2, 1.0, None)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_redundant": 3}, InputError, "do not divide over 4 ranks"),
        ({"ranks_per_node": 16}, InputError, "more ranks than experts"),
        ({"num_nodes": 0}, InputError, "below one"),
        ({"num_redundant": -1}, InputError, "below zero"),
        (
            {"context_tokens": 500_000, "prefill": False, "tokens_per_rank": 100_000, "bits": "16"},
            DoesNotFit,
            "every rank",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        make_ep_plan(MODEL, HARDWARE, counts(), dataclasses.replace(REQUEST, **changes))


def test_a_recording_of_another_model_is_refused():
    with pytest.raises(InputError, match="2 MoE layers"):
        make_ep_plan(load_model("deepseek-v2-lite"), HARDWARE, counts(), REQUEST)


@pytest.mark.skipif(not LOADS.exists(), reason="recorded loads are not at hand")
def test_deepseek_r1_is_planned():
    table = json.loads((LOADS / "decode_in1000out1000.json").read_text())["logical_count"]
    profile = LoadProfile(
        counts=np.array(table, np.int64)[3:], model="", layer_ids=tuple(range(3, 61)), source="", licence=""
    )
    found = make_ep_plan(
        load_model("deepseek-v3"),
        HARDWARE,
        profile,
        ParallelRequest(num_nodes=4, ranks_per_node=8, num_redundant=32, context_tokens=2048, bits=None),
    )
    steps = {each.schedule.name: each for each in found.baselines}
    assert found.best.step_s < steps["eplb"].step_s < steps["ep"].step_s
    # The published algorithm balances what it was made from to 1.007; other recordings of the phase leave it 1.02 to 1.26.
    assert 1.03 < found.best.max_over_mean_load < 1.2


@pytest.mark.parametrize(("ranks", "groups"), [(None, {1, 2}), (1, {1}), (4, {4})])
def test_a_search_keeps_to_the_ranks_that_share_attention(ranks: int | None, groups: set[int]) -> None:
    asked = dataclasses.replace(REQUEST, attention_ranks=ranks, num_redundant=0, bits="16")
    search = prepare_ep(MODEL, HARDWARE, evidence_of(MODEL, counts(), asked), asked, plain_schedule("16"))
    found = search.best(plain_schedule("16"), (0,), "choose")
    assert {each.schedule.parallel.group(2) for each in found} == groups


def test_a_search_names_groups_that_the_machine_does_not_have() -> None:
    asked = dataclasses.replace(REQUEST, attention_ranks=3, num_redundant=0, bits="16")
    search = prepare_ep(MODEL, HARDWARE, evidence_of(MODEL, counts(), asked), asked, plain_schedule("16"))
    with pytest.raises(InputError, match="groups of 3"):
        search.best(plain_schedule("16"), (0,), "choose")
