"""Who sends how many bytes to whom, before and after a plan: matrices of links, and the ports they add up to.

Modelled: dispatch and combine of a mean step together, all layers; links inside a node and between nodes each on a scale of
their own, since one node's fabric and the network are far apart in speed. Ignored: when bytes cross, and the reductions of
ranks that share a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...base.units import GIB, KIB, MIB
from .. import numbers
from ..page import Plot
from ..panels import BLUES, ORANGES, Panels, Scale, heat, node_lines, panels_figure
from .placement import rank_axis
from .plan_document import (
    AFTER,
    BEFORE,
    Document,
    FloatArray,
    link_bytes,
    placement_of,
    plain_of,
    same_node,
    schedule_of,
)

_STATES = (BEFORE, AFTER)
_INSIDE, _BETWEEN = "inside a node", "between nodes"
_MOST_PX = 420


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of a mean step, dispatch and combine together."""

    links: FloatArray
    """[from rank, to rank]; the diagonal is zero."""
    near: np.ndarray[Any, np.dtype[np.bool_]]
    """[ranks, ranks]: whether a link stays inside a node."""

    def tier(self, between: bool) -> FloatArray:
        """Return the links of one tier, the others zero."""
        return np.asarray(np.where(self.near ^ between, self.links, 0.0))

    def total(self, between: bool) -> float:
        """Return the bytes of one tier."""
        return float(self.tier(between).sum())

    def ports(self, between: bool) -> FloatArray:
        """Return [2, ranks]: bytes that each rank sends and receives over one tier."""
        tier = self.tier(between)
        return np.stack([tier.sum(axis=1), tier.sum(axis=0)])


def traffic_of(document: Document, state: str) -> Traffic:
    """Return the traffic before or after."""
    return Traffic(links=link_bytes(document, state), near=same_node(placement_of(document, state)))


def traffic_plot(document: Document) -> Plot:
    """Return the matrices of links before and after, tiers told apart by hue."""
    found = [traffic_of(document, state) for state in _STATES]
    placement = placement_of(document, AFTER)
    ranks = placement.num_ranks
    tiers = [between for between in (False, True) if any(each.tier(between).any() for each in found)]
    data, scales = [], []
    other = ~np.eye(ranks, dtype=bool)
    for scale, between in enumerate(tiers):
        most = max(float(each.tier(between).max()) for each in found)
        unit, size = _unit(most)
        name = _BETWEEN if between else _INSIDE
        colours = ORANGES if between else BLUES
        scales.append(Scale(title=f"{name}, {unit}", colours=colours, low=0, high=most / size))
        for panel, each in enumerate(found):
            mine = (each.near ^ between) & other
            z = [
                [round(value / size, 4) if here else None for value, here in zip(row, kept, strict=True)]
                for row, kept in zip(each.links.tolist(), mine.tolist(), strict=True)
            ]
            hover = f"from rank %{{y}} to rank %{{x}}, {name}<br>%{{z:,.3~r}} {unit} a step<extra></extra>"
            values = {"x": list(range(ranks)), "y": list(range(ranks)), "z": z}
            gap = {"xgap": 1, "ygap": 1} if ranks <= _APART_UP_TO else {}
            data.append(heat(values, panel, scale, hovertemplate=hover, **gap))
    figure, height = panels_figure(
        data,
        Panels(
            titles=("before: plain expert parallelism", "after: the plan"), x_title="to rank", y_title="from rank",
            map_px=min(_MOST_PX, max(260, 14 * ranks)),
        ),
        scales,
        x_axis=rank_axis(ranks) | {"tickangle": 0},
        y_axis=rank_axis(ranks),
        lines=node_lines(ranks, placement.ranks_per_node, upright=True),
    )  # fmt: skip
    return Plot(
        id="plot-traffic",
        figure=figure,
        height_px=height,
        title="Bytes from rank to rank, before and after",
        caption="Bytes that a mean step sends over each link, all layers, dispatch and combine together. Blue: links inside a "
        "node; orange: between nodes; each kind has a scale of its own, the same before and after. Lines separate nodes. A "
        "hierarchical exchange crosses once to the rank with the sender's place in the other node and is forwarded there.",
    )


_APART_UP_TO = 40


def _unit(most: float) -> tuple[str, int]:
    return next(
        (unit, size) for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB), ("B", 1)) if most >= size or size == 1
    )


def traffic_table_rows(document: Document) -> list[tuple[str, str, str, str]]:
    """Return (what, before, after, change): totals, busiest ports and busiest links of both tiers."""
    found = [traffic_of(document, state) for state in _STATES]
    rows: list[tuple[str, str, str, str]] = []
    for between in (True, False):
        name = _BETWEEN if between else _INSIDE
        totals = [each.total(between) for each in found]
        if not any(totals):
            continue
        rows.append((f"All links {name}", numbers.size(totals[0]), numbers.size(totals[1]), _change(totals)))
        ports = [each.ports(between) for each in found]
        busiest = [float(port.max()) for port in ports]
        words = [_port_words(port) for port in ports]
        rows.append((f"Busiest port {name}", words[0], words[1], _change(busiest)))
        over = [float(port.max() / port.mean()) if port.any() else 1.0 for port in ports]
        rows.append(("… over the mean port", f"{over[0]:.3f}", f"{over[1]:.3f}", ""))
        links = [each.tier(between) for each in found]
        worst = [float(each.max()) for each in links]
        rows.append((f"Busiest link {name}", _link_words(links[0]), _link_words(links[1]), _change(worst)))
    reduced = [reduction_bytes(document, state) for state in _STATES]
    if any(reduced):
        rows.append(("Reductions inside nodes", numbers.size(reduced[0]), numbers.size(reduced[1]), _change(reduced)))
    return rows


def reduction_bytes(document: Document, state: str) -> float:
    """Return the bytes that ranks send to add up or gather what they share, in a mean step: all that is not exchanged."""
    schedule = schedule_of(document, state)
    if schedule.parallel.attention == "data" and schedule.parallel.experts == "expert":
        return 0.0
    sent = (plain_of(document) if state == BEFORE else document["best"])["intra_node_bytes"]
    return max(0.0, float(sent) - traffic_of(document, state).total(False))


def _change(values: list[float]) -> str:
    return numbers.percent(values[1] / values[0] - 1, signed=True) if values[0] else "–"


def _port_words(ports: FloatArray) -> str:
    """Return the busiest port in words."""
    way, rank = np.unravel_index(int(ports.argmax()), ports.shape)
    return (
        f"{numbers.size(float(ports.max()))}, rank {rank} {'receiving' if way else 'sending'}"
        if ports.any()
        else "nothing"
    )


def _link_words(links: FloatArray) -> str:
    source, target = np.unravel_index(int(links.argmax()), links.shape)
    return f"{numbers.size(float(links.max()))}, rank {source} to {target}" if links.any() else "nothing"
