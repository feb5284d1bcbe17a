"""What each option of a schedule changes, on recordings made so that it must: who leaves, what is guessed, where misses run."""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.base.errors import InputError
from moeplan.sim.offload.costs import CostTables, host_costs
from moeplan.sim.offload.simulators import Outcome, first_difference, run_compiled, run_simpy
from moeplan.sim.offload.workload import build_workload
from moeplan.sim.timeline import (
    NUM_RATED_LANES,
    OP_CPU,
    OP_DISK,
    OP_PREFETCH,
    RATE_ONE,
    ROW_END,
    ROW_EXPERT,
    ROW_LAYER,
    ROW_OP,
    ROW_START,
    ROW_STEP,
)
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.specs.schedules.presets import FAMILIES, PRESETS, load_preset
from moeplan.traces.format import RoutingTrace
from strategies import capacities_of, config_of


def recording(choices: list[list[list[int]]], *, num_experts: int, requests: list[int] | None = None, guess: int = -1,
              prob: float = 1.0) -> RoutingTrace:  # fmt: skip
    """Return a decode-only recording of [token][layer][choice]; with `guess`, every token guesses that expert for each layer."""
    experts = np.array(choices, np.uint8)
    tokens, layers, _ = experts.shape
    owner = np.repeat(np.arange(len(requests or [tokens])), requests or [tokens]).astype(np.int32)
    position = np.concatenate([np.arange(n) for n in requests or [tokens]]).astype(np.int32)
    predicted = np.full((tokens, layers, 1, 1), guess, np.int16)
    predicted[:, 0] = -1
    return RoutingTrace(
        experts=experts, request=owner, position=position, phase=np.ones(tokens, np.uint8), num_experts=num_experts, model="made-up",
        layer_ids=tuple(range(layers)), source="test", licence="none", predicted=None if guess < 0 else predicted,
        predicted_prob=None if guess < 0 else np.full(predicted.shape, prob, np.float16), metadata={},
    )  # fmt: skip


