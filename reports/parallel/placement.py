"""Maps of where experts sit and how full ranks are, before and after a plan.

Modelled: rows of the first reported step, rank by layer and, for a layer that the reader chooses, expert by rank; the
balance of every layer, mean over the reported steps. Ignored: time; a rank with few rows may still wait for weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import numbers
from ..page import Plot, cells, choices
from ..panels import BLUES, ORANGES, Panels, Scale, heat, node_lines, panels_figure
from ..style import BLUE, GREY, axis, hovering, layout
from .plan_document import AFTER, BEFORE, Document, FloatArray, placement_of, rank_rows

_TITLES = ("before: plain expert parallelism", "after: the plan")
_STATES = (BEFORE, AFTER)
# Blue below the mean, white at it, red above; deepest at this quantile of all cells.
_BELOW, _ABOVE = ("#2f6da8", "#9cc3e0"), ("#f0a067", "#a83c00")
_DEEPEST_QUANTILE = 0.99
# A panel's height: so many pixels a rank within these bounds.
_RANK_PX, _LEAST_PX, _MOST_PX = 20, 150, 420
# Up to so many columns, cells are set apart by a hair.
_APART_UP_TO = 130


def load_plot(document: Document) -> Plot:
    """Return the rows of every rank in every layer over the mean rank's, before and after."""
    loads = [_over_mean(rank_rows(document, state)) for state in _STATES]
    layers = document["provenance"]["trace"]["layer_ids"]
    data = []
    for panel, load in enumerate(loads):
        hover = "layer %{x}, rank %{y}<br>%{z:.2f} times the mean rank's rows<extra></extra>"
        values = {"x": layers, "y": list(range(load.shape[1])), "z": load.T.round(3).tolist()}
        data.append(heat(values, panel, 0, hovertemplate=hover, **_apart(len(layers))))
    placement = placement_of(document, AFTER)
    most = max(float(load.max()) for load in loads)
    # One layer far from all others would leave their differences invisible.
    deepest = max(
        1.05, float(np.quantile(loads[0], _DEEPEST_QUANTILE)), float(np.quantile(loads[1], _DEEPEST_QUANTILE))
    )
    shallowest = max(0.0, 2.0 - deepest)
    beyond = f"; up to {most:.2f} as deep" if most > deepest * 1.05 else ""
    figure, height = panels_figure(
        data,
        Panels(titles=_TITLES, x_title="layer of the model", y_title="rank", map_px=_panel_px(placement.num_ranks)),
        [Scale(title=f"rows over the mean rank's{beyond}", colours=_around_one(shallowest, deepest),
               low=shallowest, high=deepest)],
        y_axis=rank_axis(placement.num_ranks),
        lines=node_lines(placement.num_ranks, placement.ranks_per_node),
    )  # fmt: skip
    return Plot(
        id="plot-load",
        figure=figure,
        height_px=height,
        title="Rows of every rank in every layer, before and after",
        caption="Rows that each rank computes in each layer of the first reported step, over the mean of the layer's ranks: the "
        "layer lasts as long as its deepest red rank. Level lines separate nodes. Both maps have one scale.",
    )


def balance_plot(document: Document) -> Plot:
    """Return how full the fullest rank of every layer is, before and after."""
    layers = document["provenance"]["trace"]["layer_ids"]
    data: list[dict[str, Any]] = []
    for state, colour in ((BEFORE, GREY), (AFTER, BLUE)):
        values = [float(value) for value in document["max_over_mean_by_layer"][state]]
        mean = float(np.mean(values))
        hover = [
            f"<b>{state}</b>, layer {layer}<br>{value:.3f} times the mean rank's rows"
            for layer, value in zip(layers, values, strict=True)
        ]
        trace: dict[str, Any] = {
            "type": "scatter", "mode": "lines+markers", "name": f"{state}, mean {mean:.3f}", "x": layers, "y": values,
            "line": {"color": colour, "width": 2}, "marker": {"size": 6, "color": colour},
        }  # fmt: skip
        data.append(trace | hovering(hover))
    most = max(value for trace in data for value in trace["y"])
    plan = layout(
        xaxis=axis("layer of the model"),
        yaxis=axis("fullest rank over the mean rank", range=[1 - 0.03 * (most - 1), 1 + (most - 1) * 1.06 or 1.1]),
    )
    return Plot(
        id="plot-balance",
        figure={"data": data, "layout": plan, "narrow": {"font.size": 11}},
        height_px=300,
        title="Load of the fullest rank in every layer, before and after",
        caption="Rows of the fullest rank over the mean rank's, mean over all reported steps. At 1 every rank has as much to do.",
    )


def expert_plot(document: Document) -> Plot:
    """Return which rank holds which expert with how many rows, for a layer that the reader chooses."""
    placements = [placement_of(document, state) for state in _STATES]
    layers, ranks = layer_names(document), placements[0].num_ranks
    options = [(f"{name}{_worst_words(document, at)}", _layer_change(document, at)) for at, name in enumerate(layers)]
    start = _worst_layer(document)
    hover = "expert %{x} on rank %{y}<br>%{z:,} rows"
    data = []
    kinds = ((0, ""), (1, ", one of several copies")) if _any_copies(document) else ((0, ""),)
    for panel in (0, 1):
        for copied, more in kinds:
            values = {"x": [], "y": list(range(ranks)), "z": []}
            gaps = _apart(placements[0].num_logical)
            data.append(heat(values, panel, copied, hovertemplate=f"{hover}{more}<extra></extra>", **gaps))
    figure, height = panels_figure(
        data,
        Panels(
            titles=_TITLES, x_title="expert, the busiest first", y_title="rank", map_px=_panel_px(ranks), stacked=True
        ),
        [
            Scale(title="rows, one place only", colours=BLUES, low=0, high=1),
            Scale(title="rows, one of several", colours=ORANGES, low=0, high=1),
        ][: len(kinds)],
        x_axis={"type": "category", "nticks": 24, "tickangle": 0, "tickfont": {"size": 11}},
        y_axis=rank_axis(ranks) | {"range": [ranks - 0.5, -0.5], "autorange": False},
        lines=node_lines(ranks, placements[0].ranks_per_node),
    )
    figure["choices"] = choices("Layer of the model", options, start)
    return Plot(
        id="plot-experts",
        figure=figure,
        height_px=height,
        title="Which rank holds which expert, before and after",
        caption="Each cell is an expert that a rank holds, coloured by the rows it computed in the first reported step; experts "
        "stand in order of their load."
        + (" Orange: experts that sit on several ranks." if len(kinds) > 1 else "")
        + " Level lines separate nodes.",
    )


