"""Heat maps of a figure over a study's grid: two axes on each map, one map for each level of a third, a list for the rest.

Modelled: the axes that matter most are on the maps; runs without the figure stay empty and say why. Ignored: order of levels; they stand as
the study's file has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from typing import Any

from .. import numbers
from ..page import INK, Plot, choices
from ..style import axis, layout, note
from .rows import DONE, Effect, Levels, Metric, StudyRows

MOST_MAPS, MOST_CHOICES = 6, 60
_ROW_PX, _LEAST_PX, _MOST_PX, _TITLE_PX, _FOOT_PX = 30, 90, 420, 34, 64
_GAP_PX = 70
_MOST_TEXTS = 14
_COLUMNS, _CELLS = 3, 18
"""Maps side by side, and the cells that a row of them has room for."""
_COLOURS = [[0, "#f0f4f8"], [0.5, "#7fb2d9"], [1, "#08519c"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which axis, by its number, goes where; None: there is none."""

    x: int
    y: int | None
    facet: int | None
    rest: tuple[int, ...]


def lay_out(study: StudyRows, found: Sequence[Effect]) -> Layout:
    """Return where axes go: of those that matter most, the one with most levels lies, the next stands, a third makes maps."""
    sizes = [len(labels) for labels in study.axes.values()]
    order = [one.at for one in found] + [at for at in range(len(sizes)) if at not in {one.at for one in found}]
    several = [at for at in order if sizes[at] > 1] or order[:1]
    pair = sorted(several[:2], key=lambda at: -sizes[at])
    facet = next((at for at in several[2:] if sizes[at] <= MOST_MAPS), None)
    x, y = pair[0], pair[1] if len(pair) > 1 else None
    rest = tuple(at for at in range(len(sizes)) if at not in {x, y, facet} and sizes[at] > 1)
    return Layout(x=x, y=y, facet=facet, rest=rest)


def map_plot(study: StudyRows, metric: Metric, found: Sequence[Effect], plot_id: str) -> Plot:
    """Return the maps of one figure."""
    places = lay_out(study, found)
    names, labels = list(study.axes), [[str(one) for one in labels] for labels in study.axes.values()]
    values = study.values(metric)
    missing = {row.levels: row.reason or row.state for row in study.rows if row.state != DONE}
    facets = range(len(labels[places.facet])) if places.facet is not None else range(1)
    combinations = list(product(*(range(len(labels[at])) for at in places.rest)))
    shown = combinations[:MOST_CHOICES]

    def data(rest: Sequence[int]) -> list[dict[str, Any]]:
        fixed = dict(zip(places.rest, rest, strict=True))
        return [_cells(places, labels, values, missing, metric, fixed, facet) for facet in facets]

    span = (min(values.values()), max(values.values()))
    few = len(labels[places.x]) <= _MOST_TEXTS
    base = [
        {"type": "heatmap", "coloraxis": "coloraxis", "x": labels[places.x], "y": _y_labels(places, labels), "hoverongaps": True,
         "xgap": 1, "ygap": 1, "xaxis": _nth("x", at), "yaxis": _nth("y", at), "hovertemplate": "%{customdata}<extra></extra>",
         "texttemplate": "%{text}" if few else "", "textfont": {"size": 11}} | cells
        for at, cells in enumerate(data(shown[0]))
    ]  # fmt: skip
    tall = min(_MOST_PX, max(_LEAST_PX, _ROW_PX * len(_y_labels(places, labels))))
    titles = [f"{names[places.facet]}: {labels[places.facet][at]}" if places.facet is not None else "" for at in facets]
    figure, height = _figure(base, titles, names, places, tall, span, metric)
    if len(shown) > 1:
        options = [
            (", ".join(f"{names[at]} {labels[at][level]}" for at, level in zip(places.rest, rest, strict=True)), {"data": data(rest)})
            for rest in shown
        ]  # fmt: skip
        figure["choices"] = choices(", ".join(names[at] for at in places.rest), options, 0)
    down = "" if places.y is None else f" Down: {names[places.y]}."
    caption = f"Darker is more. Empty: no answer, for a reason that is said where one points.{down}"
    if len(shown) < len(combinations):
        caption += f" The first {len(shown)} of {len(combinations)} combinations of {', '.join(names[at] for at in places.rest)} are shown."
    return Plot(
        id=plot_id, figure=figure, height_px=height, title=f"{metric.title} over {', '.join(names)}", caption=caption
    )


def _y_labels(places: Layout, labels: Sequence[Sequence[str]]) -> list[str]:
    return [""] if places.y is None else list(labels[places.y])


