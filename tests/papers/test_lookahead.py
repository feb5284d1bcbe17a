"""Lookahead's three published gains beside simulated ones: which cells there are, and what better gates could gain."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeplan.papers import lookahead
from moeplan.papers.cells import CHECKED, PREDICTED


def test_recall_is_that_of_the_bundled_recording() -> None:
    recall, decay = lookahead.own_recall()
    assert recall == pytest.approx(0.649, abs=5e-4)  # examples/tiny_moe/README.md
    assert recall * decay == pytest.approx(0.58, abs=0.01)


def test_trained_gates_guess_better_than_the_same_gates_untrained() -> None:
    (own, own_decay), (trained, decay) = lookahead.own_recall(), lookahead.trained_recall()
    assert trained > own and trained * decay > own * own_decay


def test_measured_gains_stand_beside_published_ones_with_the_limit_of_their_machine() -> None:
    cells = lookahead.measured_cells()
    assert {cell.row for cell in cells} >= {f"{bits}-bit experts" for bits in lookahead.PUBLISHED}
    for cell in cells:
        assert cell.measured is not None and "hiding everything would gain" in cell.note and "n = " in cell.note
        assert cell.published == lookahead.PUBLISHED.get(cell.row.partition("-")[0])


def test_nothing_is_measured_where_no_results_were_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lookahead, "_path", lambda name: tmp_path / name)
    assert lookahead.measured_cells() == []


def test_published_figures_stand_in_every_column() -> None:
    assert dict(lookahead.PUBLISHED) == {"4": 57.72, "3": 60.00, "2": 62.26}
    cells = lookahead.cells_of("2", lookahead.BARE)
    gains, right = ({cell.column: cell for cell in cells if cell.role == role} for role in (CHECKED, PREDICTED))
    assert len(gains) == len(right) == len(lookahead.BASELINES) == 2
    assert all(cell.row == "2-bit experts" and cell.published == 62.26 for cell in gains.values())
    assert all(
        {"row", "column", "published", "simulated", "measured", "role"} <= cell.to_dict().keys() for cell in cells
    )
    for (
        column,
        cell,
    ) in gains.items():  # nothing loses to what it could have chosen, and the truth is never a worse guess
        assert 0 <= cell.simulated <= right[column].simulated + 0.5
