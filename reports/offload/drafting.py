"""Drafting on the page of a plan: which draft lengths were looked at, and from which acceptance on drafting pays at which hit rate.

Modelled: the part `drafting` of a plan document: a table, a line for each draft length over the hit rate, and two maps of what drafting
gains over acceptance and length. Ignored: how the surface is computed (`planner.offload.break_even`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...specs.drafting import read_acceptance, share_accepted
from .. import numbers
from ..page import INK, Column, Plot, Section, paragraph, table
from ..panels import Panels, Scale, heat, panels_figure
from ..style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, axis, hovering, layout

_COLOURS = (SKY, BLUE, GREEN, PURPLE, ORANGE, VERMILION, GREY)
# Costs, no difference, pays: told apart by hue, white where it makes no difference.
_GAINS = [[0.0, "#b35806"], [0.25, "#f1a340"], [0.5, "#ffffff"], [0.75, "#67a9cf"], [1.0, "#2166ac"]]
_HEIGHT_PX = 380


def drafting_sections(document: Mapping[str, Any]) -> list[Section]:
    """Return the section of drafting, none for a plan that nobody asked about it."""
    drafting = document.get("drafting")
    if drafting is None:
        return []
    parts: list[str | Plot] = [paragraph(_sentence(str(drafting["verdict"])))]
    if drafting["tried"]:
        parts.append(_tried(drafting))
    pays = drafting.get("break_even")
    if pays and pays["levels"]:
        parts += [break_even_plot(pays, drafting), gains_plot(pays)]
    return [Section(id="drafting", title="Does drafting pay?", parts=tuple(parts))]


def _tried(drafting: Mapping[str, Any]) -> str:
    columns = (
        Column(title="Guesses a step", is_number=True), Column(title="Tokens a step", is_number=True),
        Column(title="Generated tokens/s", is_number=True), Column(title="A request", is_number=True), Column(title="How it was found"),
    )  # fmt: skip
    rows = []
    for one in drafting["tried"]:
        how = one["why"] or ("searched" if one["searched"] else "estimated")
        speed, request = one["decode_tokens_per_s"], one["request_s"]
        rows.append((
            str(one["length"]), numbers.significant(one["tokens_per_step"]), "–" if speed is None else numbers.significant(speed),
            "–" if request is None else numbers.seconds(request), how,
        ))  # fmt: skip
    legend = "Estimated: with the schedules that did best without drafts, at the memory that drafting leaves."
    chosen = frozenset(at for at, one in enumerate(drafting["tried"]) if one["length"] == drafting["length"])
    return table(columns, rows, marked=chosen) + paragraph(legend, "note")


def break_even_plot(pays: Mapping[str, Any], drafting: Mapping[str, Any]) -> Plot:
    """Return the acceptance from which drafts of each length pay, against the hit rate; levels stand at even distances."""
    levels: Sequence[Mapping[str, Any]] = pays["levels"]
    places = list(range(len(levels)))
    data = []
    for at, (length, colour) in enumerate(zip(pays["lengths"], _COLOURS, strict=False)):
        least = [level["break_even"][at] for level in levels]
        hover = [
            f"<b>{_guesses(length)}</b><br>{level['hit_rate']:.1%} hits, {level['cached_experts']:,} experts<br>"
            + ("pays at no acceptance" if value is None else f"pays from an acceptance of {value:.0%}")
            for level, value in zip(levels, least, strict=True)
        ]
        drawn = [None if value is None else 100 * value for value in least]
        trace: dict[str, Any] = {
            "type": "scatter", "mode": "lines+markers", "name": _guesses(length), "x": places, "y": drawn,
            "line": {"color": colour, "width": 2}, "marker": {"size": 7, "color": colour},
        }  # fmt: skip
        data.append(trace | hovering(hover))
    here = 100 * _chance(drafting)
    line = {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": here,
        "y1": here,
        "line": {"color": INK, "width": 1, "dash": "dot"},
    }
    plan = layout(
        xaxis=axis("hit rate without drafts", tickmode="array", tickvals=places, ticktext=_hits(levels), range=[-0.3, len(levels) - 0.7]),
        yaxis=axis("acceptance from which drafts pay, %", range=[0, 104]), shapes=[line],
    )  # fmt: skip
    return Plot(
        id="plot-break-even", figure={"data": data, "layout": plan, "narrow": {"font.size": 11}}, height_px=_HEIGHT_PX,
        title="From which acceptance on drafting pays",
        caption="Above a line drafts of that length pay, below it they cost; where a line is missing they pay at no acceptance. The "
        "chosen schedule with fewer and more experts on the device, simulated; acceptance is the chance of each guess whose forerunners "
        f"were right; dotted: the {here:.0f} % asked about. "
        + _beyond(levels),
    )  # fmt: skip


def gains_plot(pays: Mapping[str, Any]) -> Plot:
    """Return what drafting gains over acceptance and draft length, at the least hit rate and at the largest cache that fits."""
    levels: Sequence[Mapping[str, Any]] = pays["levels"]
    roomy = [level for level in levels if level["fits"]]
    shown = (levels[0], roomy[-1] if roomy else levels[-1])
    lengths, chances = [str(length) for length in pays["lengths"]], [f"{chance:.0%}" for chance in pays["chances"]]
    data = []
    for panel, level in enumerate(shown):
        gains = level["gains"]
        hover = [
            [
                f"{_guesses(length)}, {chance:.0%} accepted:<br>{gain:.2f} times the speed without"
                for chance, gain in zip(pays["chances"], row, strict=True)
            ]
            for length, row in zip(pays["lengths"], gains, strict=True)
        ]
        data.append(heat(
            {"x": chances, "y": lengths, "z": [[min(2.0, max(0.0, gain)) for gain in row] for row in gains]}, panel, 0,
            text=[[f"{gain:.2f}" for gain in row] for row in gains], texttemplate="%{text}", customdata=hover,
            hovertemplate="%{customdata}<extra></extra>", xgap=1, ygap=1,
        ))  # fmt: skip
    panels = Panels(
        titles=tuple(f"{level['hit_rate']:.1%} hits" for level in shown),  # type: ignore[arg-type]
        x_title="acceptance", y_title="guesses a step", map_px=230,
    )  # fmt: skip
    scale = Scale(title="speed with drafts over speed without", colours=_GAINS, low=0.0, high=2.0)
    categories = {"type": "category"}
    figure, height = panels_figure(data, panels, [scale], x_axis=categories, y_axis=categories)
    return Plot(
        id="plot-gains", figure=figure, height_px=height, title="What drafting gains",
        caption="Blue: faster than without drafts; orange: slower. First the fewest experts on the device that were simulated, then the "
        "most that fit.",
    )  # fmt: skip


def _hits(levels: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{level['hit_rate']:.1%}" + ("" if level["fits"] else "*") for level in levels]


def _beyond(levels: Sequence[Mapping[str, Any]]) -> str:
    return "" if all(level["fits"] for level in levels) else "Starred: more experts than fit here."


def _chance(drafting: Mapping[str, Any]) -> float:
    """Return the acceptance of a plan as one number: of those given by position, the share of all guesses that are accepted."""
    found = read_acceptance(str(drafting["acceptance"]))
    if found.chance is not None:
        return found.chance
    return share_accepted(drafting["length"] or found.longest, found)


def _guesses(length: int) -> str:
    return f"{length} guess" if length == 1 else f"{length} guesses"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
