"""Predicted against measured: a page, or a section of another, from a validation document (see `comparison`).

Modelled: what of a plan ran, the document's own figures, the configurations whose interval misses by name, plots, a table, and
two timelines of the same steps one above the other. Ignored: how any of it was measured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pandas as pd

from ...base.text_files import write_atomic
from ...sim.parallel.timeline import EpTimeline
from ...sim.timeline import Timeline
from .. import numbers
from ..page import Column, Plot, Section, bullet_list, figures_row, paragraph, render, table
from ..timelines.lanes import excerpt, lanes_plot
from ..timelines.ranks import ranks_plot
from .comparison import Comparison, comparisons
from .errors import budget_plot, error_plot, scatter_plot

AnyTimeline: TypeAlias = Timeline | EpTimeline | pd.DataFrame


def predicted_measured_section(
    document: Mapping[str, Any],
    *,
    predicted: AnyTimeline | None = None,
    measured: AnyTimeline | None = None,
) -> Section:
    """Return the part of a report that compares predictions with measurements.

    document: see `comparison`. predicted, measured: rows of one schedule, of the same steps, shown one above the other. Raises
    InputError for a document that is none.
    """
    found = comparisons(document)
    parts: list[str | Plot] = [*_reduced(document), figures_row(_key_figures(document, found))]
    parts += [*_drift(document), *_misses(found)]
    parts.append(scatter_plot(found))
    parts += ["<h3>Error of every configuration</h3>", error_plot(found, document), _table(found)]
    if document.get("error_budget"):
        parts += ["<h3>Where the error comes from</h3>", budget_plot(document)]
    if predicted is not None and measured is not None:
        parts.append("<h3>The same steps, predicted and measured</h3>")
        if isinstance(predicted, EpTimeline) and isinstance(measured, EpTimeline):
            parts.append(_ranks(document, predicted, measured))
        else:
            parts.append(_two_timelines(_frame(predicted), _frame(measured)))
    return Section(id="measured", title="Predicted against measured", parts=tuple(parts))


def write_predicted_measured(
    path: str | os.PathLike[str],
    document: Mapping[str, Any],
    *,
    predicted: AnyTimeline | None = None,
    measured: AnyTimeline | None = None,
    title: str = "Predicted against measured",
) -> str:
    """Write a page of its own with that section and return its path; raises InputError where it cannot be written."""
    section = predicted_measured_section(document, predicted=predicted, measured=measured)
    found = comparisons(document)
    answer = f"Half of the predictions are within {numbers.percent(_median(found))} of the measured step time"
    footer = "This file is complete: it opens without a network."
    write_atomic(path, render(title=title, lead=[paragraph(answer, "answer")], sections=[section], footer=footer))
    return os.fspath(path)


def _frame(timeline: AnyTimeline) -> pd.DataFrame:
    return timeline if isinstance(timeline, pd.DataFrame) else timeline.frame()


def _ranks(document: Mapping[str, Any], predicted: EpTimeline, measured: EpTimeline) -> Plot:
    """Return two layers of a step on every rank, predicted above measured."""
    clocks = document["clocks"]
    below = (
        f"Measured rows of all ranks are on one clock, the first rank's: their clocks were compared by messages and differ by at most "
        f"{numbers.seconds(clocks['largest_offset_s'])}, known to {numbers.seconds(clocks['known_to_s'])}. Measured exchanges last "
        "from when a rank began one until it had everything that was sent to it, so that waiting for other ranks is part of them."
    )
    return ranks_plot(
        [("predicted", predicted), ("measured", measured)], ranks_per_node=document["num_ranks"] // document["num_nodes"],
        layer_names=document["layer_names"], note_below=below,
    )  # fmt: skip


def _median(found: Sequence[Comparison]) -> float:
    return float(pd.Series([abs(one.relative_error) for one in found]).median())


def _key_figures(document: Mapping[str, Any], found: Sequence[Comparison]) -> list[tuple[str, str]]:
    """Return the document's own figures; what it lacks is worked out from its configurations where that is possible."""
    errors = pd.Series([abs(one.relative_error) for one in found])
    covered = sum(one.covered for one in found) / len(found)
    equal = document.get("counts_equal")
    return [
        ("Configurations", f"{len(found)}"),
        ("Error, median", numbers.percent(document.get("median_relative_error", float(errors.median())))),
        ("Error, 90th percentile", numbers.percent(document.get("p90_relative_error", float(errors.quantile(0.9))))),
        ("Noise of the same run", _optional(document.get("noise_floor"))),
        ("Intervals that hold", numbers.percent(document.get("coverage", covered), 0)),
        ("Order, Kendall's τ", "–" if document.get("kendall_tau") is None else f"{document['kendall_tau']:.2f}"),
        ("Lost by trusting it", _optional(document.get("regret"))),
        ("Hits, misses, bytes", "–" if equal is None else "equal" if equal else "differ"),
    ]


