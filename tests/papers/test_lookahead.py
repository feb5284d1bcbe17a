"""Lookahead's three published gains beside simulated ones: which cells there are, and what no gate can exceed."""

from __future__ import annotations

import pytest

from moeplan.papers import lookahead
from moeplan.papers.cells import CHECKED, PREDICTED, Reproduction


@pytest.fixture(scope="module")
def found() -> Reproduction:
    return lookahead.reproduce_lookahead()


def test_recall_is_that_of_the_bundled_recording() -> None:
    recall, decay = lookahead.own_recall()
    assert recall == pytest.approx(0.649, abs=5e-4)  # examples/tiny_moe/README.md
    assert recall * decay == pytest.approx(0.58, abs=0.01)


def test_published_figures_stand_in_every_column_and_nothing_is_fitted_to_them(found: Reproduction) -> None:
    gains = [cell for cell in found.cells if cell.role == CHECKED]
    assert {(cell.row, cell.published) for cell in gains} == {
        ("4-bit experts", 57.72), ("3-bit experts", 60.00), ("2-bit experts", 62.26),
    }  # fmt: skip
    assert len({cell.column for cell in gains}) == 4 and len(gains) == 12
    assert not found.constants
    assert all(
        {"row", "column", "published", "simulated", "measured", "role"} <= cell.to_dict().keys() for cell in found.cells
    )


def test_no_gate_gains_more_than_the_truth_and_none_loses_to_lru_alone(found: Reproduction) -> None:
    limits = {(cell.row, cell.column): cell.simulated for cell in found.cells if cell.role == PREDICTED}
    for cell in found.cells:
        if cell.role == CHECKED:
            assert cell.simulated <= limits[cell.row, cell.column] + 0.5
            assert cell.simulated >= 0 or "next gate" in cell.column
