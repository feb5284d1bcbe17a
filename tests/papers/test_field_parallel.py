"""Figures of expert parallelism: every line is predicted or says why not, nothing stops a run, and scores are what definitions say."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.papers.field.parallel.differences import PAIRS, run_of
from moeplan.papers.field.parallel.predict import Predicted, predict_all, predict_row
from moeplan.papers.field.parallel.rows import BUNDLED, Row, _row, read_rows
from moeplan.papers.field.parallel.scores import document, score
from moeplan.papers.field.parallel.setup import set_up
from moeplan.planner.placement.eplb import even_rank_load, max_over_mean, rebalance
from moeplan.planner.placement.placement import contiguous
from moeplan.traces.synthesis.loads import POPULARITY, loads_of

ROWS = {row.id: row for row in read_rows()}
ONE = "silicon-dsr1_h200_sglang_fp8_disagg_8192x1024_c256_cfg434"
MIXED = "silicon-2026_03_25_deepseek_r1_h200_sxm_trtllm_fp8_agg_1024x1024_c128_tp8_0_ep8_0_1244"

OPERATIONS = ("aic-deepep-ll-n1-t8", "aic-moe-h200_sxm-a1.2-ep8-T1024-eplb0", "diff-tbo-decode-32")


def changed(name: str, **facts: Any) -> Row:
    return _row(1, json.dumps({**ROWS[name].row, **facts}), BUNDLED.parent)


def test_a_server_is_within_a_factor_of_its_figure() -> None:
    found = predict_row(ROWS[ONE])
    assert found.value is not None and found.low is not None and found.high is not None
    assert found.low < found.value < found.high
    assert 0.7 < found.value / ROWS[ONE].measured < 1.4


def test_nearly_all_bundled_figures_are_predicted_and_the_others_say_why_not() -> None:
    found = predict_all(list(ROWS.values())[::9])
    assert len(ROWS) == 261
    assert all((row.value is None) == (row.reason is not None) for row in found)
    assert sum(row.value is None for row in found) <= 3


@given(st.dictionaries(st.sampled_from(sorted({key for row in ROWS.values() for key in row.row})), st.one_of(
    st.none(), st.integers(-3, 2**40), st.floats(), st.text(max_size=8), st.lists(st.none(), max_size=2),
), max_size=4), st.sampled_from([ONE, MIXED, *OPERATIONS]))  # fmt: skip
def test_nothing_in_a_line_stops_a_run(changes: dict[str, Any], name: str) -> None:
    found = predict_row(changed(name, **changes))
    assert (found.value is None) == (found.reason is not None)
    if found.value is not None:
        assert math.isfinite(found.value) and found.value > 0


def test_lines_that_are_no_figures_are_kept_with_the_reason(tmp_path: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '[]\nnonsense\n{"id": "a"}\n{"id": "b", "measured": 0}\n{"id": "c", "measured": 3, "metric": "tps_gpu"}\n'
    )
    found = predict_all(read_rows(path))
    assert [row.reason for row in found][:4] == [
        "not a JSON object", "not JSON", "its figure is not a number above zero", "its figure is not a number above zero",
    ]  # fmt: skip
    assert found[4].reason == "no model is named"
    assert document(found)["num_predicted"] == 0
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no line in it"):
        read_rows(tmp_path / "none.jsonl")


def test_predictions_of_others_that_stand_beside_a_figure_are_not_read() -> None:
    before = predict_row(ROWS[MIXED])
    after = predict_row(changed(MIXED, decode_step_ms=1.0, prefill_tps_gpu=1.0, decode_share=0.01, measured=1.0))
    assert (before.value, before.low, before.high) == (after.value, after.low, after.high)


def test_loads_are_like_published_recordings() -> None:
    for kind, most, of_32 in (("prefill", (5.5, 8.1), (2.0, 2.9)), ("decode", (5.3, 7.0), (2.0, 2.9))):
        planned, served = loads_of(POPULARITY[kind], 58, 256, 8)
        assert most[0] < (planned / planned.mean(axis=1, keepdims=True)).max(axis=1).mean() < most[1]
        assert of_32[0] < max_over_mean(even_rank_load(planned, contiguous(58, 256, 256, 32, 1))).mean() < of_32[1]
        balanced = rebalance(planned, 288, 32, 1)
        assert max_over_mean(even_rank_load(planned, balanced)).mean() < 1.02
        assert 1.06 < max_over_mean(even_rank_load(served, balanced)).mean() < 1.15
        assert np.allclose(served.sum(axis=1), 8e6)
    planned, served = loads_of(POPULARITY["uniform"], 2, 64, 6)
    assert np.allclose(planned, planned[0, 0]) and np.allclose(planned, served)


def test_a_placement_made_for_one_load_meets_another() -> None:
    even, made = (
        set_up(changed("lmsys-prefill-4096", eplb=text)).load().max_over_mean() for text in ("perfect", "eplb+32")
    )
    plain = set_up(changed("lmsys-prefill-4096", eplb="contiguous+0")).load().max_over_mean()
    assert even == pytest.approx(1.0) and 1.05 < made < 1.2 and plain > 1.8


def test_every_bundled_ratio_that_is_described_has_its_two_runs() -> None:
    assert set(PAIRS) <= set(ROWS)
    for pair in PAIRS.values():
        assert run_of(pair.above).row != run_of(pair.below).row


def row_of(measured: float, value: float | None, metric: str = "tps_gpu", **facts: Any) -> Predicted:
    report = Row(
        id="x", row={"measured": measured, "metric": metric, "phase": "decode", **facts}, folder=BUNDLED.parent
    )
    low, high = (None, None) if value is None else (value / 1.2, value * 1.2)
    return Predicted(report=report, value=value, low=low, high=high, roofline=measured * 2)


def test_scores_by_hand() -> None:
    rows = [row_of(100, 110), row_of(100, 130), row_of(100, None), row_of(50, 40)]
    found = score(rows)
    assert found["n"] == 4 and found["predicted"] == 3
    assert found["median_relative_error"] == pytest.approx(0.2)
    assert found["bias"] == pytest.approx(1.1)
    assert found["coverage"] == pytest.approx(1 / 3)
    assert found["kendall_tau"] == 1
    assert found["roofline_median"] == pytest.approx(1.0) and found["roofline06_median"] == pytest.approx(0.2)


def test_a_time_that_is_predicted_too_short_counts_as_too_fast() -> None:
    assert score([row_of(100, 80, metric="step_ms")])["bias"] == pytest.approx(1.25)
    assert score([row_of(100, 80, metric="tps_node")])["bias"] == pytest.approx(0.8)


def test_signs_of_ratios() -> None:
    ratios = [row_of(1.3, 1.1, "", group="difference"), row_of(0.7, 1.1, "", group="difference")]
    assert document(ratios)["signs"] == {"n": 2, "right": 1}
