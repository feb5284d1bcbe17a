"""Plots of how fast every schedule is and where its time goes, one bar a schedule, grouped by family.

Ignored: anything that is not in the plan document.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ...base.units import NS_PER_S
from .. import numbers
from ..bars import lying_figure, rows_under
from ..page import INK, Plot
from ..style import KIND_COLOURS, SHARE_COLOURS, axis, lying_bars
from .speed import Entry, interval_of, interval_text, speed_of, speed_words

SHARE_TITLES = {
    "dense": "attention, router, shared parts",
    "expert": "expert kernels",
    "head": "output head",
    "launch": "launching kernels",
    "copy": "waiting for copies",
    "cpu": "waiting for experts on the host's cores",
    "host": "waiting for the host",
}


def speed_plot(entries: Sequence[Entry], told: str | None = None) -> Plot:
    """Return the speed of every schedule with its interval: of decoding, or of prompts where nothing is decoded.

    told: the time by which they are told instead; less is better.
    """
    unit = speed_words(entries[0].result, told)
    rows = rows_under([entry.heading for entry in entries])
    speeds = [speed_of(entry.result, told) for entry in entries]
    texts = [numbers.significant(speed) for speed in speeds]
    hover = [
        f"<b>{escape(entry.title)}</b><br>{text} {unit}<br>interval {interval_text(entry.result, told)}"
        for entry, text in zip(entries, texts, strict=True)
    ]
    below, above = [], []
    for speed, entry in zip(speeds, entries, strict=True):
        low, high = interval_of(entry.result, told)
        below.append(speed - low)
        above.append(high - speed)
    errors = {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": below,
        "color": INK,
        "thickness": 1.3,
        "width": 4,
    }
    colours = [KIND_COLOURS[entry.kind] for entry in entries]
    bars = lying_bars(speeds, rows.bars, hover, marker={"color": colours}, error_x=errors)
    needing = (
        " †: needs what this case does not have; the list below says what."
        if any(each.needs for each in entries)
        else ""
    )
    most = max(speed + up for speed, up in zip(speeds, above, strict=True))
    x_axis = axis(unit, range=[0, most * 1.02 or 1])
    return Plot(
        id="plot-speed",
        figure=lying_figure([entry.label for entry in entries], rows, texts, unit, x_axis, [bars]),
        height_px=rows.height_px(80),
        title=f"Predicted {'speed' if told is None else 'time'} of every schedule, {unit}",
        caption=f"Bars: predicted {'speed' if told is None else 'time, the shortest is best'}. "
        "Lines: the interval that the uncertainty of the machine's constants leaves; all "
        "schedules use the same constants, so much of the error is common to them and their order is surer than the intervals "
        "suggest. Published schedules have the same memory and bits, each with the largest cache that fits. Out of reach: the "
        "chosen schedule with more memory, and with a cache that knows the future: it misses least often, but starts empty and moves "
        "what the host's cores might have computed, so that it may be slower." + needing,
    )


def share_plot(entries: Sequence[Entry]) -> Plot:
    """Return what share of each schedule's time goes into what."""
    rows = rows_under([entry.heading for entry in entries])
    passes = [int(entry.result["makespan_ns"]) / NS_PER_S / max(int(entry.result["num_steps"]), 1) for entry in entries]
    data = []
    for part, title in SHARE_TITLES.items():
        shares = [float(entry.result["time_share"].get(part, 0.0)) for entry in entries]
        if part == "cpu" and not any(shares):
            continue
        hover = [
            f"<b>{escape(entry.title)}</b><br>{escape(title)}: {numbers.percent(share)}, {numbers.seconds(share * mean)} a pass"
            for entry, share, mean in zip(entries, shares, passes, strict=True)
        ]
        percents = [100 * share for share in shares]
        data.append(lying_bars(percents, rows.bars, hover, name=title, marker={"color": SHARE_COLOURS[part]}))
    texts = [numbers.seconds(mean) for mean in passes]
    figure = lying_figure(
        [entry.title for entry in entries], rows, texts, "mean pass", axis("share of the time, %", range=[0, 100]), data
    )
    figure["layout"] |= {"barmode": "stack", "showlegend": True}
    return Plot(
        id="plot-share",
        figure=figure,
        height_px=rows.height_px(130),
        title="Where the time of every schedule goes",
        caption="Time of all forward passes, prompts included. A copy or host operation that runs beside a kernel costs nothing "
        "here: only the time in which the compute stream stands still is counted against it.",
    )