def outcome(
    trace: RoutingTrace, schedule: OffloadSchedule, *, copy: int = 20, cpu: int = 12, dense: int = 10
) -> Outcome:
    """Return the outcome on which both engines agree: an expert takes 4 ns, half the bytes take half the time."""
    workload = build_workload(trace, schedule.workload, with_next_use=True)
    tokens = np.arange(workload.max_expert_tokens + 1)
    costs = CostTables(
        step_class=np.zeros(workload.num_steps, np.int64), dense_ns=np.full((1, trace.num_layers), dense), head_ns=np.array([5]),
        kernel_ns=np.stack([4 * np.minimum(tokens, 1), 3 * np.minimum(tokens, 1)]), grouped_ns=np.array([0]),
        expert_format=np.zeros(trace.num_layers * trace.num_experts, np.int64), expert_bytes=np.array([100, 50]),
        num_chunks=np.array([1, 1]), chunk_bytes=np.array([[100, 100], [50, 50]]),
        chunk_ns=np.array([[copy, copy], [copy // 2, copy // 2]]), back_ns=np.array([copy, copy]),
        cpu_ns=np.stack([cpu * tokens, cpu * tokens]), disk_ns=np.array([30, 15]),
        host_ns=host_costs(step=0, layer=1, kernel=0, transfer=0),
        rate=np.full((NUM_RATED_LANES, 2**NUM_RATED_LANES), RATE_ONE),
    )  # fmt: skip
    config, capacities = config_of(schedule, trace), capacities_of(schedule, trace)
    fast = run_compiled(config, workload, costs, capacities, serial=False, rows=True)
    slow = run_simpy(config, workload, costs, capacities, serial=False)
    assert first_difference(slow, fast) is None
    return fast


def misses_of(trace: RoutingTrace, **options: object) -> int:
    return int(outcome(trace, OffloadSchedule().with_options(**options)).counts.misses)


def test_least_stale_keeps_what_the_pass_still_needs():
    """Three layers of one expert and two slots: recency always evicts the layer that comes next."""
    trace = recording([[[0], [0], [0]]] * 6, num_experts=2)
    assert misses_of(trace, cache__pooled_experts=2) == 18
    # The layer just left goes: of every later pass's three layer steps, one and two miss by turns.
    assert misses_of(trace, cache__policy="least-stale", cache__pooled_experts=2) == 3 + (1 + 2 + 1 + 2 + 1)


def test_affinity_keeps_what_tends_to_follow():
    """One layer, two slots: 0, 1 and 2 come as 0 1 0 2 0 1 0 2 … A follower count learns that 0 follows both others."""
    tokens = [[[expert]] for expert in [0, 1, 0, 2] * 5]
    trace = recording(tokens, num_experts=3)
    assert misses_of(trace, cache__policy="affinity", cache__experts_per_layer=2) <= misses_of(
        trace, cache__experts_per_layer=2
    )
    # After 1 or 2 comes 0; so when the third expert arrives, 0 is never the one to leave once that has been seen.
    late = outcome(trace, OffloadSchedule().with_options(cache__policy="affinity", cache__experts_per_layer=2))
    assert late.counts.hits >= 9


def test_an_activation_match_guesses_what_the_like_request_used():
    """Two kinds of requests, told apart by layer 0; from the third request on, layer 1 is guessed from the like one before."""
    kinds = [[[0], [2]], [[1], [3]]]
    trace = recording([kinds[request % 2] for request in range(6) for _ in range(3)], num_experts=4, requests=[3] * 6)
    schedule = OffloadSchedule().with_options(
        cache__policy="activation", predictor__kind="activation", cache__experts_per_layer=1, predictor__library=4
    )
    found = outcome(trace, schedule, dense=40)
    rows = found.timeline.rows
    fetched = rows[(rows[:, ROW_OP] == OP_PREFETCH) & (rows[:, ROW_LAYER] == 1)]
    # The first request has nobody to resemble and the second only the other kind. Each of the later four takes after the
    # latest request, of the other kind, at its first pass; at its two others it is known for what it is.
    assert (found.counts.guesses_true, found.counts.truths) == (4 * 2, 18)
    assert set(fetched[:, ROW_EXPERT]) <= {2, 3}
    assert fetched[:, ROW_STEP].min() >= 3


def test_a_first_choice_comes_in_full_precision_and_the_second_in_half():
    trace = recording([[[0, 1]], [[1, 0]]], num_experts=2)
    schedule = OffloadSchedule().with_options(
        cache__experts_per_layer=2, experts__bits="16", experts__low_bits="4", experts__low_rank=1
    )
    found = outcome(trace, schedule)
    # Expert 1 comes at half precision as a second choice, and again in full when it is a first one; expert 0 stays as it is.
    assert (found.counts.misses, found.counts.low_fetches) == (3, 1)
    assert found.clock.bytes_h2d == 100 + 50 + 100


@pytest.mark.parametrize(("threshold", "prefetches"), [(0.0, 2), (0.5, 2), (0.7, 0)])
def test_guesses_below_the_threshold_are_left(threshold, prefetches):
    trace = recording([[[0], [token]] for token in range(2)], num_experts=4, guess=3, prob=0.6)
    schedule = OffloadSchedule().with_options(
        cache__experts_per_layer=1, predictor__kind="next-gate", predictor__threshold=threshold
    )
    assert outcome(trace, schedule).counts.prefetches == prefetches


@pytest.mark.parametrize(("prob", "dense", "prefetches"), [(0.9, 10, 1), (0.2, 4, 0), (0.2, 40, 1)])
def test_an_expected_benefit_weighs_what_is_hidden_against_what_is_delayed(prob, dense, prefetches):
    """A copy takes 20 ns; beside 4 ns of compute it delays most of what follows, beside 40 ns it delays nothing."""
    trace = recording([[[0], [1]]], num_experts=4, guess=3, prob=prob)
    schedule = OffloadSchedule().with_options(
        cache__experts_per_layer=1, predictor__kind="next-gate", predictor__benefit=True
    )
    assert outcome(trace, schedule, dense=dense).counts.prefetches == prefetches


def test_a_wrong_guess_that_has_not_begun_is_dropped():
    """Layer 0's own miss takes longer than layer 1's dense part, so the guess for layer 1 has not begun when it proves wrong."""
    trace = recording([[[0, 1, 2], [0, 1, 2]]], num_experts=4, guess=3)
    base = OffloadSchedule().with_options(
        cache__experts_per_layer=4, predictor__kind="next-gate", kernel__miss="cheaper", copy__cancel=True
    )
    kept = outcome(trace, base.with_options(copy__cancel=False, kernel__miss="fetch"), dense=1)
    assert kept.counts.prefetches == 1
    # The first guess's copy begins at once, for the misses run on the cores: too late to drop it.
    begun = outcome(trace, base, dense=1)
    assert (begun.counts.prefetches, begun.counts.cancelled) == (1, 0)
    late = outcome(two_guesses(), base.with_options(predictor__width=2, kernel__miss="fetch"), dense=1)
    assert (late.counts.prefetches, late.counts.cancelled) == (1, 1)
    assert late.clock.bytes_h2d == 100 * (int(late.counts.misses) + 1)


def two_guesses() -> RoutingTrace:
    """Return one token whose two guesses for layer 1 are wrong: one begins while layer 1's dense part runs, one does not."""
    trace = recording([[[0], [0]]], num_experts=4, guess=3)
    predicted = np.full((1, 2, 1, 2), -1, np.int16)
    predicted[0, 1, 0] = [3, 2]
    values = {name: getattr(trace, name) for name in trace.__slots__}
    return RoutingTrace(**(values | {"predicted": predicted, "predicted_prob": np.ones(predicted.shape, np.float16)}))


def test_misses_are_divided_so_that_cores_and_link_end_together():
    trace = recording([[[0, 1, 2, 3]]], num_experts=4)
    found = {
        miss: outcome(
            trace, OffloadSchedule().with_options(cache__experts_per_layer=4, kernel__miss=miss), cpu=22
        ).counts.cpu_runs
        for miss in ("fetch", "cpu", "cheaper", "balanced")
    }
    # 22 ns on the cores against 20 + 4 by copy: alone, each is cheaper there; together, two and two end soonest (44 and 40).
    assert found == {"fetch": 0, "cpu": 4, "cheaper": 4, "balanced": 2}


def test_experts_beyond_the_host_are_read_from_disk_in_order():
    trace = recording([[[expert]] for expert in (0, 0, 0, 1, 1, 2, 0, 2)], num_experts=3)
    schedule = OffloadSchedule().with_options(cache__policy="none", copy__host_experts=1)
    found = outcome(trace, schedule)
    rows = found.timeline.rows
    read = rows[rows[:, ROW_OP] == OP_DISK]
    # Expert 0, the most popular, is there; each other takes its place, and it theirs.
    assert read[:, [ROW_STEP, ROW_EXPERT]].tolist() == [[3, 1], [5, 2], [6, 0], [7, 2]]
    assert not np.any(rows[:, ROW_OP] == OP_CPU)


def test_cores_wait_for_what_the_hosts_memory_lacks():
    trace = recording([[[0, 1]], [[0, 2]], [[0, 1]]], num_experts=3)
    schedule = OffloadSchedule().with_options(cache__policy="none", kernel__miss="cpu", copy__host_experts=2)
    rows = outcome(trace, schedule).timeline.rows
    work = rows[np.isin(rows[:, ROW_OP], (OP_DISK, OP_CPU))]
    # 0 and 1, the most popular, are there. 2 takes the place of 1, and is read (30 ns) beside the work on 0 (12 ns); then 1 that of 2.
    assert work[work[:, ROW_STEP] < 2][:, [ROW_OP, ROW_EXPERT]].tolist() == [
        [OP_CPU, 0], [OP_CPU, 1], [OP_CPU, 0], [OP_DISK, 2], [OP_CPU, 2],
    ]  # fmt: skip
    step = [work[work[:, ROW_STEP] == number] for number in range(3)]
    spans = [int(one[:, ROW_END].max() - one[:, ROW_START].min()) for one in step]
    assert spans == [24, 30 + 12, 30 + 12]
    assert outcome(trace, schedule.with_options(copy__host_experts=1)).counts.disk_reads == 5


def test_every_preset_belongs_to_a_family_and_layers_may_be_counted():
    assert set(FAMILIES) == set(PRESETS)
    assert load_preset("n-cpu-moe=3").cache.host_layers == 3
    for name in ("n-cpu-moe=-1", "n-cpu-moe=x", "n-cpu-moe="):
        with pytest.raises(InputError, match="count of layers"):
            load_preset(name)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kernel.miss": "cpu", "copy.overlap": False}, "copy.overlap"),
        ({"copy.fetch": "layer-streamed", "cache.policy": "none", "copy.overlap": False}, "copy.overlap"),
        ({"cache.placement": "front"}, "cache.placement"),
        ({"cache.host_layers": 2}, "cache.host_layers"),
        ({"experts.low_bits": "2"}, "experts.low_bits"),
        ({"experts.low_rank": 1}, "experts.low_bits"),
        ({"experts.low_bits": "2", "experts.low_rank": 1, "experts.low_fraction": 0.5}, "experts.low_rank"),
        ({"copy.host_experts": 4, "copy.write_back": True}, "copy.write_back"),
        ({"predictor.threshold": 1.5}, "predictor.threshold"),
        ({"kernel.miss": "elsewhere"}, "kernel.miss"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, field):
    from moeplan.specs.schedules.offload import apply_settings

    with pytest.raises(InputError, match=field.replace(".", r"\.")):
        apply_settings(OffloadSchedule(), options)
