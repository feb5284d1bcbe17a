"""Plots of how fast every schedule is and where its time goes, one bar a schedule, grouped by family.

Modelled: bars lie, so that names are read level; figures stand in a column at the right like in a table. Ignored: anything
that is not in the plan document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..units import NS_PER_S
from . import numbers
from .page import INK, Figure, Plot
from .speed import FAMILY_TITLES, Entry, interval_of, interval_text
from .style import FAMILY_COLOURS, SHARE_COLOURS, axis, layout, lying_bars, note, wrapped

_ROW_PX = 34
_VALUES_PX = 78
SHARE_TITLES = {
    "dense": "attention, router, shared parts",
    "expert": "expert kernels",
    "head": "output head",
    "copy": "waiting for copies",
    "host": "waiting for the host",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Where bars and headings stand, counted downwards from 0."""

    bars: list[float]
    headings: list[tuple[float, str]]
    end: float


def speed_plot(entries: Sequence[Entry]) -> Plot:
    """Return tokens per second of every schedule with its interval."""
    rows = _rows(entries)
    speeds = [float(entry.result["tokens_per_s"]) for entry in entries]
    texts = [numbers.significant(speed) for speed in speeds]
    hover = [
        f"<b>{escape(entry.title)}</b><br>{text} tokens/s<br>interval {interval_text(entry.result)}"
        for entry, text in zip(entries, texts, strict=True)
    ]
    below, above = [], []
    for speed, entry in zip(speeds, entries, strict=True):
        low, high = interval_of(entry.result)
        below.append(speed - low)
        above.append(0.0 if high is None else high - speed)
    errors = {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": below,
        "color": INK,
        "thickness": 1.3,
        "width": 4,
    }
    colours = [FAMILY_COLOURS[entry.family] for entry in entries]
    bars = lying_bars(speeds, rows.bars, hover, marker={"color": colours}, error_x=errors)
    most = max(speed + up for speed, up in zip(speeds, above, strict=True))
    x_axis = axis("tokens per second", range=[0, most * 1.02 or 1])
    return Plot(
        id="plot-speed",
        figure=_lying(entries, rows, texts, "tokens/s", x_axis, [bars]),
        height_px=round(rows.end * _ROW_PX) + 80,
        title="Predicted tokens per second of every schedule",
        caption="Bars: predicted speed. Lines: the interval that the uncertainty of the machine's constants leaves; all "
        "schedules use the same constants, so much of the error is common to them and their order is surer than the intervals "
        "suggest. Published schedules have the same memory and bits, each with the largest cache that fits. Out of reach: the "
        "chosen schedule with a cache that knows the future, and with more memory.",
    )


def share_plot(entries: Sequence[Entry]) -> Plot:
    """Return what share of each schedule's time goes into what."""
    rows = _rows(entries)
    passes = [int(entry.result["makespan_ns"]) / NS_PER_S / max(int(entry.result["num_steps"]), 1) for entry in entries]
    data = []
    for part, title in SHARE_TITLES.items():
        shares = [float(entry.result["time_share"][part]) for entry in entries]
        hover = [
            f"<b>{escape(entry.title)}</b><br>{title}: {numbers.percent(share)}, {numbers.seconds(share * mean)} a pass"
            for entry, share, mean in zip(entries, shares, passes, strict=True)
        ]
        percents = [100 * share for share in shares]
        data.append(lying_bars(percents, rows.bars, hover, name=title, marker={"color": SHARE_COLOURS[part]}))
    texts = [numbers.seconds(mean) for mean in passes]
    figure = _lying(entries, rows, texts, "mean pass", axis("share of the time, %", range=[0, 100]), data)
    figure["layout"] |= {"barmode": "stack", "showlegend": True}
    return Plot(
        id="plot-share",
        figure=figure,
        height_px=round(rows.end * _ROW_PX) + 130,
        title="Where the time of every schedule goes",
        caption="Time of all forward passes, prompts included. A copy or host operation that runs beside a kernel costs nothing "
        "here: only the time in which the compute stream stands still is counted against it.",
    )


def _rows(entries: Sequence[Entry]) -> _Rows:
    bars: list[float] = []
    headings: list[tuple[float, str]] = []
    at = 0.0
    family = ""
    for entry in entries:
        if entry.family != family:
            family = entry.family
            headings.append((at, FAMILY_TITLES[family]))
            at += 0.85
        bars.append(at)
        at += 1
    return _Rows(bars=bars, headings=headings, end=at - 0.5)


def _lying(
    entries: Sequence[Entry],
    rows: _Rows,
    texts: Sequence[str],
    unit: str,
    x_axis: dict[str, Any],
    data: list[dict[str, Any]],
) -> Figure:
    """Return a figure of lying bars with names at the left, headings above families and `texts` in a column at the right."""
    column = {"x": 1, "xref": "paper", "xanchor": "right", "xshift": _VALUES_PX - 4, "yanchor": "middle"}
    notes = [
        note(text, y=at, **column) | {"font": {"size": 13, "color": INK}}
        for text, at in zip(texts, rows.bars, strict=True)
    ]
    notes.append(note(unit, y=rows.headings[0][0], **column))
    for at, title in rows.headings:
        notes.append(note(f"<b>{escape(title)}</b>", y=at, x=0, xref="paper", xanchor="left", yanchor="middle"))
    names = [wrapped(entry.title) for entry in entries]
    y_axis = axis(
        tickmode="array", tickvals=rows.bars, ticktext=names, range=[rows.end, -0.5], showgrid=False, ticks=""
    )
    margin = {"l": 10, "r": _VALUES_PX, "t": 6, "b": 10}
    plan = layout(xaxis=x_axis, yaxis=y_axis, annotations=notes, showlegend=False, margin=margin)
    return {"data": data, "layout": plan, "narrow": {"font.size": 11}}
