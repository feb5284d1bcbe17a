"""The page of studies: what is best, what the answer depends on, maps of it, and what has no answer.

Modelled: every study of a store, one after the other, and beside each other where their runs have equal labels. Ignored: where runs come
from.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from ...base.text_files import write_atomic
from .. import numbers
from ..page import Column, Plot, Section, figures_row, fold, paragraph, render, table
from ..style import BLUE, axis, layout, lying_bars, wrapped
from .maps import map_plot
from .rows import DONE, Comparison, Effect, Metric, StudyRows, compare, effects

MOST_STUDIES, MOST_METRICS, _MOST_ROWS = 12, 3, 12
_BAR_PX, _AXIS_PX = 34, 64


def write_study_page(path: str | os.PathLike[str], studies: Sequence[StudyRows]) -> str:
    """Write the page and return its path; raises InputError where it cannot be written."""
    write_atomic(path, study_page(studies))
    return os.fspath(path)


def study_page(studies: Sequence[StudyRows]) -> str:
    """Return the page of some studies, one at least; of more than `MOST_STUDIES` the last ones are shown."""
    shown = studies[-MOST_STUDIES:]
    lead = _lead(shown[0]) if len(shown) == 1 else [paragraph(f"{len(studies)} studies", "answer"), _overview(shown)]
    if len(shown) < len(studies):
        lead.append(paragraph(f"The last {len(shown)} of {len(studies)} studies are shown.", "note"))
    sections: list[Section] = []
    for number, study in enumerate(shown, 1):
        sections += _sections(study, number, alone=len(shown) == 1)
    compared = [one for pair in combinations(shown, 2) for one in compare(*pair)]
    if compared:
        sections.append(Section(id="compared", title="Studies beside each other", parts=(_compared(compared),)))
    return render(
        title=shown[0].name if len(shown) == 1 else "Studies", lead=lead, sections=sections,
        footer="This file is complete: it opens without a network.",
    )  # fmt: skip


def _lead(study: StudyRows) -> list[str]:
    metrics = study.metrics()
    if not metrics:
        return [paragraph(f"None of {study.num_runs} runs has figures", "answer")]
    (levels, value), strongest = study.best(metrics[0]) or ((), 0.0), effects(study, metrics[0])[:1]
    answer = f"Best: {numbers.significant(value)} {metrics[0].unit}, with {study.label(levels)}"
    done = sum(row.state == DONE for row in study.rows)
    binds = Counter(str(row.figures.get("bound")) for row in study.rows if row.state == DONE and "bound" in row.figures)
    items = [("runs with figures", f"{done:,} of {study.num_runs:,}")]
    items += [("matters most", one.axis) for one in strongest]
    items += [("between its levels", f"{numbers.significant(one.ratio)} ×") for one in strongest]
    items += [
        ("binds most often", f"{name}, {numbers.percent(count / done, 0)}") for name, count in binds.most_common(1)
    ]
    return [paragraph(answer, "answer"), figures_row(items)]


def _overview(studies: Sequence[StudyRows]) -> str:
    columns = [Column(title="Study", is_name=True), Column(title="Runs", is_number=True), Column(title="With figures", is_number=True),
               Column(title="Best", is_number=True), Column(title="With"), Column(title="Matters most")]  # fmt: skip
    rows = []
    for study in studies:
        metrics = study.metrics()
        best = study.best(metrics[0]) if metrics else None
        strongest = effects(study, metrics[0])[:1] if metrics else []
        rows.append((
            study.name, f"{study.num_runs:,}", f"{sum(row.state == DONE for row in study.rows):,}",
            "–" if best is None else f"{numbers.significant(best[1])} {metrics[0].unit}",
            "–" if best is None else study.label(best[0]), strongest[0].axis if strongest else "–",
        ))  # fmt: skip
    return table(columns, rows)


def _sections(study: StudyRows, number: int, *, alone: bool) -> list[Section]:
    before = "" if alone else f"{study.name}: "
    metrics = study.metrics()[:MOST_METRICS]
    found = []
    if metrics:
        depends: list[str | Plot] = []
        maps: list[str | Plot] = []
        for metric in metrics:
            strength = effects(study, metric)
            if strength:
                depends += [f"<h3>{metric.title}</h3>", _effects_plot(strength, metric, f"effects-{number}-{metric.name}"),
                            _effects_table(strength)]  # fmt: skip
            if study.axes:
                maps += [f"<h3>{metric.title}</h3>", map_plot(study, metric, strength, f"map-{number}-{metric.name}")]
        if depends:
            title = f"{before}What the answer depends on"
            found.append(Section(id=f"depends-{number}", title=_capital(title), parts=tuple(depends)))
        if maps:
            found.append(Section(id=f"maps-{number}", title=_capital(f"{before}Over the grid"), parts=tuple(maps)))
        found.append(
            Section(id=f"best-{number}", title=_capital(f"{before}Best runs"), parts=(_best(study, metrics[0]),))
        )
    without = [row for row in study.rows if row.state != DONE]
    absent = study.num_runs - len(study.rows)
    if without or absent:
        parts = [_without(study)] if without else []
        if absent:
            parts.append(paragraph(f"{absent:,} runs have not been made yet."))
        found.append(
            Section(id=f"without-{number}", title=_capital(f"{before}Runs without figures"), parts=tuple(parts))
        )
    base = fold("What all runs share", table([Column(title="Field", is_name=True), Column(title="Value")],
                [(name, str(value)) for name, value in study.base.items()]))  # fmt: skip
    found.append(Section(id=f"inputs-{number}", title=_capital(f"{before}Inputs"), parts=(_axes(study), base)))
    return found


def _capital(title: str) -> str:
    return title[:1].upper() + title[1:]


def _effects_plot(found: Sequence[Effect], metric: Metric, plot_id: str) -> Plot:
    """Return a bar for each axis: how far its levels are apart where all else is equal."""
    at = [float(-row) for row in range(len(found))]
    hover = [
        f"{wrapped(one.axis, 40)}: {numbers.significant(one.ratio)} × at the median, {numbers.significant(one.least)} to "
        f"{numbers.significant(one.most)} ×" for one in found
    ]  # fmt: skip
    gains = [one.ratio for one in found]
    ends = {"type": "data", "symmetric": False, "array": [one.most - one.ratio for one in found],
            "arrayminus": [one.ratio - one.least for one in found], "color": "#57606a", "thickness": 1, "width": 4}  # fmt: skip
    bars = lying_bars([gain - 1 for gain in gains], at, hover, base=1, marker={"color": BLUE}, error_x=ends)
    ticks: dict[str, Any] = {
        "tickmode": "array",
        "tickvals": at,
        "ticktext": [wrapped(one.axis, 24) for one in found],
        "showgrid": False,
        "ticks": "",
    }
    end = 1 + 1.04 * (max(one.most for one in found) - 1 or 1)
    figure = {
        "data": [bars], "narrow": {"font.size": 11},
        "layout": layout(xaxis=axis("best over worst level", range=[1, end], ticksuffix=" ×"), yaxis=axis(**ticks),
                         margin={"l": 10, "r": 12, "t": 8, "b": 10}),
    }  # fmt: skip
    return Plot(
        id=plot_id, figure=figure, height_px=_BAR_PX * len(found) + _AXIS_PX, title=f"{metric.title}: effect of each input",
        caption="How many times the worst level's answer the best level's is, where all else is equal: the median over the grid, "
        "and from the least to the most.",
    )  # fmt: skip


def _effects_table(found: Sequence[Effect]) -> str:
    columns = [Column(title="Input", is_name=True), *(Column(title=title, is_number=True) for title in (
        "Best over worst", "Least", "Most", "Share of the spread")), Column(title="Best level")]  # fmt: skip
    return table(columns, [
        (one.axis, f"{numbers.significant(one.ratio)} ×", f"{numbers.significant(one.least)} ×", f"{numbers.significant(one.most)} ×",
         numbers.percent(one.spread_share, 0), f"{one.best} (in {numbers.percent(one.best_share, 0)} of cases)")
        for one in found
    ])  # fmt: skip


def _best(study: StudyRows, metric: Metric) -> str:
    values = sorted(
        study.values(metric).items(), key=lambda each: (-each[1] if metric.most_is_best else each[1], each[0])
    )
    figures = {row.levels: row.figures for row in study.rows}
    columns = [*(Column(title=name, is_name=True) for name in study.axes), Column(title=metric.unit, is_number=True),
               Column(title="Likely", is_number=True), Column(title="Device memory", is_number=True), Column(title="Binds")]  # fmt: skip
    rows = []
    for levels, value in values[:_MOST_ROWS]:
        own = figures[levels]
        low, high = own.get(f"{metric.name}_low"), own.get(f"{metric.name}_high")
        rows.append((
            *(str(labels[at]) for labels, at in zip(study.axes.values(), levels, strict=True)), numbers.significant(value),
            "–" if low is None or high is None else f"{numbers.significant(low)} to {numbers.significant(high)}",
            numbers.size(own["device_bytes"]) if "device_bytes" in own else "–", str(own.get("bound", "–")),
        ))  # fmt: skip
    return table(columns, rows)


def _without(study: StudyRows) -> str:
    first: dict[tuple[str, str], str] = {}
    count: Counter[tuple[str, str]] = Counter()
    for row in study.rows:
        if row.state != DONE:
            # The same reason with other numbers is the same kind.
            kind = row.state, "".join(letter for letter in row.reason or "" if not letter.isdigit())
            count[kind] += 1
            first.setdefault(kind, f"{row.reason} ({study.label(row.levels)})")
    columns = [
        Column(title="State", is_name=True),
        Column(title="Runs", is_number=True),
        Column(title="The first reason"),
    ]
    return table(columns, [(kind[0], f"{number:,}", first[kind]) for kind, number in count.most_common(_MOST_ROWS)])


def _axes(study: StudyRows) -> str:
    columns = [
        Column(title="Axis", is_name=True),
        Column(title="Levels", is_number=True),
        Column(title="From the first to the last"),
    ]
    rows: list[tuple[str, ...]] = []
    for name, labels in study.axes.items():
        texts = [str(label) for label in labels]
        rows.append(
            (
                name,
                f"{len(texts):,}",
                ", ".join(texts if len(texts) <= _MOST_ROWS else [*texts[:_MOST_ROWS], "…", texts[-1]]),
            )
        )
    return table(columns, rows)


def _compared(found: Sequence[Comparison]) -> str:
    columns: list[Any] = [Column(title="Studies", is_name=True), Column(title="Figure"), *(
        Column(title=title, is_number=True) for title in ("Runs in both", "Second over first", "Least", "Most"))]  # fmt: skip
    return table(columns, [
        (" → ".join(one.names), one.metric.unit, f"{one.num_runs:,}", f"{numbers.significant(one.ratio)} ×",
         f"{numbers.significant(one.least)} ×", f"{numbers.significant(one.most)} ×")
        for one in found
    ])  # fmt: skip