def _reduced(document: Mapping[str, Any]) -> list[str]:
    """Return what of a plan ran where the machine does not hold all of it."""
    reduced = document.get("reduced")
    if not isinstance(reduced, Mapping):
        return []
    return [paragraph("What ran is not the whole plan:"), bullet_list(str(note) for note in reduced["notes"])]


def _drift(document: Mapping[str, Any]) -> list[str]:
    """Return what the machine has become since its profile was measured, and what of the error is left without that."""
    drift, without = document.get("drift"), document.get("without_drift")
    if not isinstance(drift, Mapping) or not isinstance(without, Mapping):
        return []
    slower = ", ".join(f"{name} {numbers.percent(ratio - 1, signed=True)}" for name, ratio in drift.items())
    return [
        paragraph(
            f"Runs of a calibrated shape, made again meanwhile, took other times than when the profile was measured: {slower}. "
            f"With that taken out, the median error is {numbers.percent(without['median_relative_error'])}, the 90th "
            f"percentile {numbers.percent(without['p90_relative_error'])}."
        )
    ]


def _optional(fraction: float | None) -> str:
    return "–" if fraction is None else numbers.percent(fraction)


def _misses(found: Sequence[Comparison]) -> list[str]:
    """Return the configurations whose interval misses and those whose counts differ, by name."""
    parts = []
    missed = [one for one in found if not one.covered]
    if missed:
        parts.append(
            paragraph(f"The interval of {len(missed)} of {len(found)} configurations misses the measured time:")
        )
        parts.append(
            bullet_list(f"{one.name}: predicted {numbers.percent(one.relative_error, signed=True)}" for one in missed)
        )
    differ = [one.name for one in found if one.counts_equal is False]
    if differ:
        parts.append(paragraph("Hits, misses, bytes or tokens differ between prediction and run:"))
        parts.append(bullet_list(differ))
    return parts


def _two_timelines(predicted: pd.DataFrame, measured: pd.DataFrame) -> Plot:
    """Return the same steps of both, chosen on the prediction."""
    first = excerpt(predicted)
    second = excerpt(measured, steps=first.steps)
    caption = (
        f"{first.words[:1].upper()}{first.words[1:]}. Both start at zero; the plot opens on the first step. Where lanes drift "
        "apart, the costs of what runs there are wrong."
    )
    return lanes_plot([("predicted", first), ("measured", second)], plot_id="plot-both", caption=caption)


def _table(found: Sequence[Comparison]) -> str:
    headings = ("Predicted", "Interval", "Measured", "Error", "Holds", "Counts")
    columns = [Column(title="Configuration", is_name=True), *(Column(title=text, is_number=True) for text in headings)]
    rows = [
        (
            one.name,
            numbers.seconds(one.predicted_s),
            f"{numbers.seconds(one.low_s)} to {numbers.seconds(one.high_s)}",
            numbers.seconds(one.measured_s),
            numbers.percent(one.relative_error, signed=True),
            "yes" if one.covered else "no",
            "–" if one.counts_equal is None else "equal" if one.counts_equal else "differ",
        )
        for one in found
    ]
    return table(columns, rows)
