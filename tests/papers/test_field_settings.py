"""Settings of one engine on one machine: the one that was measured fastest is predicted fastest, or may be."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from moeplan.papers.field.choices import LLAMA_CPP, same_but_for_settings, scores_of
from moeplan.papers.field.predict import predict_report
from moeplan.papers.field.rows import read_reports

_SHARE = 0.8


def test_the_setting_measured_best_is_predicted_best_or_within_its_interval() -> None:
    reports = [
        report for report in read_reports() if report.reason is None and report.part("engine").get("name") in LLAMA_CPP
    ]
    several = Counter(map(same_but_for_settings, reports))
    rows = [predict_report(report) for report in reports if several[same_but_for_settings(report)] > 1]
    found = scores_of(rows)["llama.cpp and ik_llama.cpp"]
    assert found["groups"] >= 10 and found["share"] >= _SHARE and found["chosen"] >= _SHARE * found["groups"]
    assert len(found["missed"]) == found["groups"] - found["chosen_or_within"]


def test_a_prediction_that_rules_the_best_setting_out_is_a_miss() -> None:
    """Figures with the two settings' predictions swapped, and intervals of nothing."""
    reports = [report for report in read_reports() if report.id in ("C35", "C36")]
    slow, fast = (predict_report(report) for report in reports)

    def wrong(half_width: float) -> dict[str, Any]:
        rows = [
            dataclasses.replace(row, value=other.value, low=value / half_width, high=value * half_width)
            for row, other in ((slow, fast), (fast, slow))
            if (value := other.value or 0.0)
        ]
        found: dict[str, Any] = scores_of(rows)["llama.cpp and ik_llama.cpp"]
        return found

    assert (wrong(1.01)["chosen"], wrong(1.01)["share"]) == (0, 0)
    assert wrong(1.01)["missed"] == [{"best_measured": "C36", "best_predicted": "C35"}]
    assert (wrong(2)["chosen"], wrong(2)["share"]) == (0, 1)
    assert scores_of([fast]) == {}  # one setting is no choice


def test_a_larger_micro_batch_gains_what_was_measured() -> None:
    """Prompts of gpt-oss-120b on an RTX 3090 with 26 layers' experts on the host: 380 tokens/s at 512, 1682 at 4096."""
    rows = [row for row in read_reports() if row.row["placement"].get("cpu_layers") == 26 and row.row["model"] == "gpt-oss-120b"
            and row.row["metric"] == "prefill_tokens_per_s" and row.row["rig"].startswith("rtx-3090")]  # fmt: skip
    small, large = sorted(rows, key=lambda row: row.row["workload"]["ubatch"])
    measured = large.row["value"] / small.row["value"]
    predicted = (predict_report(large).value or 0.0) / (predict_report(small).value or 1.0)
    assert measured / 1.25 < predicted < measured * 1.25
