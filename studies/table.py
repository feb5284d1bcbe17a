"""A study's runs as a table, the same to the byte wherever and in whatever order they were made.

Modelled: labels of axes, state, reason, and figures in the order of their names. Ignored: how long a run took, and when it was made.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..base.text_files import written_aside
from .store import KeptRun, KeptStudy

if TYPE_CHECKING:
    import pandas as pd

RUN, STATE, REASON = "run", "state", "reason"


def labels_of(study: KeptStudy, number: int) -> dict[str, Any]:
    """Return the labels of the levels that a run's number stands for, by axis."""
    found: dict[str, Any] = {}
    for name, labels in reversed(list(study.axes.items())):
        number, at = divmod(number, len(labels))
        found[name] = labels[at]
    return dict(reversed(found.items()))


def table_of(study: KeptStudy, runs: Iterable[KeptRun]) -> pd.DataFrame:
    """Return runs as a table, one a row; an axis that is called as a figure is has `axis: ` before its name."""
    import pandas as pd

    rows = list(runs)
    figures = sorted({name for run in rows for name in run.figures})
    taken = {*figures, RUN, STATE, REASON}
    names = {axis: f"axis: {axis}" if axis in taken else axis for axis in study.axes}
    columns: dict[str, list[Any]] = {RUN: [run.number for run in rows]}
    labels = [labels_of(study, run.number) for run in rows]
    for axis, name in names.items():
        columns[name] = _of_one_type([label[axis] for label in labels])
    columns[STATE] = [run.state for run in rows]
    columns[REASON] = [run.reason for run in rows]
    for name in figures:
        columns[name] = [run.figures.get(name) for run in rows]
    return pd.DataFrame(columns, columns=list(columns))


def _of_one_type(labels: list[Any]) -> list[Any]:
    """Return labels as they are where all are numbers or all are texts, else all as texts."""
    kinds = {type(label) for label in labels}
    return labels if len(kinds) == 1 or kinds <= {int, float} else [str(label) for label in labels]


def write_parquet(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table as Parquet, whole or not at all; raises InputError where it cannot be written."""
    with written_aside(path, "--parquet") as file:
        table.to_parquet(file, engine="pyarrow", index=False)
