"""Two maps beside each other, before and after, on scales they share: the frame of every heat map of a plan.

Modelled: panels side by side at a desk, one above the other on a phone; scales lie below, one for each kind of cell, so that
kinds are told apart by hue and amounts by depth. Ignored: what a map shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .page import INK, Figure
from .style import axis, layout, note

# Light to dark, one hue each: an empty cell is white, the least amount already is not.
BLUES = [[0.0, "#deebf7"], [0.25, "#a9cfea"], [0.5, "#5ba3d0"], [0.75, "#1f6fb0"], [1.0, "#08306b"]]
ORANGES = [[0.0, "#fff0d9"], [0.25, "#fdd49e"], [0.5, "#f39d4a"], [0.75, "#d55e00"], [1.0, "#7a2c00"]]
_TOP_PX, _SCALE_PX, _AXIS_PX, _BETWEEN_PX = 34, 74, 52, 78
_GAP = 0.09


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One scale of colours."""

    title: str
    colours: Sequence[Sequence[Any]]
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Panels:
    """How two maps are laid out."""

    titles: tuple[str, str]
    x_title: str
    y_title: str
    map_px: int
    """Height of one map."""
    stacked: bool = False
    """One above the other at a desk too."""

    @property
    def height_px(self) -> int:
        """Height of the plot at a desk."""
        around = _TOP_PX + _AXIS_PX + _SCALE_PX
        return 2 * self.map_px + _BETWEEN_PX + around if self.stacked else self.map_px + around


def heat(values: dict[str, Any], panel: int, scale: int, **changes: Any) -> dict[str, Any]:
    """Return a map for panel 0 or 1 on scale 0 or 1; `values` holds x, y and z or cells."""
    base: dict[str, Any] = {
        "type": "heatmap", "coloraxis": _nth("coloraxis", scale), "xaxis": _nth("x", panel), "yaxis": _nth("y", panel),
        "hoverongaps": False,
    }  # fmt: skip
    return base | values | changes


def panels_figure(
    data: list[dict[str, Any]],
    panels: Panels,
    scales: Sequence[Scale],
    *,
    x_axis: dict[str, Any] | None = None,
    y_axis: dict[str, Any] | None = None,
    lines: Sequence[dict[str, Any]] = (),
) -> tuple[Figure, int]:
    """Return a figure of two panels and its height; `lines` are shapes whose xref and yref name a panel's axes."""
    height = panels.height_px
    plan = layout(annotations=[], shapes=list(lines), showlegend=False)
    plan["margin"] = {"l": 10, "r": 12, "t": _TOP_PX, "b": _AXIS_PX + _SCALE_PX}
    tall = 2 * panels.map_px + _BETWEEN_PX
    lower = panels.map_px / tall
    upper = 1 - lower
    for panel, title in enumerate(panels.titles):
        domain = [0.0, 1.0] if panels.stacked else [0.0, 0.5 - _GAP / 2] if panel == 0 else [0.5 + _GAP / 2, 1.0]
        rows = [0.0, 1.0] if not panels.stacked else [upper, 1.0] if panel == 0 else [0.0, lower]
        x, y = _nth("x", panel), _nth("y", panel)
        plan[_nth("xaxis", panel)] = axis(panels.x_title, domain=domain, anchor=y, showgrid=False, ticks="") | (
            x_axis or {}
        )
        plan[_nth("yaxis", panel)] = axis(
            panels.y_title, domain=rows, anchor=x, autorange="reversed", showgrid=False, ticks=""
        ) | (y_axis or {})
        place = {"x": 0, "xref": f"{x} domain", "xanchor": "left", "y": 1, "yref": f"{y} domain", "yanchor": "bottom"}
        plan["annotations"].append(note(f"<b>{title}</b>", **place) | {"font": {"size": 13, "color": INK}})
    width = 1 / len(scales)
    for at, scale in enumerate(scales):
        bar = {
            "orientation": "h", "x": at * width, "xanchor": "left", "len": width * 0.86, "lenmode": "fraction", "thickness": 10,
            "y": 0, "yref": "container", "yanchor": "bottom", "ypad": 6, "xpad": 0, "outlinewidth": 0, "nticks": 5,
            "title": {"text": scale.title, "side": "bottom", "font": {"size": 12}}, "tickfont": {"size": 11},
        }  # fmt: skip
        coloured = {"colorscale": list(scale.colours), "cmin": scale.low, "cmax": scale.high, "colorbar": bar}
        plan[_nth("coloraxis", at)] = coloured
    narrow: dict[str, Any] = {"font.size": 11}
    extra = 0
    if not panels.stacked:
        extra = panels.map_px + _BETWEEN_PX
        narrow |= {
            "xaxis.domain": [0, 1], "xaxis2.domain": [0, 1], "yaxis.domain": [upper, 1], "yaxis2.domain": [0, lower],
        }  # fmt: skip
    return {"data": data, "layout": plan, "narrow": narrow, "narrow_extra_px": extra}, height


def node_lines(
    num_ranks: int, ranks_per_node: int, *, upright: bool = False, level: bool = True
) -> list[dict[str, Any]]:
    """Return lines between nodes over both panels; ranks stand at whole numbers on the axes they run along."""
    found = []
    for panel in (0, 1):
        x, y = _nth("x", panel), _nth("y", panel)
        for edge in range(ranks_per_node, num_ranks, ranks_per_node):
            line = {"type": "line", "line": {"color": INK, "width": 1}, "layer": "above"}
            if level:
                found.append(
                    line | {"xref": f"{x} domain", "x0": 0, "x1": 1, "yref": y, "y0": edge - 0.5, "y1": edge - 0.5}
                )
            if upright:
                found.append(
                    line | {"yref": f"{y} domain", "y0": 0, "y1": 1, "xref": x, "x0": edge - 0.5, "x1": edge - 0.5}
                )
    return found


def _nth(name: str, at: int) -> str:
    """Return the plotting library's name of the nth axis: x, x2, …"""
    return name if at == 0 else f"{name}{at + 1}"
