"""A run replayed piece by piece is the run replayed at once, to the nanosecond; and a long one stays small."""

from __future__ import annotations

import os

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.sim.offload import simulators as engines
from moeplan.sim.offload.run_records import NEVER
from moeplan.sim.offload.simulators import first_difference, run_compiled
from moeplan.sim.offload.workload import Workload, build_workload
from moeplan.sim.policies.steps import Steps
from moeplan.sim.timeline import D2H, DISK, H2D
from moeplan.specs.schedules.offload import OffloadSchedule, WorkloadOptions, apply_settings
from strategies import capacities_of, config_of, make_costs, make_trace, runs

LONG = os.environ.get("MOEPLAN_LONG") == "1"


def joined(pieces: list[Steps], num_layers: int) -> dict[str, np.ndarray]:
    """Return the columns of consecutive pieces laid end to end, counted from the start of the run."""
    entries, tokens, out = 0, 0, {name: [] for name in Steps._fields[:11]}
    steps = 0
    for piece in pieces:
        assert piece.first_layer_step == steps * num_layers
        for name, column in out.items():
            values = getattr(piece, name)
            if name == "layer_step_start":
                values = values[:-1] + entries
            elif name == "step_start":
                values = values[:-1] + tokens
            column.append(values)
        entries += int(piece.layer_step_start[-1])
        tokens += int(piece.step_start[-1])
        steps += len(piece.step_phase)
    return {name: np.concatenate(column) for name, column in out.items()}


def whole(workload: Workload) -> dict[str, np.ndarray]:
    steps = workload.steps
    return {name: getattr(steps, name)[: -1 if name.endswith("_start") else None] for name in Steps._fields[:11]}


@settings(max_examples=400 if LONG else 60, deadline=None)
@given(run=runs(), data=st.data())
def test_a_run_in_pieces_is_the_run_at_once(run, data):
    config, workload, costs, capacities, schedule, trace = run
    pieces = build_workload(
        trace, schedule.workload, reset_per_request=schedule.cache.reset == "request",
        with_next_use=schedule.cache.policy == "belady", piece_entries=data.draw(st.integers(1, 60)),
    )  # fmt: skip
    serial = not schedule.copy.overlap
    for rows in (True, False):
        once = run_compiled(config, workload, costs, capacities, serial=serial, rows=rows)
        many = run_compiled(config, pieces, costs, capacities, serial=serial, rows=rows)
        assert first_difference(once, many) is None
        assert once.clock == many.clock
    count = data.draw(st.integers(1, workload.num_steps))
    some = [run_compiled(config, w, costs, capacities, serial=serial, max_steps=count) for w in (workload, pieces)]
    assert first_difference(*some) is None
    limit = data.draw(st.integers(1, int(once.step_end[-1])))
    given_up = [run_compiled(config, w, costs, capacities, serial=serial, limit_ns=limit) for w in (workload, pieces)]
    assert given_up[0].abandoned == given_up[1].abandoned == (int(once.step_end[-1]) > limit)


def test_what_is_under_way_between_two_pieces_goes_on(monkeypatch):
    """Slow links, so that copies, write-backs and disk reads outlive the step that asked for them."""
    carried = dict.fromkeys(("copying", "writing back", "reading", "prefetches", "write-backs", "reads"), 0)
    whole_call = engines.run_overlapped

    def watched(*arguments):
        whole_call(*arguments)
        run = arguments[-1]
        if run.program[0].more:
            for name, lane in (("copying", H2D), ("writing back", D2H), ("reading", DISK)):
                carried[name] += int(run.lanes[lane].end != NEVER)
            for name, queue in (("prefetches", run.guesses), ("write-backs", run.backs), ("reads", run.reads)):
                carried[name] += int(queue.ends[0].head < queue.ends[0].tail)

    monkeypatch.setattr(engines, "run_overlapped", watched)
    for seed in range(48):
        rng = np.random.default_rng(seed)
        trace = make_trace(rng, num_layers=3, num_experts=6, top_k=2, requests=[(3, 5), (2, 6)], guesses=2)
        tier = {"copy.write_back": True} if seed % 2 else {"copy.host_experts": 9}
        schedule = apply_settings(
            OffloadSchedule(name="slow link"),
            {
                "cache.policy": "lru", "cache.experts_per_layer": 3, "copy.chunk_bytes": 4096, **tier,
                "predictor.kind": ("all", "next-gate", "synthetic")[seed // 2 % 3], "predictor.depth": 2, "predictor.width": 4,
                "predictor.staging": (0, 4)[seed // 6 % 2], "predictor.recall": 0.3,
            },
        )  # fmt: skip
        workload = build_workload(trace, schedule.workload)
        pieces = build_workload(trace, schedule.workload, piece_entries=int(rng.integers(6, 24)))
        costs = make_costs(rng, workload, schedule)
        costs = costs._replace(
            chunk_ns=costs.chunk_ns * 8, back_ns=costs.back_ns * 8, disk_ns=rng.integers(100, 900, costs.disk_ns.shape)
        )
        config, capacities = config_of(schedule, trace), capacities_of(schedule, trace)
        once, many = (run_compiled(config, w, costs, capacities, serial=False, rows=True) for w in (workload, pieces))
        assert first_difference(once, many) is None, seed
    assert min(carried.values()) > 0, carried


@settings(max_examples=examples(60), deadline=None)
@given(run=runs(), entries=st.integers(1, 60), next_use=st.booleans())
def test_pieces_hold_what_the_whole_holds(run, entries, next_use):
    _, _, _, _, schedule, trace = run
    built = [
        build_workload(trace, schedule.workload, with_next_use=next_use, piece_entries=most)
        for most in (entries, 10**9)
    ]
    cut, uncut = built
    pieces = list(cut.pieces())
    for piece in pieces:
        assert len(piece.layer_step_expert) <= entries or len(piece.step_phase) == 1
    assert len(list(uncut.pieces())) == 1
    known, found = whole(uncut), joined(pieces, trace.num_layers)
    if not next_use:
        del known["layer_step_next_use"], found["layer_step_next_use"]
    for name, column in known.items():
        assert np.array_equal(found[name], column), name
    assert np.array_equal(cut.first_use, uncut.first_use) and cut.max_expert_tokens == uncut.max_expert_tokens
    tokens = uncut.steps.layer_step_tokens
    for workload in (cut, uncut):
        assert np.array_equal(workload.layer_step_sizes, np.bincount(tokens, minlength=2))
        assert (workload.num_expert_uses, workload.max_expert_tokens) == (len(tokens), tokens.max())


def test_next_uses_are_those_a_search_finds():
    trace = make_trace(np.random.default_rng(4), num_layers=2, num_experts=5, top_k=2, requests=[(3, 5), (2, 6)])
    workload = build_workload(trace, WorkloadOptions(), with_next_use=True, piece_entries=9)
    found = joined(list(workload.pieces()), 2)
    sets = [
        set(found["layer_step_expert"][low:high].tolist())
        for low, high in zip(
            found["layer_step_start"], [*found["layer_step_start"][1:], len(found["layer_step_expert"])], strict=True
        )
    ]
    at = 0
    for layer_step, experts in enumerate(sets):
        for expert in found["layer_step_expert"][at : at + len(experts)].tolist():
            later = [other for other in range(layer_step + 2, len(sets), 2) if expert in sets[other]]
            assert found["layer_step_next_use"][at] == (later[0] if later else 2**62)
            at += 1
