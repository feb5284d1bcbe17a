"""Plots of what expert-parallel schedules are worth: every schedule's step, every ingredient's share, how a plan ages.

Modelled: a step is the kernels of its busiest rank and what else nothing hides (exchanges and waiting); intervals are drawn
wherever there are any. Ignored: anything that is not in the plan document.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from ...base.units import MS_PER_S
from .. import numbers
from ..bars import lying_figure, rows_under, stacked
from ..page import INK, Plot
from ..style import BLUE, GREEN, GREY, LIGHT_GREY, VERMILION, axis, lying_bars
from .plan_document import PLAIN, Document, plain_of

RIVAL = "the rival"
# Short enough to stand beside a bar.
INGREDIENTS = {
    "none": "plain",
    "parallelism": "parallelism",
    "all-to-all": "all-to-all kind",
    "exchange": "all-to-all kind",  # in plans of the version before
    "placement": "placement",
    "replication": "copies",
    "routing": "copy choice",
    "pipeline": "overlap",
    "kernels": "kernel choice",
}


def schedules(document: Document) -> list[tuple[str, str, Document]]:
    """Return (heading, title, result) of every simulated schedule: the chosen, plain, the headline's rival, the others fastest first,
    references.
    """
    plain = plain_of(document)
    found = [("Chosen", "best", document["best"]), ("Today", f"{PLAIN} (plain)", plain)]
    if (rival := document["headline"].get("rival")) is not None:
        found.append(("What it is set against", RIVAL, rival))
    others = sorted((one for one in document["baselines"] if one is not plain), key=lambda one: float(one["step_s"]))
    found += [("Published schedules", str(one["name"]), one) for one in others]
    found += [("References out of reach", str(one["name"]), one) for one in document["references"]]
    return found


def steps_plot(document: Document) -> Plot:
    """Return the step time of every schedule, divided into kernels and what nothing hides, with its interval."""
    every = schedules(document)
    rows = rows_under([heading for heading, _, _ in every])
    results = [one for _, _, one in every]
    titles = [title for _, title, _ in every]
    steps = [float(one["step_s"]) * MS_PER_S for one in results]
    errors = [step * float(one["relative_uncertainty"]) for step, one in zip(steps, results, strict=True)]
    parts = {
        "kernels of the busiest rank": ([float(one["compute_s"]) * MS_PER_S for one in results], BLUE),
        "exchanges and waiting that nothing hides": (
            [float(one["exposed_s"]) * MS_PER_S for one in results],
            VERMILION,
        ),
    }
    data: list[dict[str, Any]] = []
    for name, (values, colour) in parts.items():
        hover = [
            f"<b>{escape(title)}</b><br>{name}: {numbers.seconds(value / MS_PER_S)} of {numbers.seconds(step / MS_PER_S)}"
            for title, value, step in zip(titles, values, steps, strict=True)
        ]
        data.append(lying_bars(values, rows.bars, hover, name=name, marker={"color": colour}))
    data[-1]["error_x"] = {"type": "data", "array": errors, "color": INK, "thickness": 1.3, "width": 4}
    most = max(step + error for step, error in zip(steps, errors, strict=True))
    texts = [numbers.seconds(step / MS_PER_S) for step in steps]
    figure = stacked(lying_figure(titles, rows, texts, "step", axis("one step, ms", range=[0, most * 1.02]), data))
    return Plot(
        id="plot-steps",
        figure=figure,
        height_px=rows.height_px(130),
        title="Predicted step time of every schedule",
        caption="Time of one step through all layers, mean over the reported steps. Lines: the interval that the uncertainty of the "
        "machine's constants leaves; it is largely common to all, so that their order is surer than the intervals suggest. "
        "References are out of reach: tiles without any loss, or a model trained with a shortcut.",
    )


def ablation_plot(document: Document) -> Plot:
    """Return the step after each ingredient is added to plain expert parallelism."""
    added = [row for row in document["ablation"] if row["kind"] == "added"]
    rows = rows_under([""] * len(added))
    values = [float(row["step_s"]) * MS_PER_S for row in added]
    titles = [INGREDIENTS.get(row["ingredient"], str(row["ingredient"])) for row in added]
    titles = titles[:1] + [f"+ {title}" for title in titles[1:]]
    texts = [
        numbers.seconds(float(row["step_s"]))
        if at == 0
        else numbers.percent(float(row["change_fraction"]), signed=True)
        for at, row in enumerate(added)
    ]
    hover = [
        f"<b>{escape(title)}</b><br>{numbers.seconds(value / MS_PER_S)} a step"
        for title, value in zip(titles, values, strict=True)
    ]
    changes = [float(row["change_fraction"]) for row in added]
    colours = [LIGHT_GREY if change == 0 else GREEN if change < 0 else VERMILION for change in changes]
    colours[0] = GREY
    bars = lying_bars(values, rows.bars, hover, marker={"color": colours})
    figure = lying_figure(titles, rows, texts, "", axis("one step, ms", range=[0, max(values) * 1.02]), [bars])
    return Plot(
        id="plot-ablation",
        figure=figure,
        height_px=rows.height_px(70),
        title="Step time as ingredients are added",
        caption="From plain expert parallelism, each line adds one ingredient of the plan to all above it; the last is the plan. The "
        "right column says what the ingredient changes in that order.",
    )


def staleness_plot(document: Document) -> Plot:
    """Return, for every other recording, the step of plain expert parallelism, of the plan as it is, and re-planned."""
    headings: list[str] = []
    titles: list[str] = []
    values: list[float] = []
    colours: list[str] = []
    for one in document["staleness"]:
        for title, key, colour in _AGEING:
            headings.append(f"on {one['recording']}")
            titles.append(title)
            values.append(float(one[key]) * MS_PER_S)
            colours.append(colour)
    rows = rows_under(headings)
    texts = [numbers.seconds(value / MS_PER_S) for value in values]
    hover = [
        f"<b>{escape(title)}</b><br>{escape(heading)}<br>{text} a step"
        for title, heading, text in zip(titles, headings, texts, strict=True)
    ]
    bars = lying_bars(values, rows.bars, hover, marker={"color": colours})
    figure = lying_figure(titles, rows, texts, "step", axis("one step, ms", range=[0, max(values) * 1.02]), [bars])
    return Plot(
        id="plot-staleness",
        figure=figure,
        height_px=rows.height_px(70),
        title="The plan on other recordings than it was made from",
        caption="The plan as it is, beside plain expert parallelism and an EPLB placement made from the other recording itself.",
    )


_AGEING: Sequence[tuple[str, str, str]] = (
    ("plain", "plain_step_s", GREY), ("the plan as it is", "plan_step_s", BLUE),
    ("EPLB made there", "replanned_eplb_step_s", LIGHT_GREY),
)  # fmt: skip
