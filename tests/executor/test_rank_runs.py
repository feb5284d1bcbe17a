"""What `calibrate --ranks` measures: every stage, all-reduces, contexts and cores that exchanges keep, each with a law."""

from __future__ import annotations

import numpy as np

from moeplan.calibrate.costs.rank_laws import CORES, FIRST, STEP, TOGETHER, laws_of
from moeplan.calibrate.fitting.rank_fit import fit_ranks
from moeplan.calibrate.samples import SampleSet
from moeplan.executor.calibration.rank_runs import RankExtent, measure_ranks


def test_everything_that_predictions_need_is_measured() -> None:
    samples, notes = measure_ranks(RankExtent(ranks=2, repeats=1, tokens=(4, 8, 16)), ("32",))
    assert notes == () or "they wait for cores" in notes[0]  # where no thread may go before others
    stages = [one for one in samples if one.kind == "rank_stage"]
    whats = {one.labels["what"] for one in stages}
    assert whats == {"dense", "head", "expert.32", "dispatch", "combine", "busy.dispatch", "busy.combine", "reduce"}
    dense = [one.labels["features"].split(";")[0].split(",") for one in stages if one.labels["what"] == "dense"]
    per_token = {float(row[3]) / float(row[1]) for row in dense}  # keys and values over operations
    assert max(per_token) > 4 * min(per_token)  # of a short and a long context
    reductions = [one for one in stages if one.labels["what"] == "reduce"]
    # Two ranks pass half of 16-bit values on, and half of the sums.
    assert {float(one.labels["features"].split(",")[2]) / (2 * one.arguments["tokens"]) for one in reductions} == {
        256.0,
        512.0,
    }
    assert len(reductions) == 2 * 3 and all(len(one.seconds) == 1 for one in reductions)
    assert {one.labels["what"] for one in samples if one.kind == "rank_fact"} == {CORES, FIRST, STEP, TOGETHER}
    fit = fit_ranks(SampleSet(device={}, conditions={}, samples=tuple(samples)), "a test")[0]
    laws = laws_of(fit.curves, 2, 1)
    assert laws.exchanges_first is (notes == ())
    assert laws.step_uncertainty is not None and laws.step_uncertainty > 0
    off = next(one for one in samples if one.labels["what"] == STEP)
    assert len(off.seconds) == 2 * (
        4 * 3 + 2
    )  # every step of either shape: plain, every choice, two that overlap; longer contexts
    assert laws.knows_busy and 1 <= laws.together <= 8
    assert float(laws.busy_s("dispatch", np.array(0.0))) > 0
