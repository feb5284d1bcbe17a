"""Published figures beside the simulator's: papers, and what people measured. The function behind `moeplan reproduce`.

Modelled: a paper's tables cell by cell, public reports row by row with their scores. Ignored: how either is predicted (`papers/`), and
how it is printed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..base.errors import InputError
from ..base.frames import Tabular, flat
from ..papers import registry
from ..papers.cells import Reproduction
from ..papers.field import scores
from ..papers.field.parallel import predict as parallel_predict
from ..papers.field.parallel import rows as parallel_rows
from ..papers.field.parallel import scores as parallel_scores
from ..papers.field.rows import read_reports

FIELD = "field"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldReproduction(Tabular):
    """What people measured beside what is predicted for it."""

    SHOWN: ClassVar[tuple[str, ...]] = ("id", "kind", "measured", "predicted", "low", "high")

    document: dict[str, Any] = field(repr=False)
    """Scores by kind and by cut, and every row."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row for every report."""
        return [flat(one) for one in self.document["rows"]]

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `moeplan reproduce field --json` prints."""
        return self.document


def reproduce(
    paper: str,
    *,
    hardware: str | None = None,
    bits: str | None = None,
    reports: str | os.PathLike[str] | None = None,
    parallel: bool = False,
    progress: Progress | None = None,
) -> Reproduction | FieldReproduction:
    """Return what was published beside what is predicted: a paper's cells, or the rows and scores of public reports.

    paper: a name of `moeplan.papers`, or "field". hardware, bits: predict for another machine or weight format, where a paper lets one.
    reports: a file of field reports in place of the bundled ones; parallel: figures of expert parallelism in place of reports on one box;
    both of field only. progress: told (done, total, note).

    Raises InputError for options that a paper does not have and for reports that cannot be read, UnknownName for a paper that is not here.
    """
    if paper != FIELD:
        for name, given in (("--reports", reports), ("--parallel", parallel or None)):
            if given is not None:
                raise InputError(name, str(given), f"{paper} has its own figures", "give it to reproduce field")
        return registry.reproduce(paper, hardware=hardware, bits=bits)
    for name, value in (("--hardware", hardware), ("--bits", bits)):
        if value is not None:
            raise InputError(name, value, "reports state their own machines and formats", "leave it out")
    path, bundled = None if reports is None else os.fspath(reports), reports is None
    if parallel:
        served = parallel_predict.predict_all(parallel_rows.read_rows(path), progress)
        return FieldReproduction(document=parallel_scores.document(served, bundled=bundled))
    return FieldReproduction(
        document=scores.document(scores.predict_all(read_reports(path), progress), bundled=bundled)
    )
