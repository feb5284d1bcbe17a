"""Plots of what ran when: the lanes of a few steps, to be zoomed into.

Modelled: a bar for each row, coloured by operation, with layer, expert and bytes on touch; which steps to show is chosen by
rule (ordinary ones, once the cache is warm) and said. Several timelines can stand one above the other on one time axis.
Ignored: the rest of the run, which is in the Perfetto file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from ...base.units import MS_PER_S, NS_PER_S, US_PER_S
from .. import numbers
from ..page import HAIRLINE, Plot
from ..style import GREY, OP_COLOURS, axis, layout, lying_bars, note, upright_line
from .perfetto import slice_name

# Bars beyond this number make a page slow to open and to zoom on a phone.
MOST_BARS = 3000
NUM_STEPS = 3
_LANE_LABELS = {
    "host": "host", "compute": "compute", "cpu": "host's<br>cores", "h2d": "copies<br>to device", "d2h": "copies<br>to host",
    "disk": "reads<br>from disk",
}  # fmt: skip
_LANE_PX = 54
_NARROW_LEGEND_PX = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """A part of a timeline small enough to draw."""

    frame: pd.DataFrame
    start_ns: int
    end_ns: int
    steps: tuple[int, int]
    """First and last step, both included."""
    step_ends_ns: tuple[int, ...]
    """When each of its steps ended."""
    words: str
    """Which part it is."""


def excerpt(
    frame: pd.DataFrame, *, num_steps: int = NUM_STEPS, most_rows: int = MOST_BARS, steps: tuple[int, int] | None = None
) -> Excerpt:
    """Return consecutive ordinary steps from the later half of a timeline: those whose time is nearest to the median.

    Ordinary: with the number of tokens that most steps of that half have. Where one step has more than `most_rows` rows, its
    first layers are returned. steps: first and last step where they are chosen already.
    """
    spans = step_spans(frame)
    if steps is not None:
        found = _cut(frame, spans, *steps)
        return found if len(found.frame) <= most_rows else _first_layers(found, most_rows)
    late = spans.iloc[len(spans) // 2 :]
    usual = late["tokens"].mode().iloc[0]
    for count in range(min(num_steps, len(late)), 0, -1):
        total = (late["end_ns"].shift(-count + 1) - late["start_ns"]).dropna()
        alike = (late["tokens"] == usual).astype(int).rolling(count).sum().shift(-count + 1)
        total = total[(alike == count).reindex(total.index)]
        if total.empty:
            continue
        first = int((total - total.median()).abs().idxmin())
        found = _cut(frame, spans, first, first + count - 1)
        if len(found.frame) <= most_rows or count == 1:
            break
    return found if len(found.frame) <= most_rows else _first_layers(found, most_rows)


def step_spans(frame: pd.DataFrame) -> pd.DataFrame:
    """Return [step → start_ns, end_ns, tokens].

    A step lasts from the end of the one before until its last kernel or host operation has ended.
    """
    working = frame[frame["lane"].isin(["compute", "host"])]
    ends = working.groupby("step")["end_ns"].max()
    first = int(np.min(working["start_ns"].to_numpy()))
    dense = working[working["op"] == "dense"]
    tokens = dense.groupby("step")["tokens"].max().reindex(ends.index).fillna(0).astype(int)
    return pd.DataFrame({"start_ns": ends.shift(1).fillna(first).astype("int64"), "end_ns": ends, "tokens": tokens})


def _cut(frame: pd.DataFrame, spans: pd.DataFrame, first: int, last: int) -> Excerpt:
    mine = spans.loc[first:last]
    ends = tuple(mine["end_ns"].tolist())
    start, end = int(mine["start_ns"].to_numpy()[0]), ends[-1]
    shown = frame[(frame["start_ns"] < end) & (frame["end_ns"] > start)]
    words = f"steps {first} to {last}" if last > first else f"step {first}"
    words = f"{words} of {len(spans):,}"
    return Excerpt(frame=shown, start_ns=start, end_ns=end, steps=(first, last), step_ends_ns=ends, words=words)


def _first_layers(whole: Excerpt, most_rows: int) -> Excerpt:
    end = int(whole.frame["end_ns"].sort_values().iloc[most_rows - 1])
    shown = whole.frame[whole.frame["end_ns"] <= end]
    layers = int(np.max(shown["layer"][shown["op"] == "dense"].to_numpy())) + 1
    words = f"{whole.words}, its first {layers} layers"
    return Excerpt(
        frame=shown, start_ns=whole.start_ns, end_ns=end, steps=whole.steps, step_ends_ns=(end,), words=words
    )


def lanes_plot(timelines: Sequence[tuple[str, Excerpt]], *, plot_id: str = "plot-lanes", caption: str = "") -> Plot:
    """Return the lanes of one or several excerpts, one above the other, each from its own start on a common time axis.

    timelines: (title, excerpt); a title is shown where there are several. The plot opens on the first step (on a narrow screen
    on a part of it): bars thinner than a pixel would look wider than they are.
    """
    longest = max(part.end_ns - part.start_ns for _, part in timelines)
    scale, unit = (US_PER_S, "µs") if longest * MS_PER_S < NS_PER_S else (MS_PER_S, "ms")
    to_unit = scale / NS_PER_S
    bars: dict[str, _Bars] = {}
    labels: list[tuple[float, str]] = []
    notes, lines = [], []
    row = 0.0
    for title, part in timelines:
        if len(timelines) > 1:
            notes.append(
                note(f"<b>{escape(title)}</b>", x=0, xref="paper", xanchor="left", y=row - 0.15, yanchor="middle")
            )
            row += 0.6
        top = row - 0.5
        present = set(part.frame["lane"].astype(str))
        for lane in [name for name in _LANE_LABELS if name in present] + sorted(present - set(_LANE_LABELS)):
            labels.append((row, _LANE_LABELS.get(lane, escape(lane))))
            for op, found in _lane_bars(part, part.frame[part.frame["lane"] == lane], row, to_unit):
                bars.setdefault(op, _Bars()).extend(found)
            row += 1
        for end in part.step_ends_ns[:-1]:
            at = (end - part.start_ns) * to_unit
            lines.append(
                upright_line(at, y0=top, y1=row - 0.5, yref="y", line={"color": GREY, "width": 1, "dash": "dot"})
            )
    order = [op for op in [*OP_COLOURS, *sorted(set(bars) - set(OP_COLOURS))] if op in bars]
    data = [bars[op].trace(op) for op in order]
    first_step = max(part.step_ends_ns[0] - part.start_ns for _, part in timelines) * to_unit
    ticks: dict[str, Any] = {
        "tickmode": "array",
        "tickvals": [at for at, _ in labels],
        "ticktext": [text for _, text in labels],
    }
    plan = layout(
        barmode="overlay",
        dragmode="zoom",
        annotations=notes,
        shapes=lines,
        xaxis=axis(f"time, {unit}", fixedrange=False, range=[0, first_step], linecolor=HAIRLINE),
        yaxis=axis(**ticks, range=[row - 0.5, -0.5], showgrid=False),
        margin={"l": 10, "r": 12, "t": 62, "b": 10},
    )
    # On a narrow screen the legend takes several rows, below the buttons.
    narrow = {
        "dragmode": "pan",
        "font.size": 11,
        "xaxis.range": [0, first_step / 4],
        "margin.t": 62 + _NARROW_LEGEND_PX,
    }
    figure = {"data": data, "layout": plan, "zoom": True, "narrow": narrow, "narrow_extra_px": _NARROW_LEGEND_PX}
    height = round(row * _LANE_PX) + 150
    return Plot(id=plot_id, figure=figure, height_px=height, title="What ran when, lane by lane", caption=caption)


@dataclass(slots=True)
class _Bars:
    """The bars of one operation, over all lanes."""

    base: list[float] = field(default_factory=list)
    length: list[float] = field(default_factory=list)
    row: list[float] = field(default_factory=list)
    hover: list[str] = field(default_factory=list)

    def extend(self, other: _Bars) -> None:
        self.base += other.base
        self.length += other.length
        self.row += other.row
        self.hover += other.hover

    def trace(self, op: str) -> dict[str, Any]:
        marker = {"color": OP_COLOURS.get(op, GREY), "line": {"width": 0}}
        return lying_bars(self.length, self.row, self.hover, name=op, base=self.base, width=0.72, marker=marker)


def _lane_bars(part: Excerpt, rows: pd.DataFrame, row: float, to_unit: float) -> Iterator[tuple[str, _Bars]]:
    """Yield (operation, its bars) of one lane, cut to the excerpt."""
    for op, mine in rows.groupby(rows["op"].astype(str)):
        start, end = mine["start_ns"].to_numpy(), mine["end_ns"].to_numpy()
        begin, finish = np.maximum(start, part.start_ns), np.minimum(end, part.end_ns)
        hover = [_hover(str(op), *values) for values in zip(*(mine[name].tolist() for name in _HOVERED), strict=True)]
        base, length = (begin - part.start_ns) * to_unit, (finish - begin) * to_unit
        yield (
            str(op),
            _Bars(base=base.round(6).tolist(), length=length.round(6).tolist(), row=[row] * len(mine), hover=hover),
        )


_HOVERED = ("step", "layer", "expert", "start_ns", "end_ns", "bytes", "tokens")


def _hover(op: str, step: int, layer: int, expert: int, start_ns: int, end_ns: int, num_bytes: int, tokens: int) -> str:
    duration_s = (end_ns - start_ns) / NS_PER_S
    lines = [
        f"<b>{escape(slice_name(op, layer, expert))}</b>",
        f"step {step}, layer {layer}" + (f", expert {expert}" if expert >= 0 else ""),
        numbers.seconds(duration_s) + (f", {tokens} token{'s' if tokens > 1 else ''}" if tokens else ""),
    ]
    if num_bytes:
        lines.append(f"{num_bytes:,} bytes, {numbers.rate(num_bytes / duration_s)}")
    return "<br>".join(lines)


def waiting_fraction(part: Excerpt) -> float:
    """Return the share of an excerpt in which the compute lane stands idle."""
    rows = part.frame[part.frame["lane"] == "compute"]
    begin = np.maximum(rows["start_ns"].to_numpy(), part.start_ns)
    finish = np.minimum(rows["end_ns"].to_numpy(), part.end_ns)
    return 1.0 - float((finish - begin).sum()) / (part.end_ns - part.start_ns)
