"""Exchanges and kernels that share all multiprocessors slow each other down; what overlaps nothing, or keeps some apart, does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moeplan.sim.parallel.simulate import ParallelSimulation
from moeplan.sim.parallel.tiers import constants_of
from moeplan.sim.parallel.traffic import expect_step
from moeplan.specs.machines.bundled_kernels import with_kernels
from moeplan.specs.machines.overlap import shared_speed
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import ExpertParallelSchedule

PROFILE = with_kernels(load_hardware("h100-sxm"), "sglang")
MODEL = dataclasses.replace(load_model("deepseek-v3"), num_layers=8, moe_layers=tuple(range(3, 8)))


def step_s(speed: float, **options: object) -> float:
    constants = dataclasses.replace(constants_of(PROFILE, 4, 8), shared_speed=speed)
    simulation = ParallelSimulation(MODEL, PROFILE, 4, 8, False, 2048, constants=constants)
    schedule = ExpertParallelSchedule(name="x").with_options(all_to_all__kind="all-choices", **options)
    chance = np.full((MODEL.num_moe_layers, 1, 256), 8 / 256)
    load = expect_step(chance, np.full(32, 128, np.int64), simulation.topology(256), schedule)
    return simulation.predict(schedule, [load], engine="both", check_memory=False).step_s


def test_two_batches_gain_less_where_they_share_everything() -> None:
    ideal, shared, slower = (step_s(speed, pipeline__micro_batches=2) for speed in (1.0, 0.8, 0.7))
    # Each is slower at most by the speed it has left, and only while the other runs.
    assert ideal < shared < ideal / 0.8
    assert shared < slower < ideal / 0.7


def test_nothing_that_does_not_overlap_is_slowed() -> None:
    assert step_s(0.8) == step_s(1.0)


def test_multiprocessors_that_are_kept_for_exchanges_are_not_shared() -> None:
    kept = {"pipeline__micro_batches": 2, "pipeline__all_to_all_sm_fraction": 0.18}
    assert step_s(0.8, **kept) == step_s(1.0, **kept)


def test_servers_of_gpus_share_as_published_clusters_do() -> None:
    assert constants_of(PROFILE, 4, 8).shared_speed == shared_speed()
    assert constants_of(PROFILE, 1, 8).shared_speed == pytest.approx(shared_speed())
