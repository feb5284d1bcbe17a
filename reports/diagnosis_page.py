"""Is a measured speed normal, as a page: from the document that `moeplan diagnose` prints.

Modelled: the verdict, each measured figure on its interval below its ceilings, changes with their gains and costs, causes with the speeds
they would give, memory at the context that was asked for. Ignored: how any of it was found (`diagnosis`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ..base.text_files import write_atomic
from ..base.units import GIGA
from . import numbers
from .diagnosis_words import bound_words, ceiling_words
from .page import Column, Plot, Section, bullet_list, code_block, figures_row, paragraph, render, table
from .style import BLUE, GREY, VERMILION, axis, layout, points

_TITLES = {"decode_tokens_per_s": "Generated tokens", "prefill_tokens_per_s": "Prompt tokens"}
_ROW_PX, _AROUND_PX = 90, 90


def write_diagnosis_page(path: str | os.PathLike[str], document: Mapping[str, Any]) -> str:
    """Write the page and return its path; raises InputError where it cannot be written."""
    write_atomic(path, diagnosis_page(document))
    return os.fspath(path)


def diagnosis_page(document: Mapping[str, Any]) -> str:
    """Return the page of a diagnosis's document."""
    speeds = document["speeds"]
    quant = "" if document["quant"] is None else f" {document['quant']}"
    lead = [
        paragraph(f"{document['verdict'].capitalize()}.", "answer"),
        figures_row([(f"{_TITLES[one['metric']]} per second", numbers.significant(one["measured"])) for one in speeds]),
        paragraph(" ".join(_normal(one) for one in speeds)),
        paragraph(f"{document['model']}{quant} on {document['machine']}.", "note"),
    ]
    if document["command"] and not document.get("lines"):
        lead.append(code_block(document["command"]))
    sections = [
        *(
            [Section(id="lines", title="Every line", parts=(_lines(document["lines"]),))]
            if document.get("lines")
            else []
        ),
        Section(id="speeds", title="Measured beside predicted", parts=(_plot(speeds), _figures(speeds))),
        *(
            [Section(id="changes", title="What would gain most", parts=_changes(document["changes"]))]
            if document["changes"]
            else []
        ),
        *_causes(document),
        Section(id="memory", title="Memory", parts=(_memory(document["memory"]),)),
        Section(
            id="assumed",
            title="What was assumed",
            parts=(bullet_list([*document["notes"], *document["assumed"]] or ["nothing"]),),
        ),
    ]
    title = f"{document['model']}: is it normal?"
    return render(
        title=title, lead=lead, sections=sections, footer="This file is complete: it opens without a network."
    )


def _normal(one: Mapping[str, Any]) -> str:
    low, high, predicted = (numbers.significant(one[name]) for name in ("low", "high", "predicted"))
    beyond = " Nothing on this machine can do what was measured." if one["impossible"] else ""
    return f"{_TITLES[one['metric']]}: {low} to {high} a second are normal, {predicted} are predicted.{beyond}"


