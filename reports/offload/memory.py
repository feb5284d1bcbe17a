"""Plots of what memory buys: hit rate against cache size, speed against device memory.

Modelled: curves from simulation on the plan's window, with the plan's schedules marked on them. Ignored: schedules that
cache nothing, in the first plot.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from ...base.units import GIB, MIB
from ...specs.schedules.offload import OffloadSchedule
from .. import numbers
from ..page import INK, Plot
from ..style import BLUE, GREEN, GREY, ORANGE, VERMILION, axis, layout, note_beside, points, upright_line
from .hit_curves import HitCurve
from .speed import CHOSEN, PUBLISHED, REFERENCE, Document, Entry, is_roomier, speed_of, speed_words, told_by

_HEIGHT_PX = 400
_CURVE_COLOURS = (BLUE, ORANGE, GREEN, VERMILION)
_NARROW = {"font.size": 11}


def mean_experts_per_layer(schedule: OffloadSchedule, num_layers: int) -> float | None:
    """Return how many experts a layer the schedule caches, on average; None where it caches none or does not say."""
    cache = schedule.cache
    if cache.policy == "none":
        return None
    sized = cache.experts_per_layer is not None or cache.pooled_experts is not None
    return cache.slots(num_layers) / num_layers if sized else None


def hit_rate_plot(curves: Sequence[HitCurve], entries: Sequence[Entry], *, num_layers: int, num_experts: int) -> Plot:
    """Return hit rate against experts cached a layer, with the chosen size marked and the plan's schedules as points."""
    data = [_curve(curve, colour) for curve, colour in zip(curves, _CURVE_COLOURS, strict=False)]
    for kind, name, symbol, colour, size in _MARKS:
        sizes = [(entry, mean_experts_per_layer(entry.schedule, num_layers)) for entry in entries if entry.kind == kind]
        mine = [(entry, at, 100 * float(entry.result["hit_rate"])) for entry, at in sizes if at is not None]
        if mine and kind != REFERENCE:
            hover = [
                f"<b>{escape(entry.title)}</b><br>{numbers.plain(at)} experts a layer<br>{hit:.1f} % hits"
                for entry, at, hit in mine
            ]
            marker = {"size": size, "symbol": symbol, "color": colour, "line": {"width": 2, "color": colour}}
            data.append(
                points(name, [at for _, at, _ in mine], [hit for _, _, hit in mine], hover, colour, marker=marker)
            )
    plan = layout(
        xaxis=axis(f"experts cached a layer, of {num_experts}", range=[0, num_experts * 1.03]),
        yaxis=axis("hit rate, %", range=[0, 103]),
    )
    chosen = mean_experts_per_layer(entries[0].schedule, num_layers)
    if chosen is not None:
        text = f"chosen: {numbers.plain(chosen)} a layer"
        plan |= {
            "shapes": [upright_line(chosen)],
            "annotations": [note_beside(text, chosen, to_left=chosen > 0.6 * num_experts)],
        }
    return Plot(
        id="plot-hits",
        figure={"data": data, "layout": plan, "narrow": _NARROW},
        height_px=_HEIGHT_PX,
        title="Hit rate against cache size",
        caption="Lines: one cache a layer, nothing fetched ahead, on the recording and window of the plan. Points: "
        "schedules of the plan; what they fetch ahead counts as a hit, so they may lie above the lines. A pooled cache is "
        "shown at its mean size a layer.",
    )


# Kind, name in the legend, symbol, colour and size of the points that stand for schedules; the chosen one is drawn last.
_MARKS = (
    (PUBLISHED, "published schedules", "circle-open", GREY, 9),
    (REFERENCE, "chosen schedule with more memory", "circle", ORANGE, 9),
    (CHOSEN, "chosen schedule", "diamond", INK, 13),
)


def _curve(curve: HitCurve, colour: str) -> dict[str, Any]:
    each = curve.bytes_per_size
    hover = []
    for size, hit in zip(curve.experts_per_layer, curve.hit_fraction, strict=True):
        memory = f", {numbers.size(size * each)}" if each is not None else ""
        hover.append(f"<b>{escape(curve.name)}</b><br>{size} experts a layer{memory}<br>{100 * hit:.1f} % hits")
    hits = [100 * hit for hit in curve.hit_fraction]
    line = {"color": colour, "width": 2}
    return points(
        curve.name, curve.experts_per_layer, hits, hover, colour, mode="lines+markers", line=line, marker={"size": 5}
    )


def front_plot(document: Document, entries: Sequence[Entry]) -> Plot:
    """Return the best speed at each amount of device memory, with the budget and the plan's schedules."""
    budget_bytes = document["provenance"]["memory_bytes"]
    unit, scale = ("GiB", GIB) if budget_bytes >= GIB else ("MiB", MIB)
    told = told_by(document)
    budget, unit_of_speed = budget_bytes / scale, speed_words(document["best"], told)
    front = [(point["device_bytes"] / scale, speed_of(point, told), point["level"]) for point in document["front"]]
    hover = [
        f"<b>best found</b><br>{numbers.size(x * scale)}, {level} expert slots<br>{numbers.significant(y)} {unit_of_speed}"
        for x, y, level in front
    ]
    steps = {"shape": "hv", "color": BLUE, "width": 2}
    data = [
        points(
            "best found",
            [x for x, _, _ in front],
            [y for _, y, _ in front],
            hover,
            BLUE,
            mode="lines+markers",
            line=steps,
            marker={"size": 6},
        )
    ]
    for kind, name, symbol, colour, size in _MARKS:
        mine = [entry for entry in entries if entry.kind == kind and (kind != REFERENCE or is_roomier(entry))]
        if mine:
            x = [entry.result["memory_breakdown"]["device_bytes"] / scale for entry in mine]
            y = [speed_of(entry.result, told) for entry in mine]
            hover = [
                f"<b>{escape(entry.title)}</b><br>{numbers.size(at * scale)}<br>{numbers.significant(speed)} {unit_of_speed}"
                for entry, at, speed in zip(mine, x, y, strict=True)
            ]
            marker = {"size": size, "symbol": symbol, "color": colour, "line": {"width": 2, "color": colour}}
            data.append(points(name, x, y, hover, colour, marker=marker))
    every_x = [x for trace in data for x in trace["x"]] + [budget]
    low, high = min(every_x), max(every_x)
    room = max((high - low) * 0.06, high * 0.01)
    most = max(y for trace in data for y in trace["y"])
    plan = layout(
        xaxis=axis(f"device memory, {unit}", range=[max(0.0, low - room), high + room]),
        yaxis=axis(unit_of_speed, range=[0, most * 1.08 or 1]),
        shapes=[upright_line(budget)],
        annotations=[
            note_beside(f"budget {numbers.size(budget_bytes)}", budget, to_left=budget > low + 0.6 * (high - low))
        ],
    )
    return Plot(
        id="plot-front",
        figure={"data": data, "layout": plan, "narrow": _NARROW},
        height_px=_HEIGHT_PX,
        title="Best speed against device memory",
        caption="The line is the best schedule found with at most so much device memory. Points are "
        "schedules of the plan, at the memory they really take.",
    )
