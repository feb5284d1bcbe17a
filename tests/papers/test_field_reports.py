"""Public reports: every line is predicted or says why not, nothing stops a run, and scores are what the definitions say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.papers.field.predict import Predicted, predict_report
from moeplan.papers.field.rows import BUNDLED, Report, read_reports
from moeplan.papers.field.scores import document, score
from moeplan.specs.models.load import load_model

ROW = json.loads((BUNDLED / "reports.jsonl").read_text(encoding="utf-8").splitlines()[0])


def report(**changes: Any) -> Report:
    return Report(id="x", row=ROW | changes, folder=BUNDLED)


def test_one_card_is_within_a_factor_of_its_figure() -> None:
    found = predict_report(report())
    assert found.value is not None and found.low is not None and found.high is not None
    assert found.low < found.value < found.high
    assert 0.6 < found.value / ROW["value"] < 1.6


def test_bundled_reports_are_read_and_nearly_all_can_be_set_up() -> None:
    reports = read_reports()
    one_card = [row for row in reports if row.num_gpus <= 1]
    found = [predict_report(row) for row in one_card[::12]]
    assert len(reports) >= 442 and sum(row.value is None for row in found) <= 1


def test_no_measurement_stands_twice() -> None:
    found: dict[str, str] = {}
    for one in read_reports():
        row = one.row
        cards = [card["name"] for card in row.get("gpus") or []]
        model = str(row["model"]).removeprefix("configs/").removesuffix(".json")
        said = (row["engine"]["name"], row["engine"]["backend"], cards, row["host"]["cpu"], model, row["quant"]["experts"],
                row["placement"]["kind"], row["metric"], row["value"])  # fmt: skip
        assert found.setdefault(json.dumps(said), one.id) == one.id, f"{one.id} and {found[json.dumps(said)]}"


@given(st.dictionaries(st.sampled_from(sorted(ROW)), st.one_of(
    st.none(), st.integers(-3, 2**40), st.floats(), st.text(max_size=8), st.lists(st.none(), max_size=2),
    st.dictionaries(st.text(max_size=4), st.none(), max_size=2),
), max_size=4))  # fmt: skip
def test_nothing_in_a_line_stops_a_run(changes: dict[str, Any]) -> None:
    found = predict_report(read_line(ROW | changes))
    assert (found.value is None) == (found.reason is not None)
    if found.value is not None:
        assert math.isfinite(found.value) and found.value > 0


def read_line(row: dict[str, Any]) -> Report:
    from moeplan.papers.field.rows import _report

    return _report(1, json.dumps(row), BUNDLED)


def test_unknown_engines_and_cards_are_answered() -> None:
    known = predict_report(report(engine={"name": "brand-new", "version": None, "backend": "cuda"}))
    assert known.value is not None and any("brand-new" in line for line in known.assumed)
    card = [{"name": "Imaginary 9000", "memory_gib": 24, "count": 1, "pcie": None}]
    assert "not in the catalogue" in str(predict_report(report(gpus=card)).reason)


@pytest.mark.parametrize("text", ["", "\n", "no json\n", "[1]\n", '{"metric": "decode_tokens_per_s", "value": -1}\n'])
def test_files_of_other_things(tmp_path: Path, text: str) -> None:
    path = tmp_path / "reports.jsonl"
    path.write_text(text, encoding="utf-8")
    if not text.strip():
        with pytest.raises(InputError):
            read_reports(path)
        return
    (row,) = read_reports(path)
    assert row.reason is not None and document([predict_report(row)])["num_predicted"] == 0


def made(measured: float, predicted: float, *, low: float = 0.0, high: float = 1e9, rig: str = "a") -> Predicted:
    row = report(value=measured, rig=rig)
    return Predicted(
        report=row, value=predicted, low=low, high=high, bound="compute", roofline=2 * measured, reason=None, assumed=()
    )


def test_scores_are_what_they_say() -> None:
    rows = [made(100, 110, low=100, high=120), made(200, 150, low=140, high=160), made(400, 400)]
    found = score(rows)
    assert found["median_relative_error"] == pytest.approx(0.10)
    assert found["bias"] == pytest.approx(1.0) and found["coverage"] == pytest.approx(2 / 3)
    assert found["kendall_tau"] == 1.0 and found["roofline_median"] == pytest.approx(1.0)
    assert found["roofline06_median"] == pytest.approx(0.2)
    assert score([made(100, 50), made(200, 40)])["kendall_tau"] == -1.0
    assert score([made(100, 50), made(110, 40)])["kendall_tau"] is None  # too close to say


def test_configurations_beside_the_reports_are_models() -> None:
    for path in sorted((BUNDLED / "configs").glob("*.json")):
        assert load_model(path).total_parameters > 1e9


def test_the_page_shows_every_kind_and_names_misses(tmp_path: Path) -> None:
    from moeplan.reports.field_page import write_field_page

    path = tmp_path / "field.html"
    found = document(
        [
            made(100, 110, low=90, high=120),
            made(100, 300, low=200, high=400),
            predict_report(read_line({"metric": "speed"})),
        ]
    )
    write_field_page(path, found)
    text = path.read_text(encoding="utf-8")
    assert "2 of 3 public measurements" in text and "left out" not in text and "plot-gpu-decode-data" in text
    assert "1 predictions are more than 1.5 times off" in text and "an unknown metric" in text
