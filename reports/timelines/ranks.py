"""Plots of what every rank does while a few layers run: kernels, the port to other nodes, the port inside its node.

Modelled: two ordinary layers and the ranks that tell most (the busiest, the least busy, then others from all nodes), for the
plan and for plain expert parallelism on one time axis. Bars carry the number of their batch or group where there are
several. Ignored: the other layers and ranks, which are in the Perfetto file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from ...base.units import MS_PER_S, NS_PER_S, US_PER_S
from ...sim.parallel.program import EP_OPS
from ...sim.parallel.timeline import (
    EP_BYTES,
    EP_END,
    EP_GROUP,
    EP_LANE,
    EP_LAYER,
    EP_MICRO,
    EP_OP,
    EP_RANK,
    EP_START,
    EP_TOKENS,
    LANE_COMPUTE,
    NUM_EP_LANES,
    EpTimeline,
)  # fmt: skip
from .. import numbers
from ..page import HAIRLINE, INK, Plot
from ..style import OP_COLOURS, axis, layout, lying_bars, note

Rows = npt.NDArray[np.int64]

NUM_LAYERS = 2
MOST_RANKS = 4
MOST_BARS = 3000
_LANE_TITLES = ("kernels", "between nodes", "inside node")
_LANE_PX = 24
_OP_TITLES = {
    "dense": "attention, router", "shared": "shared experts", "expert": "experts", "head": "output head",
    "dispatch": "dispatch", "combine": "combine", "reduce": "reduction",
}  # fmt: skip
_NARROW_LEGEND_PX = 70
_RANK_GAP, _TITLE_ROWS = 0.35, 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersExcerpt:
    """Consecutive layers of a step."""

    rows: Rows
    """Rows that touch the excerpt, int64 [n, EP_FIELDS]."""
    layers: tuple[int, int]
    """First and last, both included, counted from the first MoE layer."""
    start_ns: int
    end_ns: int


def ordinary_layers(timeline: EpTimeline, num_layers: int = NUM_LAYERS) -> tuple[int, int]:
    """Return the first and last of consecutive layers whose time is nearest to the median, the outermost left out."""
    rows = timeline.rows
    last = int(rows[:, EP_LAYER].max())
    ends = np.array([int(rows[rows[:, EP_LAYER] == layer, EP_END].max()) for layer in range(last + 1)])
    if last < num_layers + 1:
        return 0, min(num_layers, last + 1) - 1
    spans = ends[num_layers:-1] - ends[: -num_layers - 1]
    first = int(np.abs(spans - np.median(spans)).argmin()) + 1
    return first, first + num_layers - 1


def layers_excerpt(timeline: EpTimeline, layers: tuple[int, int]) -> LayersExcerpt:
    """Return the part of a step in which `layers` run, with whatever runs beside them."""
    rows = timeline.rows
    mine = rows[(rows[:, EP_LAYER] >= layers[0]) & (rows[:, EP_LAYER] <= layers[1])]
    start, end = int(mine[:, EP_START].min()), int(mine[:, EP_END].max())
    beside = rows[(rows[:, EP_START] < end) & (rows[:, EP_END] > start)]
    return LayersExcerpt(rows=beside, layers=layers, start_ns=start, end_ns=end)


def telling_ranks(timeline: EpTimeline, ranks_per_node: int, most: int = MOST_RANKS) -> list[int]:
    """Return ranks in order: the one whose kernels take longest, the one whose take least, and others from all nodes."""
    rows = timeline.rows
    num_ranks = int(rows[:, EP_RANK].max()) + 1
    if num_ranks <= most:
        return list(range(num_ranks))
    kernels = rows[rows[:, EP_LANE] == LANE_COMPUTE]
    busy = np.bincount(kernels[:, EP_RANK], weights=kernels[:, EP_END] - kernels[:, EP_START], minlength=num_ranks)
    found = [int(busy.argmax())]
    for rank in [int(busy.argmin()), *range(0, num_ranks, ranks_per_node), *range(num_ranks)]:
        if rank not in found and len(found) < most:
            found.append(rank)
    return sorted(found)


def ranks_plot(
    timelines: Sequence[tuple[str, EpTimeline]],
    *,
    ranks_per_node: int,
    layer_names: Sequence[str],
    note_below: str = "",
) -> Plot:
    """Return the lanes of a few ranks while two layers run, one timeline above the other on one time axis.

    timelines: (title, rows); layers and ranks are chosen on the last. layer_names: the model's own number of each MoE layer.
    note_below: what a reader must know besides, in whole sentences; by default where the other layers are.
    """
    layers = ordinary_layers(timelines[-1][1])
    ranks = telling_ranks(timelines[-1][1], ranks_per_node)
    parts = [(title, layers_excerpt(timeline, layers)) for title, timeline in timelines]
    parts = [(title, _first_rows(part, ranks)) for title, part in parts]
    longest = max(part.end_ns - part.start_ns for _, part in parts)
    scale, unit = (US_PER_S, "µs") if longest * MS_PER_S < NS_PER_S else (MS_PER_S, "ms")
    bars: dict[str, list[tuple[float, float, float, str, str]]] = {}
    ticks: list[tuple[float, str]] = []
    notes = []
    at = 0.0
    for title, part in parts:
        words = f"<b>{escape(title)}</b>: {numbers.seconds((part.end_ns - part.start_ns) / NS_PER_S)}"
        notes.append(
            note(words, x=0, xref="paper", xanchor="left", y=at, yanchor="middle")
            | {"font": {"size": 13, "color": INK}}
        )
        at += _TITLE_ROWS
        for rank in ranks:
            for lane in range(NUM_EP_LANES):
                mine = part.rows[(part.rows[:, EP_RANK] == rank) & (part.rows[:, EP_LANE] == lane)]
                if not len(mine) and lane != LANE_COMPUTE:
                    continue
                ticks.append((at, (f"<b>rank {rank}</b>  " if lane == LANE_COMPUTE else "") + _LANE_TITLES[lane]))
                for row in mine:
                    bar = _bar(row, part, at, scale / NS_PER_S, layer_names)
                    bars.setdefault(EP_OPS[row[EP_OP]], []).append((*bar, _number(row, part)))
                at += 1
            at += _RANK_GAP
    several = any(bool((part.rows[:, [EP_MICRO, EP_GROUP]] > 0).any()) for _, part in parts)
    data = [_trace(op, bars[op], several) for op in EP_OPS if op in bars]
    plan = layout(
        barmode="overlay",
        dragmode="zoom",
        annotations=notes,
        uniformtext={"mode": "hide", "minsize": 8},
        xaxis=axis(f"time, {unit}", fixedrange=False, range=[0, longest * scale / NS_PER_S], linecolor=HAIRLINE),
        yaxis=axis(
            tickmode="array", tickvals=[y for y, _ in ticks], ticktext=[text for _, text in ticks], range=[at - 0.4, -0.6],
            showgrid=False, ticks="", tickfont={"size": 11},
        ),
        margin={"l": 10, "r": 12, "t": 62, "b": 10},
    )  # fmt: skip
    narrow = {"dragmode": "pan", "font.size": 11, "yaxis.tickfont.size": 9, "margin.t": 62 + _NARROW_LEGEND_PX}
    figure = {"data": data, "layout": plan, "zoom": True, "narrow": narrow, "narrow_extra_px": _NARROW_LEGEND_PX}
    names = " and ".join(layer_names[layer] for layer in range(layers[0], layers[1] + 1))
    which = (
        "all ranks"
        if len(ranks) == int(timelines[-1][1].rows[:, EP_RANK].max()) + 1
        else "the busiest and the least busy rank and others"
    )
    numbered = " Letters in bars are batches, numbers groups." if several else ""
    return Plot(
        id="plot-ranks",
        figure=figure,
        height_px=round(at * _LANE_PX) + 140,
        title="What every rank does, lane by lane",
        caption=f"Layers {names} of the first reported step, {which}; every rank waits where an exchange has not ended. Where kernels "
        f"and ports are busy at once, an exchange is hidden.{numbered} Point at a bar for its tokens and bytes; the buttons zoom "
        f"and move. {note_below or 'The Perfetto file holds every rank and layer.'}",
    )


def _first_rows(part: LayersExcerpt, ranks: Sequence[int]) -> LayersExcerpt:
    """Return the excerpt with the rows of these ranks only, at most as many as a page can draw."""
    rows = part.rows[np.isin(part.rows[:, EP_RANK], ranks)][: MOST_BARS // 2]
    return LayersExcerpt(rows=rows, layers=part.layers, start_ns=part.start_ns, end_ns=part.end_ns)


def _bar(
    row: Rows, part: LayersExcerpt, at: float, to_unit: float, layer_names: Sequence[str]
) -> tuple[float, float, float, str]:
    """Return (base, length, place, text on touch) of one row, cut to the excerpt."""
    begin, finish = max(int(row[EP_START]), part.start_ns), min(int(row[EP_END]), part.end_ns)
    duration_s = int(row[EP_END] - row[EP_START]) / NS_PER_S
    hover = [
        f"<b>{_OP_TITLES[EP_OPS[row[EP_OP]]]}</b>, rank {row[EP_RANK]}, layer {escape(layer_names[row[EP_LAYER]])}",
        f"batch {row[EP_MICRO] + 1}, group {row[EP_GROUP] + 1}",
        numbers.seconds(duration_s) + (f", {row[EP_TOKENS]:,} tokens" if row[EP_TOKENS] else ""),
    ]
    if row[EP_BYTES]:
        hover.append(f"{numbers.size(int(row[EP_BYTES]))} sent")
    base, length = (begin - part.start_ns) * to_unit, (finish - begin) * to_unit
    return round(base, 6), round(length, 6), at, "<br>".join(hover)


def _number(row: Rows, part: LayersExcerpt) -> str:
    """Return what is written into a bar: its batch as a letter, its group as a number, each where there are several."""
    batch = chr(ord("A") + int(row[EP_MICRO])) if (part.rows[:, EP_MICRO] > 0).any() else ""
    split = EP_OPS[row[EP_OP]] in ("expert", "dispatch", "combine") and bool((part.rows[:, EP_GROUP] > 0).any())
    return f"{batch}{row[EP_GROUP] + 1}" if split else batch


def _trace(op: str, bars: Sequence[tuple[float, float, float, str, str]], numbered: bool) -> dict[str, Any]:
    base, length, place, hover, number = (list(column) for column in zip(*bars, strict=True))
    inside: dict[str, Any] = {}
    if numbered:
        inside = {"text": number, "textposition": "inside", "insidetextanchor": "middle", "textangle": 0,
                  "insidetextfont": {"size": 9}}  # fmt: skip
    marker = {"color": OP_COLOURS[op], "line": {"width": 0.6, "color": "#fff"}}
    return lying_bars(length, place, hover, name=_OP_TITLES[op], base=base, width=0.78, marker=marker, **inside)
