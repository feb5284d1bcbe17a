"""Expert parallelism on a machine whose own exchanges were measured: tables are used, shared cores cost, the rest is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration_samples import lawful_samples
from exchange_samples import FOUR_ON_TWO_CORES, SIZES, lawful_exchanges
from moeplan.base.errors import DoesNotFit, MissingCalibration
from moeplan.base.units import NS_PER_S
from moeplan.calibrate.all_to_all_matrices import matrix_from_text, port_bytes
from moeplan.calibrate.costs.all_to_all_table import curve_name, read_table
from moeplan.calibrate.fitting.all_to_all_fit import fit_exchanges
from moeplan.calibrate.fitting.fit import fit_profile
from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.calibrate.samples import Sample, SampleSet
from moeplan.sim.parallel.program import INTRA, OP_EXPERT
from moeplan.sim.parallel.sharing import overlapped, stretched
from moeplan.sim.parallel.simulate import ParallelSimulation
from moeplan.sim.parallel.tiers import Tier, constants_of
from moeplan.sim.parallel.traffic import StepLoad, count_step
from moeplan.specs.machines.profile import Profile
from moeplan.specs.schedules.parallel import ExpertParallelSchedule, load_ep_preset

MODEL = made_up_model("small", hidden=512, intermediate=256, num_layers=2, num_experts=8, top_k=2)
EXCHANGES = {ranks: lawful_exchanges(ranks, noise=0.05, seed=ranks) for ranks in (2, 4)}


@pytest.fixture(scope="module")
def profile() -> Profile:
    whole = lawful_samples()
    return fit_profile(dataclasses.replace(whole, samples=(*whole.samples, *EXCHANGES[2], *EXCHANGES[4]))).profile


def simulation(profile: Profile, ranks: int) -> ParallelSimulation:
    return ParallelSimulation(MODEL, profile, 1, ranks, context_tokens=16)


def load_of(case: ParallelSimulation, schedule: ExpertParallelSchedule, tokens: int = 64) -> StepLoad:
    rng = np.random.default_rng(7)
    slots = np.argsort(rng.random((tokens, 2, 8)) ** np.arange(1, 9), axis=2)[:, :, :2]  # low numbers are chosen more
    return count_step(slots, np.arange(tokens) % case.num_ranks, case.topology(8), schedule)


@pytest.mark.parametrize("ranks", [2, 4])
def test_exchanges_are_priced_within_the_uncertainty_stated_of_the_medians_nine_times_in_ten(
    profile: Profile, ranks: int
) -> None:
    tier = constants_of(profile, 1, ranks).intra
    assert tier.table is not None and tier.source == "measured" and 0 < tier.relative_uncertainty < 0.2
    inside = []
    for seed in range(8):  # of one machine, one calibration is luckier than another
        samples = lawful_exchanges(ranks, noise=0.05, seed=seed)
        found = fit_exchanges(SampleSet(device={}, conditions={}, samples=tuple(samples)), "a lawful machine")
        assert found is not None
        table = read_table(curve_name("gloo", ranks), ranks, found.curves)
        measured = dataclasses.replace(tier, table=table, relative_uncertainty=table.relative_uncertainty)
        alone = [s for s in samples if s.kind == "all_to_all" and s.labels["companion"] == "none"]
        assert len(alone) == 3 * len(SIZES)
        inside += [_off(measured, sample) <= measured.relative_uncertainty for sample in alone]
    assert (
        0.85 < np.mean(inside) < 0.99
    )  # 216 of them: 0.9 give or take two and a half standard errors, and not always right


def _off(tier: Tier, sample: Sample) -> float:
    sent, received = port_bytes(matrix_from_text(sample.labels["matrix"], int(sample.arguments["ranks"])))
    found = tier.port_ns(np.maximum(sent, received), total_bytes=sent.sum(keepdims=True))
    return abs(float(found.max()) / NS_PER_S / sample.median_s - 1)


def test_tables_of_a_step_hold_the_measured_times_of_its_traffic(profile: Profile) -> None:
    case, schedule = simulation(profile, 4), ExpertParallelSchedule()
    load = load_of(case, schedule)
    tables = case.tables(schedule, load)
    table = case.costing.constants.intra.table
    assert table is not None
    sent, received = (each[0, 0, INTRA] * 512 * 2 for each in (load.sent, load.received))
    assert sent.tolist() != received.tolist()  # the recording is skewed
    expected = np.ceil(table.seconds(np.maximum(sent, received), sent.sum()) * NS_PER_S).astype(np.int64)
    assert tables.ex_ns[0, INTRA].tolist() == expected.tolist()
    found = case.predict(schedule, [load], engine="both")
    assert found.exchange_s == pytest.approx(tables.ex_ns.max(axis=2).sum() / NS_PER_S)
    assert case.sources() == "measured"


def test_four_ranks_on_two_cores_compute_half_as_fast(profile: Profile) -> None:
    case, schedule = simulation(profile, 4), ExpertParallelSchedule()
    load = load_of(case, schedule)
    program, tables = case.program(schedule), case.tables(schedule, load)
    bare = dataclasses.replace(
        profile, curves={k: v for k, v in profile.curves.items() if not k.startswith("slowdown.compute/ranks")}
    )
    alone = simulation(bare, 4).tables(schedule, load)
    expert = program.op_kind == OP_EXPERT
    ratio = tables.work_ns[expert] / np.maximum(1, alone.work_ns[expert])
    assert ratio.max() == pytest.approx(FOUR_ON_TWO_CORES, rel=0.1)


def test_what_overlaps_slows_down_and_what_does_not_stays(profile: Profile) -> None:
    kept = {name: curve for name, curve in profile.curves.items() if not name.startswith("slowdown.")}
    bare = dataclasses.replace(profile, curves=kept)
    for name in ("ep", "tbo"):
        schedule = dataclasses.replace(load_ep_preset(name)).with_options(pipeline__all_to_all_sm_fraction=0.0)
        steps = []
        for machine in (profile, bare):
            case = simulation(machine, 2)
            steps.append(case.predict(schedule, [load_of(case, schedule, 512)], engine="both").step_s)
        if name == "ep":
            assert steps[0] == pytest.approx(steps[1], rel=0.02)  # but for two ranks on two cores, measured with noise
        else:
            assert 1.02 * steps[1] < steps[0] < 2 * steps[1]


def test_other_numbers_of_ranks_networks_and_too_little_memory_are_refused(profile: Profile) -> None:
    with pytest.raises(MissingCalibration, match=r"3 ranks.*between 2, 4 ranks"):
        constants_of(profile, 1, 3)
    with pytest.raises(MissingCalibration, match="no network"):
        constants_of(profile, 2, 2)
    assert constants_of(profile, 1, 1).intra.table is None
    device = profile.device
    case, schedule = simulation(profile, 4), ExpertParallelSchedule()
    load = load_of(case, schedule)
    needed = case.rank_bytes(schedule, load)
    for has, fits in ((4 * needed, True), (4 * needed - 4, False)):  # ranks of a CPU share its memory
        less = dataclasses.replace(device, memory_bytes=dataclasses.replace(device.memory_bytes, value=float(has)))
        small = simulation(dataclasses.replace(profile, device=less), 4)
        if fits:
            small.check_fits(schedule, load)
        else:
            with pytest.raises(DoesNotFit, match="on every rank"):
                small.check_fits(schedule, load)


# --- sharing ------------------------------------------------------------------------------------------------------------


def test_stretching_rounds_up() -> None:
    work = np.array([[0, 10, 3]])
    assert stretched(work, 1.0) is work
    assert stretched(work, 1.25).tolist() == [[0, 13, 4]]


def test_the_shorter_of_two_that_overlap_decides_for_how_long() -> None:
    work = np.array([[1000, 900]])
    alone, beside = (np.array([[[0, 0], [each, each // 2]]]) for each in (200, 400))
    # Exchanges last 400 beside kernels of half the speed: 200 of 1000 are done then, and 800 are left.
    slower, exchanges = overlapped(work, alone, beside, 0.5)
    assert slower.tolist() == [[1200, 1080]] and exchanges.tolist() == beside.tolist()
    # Kernels of 100 last 200 beside exchanges, half of whose 400 are over by then: 100 of 200 alone are left.
    slower, exchanges = overlapped(work // 10, alone, beside, 0.5)
    assert slower.tolist() == [[200, 180]] and exchanges.tolist() == [[[0, 0], [300, 150]]]
    nothing = np.zeros_like(alone)
    assert overlapped(work, nothing, nothing, 0.5) == (work, nothing)


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_together_takes_no_less_than_either_alone_and_what_does_not_meet_costs_nothing(
    compute: int, exchange: int, compute_speed: float, exchange_speed: float
) -> None:
    work, alone = np.array([[compute]]), np.array([[[0], [exchange]]])
    beside = np.ceil(alone / exchange_speed).astype(np.int64)
    slower, mixed = overlapped(work, alone, beside, compute_speed)
    longest = max(int(slower.max()), int(mixed.max()))
    assert longest >= max(compute, exchange)
    assert longest <= max(compute / compute_speed, exchange / exchange_speed) + 2
    shorter = min(compute / compute_speed, float(beside.max()))
    assert min(int(slower.max()), int(mixed.max())) <= shorter + 2
