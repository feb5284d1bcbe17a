"""How plots look: one layout, one palette, and the few kinds of traces that all plots are made of.

The palette is that of Okabe and Ito ("Color Universal Design", 2008), which readers with colour-vision deficiency can tell
apart; operations that belong together share a hue. Figures are plain dictionaries in the plotting library's own terms.
Ignored: dark mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from .page import HAIRLINE, INK, MUTED

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif'

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#b45f92", "#56b4e9"
GREY, LIGHT_GREY = "#8c959f", "#c4ccd4"

KIND_COLOURS = {"chosen": BLUE, "published": GREY, "reference": LIGHT_GREY}
OP_COLOURS = {
    "dense": SKY, "expert": BLUE, "head": GREEN, "fetch": VERMILION, "prefetch": ORANGE, "write-back": PURPLE,
    "shared": "#7fc9b4", "dispatch": ORANGE, "combine": VERMILION, "reduce": PURPLE,
    "cpu expert": "#6a51a3", "disk read": "#8c6d31",
    "host layer": "#6e7781", "host submit": "#9aa4ae", "host launch": "#b6bfc8", "host step": "#57606a",
}  # fmt: skip
SHARE_COLOURS = {"dense": SKY, "expert": BLUE, "head": GREEN, "launch": ORANGE, "copy": VERMILION, "cpu": "#6a51a3",
                 "host": GREY}  # fmt: skip

Dict = dict[str, Any]


def layout(**changes: Any) -> Dict:
    """Return a plot's layout: white, thin lines, room only where something stands; `changes` replace whole keys."""
    base: Dict = {
        "font": {"family": FONT, "size": 13, "color": INK},
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "margin": {"l": 10, "r": 12, "t": 30, "b": 10},
        "hoverlabel": {"align": "left", "font": {"family": FONT, "size": 12}},
        "hovermode": "closest",
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1,
            "yanchor": "bottom",
            "traceorder": "normal",
            "font": {"size": 12},
        },
        "dragmode": False,
    }
    return base | changes


def axis(title: str = "", **changes: Any) -> Dict:
    """Return an axis with light grid lines that makes room for its own labels."""
    base: Dict = {
        "title": {"text": title, "font": {"size": 13, "color": MUTED}, "standoff": 10},
        "automargin": True,
        "gridcolor": "#eaeef2",
        "zeroline": False,
        "linecolor": HAIRLINE,
        "tickcolor": HAIRLINE,
        "fixedrange": True,
        "separatethousands": True,
    }
    return base | changes


def lying_bars(x: Sequence[float], y: Sequence[float], hover: Sequence[str], **changes: Any) -> Dict:
    """Return bars that lie at heights `y`; `hover` is HTML, one text a bar."""
    base: Dict = {"type": "bar", "orientation": "h", "x": list(x), "y": list(y), "width": 0.62}
    return base | hovering(hover) | changes


def points(
    name: str, x: Sequence[float], y: Sequence[float], hover: Sequence[str], colour: str, **changes: Any
) -> Dict:
    """Return marks of one colour; a `line` among the changes joins them."""
    base: Dict = {"type": "scatter", "mode": "markers", "name": escape(name), "x": list(x), "y": list(y)}
    return (
        base
        | {"marker": {"size": 9, "color": colour, "line": {"width": 2, "color": colour}}}
        | hovering(hover)
        | changes
    )


def hovering(texts: Sequence[str]) -> Dict:
    """Return what makes each item of a trace show its own HTML."""
    return {"customdata": list(texts), "hovertemplate": "%{customdata}<extra></extra>"}


def upright_line(x: float, **changes: Any) -> Dict:
    """Return a dotted line over the whole height."""
    line = {"color": INK, "width": 1, "dash": "dot"}
    return {
        "type": "line",
        "x0": x,
        "x1": x,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": line,
        "layer": "below",
    } | changes


def note(text: str, **place: Any) -> Dict:
    """Return an annotation without arrow; `place` holds x, y, anchors and references, `text` is HTML."""
    return {"text": text, "showarrow": False, "font": {"size": 12, "color": MUTED}} | place


def note_beside(text: str, x: float, *, to_left: bool) -> Dict:
    """Return an annotation at the foot of the plot, beside an upright line."""
    side = {"xanchor": "right", "xshift": -5} if to_left else {"xanchor": "left", "xshift": 5}
    return note(escape(text), x=x, y=0, yref="paper", yanchor="bottom", **side)


def wrapped(name: str, most: int = 17) -> str:
    """Return escaped text broken after hyphens or spaces so that no line exceeds `most` characters where that is possible."""
    lines, line = [], ""
    for piece in name.replace("-", "-\0").replace(" ", " \0").split("\0"):
        if line and len(line) + len(piece.rstrip()) > most:
            lines.append(line.rstrip(" "))
            line = ""
        line += piece
    return "<br>".join(escape(text) for text in [*lines, line.rstrip(" ")])
