"""Settings of one engine on one machine: the one that was measured fastest is predicted fastest, or may be."""

from __future__ import annotations

import json
from collections import defaultdict

from moeplan.papers.field.predict import Predicted, predict_report
from moeplan.papers.field.rows import Report, read_reports

_SHARE = 0.8


def groups() -> list[list[Report]]:
    """Return the reports of llama.cpp that differ in how it was started, by machine, model and prompt."""
    found = defaultdict(list)
    for report in read_reports():
        row = report.row
        if row["engine"]["name"] == "llama.cpp" and report.num_gpus <= 1 and row["metric"] != "ttft_s":
            work = row["workload"]
            same = (
                row["rig"],
                row["model"],
                row["quant"]["experts"],
                row["metric"],
                row["engine"]["backend"],
                work["prompt_tokens"],
            )
            found[json.dumps([*same, work["batch"]])].append(report)
    return [rows for rows in found.values() if len({setting(row) for row in rows}) > 1]


def setting(report: Report) -> str:
    """Return how the engine was started."""
    work = report.row["workload"]
    return json.dumps([report.row["placement"], work["ubatch"], work["kv_type"]], sort_keys=True)


def test_the_setting_measured_fastest_is_predicted_fastest_or_within_its_interval() -> None:
    right, seen = 0, 0
    for rows in groups():
        found: list[tuple[float, Predicted]] = [(float(row.row["value"]), predict_report(row)) for row in rows]
        told = [(measured, one) for measured, one in found if one.value is not None and one.high is not None]
        if len(told) < 2:
            continue
        most = max(told, key=lambda pair: pair[0])[1]
        seen += 1
        right += (most.high or 0.0) >= max(one.value or 0.0 for _, one in told)
    assert seen >= 6 and right >= _SHARE * seen


def test_a_larger_micro_batch_gains_what_was_measured() -> None:
    """Prompts of gpt-oss-120b on an RTX 3090 with 26 layers' experts on the host: 380 tokens/s at 512, 1682 at 4096."""
    rows = [row for row in read_reports() if row.row["placement"].get("cpu_layers") == 26 and row.row["model"] == "gpt-oss-120b"
            and row.row["metric"] == "prefill_tokens_per_s" and row.row["rig"].startswith("rtx-3090")]  # fmt: skip
    small, large = sorted(rows, key=lambda row: row.row["workload"]["ubatch"])
    measured = large.row["value"] / small.row["value"]
    predicted = (predict_report(large).value or 0.0) / (predict_report(small).value or 1.0)
    assert measured / 1.25 < predicted < measured * 1.25
