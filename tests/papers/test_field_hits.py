"""Hit rates that reports state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moeplan.papers.field.hits import stated_hits
from moeplan.papers.field.predict import predict_report
from moeplan.papers.field.rows import read_reports
from moeplan.papers.field.setup import set_up

ROW: dict[str, Any] = {
    "id": "T1", "rig": "t", "model": "qwen3-30b-a3b", "quant": {"experts": "Q4_K_M"}, "gpus": [{"name": "RTX 5090", "pcie": "4.0 x16"}],
    "engine": {"name": "imp", "backend": "cuda"}, "placement": {"kind": "expert-cache", "cache_fraction": 0.19},
    "workload": {"context_tokens": 64, "generated_tokens": 32}, "metric": "decode_tokens_per_s", "value": 20.0,
}  # fmt: skip


def _reports(tmp_path: Path, *rows: dict[str, Any]) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(ROW | row) for row in rows), encoding="utf-8")
    return read_reports(path)


@pytest.mark.parametrize(
    ("row", "share"),
    [
        ({"note": "cold, hit 74.1 %; link measured 25.6 GB/s"}, 0.741), ({"note": "about 95 % hits reported"}, 0.95),
        ({"placement": {"kind": "expert-cache", "hit_rate": 0.6}}, 0.6), ({"placement": {"kind": "expert-cache", "hit_rate": 60}}, 0.6),
        ({"note": "hits are not said; 40 % of experts"}, None), ({"note": "hit 120 %"}, None),
        ({"note": "hit 74.1 %", "metric": "prefill_tokens_per_s"}, None), ({}, None),
    ],
)  # fmt: skip
def test_what_a_report_says_of_hits(tmp_path: Path, row: dict[str, Any], share: float | None) -> None:
    assert stated_hits(_reports(tmp_path, row)[0]) == share


def test_stated_hits_stand_in_place_of_locality(tmp_path: Path) -> None:
    unsaid, few, many = _reports(tmp_path, {}, {"note": "hit 30 %"}, {"note": "hit 90 %"})
    assert set_up(unsaid).likewise and not set_up(few).likewise
    slow, fast, open_ = (predict_report(report) for report in (few, many, unsaid))
    assert slow.metrics is not None and fast.metrics is not None
    assert slow.metrics.hit_rate == pytest.approx(0.3, abs=0.05) and fast.metrics.hit_rate == pytest.approx(
        0.9, abs=0.05
    )
    assert slow.value < fast.value  # type: ignore[operator]
    assert open_.high / open_.low > fast.high / fast.low  # type: ignore[operator]
