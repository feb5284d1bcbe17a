"""Public servers with and without rebalancing: ratios come near with nothing fitted, and the one that slowed down is explained."""

from __future__ import annotations

import json

import pytest

from moeplan.papers.cells import CHECKED, Cell
from moeplan.papers.rebalancing import reproduce_rebalancing


@pytest.fixture(scope="module")
def cells() -> dict[tuple[str, str, str], Cell]:
    found = reproduce_rebalancing()
    json.dumps(found.to_dict(), allow_nan=False)
    assert {each.role for each in found.cells} == {CHECKED}
    assert all("none of these rows" in each.fitted_to for each in found.constants)
    return {(each.table, each.row, each.column): each for each in found.cells}


def test_ratios_of_placements_made_before_serving_come_near(cells: dict[tuple[str, str, str], Cell]) -> None:
    ratios = [each for (_, _, column), each in cells.items() if column in ("offline / none", "EPLB / none")]
    assert len(ratios) == 5
    for each in ratios:
        assert each.published is not None and each.published > 1 and each.simulated > 1
        assert abs(each.relative_error or 0) < 0.06, each


def test_a_stall_is_made_of_planning_sends_and_bytes(cells: dict[tuple[str, str, str], Cell]) -> None:
    stall = cells["DeepSeek-R1, 32 x GB200", "synchronous rearrangement", "stall"]
    assert 0.65 < stall.simulated < 1.70


def test_what_became_slower_is_predicted_slower_and_its_stalls_explain_it(
    cells: dict[tuple[str, str, str], Cell],
) -> None:
    slower = cells["Kimi-K3, 16 ranks", "EPLB over none", "throughput"]
    assert slower.published is not None and slower.published < slower.simulated < 0.8
    assert "24 synchronous rearrangements explain it" in slower.note and "41.8 s each, 68% of the run" in slower.note
