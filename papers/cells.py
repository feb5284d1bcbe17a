"""What a reproduction consists of: cells of published tables beside the simulator's, and the constants that were fitted.

A cell is *fitted* when a constant was chosen to meet it, *checked* when it was published and used for nothing, *predicted* when
nothing is published for that configuration. Ignored: how a paper's numbers come about (each paper has its module).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..base.frames import Tabular

FITTED, CHECKED, PREDICTED = "fitted", "checked", "predicted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One number of one table."""

    table: str
    row: str
    column: str
    unit: str
    published: float | None
    """None where the paper has no such cell."""
    simulated: float
    role: str
    """fitted, checked or predicted."""
    measured: float | None = None
    """What running it here gave, where a benchmark of this package stored that."""
    note: str = ""
    """Why the simulator is off, or what the cell assumes; empty where nothing needs saying."""

    @property
    def relative_error(self) -> float | None:
        """Simulated over published, less one; None where nothing is published."""
        return None if not self.published else self.simulated / self.published - 1

    @property
    def difference(self) -> float | None:
        """Simulated less published, in the cell's unit; what counts where cells are percentages."""
        return None if self.published is None else self.simulated - self.published

    def to_dict(self) -> dict[str, Any]:
        """Return the cell as plain values."""
        return {
            "table": self.table, "row": self.row, "column": self.column, "unit": self.unit, "published": self.published,
            "simulated": self.simulated, "measured": self.measured, "relative_error": self.relative_error, "difference": self.difference,
            "role": self.role, "note": self.note,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedConstant:
    """A number that was chosen to meet a cell."""

    name: str
    value: float
    unit: str
    fitted_to: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction(Tabular):
    """One paper's tables beside the simulator's."""

    SHOWN: ClassVar[tuple[str, ...]] = (
        "table",
        "row",
        "column",
        "unit",
        "published",
        "simulated",
        "measured",
        "relative_error",
        "role",
    )
    paper: str
    citation: str
    constants: tuple[FittedConstant, ...]
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row for every cell."""
        return [one.to_dict() for one in self.cells]

    def table_title(self) -> str:
        """Return where the figures were published."""
        return self.citation

    def to_dict(self) -> dict[str, Any]:
        """Return the reproduction as plain values."""
        constants = [
            {"name": each.name, "value": each.value, "unit": each.unit, "fitted_to": each.fitted_to}
            for each in self.constants
        ]
        cells = [each.to_dict() for each in self.cells]
        return {"paper": self.paper, "citation": self.citation, "fitted_constants": constants, "cells": cells,
                "median": median(self.cells), "worst": worst(self.cells), "notes": list(self.notes)}  # fmt: skip


def worst(cells: Sequence[Cell]) -> dict[str, float]:
    """Return, by role, the largest absolute relative error of the published cells."""
    return {role: max(errors) for role, errors in _errors(cells).items()}


def median(cells: Sequence[Cell]) -> dict[str, float]:
    """Return, by role, the median absolute relative error of the published cells."""
    return {role: statistics.median(errors) for role, errors in _errors(cells).items()}


def _errors(cells: Sequence[Cell]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for cell in cells:
        if cell.relative_error is not None:
            found.setdefault(cell.role, []).append(abs(cell.relative_error))
    return found
