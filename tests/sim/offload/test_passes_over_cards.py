"""Prompts whose passes follow each other over cards: both simulators agree, and hand arithmetic gives the same times."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.planner.offload.bounds import Bounds
from moeplan.planner.offload.space import Candidate
from moeplan.sim.offload.costs import ONE_AT_A_TIME, CostTables, host_costs
from moeplan.sim.offload.simulate import Simulation
from moeplan.sim.offload.simulators import Outcome, first_difference, run_compiled, run_simpy
from moeplan.sim.offload.workload import Workload, build_workload
from moeplan.specs.card_split import by_counts
from moeplan.specs.machines.compose import compose_text
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.presets import load_preset
from moeplan.traces.format import RoutingTrace
from moeplan.traces.lengths import RequestLengths
from moeplan.traces.synthesis.prior import prior_recording
from strategies import config_of, make_costs, make_trace

MODEL = load_model("gpt-oss-20b")


def over_cards(costs: CostTables, cards: list[int], most: int) -> CostTables:
    return costs._replace(stages=np.array([*cards, most], np.int64))


def run_both(trace: RoutingTrace, costs: CostTables, workload: Workload) -> Outcome:
    schedule = load_preset("resident").with_options(cache__experts_per_layer=trace.num_experts)
    config, slots = config_of(schedule, trace), np.full(trace.num_layers, trace.num_experts)
    fast = run_compiled(config, workload, costs, slots, serial=False, rows=True)
    slow = run_simpy(config, workload, costs, slots, serial=False)
    assert first_difference(slow, fast) is None
    assert fast.timeline is not None
    fast.timeline.check()
    return fast


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4), st.sampled_from([None, 7]), st.integers(1, 2))
def test_both_simulators_agree_to_the_nanosecond(
    seed: int, chunk: int, most: int, piece: int | None, concurrency: int
) -> None:
    rng = np.random.default_rng(seed)
    lengths = [(int(rng.integers(1, 9)), int(rng.integers(1, 4))) for _ in range(3)]
    trace = make_trace(rng, num_layers=4, num_experts=4, top_k=2, requests=lengths, guesses=0)
    schedule = load_preset("resident").with_options(
        cache__experts_per_layer=4, workload__prefill_chunk_tokens=chunk, workload__concurrency=concurrency,
        kernel__grouping=str(rng.choice(["grouped", "per-expert"])),
    )  # fmt: skip
    workload = build_workload(trace, schedule.workload, piece_entries=piece)
    costs = make_costs(rng, workload, schedule, coupled=False)
    cards = sorted(rng.integers(0, 3, 5).tolist())
    config, slots = config_of(schedule, trace), np.full(4, 4)
    plain = run_compiled(config, workload, costs, slots, serial=False)
    alone = run_compiled(config, workload, over_cards(costs, [0] * 5, 1), slots, serial=False)
    assert (alone.step_end == plain.step_end).all() and first_difference(plain, alone) is None
    tables = over_cards(costs, cards, most)
    fast = run_compiled(config, workload, tables, slots, serial=False, rows=True)
    again = build_workload(trace, schedule.workload)
    slow = run_simpy(config, again, tables, slots, serial=False)
    assert first_difference(slow, fast) is None
    assert fast.timeline is not None
    fast.timeline.check()
    assert (np.diff(fast.step_end) >= 0).all()
    assert int(fast.step_end[-1]) <= int(plain.step_end[-1])


def test_four_passes_over_two_cards_take_five_halves_of_one() -> None:
    """Two layers of 90 ns with 10 ns of experts each: a pass takes 200, four of them 5 times 100 where both cards work at once."""
    trace = prior_recording(MODEL, RequestLengths.alike(prompt_tokens=32, reply_tokens=1, requests=1))
    trace = dataclasses.replace(
        trace, experts=np.ascontiguousarray(trace.experts[:, :2]), layer_ids=trace.layer_ids[:2]
    )
    schedule = load_preset("resident").with_options(cache__experts_per_layer=32, workload__prefill_chunk_tokens=8)
    workload = build_workload(trace, schedule.workload)
    most = workload.max_expert_tokens
    costs = make_costs(np.random.default_rng(0), workload, schedule, coupled=False)._replace(
        step_class=np.zeros(workload.num_steps, np.int64), dense_ns=np.full((1, 2), 90), head_ns=np.array([0]),
        kernel_ns=np.zeros((1, most + 1), np.int64), grouped_ns=np.array([10]),
        host_ns=host_costs(step=0, layer=0, kernel=0, transfer=0), stages=np.array([0, 1, 1, 2]),
    )  # fmt: skip
    outcome = run_both(trace, costs, workload)
    assert outcome.step_end[:4].tolist() == [200, 300, 400, 500]
    one = run_both(trace, costs._replace(stages=np.array([0, 1, 1, 1])), workload)
    assert one.step_end[:4].tolist() == [200, 400, 600, 800]


def test_an_engine_that_overlaps_passes_reads_prompts_faster_and_decodes_as_before() -> None:
    trace = prior_recording(MODEL, RequestLengths.alike(prompt_tokens=512, reply_tokens=4, requests=1))
    box = compose_text("2 x rtx-3090 + ryzen-9-5950x + ddr4-3200x2:64GiB", "sglang")
    one = Simulation(model=MODEL, profile=box, trace=trace, split=by_counts((12, 12)), memory_bytes=2**40)
    schedule = one.resolve(load_preset("resident").with_options(workload__prefill_chunk_tokens=64))
    given_, (tables, _) = one.given(schedule), one.tables(schedule)
    ends = [
        run_compiled(given_.config, given_.workload, each, given_.capacities, serial=False).step_end
        for each in (tables._replace(stages=ONE_AT_A_TIME), tables)
    ]
    waiting, following = (int(each[7]) for each in ends)
    assert 1.4 < waiting / following < 16 / 9 + 0.02, "8 passes over 2 cards: 16 / 9 where stages are alike"
    assert (np.diff(ends[0][7:]) == np.diff(ends[1][7:])).all(), "passes that decode wait for each other"
    found = one.predict(schedule, engine="both")
    assert sum(found.metrics.time_share.values()) == pytest.approx(1)
    assert found.metrics.prefill_tokens_per_s == pytest.approx(512 / following * 1e9)


def test_only_where_everything_stays_on_the_cards() -> None:
    box = compose_text("2 x rtx-3090 + ryzen-9-5950x + ddr4-3200x2:64GiB", "sglang")
    trace = prior_recording(MODEL, RequestLengths.alike(prompt_tokens=64, reply_tokens=1, requests=1))
    one = Simulation(model=MODEL, profile=box, trace=trace, split=by_counts((12, 12)), memory_bytes=2**40)
    whole, some = one.resolve(load_preset("resident")), one.resolve(load_preset("n-cpu-moe=4"))
    assert len(one.tables(whole)[0].stages) == 24 + 2 and one.tables(some)[0].stages is ONE_AT_A_TIME


def test_no_run_beats_the_bound_of_its_passes() -> None:
    trace = prior_recording(MODEL, RequestLengths.alike(prompt_tokens=128, reply_tokens=2, requests=1))
    box = compose_text("2 x rtx-3090 + ryzen-9-5950x + ddr4-3200x2:64GiB", "sglang")
    one = Simulation(model=MODEL, profile=box, trace=trace, split=by_counts((10, 14)), memory_bytes=2**40)
    schedule = one.resolve(load_preset("resident").with_options(workload__prefill_chunk_tokens=16))
    candidate = Candidate(schedule=schedule, level=768, cached_slots=768)
    bound = Bounds(one, schedule).of(candidate)
    bound.check(candidate, one.run(schedule).step_end)
    assert 0.05 < bound.whole_ns / int(one.run(schedule).step_end[-1]) < 1
