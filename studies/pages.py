"""The page of a store's studies.

Modelled: from kept runs to the rows that the page shows. Ignored: how it looks (`reports/studies`).
"""

from __future__ import annotations

import os

from ..base.errors import InputError, UnknownName
from ..reports.studies.page import write_study_page
from ..reports.studies.rows import Row, StudyRows
from .store import KeptStudy, Store


def report_store(store: str | os.PathLike[str], output: str | os.PathLike[str], name: str | None = None) -> str:
    """Write the page of the studies of a store, or of those of one name, and return its path.

    Of studies of one name the last one that was entered is shown: after a change of moeplan, that of now. Raises InputError for a store
    that is none or has no study, UnknownName for a name that is not in it.
    """
    with Store(store, must_exist=True) as database:
        kept = {study.name: study for study in database.studies()}
        if not kept:
            raise InputError("--store", database.name, "holds no study", "make one with moeplan sweep")
        if name is not None and name not in kept:
            raise UnknownName("--study", name, kept)
        chosen = [study for study in kept.values() if name in (None, study.name)]
        return write_study_page(output, [rows_of(database, study) for study in chosen])


def rows_of(database: Store, study: KeptStudy) -> StudyRows:
    """Return a study with the runs that have answers."""
    sizes = [len(labels) for labels in study.axes.values()]
    rows = [
        Row(levels=_levels(run.number, sizes), state=run.state, reason=run.reason, figures=run.figures)
        for run in database.runs(study.study)
    ]
    return StudyRows(name=study.name, num_runs=study.num_runs, axes=study.axes, base=study.base, rows=rows)


def _levels(number: int, sizes: list[int]) -> tuple[int, ...]:
    found = []
    for size in reversed(sizes):
        number, at = divmod(number, size)
        found.append(at)
    return tuple(reversed(found))