def _plot(speeds: Sequence[Mapping[str, Any]]) -> Plot:
    """Return each measured figure on its interval, with the ceilings above it, on one logarithmic axis."""
    names = [_TITLES[one["metric"]] for one in speeds]
    rows = [float(at) for at in range(len(names))]
    spread = {
        "type": "data", "symmetric": False, "color": BLUE, "thickness": 6, "width": 0,
        "array": [one["high"] - one["predicted"] for one in speeds], "arrayminus": [one["predicted"] - one["low"] for one in speeds],
    }  # fmt: skip
    data = [
        points("predicted, nine in ten lie here", [one["predicted"] for one in speeds], rows, [_hover(one) for one in speeds], BLUE,
               error_x=spread),
        points("measured", [one["measured"] for one in speeds], rows, [_hover(one) for one in speeds], VERMILION,
               marker={"size": 13, "symbol": "diamond", "color": VERMILION}),
        points("ceiling as it is placed", [one["ceiling"]["as_placed"] for one in speeds], rows,
               [escape(one["ceiling"]["as_placed_from"]) for one in speeds], GREY,
               marker={"size": 18, "symbol": "line-ns-open", "color": GREY, "line": {"width": 3, "color": GREY}}),
    ]  # fmt: skip
    every = [
        value for one in speeds for value in (one["low"], one["high"], one["measured"], one["ceiling"]["as_placed"])
    ]
    low, high = min(every) / 1.25, max(every) * 1.25
    scale: dict[str, Any] = {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickmode": "array",
        "tickvals": _ticks(low, high),
    }
    return Plot(
        id="plot-speeds",
        figure={"data": data,
                "layout": layout(xaxis=axis("tokens per second", **scale), yaxis=axis(tickmode="array", tickvals=rows, ticktext=names,
                range=[len(names) - 0.5, -0.5])),
                "narrow": {"font.size": 11}},
        height_px=_ROW_PX * len(names) + _AROUND_PX, title="Measured speeds beside their predicted intervals and ceilings",
        caption="The scale is logarithmic. Nothing can be right of the ceiling with experts where they are.",
    )  # fmt: skip


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers of a logarithmic axis."""
    found = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        found += [digit * 10.0**power for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
    return found


def _hover(one: Mapping[str, Any]) -> str:
    low, high, predicted, measured = (
        numbers.significant(one[name]) for name in ("low", "high", "predicted", "measured")
    )
    return f"measured {measured}<br>predicted {predicted} ({low} to {high})"


def _figures(speeds: Sequence[Mapping[str, Any]]) -> str:
    columns = [
        Column(title="Tokens per second", is_name=True),
        *(Column(title=title, is_number=True) for title in ("Measured", "Predicted", "Lowest", "Highest", "Ceiling")),
    ]
    cells = table(columns, [
        (_TITLES[one["metric"]], *(numbers.significant(one[name]) for name in ("measured", "predicted", "low", "high")),
         numbers.significant(one["ceiling"]["as_placed"]))
        for one in speeds
    ])  # fmt: skip
    return cells + bullet_list(text for one in speeds for text in _said(one))


def _said(one: Mapping[str, Any]) -> Iterator[str]:
    """Yield what binds, and where the ceilings come from."""
    title = _TITLES[one["metric"]]
    yield f"{title}: {bound_words(one)}."
    yield f"{title}: nothing beats {ceiling_words(one)}."


def _lines(lines: Sequence[Mapping[str, Any]]) -> str:
    columns = [Column(title="Line", is_name=True), Column(title="Test", is_name=True), Column(title="Measured", is_number=True),
               Column(title="Predicted", is_number=True), Column(title="Normal"), Column(title="Verdict")]  # fmt: skip
    return table(columns, [
        (one["where"], one["test"], numbers.significant(one["measured"]), *(
            ("–", "–", str(one["reason"])) if one["verdict"] is None else
            (numbers.significant(one["predicted"]), f"{numbers.significant(one['low'])} to {numbers.significant(one['high'])}",
            one["verdict"])
        ))
        for one in lines
    ])  # fmt: skip


def _changes(changes: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    columns = [
        Column(title="Change"),
        *(Column(title=name, is_number=True) for name in ("Generated", "Prompts", "Request")),
    ]
    headings = {"hardware": "Hardware", "file": "Settings and files", "setting": "Settings and files"}
    rows = [
        (f"{one['what']}; costs {one['cost']}", *(f"{one[name]:.2f} ×" for name in ("decode_gain", "prefill_gain", "request_gain")))
        for one in changes
    ]  # fmt: skip
    said = "Times as fast as now. Each is predicted as the run itself is; errors that both share cancel."
    return paragraph(said, "note"), table(columns, rows, headings=[headings[one["kind"]] for one in changes])


def _causes(document: Mapping[str, Any]) -> list[Section]:
    """Return what to look for; nothing where the verdict is normal."""
    if document["verdict"] == "normal":
        return []
    causes = document["causes"]
    if not causes:
        none = paragraph("No cause that is known here has the size of the gap.")
        return [Section(id="causes", title="What to check", parts=(none,))]
    metrics = list(causes[0]["speeds"])
    columns = [Column(title="It may be"), *(Column(title=_TITLES[name], is_number=True) for name in metrics)]
    rows = [
        (f"{one['what']}; look at {one['check']}", *(numbers.significant(one["speeds"][name][0]) for name in metrics))
        for one in causes
    ]
    said = "Each would give the measured speeds, within its interval; the nearest first."
    return [Section(id="causes", title="What to check", parts=(paragraph(said, "note"), table(columns, rows)))]


def _memory(memory: Mapping[str, Any]) -> str:
    columns = [
        Column(title="Where", is_name=True),
        Column(title="Needed", is_number=True),
        Column(title="There is", is_number=True),
    ]
    host = memory["host_limit_bytes"]
    rows = [
        ("Card", numbers.size(memory["device_bytes"]), numbers.size(memory["device_limit_bytes"])),
        ("Host", numbers.size(memory["host_bytes"]), "not said" if host is None else numbers.size(host)),
    ]
    said = f"With room for {memory['context_tokens']:,} tokens of context; the file has {memory['file_bytes'] / GIGA:.1f} GB."
    return paragraph(said + ("" if memory["fits"] else " It does not fit.")) + table(columns, rows)
