"""Weights that travel from contiguous experts to our placement while steps go on, in three ways.

Modelled: pauses, lasting and slow-down, predicted and measured; states of every step held against one process's. Ignored: whether to move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeplan.base.units import MEGA, MS_PER_S
from moeplan.executor.parallel.moving import WAYS
from moeplan.executor.parallel.network import Nodes
from moeplan.executor.parallel.prepare import recorded_steps
from moeplan.executor.validation.rank_moves import validate_move
from moeplan.planner.parallel.search import EpSearch
from moeplan.sim.parallel.simulate import ParallelSimulation

from .schedules import schedules


def run(
    search: EpSearch, simulation: ParallelSimulation, nodes: Nodes | None, limit: float, steps: int
) -> list[dict[str, Any]]:
    """Return every way, as plain values."""
    named = schedules(0)
    before, after = (search.placements.candidate(named[name]) for name in ("contiguous", "our placement"))
    pairs = list(zip(*(recorded_steps(search, one, steps) for one in (before, after)), strict=True))
    return [
        validate_move(simulation, named["contiguous"], pairs, (before, after), way, nodes=nodes, limit_bytes_per_s=limit).to_dict()
        for way in WAYS
    ]  # fmt: skip


def print_moves(found: Sequence[dict[str, Any]]) -> None:
    """Print pauses and slow-down."""
    print("moving experts while serving: predicted, measured")
    for one in found:
        right = "right" if one["error"] <= one["bound"] else f"WRONG by {one['error']:.2g}"
        print(f"  {one['way']:15} {one['num_bytes'] / MEGA:6.1f} MB; stands still {one['predicted_pause_s'] * MS_PER_S:8.1f} "
              f"{one['measured_pause_s'] * MS_PER_S:8.1f} ms; lasts {one['predicted_moving_s'] * MS_PER_S:8.1f} "
              f"{one['measured_moving_s'] * MS_PER_S:8.1f} ms; a step takes {one['predicted_slowdown']:.2f} {one['measured_slowdown']:.2f} "
              f"times as long (noise {one['noise']:.1%}); states {right}")  # fmt: skip