def _cells(
    places: Layout,
    labels: Sequence[Sequence[str]],
    values: Mapping[Levels, float],
    missing: Mapping[Levels, str],
    metric: Metric,
    fixed: Mapping[int, int],
    facet: int,
) -> dict[str, Any]:
    """Return one map's values, texts and what it says where one points."""
    found: dict[str, list[list[Any]]] = {"z": [], "text": [], "customdata": []}
    for row in range(len(_y_labels(places, labels))):
        z: list[float | None] = []
        texts: list[str] = []
        hovers: list[str] = []
        for column in range(len(labels[places.x])):
            chosen = {**fixed, places.x: column}
            if places.y is not None:
                chosen[places.y] = row
            if places.facet is not None:
                chosen[places.facet] = facet
            levels = tuple(chosen.get(at, 0) for at in range(len(labels)))
            value = values.get(levels)
            z.append(value)
            texts.append("" if value is None else numbers.significant(value))
            said = (
                missing.get(levels, "no answer yet") if value is None else f"{numbers.significant(value)} {metric.unit}"
            )
            hovers.append(escape(said[:160]))
        found["z"].append(z)
        found["text"].append(texts)
        found["customdata"].append(hovers)
    return dict(found)


def _figure(data: list[dict[str, Any]], titles: Sequence[str], names: Sequence[str], places: Layout, tall: int,
            span: tuple[float, float], metric: Metric) -> tuple[dict[str, Any], int]:  # fmt: skip
    """Return the figure of some maps side by side, below each other on a phone, and its height at a desk."""
    columns = max(1, min(_COLUMNS, len(data), _CELLS // len(data[0]["x"])))
    plan = layout(annotations=[], showlegend=False)
    low, high = span if span[0] < span[1] else (span[0] * 0.99, span[1] * 1.01)
    bar = {"orientation": "h", "x": 0, "xanchor": "left", "len": 0.5, "thickness": 10, "y": 0, "yref": "container", "yanchor": "bottom",
           "ypad": 6, "xpad": 0, "outlinewidth": 0, "nticks": 5, "title": {"text": metric.unit, "side": "bottom", "font": {"size": 12}},
           "tickfont": {"size": 11}}  # fmt: skip
    plan["coloraxis"] = {"colorscale": _COLOURS, "cmin": low, "cmax": high, "colorbar": bar}
    plan["margin"] = {"l": 10, "r": 12, "t": _TITLE_PX, "b": _GAP_PX + _FOOT_PX}
    rows = -(-len(data) // columns)
    narrow: dict[str, Any] = {"font.size": 11}
    for at in range(len(data)):
        x, y = _nth("x", at), _nth("y", at)
        row, column = divmod(at, columns)
        across = _part(column, columns, 0.06) if columns > 1 else [0.0, 1.0]
        up = _part(rows - 1 - row, rows, _GAP_PX / (rows * tall + (rows - 1) * _GAP_PX))
        sides: dict[str, Any] = {"type": "category", "categoryorder": "array", "showgrid": False, "ticks": ""}
        across_end, up_end = len(data[at]["x"]) - 0.5, len(data[at]["y"]) - 0.5
        plan[f"xaxis{x[1:]}"] = axis(
            names[places.x], domain=across, anchor=y, categoryarray=data[at]["x"], range=[-0.5, across_end], **sides
        )
        plan[f"yaxis{y[1:]}"] = axis(
            domain=up, anchor=x, categoryarray=data[at]["y"], range=[up_end, -0.5], showticklabels=column == 0, **sides
        )
        place = {"x": 0, "xref": f"{x} domain", "xanchor": "left", "y": 1, "yref": f"{y} domain", "yanchor": "bottom"}
        plan["annotations"].append(note(f"<b>{escape(titles[at])}</b>", **place) | {"font": {"size": 13, "color": INK}})
        alone = _part(len(data) - 1 - at, len(data), _GAP_PX / (len(data) * tall + (len(data) - 1) * _GAP_PX))
        narrow |= {f"xaxis{x[1:]}.domain": [0, 1], f"yaxis{y[1:]}.domain": alone, f"yaxis{y[1:]}.showticklabels": True}
    figure = {"data": data, "layout": plan, "narrow": narrow, "narrow_extra_px": (len(data) - rows) * (tall + _GAP_PX)}
    return figure, rows * tall + (rows - 1) * _GAP_PX + _TITLE_PX + _GAP_PX + _FOOT_PX


def _part(at: int, count: int, gap: float) -> list[float]:
    """Return the bounds of one of `count` equal parts of 0 to 1 with gaps between them, counted from below."""
    width = (1 - gap * (count - 1)) / count
    start = at * (width + gap)
    return [max(0.0, start), min(1.0, start + width)]


def _nth(name: str, at: int) -> str:
    return name if at == 0 else f"{name}{at + 1}"
