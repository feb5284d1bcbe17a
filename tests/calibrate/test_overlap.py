"""What stage 5 measures of overlap on a GPU: ratios found again, and gone by in predictions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from calibration_samples import lawful_samples
from moeplan.base.errors import InputError
from moeplan.calibrate.costs.overlap_table import overlap_table
from moeplan.calibrate.fitting.fit import fit_profile
from moeplan.calibrate.fitting.overlap_fit import overlap_curves
from moeplan.calibrate.samples import Sample, SampleSet
from moeplan.sim.parallel.program import OP_EXPERT
from moeplan.sim.parallel.simulate import ParallelSimulation
from moeplan.sim.parallel.tiers import EpConstants, Tier
from moeplan.sim.parallel.traffic import count_step
from moeplan.specs.machines.load import load_machine
from moeplan.specs.machines.profile import profile_to_json
from moeplan.specs.machines.profile_file import profile_from_json
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import load_ep_preset
from overlap_samples import DENSE, LAUNCHES, ROWS, layer_samples


def sample_set(samples: list[Sample]) -> SampleSet:
    return SampleSet(device={"name": "a GPU"}, conditions={}, samples=tuple(samples))


def test_ratios_that_made_the_samples_are_found_again() -> None:
    table = overlap_table(overlap_curves(sample_set(layer_samples()), "a test"))
    assert table is not None
    dense = table.dense_over_grouped(np.array([1.0, *ROWS, 1e6]))
    assert dense is not None and dense.tolist() == pytest.approx([1.6, *DENSE, 0.8])  # as at the ends beyond them
    for launches, longer in {1.0: 1.0, **LAUNCHES}.items():
        over = table.over_one_launch(np.array(ROWS), int(launches))
        assert over is not None and over.tolist() == pytest.approx([longer] * 3)
    assert [table.speed_on(share) for share in (1.0, 0.75, 0.5)] == pytest.approx([1.0, 1 / 1.2, 1 / 1.9])
    assert table.speed_on(0.25) == pytest.approx(0.5 / 1.9)
    # Half of a second is left when the shorter ends; 1.25 times as long while both run.
    assert table.shared_speed == pytest.approx(1 / 1.25)
    assert overlap_table({}) is None and overlap_curves(sample_set([]), "a test") == {}


def test_a_ratio_without_its_other_half_is_one_clear_complaint() -> None:
    every = layer_samples()
    with pytest.raises(InputError, match="no grouped launch as a whole"):
        overlap_curves(sample_set([one for one in every if one.labels.get("kernel") == "dense"]), "a test")
    with pytest.raises(InputError, match="none measured"):
        overlap_curves(sample_set([one for one in every if one.labels.get("what") != "copies"]), "a test")


def test_a_calibration_keeps_them_in_the_profile() -> None:
    samples = lawful_samples()
    whole = dataclasses.replace(samples, samples=(*samples.samples, *layer_samples()))
    again = profile_from_json(profile_to_json(fit_profile(whole).profile))
    table = overlap_table(again.curves)
    assert table is not None and table.shared_speed == pytest.approx(0.8)


def _experts_s(constants: EpConstants, rows: int, **options: object) -> float:
    """Return the seconds that the slowest rank's experts take in a step with so many tokens of each rank."""
    model = load_model("olmoe")
    simulation = ParallelSimulation(
        model, load_machine("t4"), 1, 4, False, 16, weight_format("16"), constants=constants
    )
    schedule = load_ep_preset("ep").with_options(**options)
    slots = np.random.default_rng(0).integers(0, model.num_experts, (4 * rows, model.num_moe_layers, model.top_k))
    load = count_step(slots, np.arange(4 * rows) % 4, simulation.topology(model.num_experts), schedule)
    program, tables = simulation.program(schedule), simulation.tables(schedule, load)
    return float(tables.work_ns[program.op_kind == OP_EXPERT].max(axis=1).sum()) / 1e9


@pytest.mark.parametrize(("rows", "faster"), [(32, "grouped"), (32_768, "dense")])
def test_the_measured_faster_kernel_is_chosen(rows: int, faster: str) -> None:
    link = Tier(bytes_per_s=1e11, latency_s=1e-5, source="assumed", relative_uncertainty=0.1)
    table = overlap_table(overlap_curves(sample_set(layer_samples()), "a test"))
    constants = EpConstants(inter=None, intra=link, overlap=table)
    found = {kernel: _experts_s(constants, rows, kernel__choice=kernel) for kernel in ("grouped", "dense", "best")}
    assert found["best"] == min(found.values()) == found[faster]
    assert found["dense"] / found["grouped"] == pytest.approx(DENSE[0 if faster == "grouped" else -1], rel=0.3)


def test_launches_and_fewer_multiprocessors_cost_what_was_measured() -> None:
    link = Tier(bytes_per_s=1e11, latency_s=1e-5, source="assumed", relative_uncertainty=0.1)
    table = overlap_table(overlap_curves(sample_set(layer_samples()), "a test"))
    constants = EpConstants(inter=None, intra=link, overlap=table)
    one = _experts_s(constants, 1024)
    two = _experts_s(constants, 1024, pipeline__split="expert", pipeline__num_groups=2)
    assert two / one == pytest.approx(LAUNCHES[2.0], rel=0.06)  # the slowest rank of each group may be another
    plain = dataclasses.replace(constants, overlap=None)
    split: dict[str, object] = {"pipeline__split": "expert", "pipeline__num_groups": 2}
    kept = split | {"pipeline__all_to_all_sm_fraction": 0.25}
    # Of products that compute bounds, as many rows make them.
    slower = {
        name: _experts_s(of, 32_768, **kept) / _experts_s(of, 32_768, **split)
        for name, of in (("measured", constants), ("plain", plain))
    }
    assert slower["measured"] == pytest.approx(1.2, rel=0.05) and slower["plain"] == pytest.approx(1 / 0.75, rel=0.05)