def layer_names(document: Document) -> list[str]:
    """Return the model's own numbers of its MoE layers, as texts."""
    return [str(layer) for layer in document["provenance"]["trace"]["layer_ids"]]


def rank_axis(num_ranks: int) -> dict[str, Any]:
    """Return ticks of an axis of ranks that leave no two labels overlapping."""
    step = 1 if num_ranks <= 16 else 2 if num_ranks <= 32 else -(-num_ranks // 64) * 4
    return {
        "tickmode": "array",
        "tickvals": list(range(0, num_ranks, step)),
        "ticktext": [str(r) for r in range(0, num_ranks, step)],
    }


def _around_one(low: float, high: float) -> list[list[Any]]:
    """Return a scale of colours from `low` to `high` that is white at one."""
    middle = (1 - low) / (high - low)
    return [
        [0.0, _BELOW[0]],
        [middle / 2, _BELOW[1]],
        [middle, "#ffffff"],
        [(1 + middle) / 2, _ABOVE[0]],
        [1.0, _ABOVE[1]],
    ]


def _panel_px(num_ranks: int) -> int:
    return min(_MOST_PX, max(_LEAST_PX, _RANK_PX * num_ranks))


def _apart(columns: int) -> dict[str, int]:
    return {"xgap": 1, "ygap": 1} if columns <= _APART_UP_TO else {}


def _over_mean(rows: FloatArray) -> FloatArray:
    """Return rows over the mean of their layer; 1 where a layer has none."""
    mean = rows.mean(axis=1, keepdims=True)
    return np.asarray(np.divide(rows, mean, out=np.ones_like(rows), where=mean > 0))


def _worst_layer(document: Document) -> int:
    return int(np.argmax(document["max_over_mean_by_layer"][BEFORE]))


def _worst_words(document: Document, layer: int) -> str:
    return " (the least balanced before)" if layer == _worst_layer(document) else ""


def _layer_change(document: Document, layer: int) -> dict[str, Any]:
    """Return what shows one layer: cells of single and of copied experts, before and after."""
    placements = [placement_of(document, state) for state in _STATES]
    num_experts, ranks = placements[0].num_logical, placements[0].num_ranks
    rows = [np.array(document["slot_rows"][state][layer], np.int64) for state in _STATES]
    load = np.bincount(placements[0].physical_to_logical[layer], weights=rows[0], minlength=num_experts)
    order = np.argsort(-load, kind="stable")
    place = np.empty(num_experts, np.int64)
    place[order] = np.arange(num_experts)
    experts = [str(expert) for expert in order.tolist()]
    data, most = [], 1
    for placement, slot_rows in zip(placements, rows, strict=True):
        held = np.zeros((ranks, num_experts), np.int64)
        there = np.zeros((ranks, num_experts), bool)
        expert = placement.physical_to_logical[layer].astype(np.int64)
        rank = np.arange(placement.num_slots) // placement.slots_per_rank
        np.add.at(held, (rank, place[expert]), slot_rows)
        there[rank, place[expert]] = True
        copied = there.sum(axis=0) > 1
        most = max(most, int(held.max()))
        for mask in (there & ~copied, there & copied) if _any_copies(document) else (there,):
            at = [(r, c, int(held[r, c])) for r, c in np.argwhere(mask).tolist()]
            data.append({"x": experts, "cells": cells(ranks, num_experts, at)})
    scales = ("coloraxis", "coloraxis2") if _any_copies(document) else ("coloraxis",)
    return {"data": data, "layout": {f"{scale}.cmax": most for scale in scales}}


def _any_copies(document: Document) -> bool:
    """Return whether an expert sits on several ranks, before or after."""
    return any(bool((placement_of(document, state).replica_counts() > 1).any()) for state in _STATES)


def rank_table_rows(document: Document) -> list[tuple[str, str, str]]:
    """Return (what, before, after): load of ranks over the whole step, for the table beside the maps."""
    found = [rank_rows(document, state).sum(axis=0) for state in _STATES]
    fullest = [f"rank {int(load.argmax())}, {numbers.plain(float(load.max()))} rows" for load in found]
    over = [f"{float(load.max() / load.mean()):.3f}" if load.mean() else "–" for load in found]
    worst = [max(float(value) for value in document["max_over_mean_by_layer"][state]) for state in _STATES]
    mean = [float(np.mean(document["max_over_mean_by_layer"][state])) for state in _STATES]
    return [
        ("Fullest rank over the mean, mean of all layers and steps", f"{mean[0]:.3f}", f"{mean[1]:.3f}"),
        ("The same in the worst layer", f"{worst[0]:.3f}", f"{worst[1]:.3f}"),
        ("Fullest rank, all layers of the first reported step", fullest[0], fullest[1]),
        ("Over the mean rank", over[0], over[1]),
    ]
