"""Experts held and hit-rate curves: replayed decisions against counting by hand and against the simulated schedule."""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.reports.offload.hit_curves import curve_sizes, hit_curves
from moeplan.reports.timelines.occupancy import cache_occupancy
from moeplan.sim.offload.simulate import Simulation
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.traces.format import RoutingTrace
from strategies import make_trace


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    """Return the tiny model on a recording of three requests."""
    model = load_model("tiny-moe")
    trace = make_trace(
        np.random.default_rng(5), num_layers=model.num_moe_layers, num_experts=model.num_experts, top_k=model.top_k,
        requests=[(6, 20), (3, 15), (0, 10)], guesses=2, skew=0.1,
    )  # fmt: skip
    return Simulation(model=model, profile=load_hardware("t4"), trace=trace)


def held_by_hand(trace: RoutingTrace, capacity: int, *, reset: bool) -> list[list[int]]:
    """Return the size of each layer's recency cache, summed over layers, after each decision of one token a step."""
    caches: list[list[int]] = [[] for _ in range(trace.num_layers)]
    held = []
    for token in range(trace.num_tokens):
        if reset and trace.position[token] == 0:
            caches = [[] for _ in range(trace.num_layers)]
        held.append([])
        for layer, cache in enumerate(caches):
            for expert in trace.experts[token, layer].tolist():
                if expert in cache:
                    cache.remove(expert)
                cache.append(expert)
                del cache[:-capacity]
            held[-1].append(sum(map(len, caches)))
    return held


@pytest.mark.parametrize("reset", [False, True])
def test_a_recency_cache_fills_up_and_stays_full(simulation: Simulation, reset: bool) -> None:
    schedule = OffloadSchedule().with_options(
        cache__experts_per_layer=5, cache__reset="request" if reset else "never", workload__prefill_chunk_tokens=1
    )
    found = cache_occupancy(simulation, schedule)
    assert found.experts.tolist() == held_by_hand(simulation.trace, 5, reset=reset)
    assert found.expert_bytes == simulation.expert_bytes(schedule)
    assert cache_occupancy(simulation, schedule, num_steps=7).experts.tolist() == found.experts[:7].tolist()


def test_staging_buffers_count_and_a_static_cache_starts_full(simulation: Simulation) -> None:
    guessing = OffloadSchedule().with_options(
        cache__policy="static",
        cache__pooled_experts=20,
        predictor__kind="next-gate",
        predictor__width=2,
        predictor__staging=3,
    )
    held = cache_occupancy(simulation, guessing).experts
    assert held.min() >= 20 and held.max() == 23
    assert np.all(np.diff(held.ravel()) >= 0)  # buffers fill and are then overwritten, never emptied


def test_decisions_that_weigh_costs_are_followed_too(simulation: Simulation) -> None:
    schedule = OffloadSchedule().with_options(cache__experts_per_layer=5, kernel__miss="balanced")
    found = cache_occupancy(simulation, schedule)
    counts = simulation.predict(schedule).outcome.counts
    fetched = counts.misses - counts.cpu_runs
    assert 0 < counts.cpu_runs < counts.misses
    assert found.experts[-1, -1] == fetched - counts.evictions


def test_without_a_cache_a_layer_step_holds_what_it_uses(simulation: Simulation) -> None:
    workload = simulation.workload(OffloadSchedule())
    used = np.diff(workload.steps.layer_step_start).reshape(workload.num_steps, -1)
    demand = OffloadSchedule().with_options(cache__policy="none")
    assert cache_occupancy(simulation, demand).experts.tolist() == used.tolist()
    whole = demand.with_options(copy__fetch="layer")
    assert np.all(cache_occupancy(simulation, whole).experts == simulation.trace.num_experts)
    ahead = demand.with_options(predictor__kind="oracle")
    after = np.concatenate([used[:, 1:], np.zeros_like(used[:, :1])], axis=1)
    assert cache_occupancy(simulation, ahead).experts.tolist() == (used + after).tolist()


def test_curves_are_what_simulating_each_size_gives(simulation: Simulation) -> None:
    schedule = OffloadSchedule().with_options(
        cache__pooled_experts=30,
        predictor__kind="next-gate",
        predictor__depth=2,
        predictor__staging=4,
        copy__overlap=False,
    )
    lru, belady = hit_curves(simulation, schedule)
    assert lru.experts_per_layer == belady.experts_per_layer == tuple(range(1, 17))
    for size in (1, 6, 16):
        alone = OffloadSchedule().with_options(cache__experts_per_layer=size)
        count = simulation.run(alone, engine="simpy").counts
        assert lru.hit_fraction[size - 1] == count.hits / (count.hits + count.misses)
    assert list(lru.hit_fraction) == sorted(lru.hit_fraction)
    assert all(best >= plain for best, plain in zip(belady.hit_fraction[1:], lru.hit_fraction[1:], strict=True))
    assert lru.hit_fraction[-1] == belady.hit_fraction[-1]  # everything fits: only first uses miss
    assert lru.bytes_per_size == simulation.trace.num_layers * simulation.expert_bytes(schedule)


def test_a_schedule_without_a_cache_has_curves_too(simulation: Simulation) -> None:
    lru, _ = hit_curves(simulation, OffloadSchedule().with_options(cache__policy="none", copy__fetch="layer"))
    assert lru.hit_fraction == hit_curves(simulation, OffloadSchedule())[0].hit_fraction


@pytest.mark.parametrize(("experts", "count"), [(1, 1), (8, 8), (33, 33), (64, 33), (256, 33)])
def test_curves_are_thinned_but_keep_both_ends(experts: int, count: int) -> None:
    sizes = curve_sizes(experts)
    assert len(sizes) == count and sizes[0] == 1 and sizes[-1] == experts and list(sizes) == sorted(set(sizes))
