"""What counts tell: a part to plan on, another to report on."""

import dataclasses

import numpy as np
import pytest

from moeplan.planner.parallel.evidence import CHOOSE, DRIFT, PLAN, REPORT, count_evidence
from moeplan.planner.placement.comparison import Candidate
from moeplan.planner.placement.eplb import rebalance
from moeplan.planner.placement.replica_choice import WeightedChoice
from moeplan.specs.schedules.parallel import ExpertParallelSchedule
from moeplan.traces.recording import LoadProfile

RANKS = 8


def loads(tokens: int, **more: object) -> LoadProfile:
    """Counts of 6 layers of 64 experts, skewed as recordings are."""
    popularity = np.exp(np.random.default_rng(1).standard_normal((6, 64)) * 0.8)
    counts = np.rint(popularity / popularity.sum(axis=1, keepdims=True) * tokens).astype(np.int64) + 1
    return LoadProfile(
        counts=counts, model="", layer_ids=tuple(range(6)), source="made up", licence="", top_k=4, **more
    )  # type: ignore[arg-type]


def busiest(profile: LoadProfile, part: str) -> float:
    """The busiest rank's rows over the mean under a placement of what is planned on, mean over layers."""
    evidence = count_evidence(profile, top_k=4, step_tokens=4096)
    candidate = Candidate(placement=rebalance(evidence.load, 64 + RANKS, RANKS, 1), router=WeightedChoice())
    rows = evidence.loads(part, candidate, ExpertParallelSchedule(name="eplb"))[0].rank_rows()
    return float((rows.max(axis=-1) / rows.mean(axis=-1)).mean())


def test_a_placement_is_reported_on_counts_that_it_was_not_made_from():
    many = loads(10**8)
    assert busiest(many, PLAN) == busiest(many, CHOOSE) < 1.03
    assert 1.03 < busiest(many, REPORT) < 1.2
    assert busiest(loads(2000), REPORT) > busiest(many, REPORT)  # few tokens tell less
    notes = " ".join(count_evidence(many, top_k=4, step_tokens=64).notes)
    assert f"{DRIFT:.0%}" in notes and "windows" in notes


def test_later_windows_are_reported_as_they_were_recorded():
    windows = np.stack([loads(10_000).counts, loads(10_000).counts[:, ::-1]])
    profile = loads(10_000, windows=windows, window_unit="pass")
    found = count_evidence(dataclasses.replace(profile, counts=windows.sum(axis=0)), top_k=4, step_tokens=64)
    assert found.load == pytest.approx(windows[0])
    assert found.served == pytest.approx(windows[1])


def test_even_counts_stay_even_and_the_same_counts_say_the_same():
    even = LoadProfile(counts=np.full((2, 8), 5), model="", layer_ids=(0, 1), source="", licence="", top_k=2)
    assert count_evidence(even, top_k=2, step_tokens=64).served is None
    one, two = (count_evidence(loads(5000), top_k=4, step_tokens=64) for _ in range(2))
    assert (one.load == two.load).all() and (one.served == two.served).all()
