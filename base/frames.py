"""Results as tables: a row for each thing compared, as a pandas DataFrame, in a notebook and in a terminal that knows rich.

Modelled: nested figures under dotted names, an interval as its two ends. Ignored: lists of other things, which a cell cannot hold; they
stand in the result's own document (`to_dict`). pandas and rich are loaded when a table is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console, ConsoleOptions, RenderResult

_INTERVAL = "_interval"
MOST_ROWS = 60
"""Rows that a terminal or a notebook shows; a frame has all."""


class Tabular:
    """What a result is that can be shown as a table."""

    __slots__ = ()
    SHOWN: ClassVar[tuple[str, ...]] = ()
    """Columns that a person looks at first; all are in the frame."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return the rows: column → number, text, truth value or None."""
        raise NotImplementedError

    def shown_columns(self, columns: list[str]) -> list[str]:
        """Return those of the frame's columns that a person looks at first; all where none of them is there."""
        return [name for name in self.SHOWN if name in columns] or columns

    def table_title(self) -> str:
        """Return a line to put above the table; empty where there is none."""
        return ""

    def to_frame(self) -> pd.DataFrame:
        """Return the rows as a pandas DataFrame; columns in the order in which rows first name them."""
        import pandas as pd

        return pd.DataFrame(self.table_rows())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the headline and the columns that are looked at first."""
        from rich.table import Table
        from rich.text import Text

        if self.table_title():
            yield Text(self.table_title())
        rows = self.table_rows()
        if not rows:
            return
        table = Table()
        for name in self.shown_columns(list(dict.fromkeys(name for row in rows for name in row))):
            numbers = all(isinstance(row.get(name), int | float | None) for row in rows)
            table.add_column(name, justify="right" if numbers else "left", overflow="fold")
        for row in rows[:MOST_ROWS]:
            table.add_row(*(Text(_cell(row.get(str(column.header)))) for column in table.columns))
        yield table
        if len(rows) > MOST_ROWS:
            yield Text(f"and {len(rows) - MOST_ROWS:,} more rows: to_frame() has all")

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        shown = self.to_frame()
        text: str = shown[self.shown_columns(list(shown.columns))].to_html(max_rows=MOST_ROWS)
        return text


def flat(document: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return a nested document as one row: dotted names; `speed_interval: [a, b]` as `speed_low` and `speed_high`; other lists left out."""
    row: dict[str, Any] = {}
    for key, value in document.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping):
            row |= flat(value, f"{name}.")
        elif name.endswith(_INTERVAL):
            low, high = (None, None) if value is None else value
            stem = name.removesuffix(_INTERVAL)
            row |= {f"{stem}_low": low, f"{stem}_high": high}
        elif value is None or isinstance(value, bool | int | float | str):
            row[name] = value
    return row


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
