"""Weights move from one placement to another while steps go on: results stay right, and just the weights that are lacking travel."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.executor.parallel.agreement import rounding_bound
from moeplan.executor.parallel.job import Job
from moeplan.executor.parallel.launch import run_jobs
from moeplan.executor.parallel.moving import (
    FETCH_EXPERT,
    FETCH_FROM,
    FETCH_FROM_SLOT,
    WAYS,
    Move,
    fetches,
    moved_slots,
)
from moeplan.executor.parallel.reference import reference_states
from moeplan.sim.parallel.traffic import Topology
from parallel_jobs import EXPERTS, LAYERS, prepared, preset32

ROUNDS = 5


def moving_job(way: str) -> Job:
    """Return a job of two ranks whose experts come into the opposite order while it runs."""
    job = prepared(preset32("ep"), steps=2).job
    after = np.ascontiguousarray(job.physical_to_logical[:, ::-1])
    # Every expert has one copy: token choices follow their expert.
    slots = tuple(
        np.take_along_axis(np.argsort(after, axis=1)[None], step.experts.astype(np.int64), axis=2) for step in job.steps
    )
    return dataclasses.replace(job, repeats=ROUNDS, move=Move(way=way, physical_to_logical=after, slots=slots, begin=2))


def test_results_stay_right_while_weights_move() -> None:
    jobs = [moving_job(way) for way in WAYS]
    for job, runs in zip(jobs, run_jobs(jobs), strict=True):
        assert job.move is not None
        reference = reference_states(job)
        for run in runs:
            assert run.moved is not None
            for number, expected in enumerate(reference):
                mine = expected[torch.from_numpy(run.tokens[number])]
                for states in run.moved.states[number]:
                    error = float(((torch.from_numpy(states) - mine).norm(dim=1) / mine.norm(dim=1)).max())
                    assert error <= rounding_bound(job)
            usable = run.moved.usable
            assert len(usable) == (ROUNDS + 1) * 2 and (np.diff(usable) >= 0).all() and not usable[: 2 * 2].any()
            assert run.moved.spans[:, 0].tolist() == list(range(1, LAYERS + 1))
            if job.move.way == "at-once":
                assert usable[4:].tolist() == [LAYERS] * 8
            elif job.move.way == "layer-by-layer":
                assert usable[4:].tolist() == [1, 2, *[LAYERS] * 6]
        assert len({tuple(run.moved.usable.tolist()) for run in runs if run.moved is not None}) == 1


@given(st.integers(0, 10_000))
@settings(max_examples=examples(20), deadline=None)
def test_every_slot_is_filled_from_a_rank_that_holds_its_expert_the_nearest_first(seed: int) -> None:
    draw = np.random.default_rng(seed)
    topology = Topology(num_ranks=4, num_nodes=2, slots_per_rank=3)
    before, after = (
        np.stack([draw.permutation(np.append(np.arange(EXPERTS), draw.integers(0, EXPERTS, 12 - EXPERTS))) for _ in range(2)])
        for _ in range(2)
    )  # fmt: skip
    for layer, found in enumerate(fetches(before, after, topology)):
        assert found[:, FETCH_EXPERT].tolist() == after[layer].tolist()
        held = before[layer].reshape(4, 3)
        assert (held[found[:, FETCH_FROM], found[:, FETCH_FROM_SLOT]] == found[:, FETCH_EXPERT]).all()
        for slot, source in enumerate(found[:, FETCH_FROM].tolist()):
            holders = {rank for rank in range(4) if after[layer, slot] in held[rank]}
            to = slot // 3
            near = holders & {to // 2 * 2, to // 2 * 2 + 1}
            assert source == to if to in holders else source in (near or holders)
        links = moved_slots(found, topology)
        lacking = [after[layer, slot] not in held[slot // 3] for slot in range(12)]
        assert links.sum() == sum(lacking) and not links.diagonal().any()
