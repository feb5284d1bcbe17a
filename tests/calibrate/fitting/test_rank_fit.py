"""Stages of steps of many ranks: laws that made samples are found again, ranks share cores fairly, predictions go by them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from calibration_samples import lawful_samples
from moeplan.api.load import load_trace
from moeplan.base.errors import InputError, MissingCalibration
from moeplan.calibrate.costs.rank_laws import (
    CORES,
    LINK,
    TERMS,
    TOGETHER,
    dense_features,
    finish_s,
    law_name,
    rank_laws,
    shares,
    still_to_pass,
)
from moeplan.calibrate.fitting.fit import fit_profile
from moeplan.calibrate.samples import Sample, SampleSet
from moeplan.planner.parallel.case import Ask, ParallelRequest
from moeplan.planner.parallel.plan import ep_plan_to_dict, make_ep_plan
from moeplan.sim.parallel.program import OP_REDUCE
from moeplan.sim.parallel.runnable import as_run_on_cores
from moeplan.sim.parallel.simulate import ParallelSimulation
from moeplan.sim.parallel.tiers import constants_of
from moeplan.sim.parallel.traffic import StepLoad, count_step
from moeplan.specs.machines.profile import Profile, profile_to_json
from moeplan.specs.machines.profile_file import profile_from_json
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import ep_schedule_from_dict
from parallel_jobs import preset32

LAWS = {
    "dense": (2e-4, 1e-10, 2e-10, 3e-10), "head": (1e-4, 1e-10, 1e-10), "expert.32": (3e-4, 1e-4, 2e-10, 3e-10),
    "dispatch": (8e-4, 5e-8, 1e-9, 5e-10), "combine": (5e-4, 5e-8, 1e-9, 5e-10),
    "reduce": (6e-4, 5e-8, 2e-9, 5e-10), "reduce.intra": (4e-4, 0.0, 2e-9, 5e-10),
    "busy.dispatch": (3e-4, 2e-9), "busy.combine": (2e-4, 1e-9),
}  # fmt: skip
PLACE = {"ranks": 4.0, "nodes": 2.0}


def rank_samples(cores: float = 2.0) -> list[Sample]:
    """Return stages that follow `LAWS`, of two shapes and several sizes."""
    draw = np.random.default_rng(1)
    found = []
    for what, law in LAWS.items():
        kind = what.partition(".")[0]
        for shape in ("one", "other"):
            for size in (1, 3, 9, 27):
                for number in range(3):
                    if kind == "busy":
                        total = draw.uniform(1, 9) * size * 1e4
                        features = np.full((4, 2), [0.25, total / 4])  # of each rank its part
                        seconds = law[0] + total * law[1]
                    elif kind in ("dispatch", "combine", "reduce"):
                        features = np.stack(
                            [np.ones(4), *(np.full(4, each) for each in draw.uniform(1, 9, 3) * size * 1e4)], axis=1
                        )
                        features[:, 1] *= number % 2 * (what != "reduce.intra")  # stages inside nodes, too
                        low = features[0] * law
                        seconds = low[0] + max(low[1], low[2]) + low[3]
                    else:
                        scale = [1.0, 1.0, 1e6, 1e6] if kind == "expert" else [1.0, 1e6, 1e6, 1e6][: len(law)]
                        features = draw.uniform(1, 5, (4, len(law))) * np.array(scale) * size
                        features[:, 0] = 1
                        seconds = float(finish_s(features @ np.array(law), cores).max())
                    text = ";".join(",".join(f"{value:.12g}" for value in row) for row in features)
                    found.append(Sample(kind="rank_stage", labels={"what": what, "shape": shape, "features": text},
                                        arguments=PLACE | {"tokens": float(size)}, seconds=(seconds,)))  # fmt: skip
    facts = {CORES: cores, LINK: 5e-8, TOGETHER: 1.2}
    return [
        *found,
        *(
            Sample(kind="rank_fact", labels={"what": what}, arguments=PLACE, seconds=(value,))
            for what, value in facts.items()
        ),
    ]


def cluster_samples() -> SampleSet:
    samples = lawful_samples()
    return dataclasses.replace(samples, samples=(*samples.samples, *rank_samples()))


@pytest.fixture(scope="module")
def cluster() -> Profile:
    return fit_profile(cluster_samples()).profile


def test_laws_that_made_the_samples_are_found_again(cluster: Profile) -> None:
    laws = rank_laws(profile_from_json(profile_to_json(cluster)), 4, 2)
    assert (
        laws is not None and (laws.cores, laws.together) == (2.0, 1.2) and laws.link_bytes_per_s == pytest.approx(2e7)
    )
    for what, law in LAWS.items():
        assert laws.seconds[what].tolist() == pytest.approx(law, rel=0.05), what
        assert laws.relative_uncertainty[what] < 0.05
    assert cluster.node is not None and cluster.node.num_gpus == 2 and cluster.node.nic_bytes_per_s is not None
    assert cluster.node.nic_bytes_per_s.value == pytest.approx(1e7, rel=0.05)  # a rank's half of its node's link
    assert set(TERMS) == {what.partition(".")[0] for what in LAWS}


def test_other_numbers_of_ranks_are_refused_by_name(cluster: Profile) -> None:
    constants = constants_of(cluster, 2, 2)
    assert constants.ranks is not None and constants.shared_nic
    with pytest.raises(MissingCalibration, match="measured: 4 ranks in 2 nodes"):
        constants_of(cluster, 4, 2)
    with pytest.raises(MissingCalibration, match="2 ranks in 1 nodes"):
        constants_of(cluster, 1, 2)


def test_damaged_samples_are_one_clear_complaint() -> None:
    whole = cluster_samples()
    for change, words in (
        ({"what": "else"}, "not one of dense"), ({"features": "1,2"}, "numbers for each"), ({"features": "a"}, "numbers for each"),
    ):  # fmt: skip
        broken = [
            dataclasses.replace(sample, labels=dict(sample.labels) | change)
            if sample.kind == "rank_stage" and sample.labels["what"] == "dense" else sample
            for sample in whole.samples
        ]  # fmt: skip
        with pytest.raises(InputError, match=words):
            fit_profile(dataclasses.replace(whole, samples=tuple(broken)))
    without = [sample for sample in whole.samples if sample.labels.get("what") != CORES]
    with pytest.raises(InputError, match="cores"):
        fit_profile(dataclasses.replace(whole, samples=tuple(without)))


def test_ranks_share_cores_fairly() -> None:
    # Four on two cores: all half as fast until the first is done, two alone on a core at the end.
    assert finish_s(np.array([1.0, 1.0, 1.0, 1.0]), 2.0).tolist() == [2.0] * 4
    assert finish_s(np.array([4.0, 1.0, 2.0, 3.0]), 2.0).tolist() == pytest.approx([5.5, 2.0, 3.5, 4.5])
    assert finish_s(np.array([3.0, 1.0]), 2.0).tolist() == [3.0, 1.0]
    seconds = np.random.default_rng(0).uniform(0, 1, (50, 4))
    order, weights = shares(seconds, 2.0)
    last = (np.take_along_axis(seconds, order, axis=-1) * weights).sum(axis=-1)
    assert last.tolist() == pytest.approx(finish_s(seconds, 2.0).max(axis=-1).tolist())
    assert law_name(4, 2, CORES) == "ranks.4x2.cores"


def test_an_older_calibration_takes_keys_and_values_for_weights(cluster: Profile) -> None:
    name = law_name(4, 2, "dense")
    older = dataclasses.replace(cluster.curves[name], arguments={"term": (0.0, 1.0, 2.0)}, seconds=(1e-4, 1e-10, 2e-10))
    laws = rank_laws(dataclasses.replace(cluster, curves={**cluster.curves, name: older}), 4, 2)
    assert laws is not None and laws.seconds["dense"].tolist() == [1e-4, 1e-10, 2e-10, 2e-10]


def test_a_step_of_ranks_goes_by_the_laws_in_both_simulators(cluster: Profile) -> None:
    model, schedule = load_model("tiny-moe"), preset32("ep")
    simulation = ParallelSimulation(model, cluster, 2, 2, False, 16)
    draw = np.random.default_rng(3)
    slots = np.argsort(draw.random((40, 6, 16)), axis=2)[:, :, :2].astype(np.int64)
    load = count_step(slots, np.arange(40) % 4, simulation.topology(16), schedule)
    assert simulation.run(schedule, load, engine="both").makespan_ns > 0
    tables = simulation.tables(schedule, load)
    sent, came = load.sent[0, 0], load.received[0, 0]  # [tiers, ranks]
    row_bytes = 4 * 256 + 8 * 2
    node = max(int(part[0].reshape(2, 2).sum(axis=1).max()) for part in (sent, came)) * row_bytes
    start, between, inside, shared = LAWS["dispatch"]
    common = start + int(sent.sum()) * row_bytes * shared
    assert tables.ex_ns[0, 0].max() == pytest.approx((common + node * between) * 1e9, rel=0.1)
    busiest = int(np.maximum(sent[1], came[1]).max()) * row_bytes
    assert tables.ex_ns[0, 1].max() == pytest.approx((common + busiest * inside) * 1e9, rel=0.1)
    # Four equal dense parts on two cores take twice as long as one.
    alone = float(np.array(dense_features(model, [0], 10, 16)) @ np.array(LAWS["dense"]))
    assert tables.work_ns[0].max() == pytest.approx(2e9 * alone, rel=0.1)
    with pytest.raises(MissingCalibration, match=r"measured: expert\.32"):
        simulation.tables(schedule.with_options(kernel__bits="16"), load)
    slower = simulation.predict(
        schedule.with_options(pipeline__micro_batches=2), [_halved(slots, simulation)], check_memory=False
    )
    assert slower.relative_uncertainty < 0.1 and simulation.sources() == "measured"


def test_attention_that_ranks_of_a_node_divide_goes_by_the_measured_all_reduce(cluster: Profile) -> None:
    model = load_model("tiny-moe")
    simulation = ParallelSimulation(model, cluster, 2, 2, False, 16)
    slots = np.argsort(np.random.default_rng(3).random((40, 6, 16)), axis=2)[:, :, :2].astype(np.int64)
    found = {}
    for attention in ("data", "tensor"):
        schedule = preset32("ep", parallel__attention=attention)
        load = count_step(slots, np.arange(40) % 4, simulation.topology(16), schedule)
        assert simulation.run(schedule, load, engine="both").makespan_ns > 0
        found[attention] = simulation.program(schedule), simulation.tables(schedule, load)
    program, tables = found["tensor"]
    reductions = np.flatnonzero(program.ex_kind == OP_REDUCE)
    assert len(reductions) == model.num_moe_layers and not (found["data"][0].ex_kind == OP_REDUCE).any()
    # Two ranks add up 20 tokens of 256 values: each sends half of them there, and half of the sums back.
    num_bytes = 20 * 256 * 2
    start, _, inside, _ = cluster.curves["ranks.4x2.reduce.intra"].seconds
    assert (tables.ex_bytes[reductions, 1] == num_bytes).all() and not tables.ex_bytes[reductions, 0].any()
    assert tables.ex_ns[reductions[0], 1].max() == pytest.approx((start + num_bytes * inside) * 1e9, rel=0.01)
    alone = float(np.array(dense_features(model, [0], 20, 16, 2, 2)) @ np.array(LAWS["dense"]))
    assert tables.work_ns[0].max() == pytest.approx(2e9 * alone, rel=0.1)
    without = {name: curve for name, curve in cluster.curves.items() if ".reduce" not in name}
    older = ParallelSimulation(model, dataclasses.replace(cluster, curves=without), 2, 2, False, 16)
    with pytest.raises(MissingCalibration, match=r"reduce\.intra"):
        older.tables(schedule, load)


def test_exchanges_beside_kernels_take_cores_from_them(cluster: Profile) -> None:
    laws = rank_laws(cluster, 4, 2)
    assert laws is not None
    # Of two cores that four ranks compute on; eight cores have four to spare.
    assert laws.lost_s(0.3, 0.2) == pytest.approx(0.15)
    assert dataclasses.replace(laws, cores=8.0).lost_s(0.3, 0.2) == 0.0
    assert dataclasses.replace(laws, cores=5.0).lost_s(0.3, 0.2) == pytest.approx(0.1 / 4)
    model = load_model("tiny-moe")
    idle = {name: curve for name, curve in cluster.curves.items() if ".busy" not in name}
    slots = np.argsort(np.random.default_rng(3).random((400, 6, 16)), axis=2)[:, :, :2].astype(np.int64)
    work = {}
    for name, profile in (("busy", cluster), ("idle", dataclasses.replace(cluster, curves=idle))):
        simulation = ParallelSimulation(model, profile, 2, 2, False, 16)
        for micro in (1, 2):
            schedule = preset32("ep", pipeline__micro_batches=micro)
            load = count_step(slots, np.arange(400) % 4, simulation.topology(16), schedule)
            tables = simulation.tables(schedule, load)
            work[name, micro] = tables.work_ns.max(axis=1).sum()
            moved = tables.ex_bytes.sum()
    assert work["busy", 1] == work["idle", 1]  # nothing beside it
    kept = (
        12 * (3e-4 + 2e-4) + (moved / 2 + 400 * 16 * 6) * 3e-9
    )  # two batches in six layers, both ways, headers but few
    lost = (work["busy", 2] - work["idle", 2]) / 1e9
    assert 0.5 * kept / 2 < lost < 1.1 * kept / 2


def _halved(slots: np.ndarray[tuple[int, ...], np.dtype[np.int64]], simulation: ParallelSimulation) -> StepLoad:
    schedule = preset32("ep").with_options(pipeline__micro_batches=2)
    return count_step(slots, np.arange(40) % 4, simulation.topology(16), schedule)


def test_plans_for_ranks_leave_out_what_was_not_measured_between_them(cluster: Profile) -> None:
    request = ParallelRequest(
        num_nodes=2, ranks_per_node=2, tokens_per_rank=40, context_tokens=16, bits="32", dense_bits="32", search_moves=20,
    )  # fmt: skip
    recording, model = load_trace("bundled"), load_model("tiny-moe")
    document = ep_plan_to_dict(make_ep_plan(model, cluster, recording, request, ask=Ask(seconds=1.0)))
    told = as_run_on_cores(ep_schedule_from_dict(document["best"]["schedule"]), model)
    assert told is not None
    assert {"tensor-parallel", "parm", "ppmoe", "comet"} <= set(document["baselines_left_out"])
    assert {"ep", "grace", "eplb"} <= {one["name"] for one in document["baselines"]}


def test_the_link_has_passed_what_ranks_that_were_done_first_could_send() -> None:
    draw = np.random.default_rng(3)
    for _ in range(50):
        sent, before = draw.uniform(0, 9, 4), draw.uniform(0, 3, 4) * draw.integers(0, 2, 4)
        before[draw.integers(4)] = 0.0
        came = np.concatenate([draw.dirichlet((1, 1)) * sent[2:].sum(), draw.dirichlet((1, 1)) * sent[:2].sum()])
        left = []
        for here, there in (((0, 1), (2, 3)), ((2, 3), (0, 1))):
            total = came[list(there)].sum()
            queue = sorted(
                (-min(before[one], before[other]), sent[one] * came[other] / total) for one in here for other in there
            )
            now = -10.0
            for begin, size in queue:
                now = max(now, begin) + size / 2.0  # a link of 2 bytes a second
            left.append(max(now, 0.0) * 2.0)
        assert still_to_pass(sent, came, before, 2.0, 2) == pytest.approx(max(left))
        assert still_to_pass(sent, came, np.zeros(4), 2.0, 2) == pytest.approx(max(sent[:2].sum(), sent[2:].sum()))
    assert still_to_pass(np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 4)), 2.0, 2).tolist() == [0.0] * 3
