"""Plots of how wrong predictions were: predicted against measured, error by configuration, where the error comes from.

Modelled: intervals are drawn wherever there are any, and configurations whose interval misses stand out. Ignored: everything
but step times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ...base.units import MS_PER_S
from .. import numbers
from ..page import INK, Plot
from ..style import BLUE, GREY, LIGHT_GREY, VERMILION, axis, layout, lying_bars, points, upright_line, wrapped
from .comparison import Comparison

# Up to so many decades, a logarithmic axis has room for three labels in each.
_DENSE_DECADES = 4
_INSIDE, _OUTSIDE = "interval holds the measurement", "interval misses it"


def scatter_plot(found: Sequence[Comparison]) -> Plot:
    """Return predicted against measured step time on equal logarithmic axes, with the intervals as error bars."""
    data: list[dict[str, Any]] = []
    every = [value for one in found for value in (one.low_s, one.high_s, one.measured_s) if value > 0]
    low, high = min(every) * MS_PER_S / 1.25, max(every) * MS_PER_S * 1.25
    diagonal = {
        "type": "scatter",
        "mode": "lines",
        "x": [low, high],
        "y": [low, high],
        "hoverinfo": "skip",
        "showlegend": False,
    }
    data.append(diagonal | {"line": {"color": GREY, "width": 1, "dash": "dot"}})
    for covered, colour in ((True, BLUE), (False, VERMILION)):
        mine = [one for one in found if one.covered == covered]
        if not mine:
            continue
        spans = [
            _bars("error_y", colour, [(one.predicted_s, one.low_s, one.high_s) for one in mine]),
            _bars(
                "error_x",
                colour,
                [(one.measured_s, *(one.measured_interval_s or (one.measured_s,) * 2)) for one in mine],
            ),
        ]
        x, y = [one.measured_s * MS_PER_S for one in mine], [one.predicted_s * MS_PER_S for one in mine]
        name = _INSIDE if covered else _OUTSIDE
        data.append(points(name, x, y, [_hover(one) for one in mine], colour, **spans[0], **spans[1]))
    ticks = _ticks(low, high)
    log: dict[str, Any] = {"type": "log", "range": [math.log10(low), math.log10(high)]}
    log |= {"tickmode": "array", "tickvals": ticks, "ticktext": [numbers.significant(tick, 1) for tick in ticks]}
    plan = layout(xaxis=axis("measured step, ms", **log), yaxis=axis("predicted step, ms", **log))
    return Plot(
        id="plot-scatter",
        figure={"data": data, "layout": plan, "narrow": {"font.size": 11}},
        height_px=460,
        title="Predicted against measured step time",
        caption="On the dotted line a prediction is exact; above it the prediction was too slow. Upright lines: predicted "
        "intervals; level lines, where there are any: the spread of the measurement.",
    )


def _ticks(low: float, high: float) -> list[float]:
    """Return the numbers 1, 2 and 5 times a power of ten between two values, or the powers alone over many decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= _DENSE_DECADES else (1,)
    every = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return [tick for tick in every if low <= tick <= high]


def _bars(key: str, colour: str, values: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    """Return error bars from (value, low, high) in seconds."""
    up = [max(0.0, high - value) * MS_PER_S for value, _, high in values]
    down = [max(0.0, value - low) * MS_PER_S for value, low, _ in values]
    return {
        key: {
            "type": "data",
            "symmetric": False,
            "array": up,
            "arrayminus": down,
            "color": colour,
            "thickness": 1.2,
            "width": 3,
        }
    }


def error_plot(found: Sequence[Comparison], document: Mapping[str, Any]) -> Plot:
    """Return the relative error of every configuration with its interval, the noise floor as a band."""
    ordered = sorted(found, key=lambda one: one.relative_error)
    places = [float(at) for at in range(len(ordered))]
    data = []
    for covered, colour in ((True, BLUE), (False, VERMILION)):
        mine = [(at, one) for at, one in zip(places, ordered, strict=True) if one.covered == covered]
        if mine:
            up = [100 * (one.high_s - one.predicted_s) / one.measured_s for _, one in mine]
            down = [100 * (one.predicted_s - one.low_s) / one.measured_s for _, one in mine]
            bars = {
                "type": "data",
                "symmetric": False,
                "array": up,
                "arrayminus": down,
                "color": colour,
                "thickness": 1.2,
                "width": 3,
            }
            hover = [_hover(one) for _, one in mine]
            x = [100 * one.relative_error for _, one in mine]
            data.append(
                points(_INSIDE if covered else _OUTSIDE, x, [at for at, _ in mine], hover, colour, error_x=bars)
            )
    shapes = []
    noise = document.get("noise_floor")
    if noise:
        band = {
            "type": "rect",
            "x0": -100 * noise,
            "x1": 100 * noise,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "layer": "below",
        }
        shapes.append(band | {"fillcolor": LIGHT_GREY, "opacity": 0.4, "line": {"width": 0}})
    shapes.append(upright_line(0.0, line={"color": INK, "width": 1}))
    names = [wrapped(one.name, 30) for one in ordered]
    y_axis = axis(
        tickmode="array",
        tickvals=places,
        ticktext=names,
        range=[len(ordered) - 0.4, -0.6],
        ticks="",
        tickfont={"size": 11},
    )
    plan = layout(xaxis=axis("relative error, %"), yaxis=y_axis, shapes=shapes)
    return Plot(
        id="plot-errors",
        figure={"data": data, "layout": plan, "narrow": {"font.size": 11}},
        height_px=110 + 32 * len(ordered),
        title="Relative error of every configuration",
        caption="Right of zero the prediction was too slow. Lines: the predicted interval."
        + (f" Grey band: {_NOISE.format(numbers.percent(noise))}" if noise else ""),
    )


_NOISE = "±{}, by which the same configuration differs from itself when it is run again; no prediction can be shown to be better."


def budget_plot(document: Mapping[str, Any]) -> Plot:
    """Return the error that is left when one class of durations is taken from the measurement."""
    budget = {str(name): 100 * float(value) for name, value in document["error_budget"].items()}
    places = [float(at) for at in range(len(budget))]
    hover = [f"<b>{escape(name)}</b><br>{value:.1f} %" for name, value in budget.items()]
    bars = lying_bars(list(budget.values()), places, hover, marker={"color": BLUE})
    names = [wrapped(name) for name in budget]
    y_axis = axis(
        tickmode="array", tickvals=places, ticktext=names, range=[len(budget) - 0.4, -0.6], showgrid=False, ticks=""
    )
    plan = layout(xaxis=axis("median relative error, %", rangemode="tozero"), yaxis=y_axis, showlegend=False)
    return Plot(
        id="plot-budget",
        figure={"data": [bars], "layout": plan, "narrow": {"font.size": 11}},
        height_px=90 + 34 * len(budget),
        title="Error budget",
        caption="What remains of the error when the durations of one class are replaced by the measured ones: the shorter the "
        "bar, the more of the error that class was to blame for.",
    )


def _hover(one: Comparison) -> str:
    span = f"{numbers.seconds(one.low_s)} to {numbers.seconds(one.high_s)}"
    return (
        f"<b>{escape(one.name)}</b><br>predicted {numbers.seconds(one.predicted_s)} ({span})<br>"
        f"measured {numbers.seconds(one.measured_s)}<br>error {numbers.percent(one.relative_error, signed=True)}"
    )
