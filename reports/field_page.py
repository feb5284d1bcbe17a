"""Predicted against measured for public reports: one page, from the document that `reproduce field` prints.

Modelled: scores by kind and cut beside the two one-liners, a plot a kind on equal logarithmic axes with intervals, and the
misses by name with what could explain them. Ignored: how any of it was predicted (`papers.field`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..base.text_files import write_atomic
from . import numbers
from .page import Column, Plot, Section, bullet_list, figures_row, paragraph, render, table
from .style import BLUE, GREY, VERMILION, axis, layout, points

_TITLES = {
    "gpu-decode": "Decoding, experts on the card", "gpu-prefill": "Prompts, experts on the card",
    "cpu-decode": "Decoding, experts on the cores", "cpu-prefill": "Prompts, experts on the cores",
    "cache-decode": "Decoding, experts cached or fetched", "cache-prefill": "Prompts, experts cached or fetched",
}  # fmt: skip
_MOST_MISSES = 40


def write_field_page(path: str | os.PathLike[str], document: Mapping[str, Any]) -> str:
    """Write the page and return its path; raises InputError where it cannot be written."""
    write_atomic(path, field_page(document))
    return os.fspath(path)


def field_page(document: Mapping[str, Any]) -> str:
    """Return the page of a document of `papers.field.scores.document`."""
    rows = [row for row in document["rows"] if row["predicted"] is not None]
    held = [row["low"] <= row["measured"] <= row["high"] for row in rows]
    share = numbers.percent(sum(held) / len(held) if held else 0, 0)
    medians = [
        (_TITLES[kind], f"{numbers.percent(one['median_relative_error'], 0)} off")
        for kind, one in document["kinds"].items()
        if one["predicted"]
    ]
    answer = f"{document['num_predicted']} of {document['num_reports']} public measurements, predicted from their facts"
    lead = [
        paragraph(answer, "answer"),
        figures_row(medians),
        paragraph(f"Half of the predictions of a kind are within that error; {share} of all intervals hold.", "note"),
    ]
    if document["in_sample"]:
        away = ", ".join(
            f"{_TITLES[kind].lower()} {numbers.percent(one['median_relative_error'], 0)}"
            for kind, one in document["left_out"].items()
        )
        lead.append(
            paragraph(
                f"Constants of engines were fitted on these reports. Median errors on machines left out of the fit: {away}.",
                "note",
            )
        )
    for engines, chosen in document["choices"].items():
        words = (
            f"{engines}: of {chosen['groups']} groups of settings of one machine and file, the best measured one is predicted best in "
            f"{chosen['chosen']}, or within its interval in {chosen['chosen_or_within']}."
        )
        lead.append(paragraph(words, "note"))
    sections = [
        Section(
            id="scores", title="Scores", parts=(_scores("kind", document["kinds"]), _scores("cut", document["cuts"]))
        ),
        Section(id="plots", title="Predicted against measured", parts=tuple(_plots(rows, document["kinds"]))),
        Section(id="misses", title="What was missed", parts=tuple(_misses(document["rows"]))),
    ]
    return render(
        title="Field reports", lead=lead, sections=sections, footer="This file is complete: it opens without a network."
    )


def _scores(title: str, scores: Mapping[str, Mapping[str, Any]]) -> str:
    headings = (
        "Reports",
        "Predicted",
        "Median error",
        "90th percentile",
        "Bias",
        "Intervals hold",
        "Kendall's τ",
        "One-liner",
        "× 0.6",
    )
    columns = [
        Column(title=title.capitalize(), is_name=True),
        *(Column(title=text, is_number=True) for text in headings),
    ]
    return table(columns, [
        (name, str(one["n"]), str(one["predicted"]), _share(one["median_relative_error"]), _share(one["p90_relative_error"]),
         _plain(one["bias"]), _share(one["coverage"]), _plain(one["kendall_tau"]), _share(one["roofline_median"]),
         _share(one["roofline06_median"]))
        for name, one in scores.items()
    ])  # fmt: skip


def _plots(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, Any]) -> list[str | Plot]:
    parts: list[str | Plot] = []
    for kind in kinds:
        mine = [row for row in rows if row["kind"] == kind]
        if mine:
            parts += [f"<h3>{escape(_TITLES[kind])}</h3>", _plot(kind, mine)]
    return parts


def _plot(kind: str, rows: Sequence[Mapping[str, Any]]) -> Plot:
    """Return predicted against measured on equal logarithmic axes; a time to the first token is shown as the speed it means."""
    every = [value for row in rows for value in (row["low"], row["high"], row["measured"])]
    low, high = min(every) / 1.25, max(every) * 1.25
    data: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "x": [low, high], "y": [low, high], "hoverinfo": "skip", "showlegend": False,
         "line": {"color": GREY, "width": 1, "dash": "dot"}}
    ]  # fmt: skip
    for holds, colour, name in (
        (True, BLUE, "interval holds the measurement"),
        (False, VERMILION, "interval misses it"),
    ):
        mine = [row for row in rows if (row["low"] <= row["measured"] <= row["high"]) == holds]
        if mine:
            bars = {"type": "data", "symmetric": False, "color": colour, "thickness": 1, "width": 0,
                    "array": [row["high"] - row["predicted"] for row in mine],
                    "arrayminus": [row["predicted"] - row["low"] for row in mine]}  # fmt: skip
            x, y = [row["measured"] for row in mine], [row["predicted"] for row in mine]
            data.append(points(name, x, y, [_hover(row) for row in mine], colour, error_y=bars))
    log: dict[str, Any] = {"type": "log", "range": [math.log10(low), math.log10(high)], "dtick": 1}
    unit = "tokens/s" if all(row["metric"] != "ttft_s" for row in rows) else "tokens/s, or seconds to the first token"
    return Plot(
        id=f"plot-{kind}",
        figure={"data": data, "layout": layout(xaxis=axis(f"measured, {unit}", **log), yaxis=axis(f"predicted, {unit}", **log)),
                "narrow": {"font.size": 11}},
        height_px=420, title=f"Predicted against measured: {_TITLES[kind]}",
        caption="On the dotted line a prediction is exact; above it, it was too high. Upright lines: predicted intervals.",
    )  # fmt: skip


def _hover(row: Mapping[str, Any]) -> str:
    return (
        f"{escape(str(row['id']))}: {escape(str(row['model']))}, {escape(str(row['engine']))}<br>{escape(str(row['machine']))}<br>"
        f"measured {numbers.significant(row['measured'], 3)}, predicted {numbers.significant(row['predicted'], 3)} "
        f"({numbers.significant(row['low'], 3)} to {numbers.significant(row['high'], 3)})"
    )


def _misses(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    missed = [row for row in rows if row["could_explain"]]
    missed.sort(key=lambda row: -abs(math.log(row["predicted"] / row["measured"])))
    parts = [paragraph(f"{len(missed)} predictions are more than 1.5 times off; the worst first.")]
    parts.append(bullet_list(
        f"{row['id']} ({row['model']}, {row['engine']}): measured {numbers.significant(row['measured'], 3)}, predicted "
        f"{numbers.significant(row['predicted'], 3)}; {row['could_explain']}" for row in missed[:_MOST_MISSES]
    ))  # fmt: skip
    left_out = [row for row in rows if row["predicted"] is None]
    if left_out:
        parts.append(paragraph(f"{len(left_out)} reports could not be predicted:"))
        parts.append(bullet_list(f"{row['id']}: {row['reason']}" for row in left_out[:_MOST_MISSES]))
    return parts


def _share(value: float | None) -> str:
    return "–" if value is None else numbers.percent(value, 0)


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
