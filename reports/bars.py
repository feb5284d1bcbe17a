"""Lying bars under headings, one bar a schedule: how every comparison of schedules is drawn.

Modelled: bars lie, so that names are read level; a heading stands above each group; figures stand in a column at the right
like in a table. Ignored: what the bars mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .page import INK, Figure
from .style import axis, layout, note, wrapped

ROW_PX = 34
_VALUES_PX = 78
# Between two headings, the heights of a bar and of a heading.
_HEADING = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Where bars and headings stand, counted downwards from 0."""

    bars: list[float]
    headings: list[tuple[float, str]]
    end: float

    def height_px(self, around_px: int) -> int:
        """Return the height of a plot with these rows and so much around them."""
        return round(self.end * ROW_PX) + around_px


def rows_under(headings: Sequence[str]) -> Rows:
    """Return the places of bars, given each bar's heading; bars of one heading follow each other."""
    bars: list[float] = []
    placed: list[tuple[float, str]] = []
    at, last = 0.0, None
    for heading in headings:
        if heading != last:
            last = heading
            if heading:
                placed.append((at, heading))
                at += _HEADING
        bars.append(at)
        at += 1
    return Rows(bars=bars, headings=placed, end=at - 0.5)


def lying_figure(
    titles: Sequence[str],
    rows: Rows,
    texts: Sequence[str],
    unit: str,
    x_axis: dict[str, Any],
    data: list[dict[str, Any]],
) -> Figure:
    """Return a figure of lying bars with names at the left, headings above groups and `texts` in a column at the right."""
    column = {"x": 1, "xref": "paper", "xanchor": "right", "xshift": _VALUES_PX - 4, "yanchor": "middle"}
    notes = [
        note(escape(text), y=at, **column) | {"font": {"size": 13, "color": INK}}
        for text, at in zip(texts, rows.bars, strict=True)
    ]
    if rows.headings:
        notes.append(note(escape(unit), y=rows.headings[0][0], **column))
    for at, title in rows.headings:
        notes.append(note(f"<b>{escape(title)}</b>", y=at, x=0, xref="paper", xanchor="left", yanchor="middle"))
    names = [wrapped(title) for title in titles]
    y_axis = axis(
        tickmode="array", tickvals=rows.bars, ticktext=names, range=[rows.end, -0.5], showgrid=False, ticks=""
    )
    margin = {"l": 10, "r": _VALUES_PX, "t": 6, "b": 10}
    plan = layout(xaxis=x_axis, yaxis=y_axis, annotations=notes, showlegend=False, margin=margin)
    return {"data": data, "layout": plan, "narrow": {"font.size": 11}}


def stacked(figure: Figure) -> Figure:
    """Return the figure with the bars of a row one after the other, and room above them for what their colours mean."""
    figure["layout"] |= {"barmode": "stack", "showlegend": True}
    figure["layout"]["margin"] |= {"t": 30}
    return figure
