"""Where the error of a step of many ranks comes from: measured durations put into the simulator, one class at a time.

    compute      how long each rank's operations take
    exchange     how long exchanges take, from when the last rank began one until it was done
    scheduling   what is left when both are measured: waits between them, threads that share cores

Modelled: an operation's measured duration is the median over runs, rank by rank; an exchange's that of the whole. Ignored: that
durations vary, and that they depend on each other; both are part of what is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...base.units import NS_PER_S
from ...sim.parallel.program import NUM_TIERS, Program
from ...sim.parallel.simulators import run_ep_compiled
from ...sim.parallel.tables import EpTables
from ...sim.parallel.timeline import (
    EP_END,
    EP_GROUP,
    EP_LANE,
    EP_LAYER,
    EP_MICRO,
    EP_OP,
    EP_START,
    LANE_COMPUTE,
    LANE_INTER,
)
from ...sim.policies.state import Array
from ..parallel.launch import RankRun
from ..parallel.prepare import Prepared


def rank_budget(prepared: Prepared, runs: Sequence[RankRun], measured_s: float) -> dict[str, float]:
    """Return the relative error of the mean step: as predicted (`none`), with each class measured, with both (`scheduling`)."""
    changes: list[dict[str, dict[str, Array]]] = []
    for step, tables in enumerate(prepared.tables):
        changes.append(measured_tables(prepared.program, tables, runs, step))
    classes: dict[str, tuple[str, ...]] = {
        "none": (), "compute": ("compute",), "exchange": ("exchange",), "scheduling": ("compute", "exchange"),
    }  # fmt: skip
    found = {}
    for name, parts in classes.items():
        taken = []
        for tables, measured in zip(prepared.tables, changes, strict=True):
            fields = {key: value for part in parts for key, value in measured[part].items()}
            taken.append(run_ep_compiled(prepared.program, tables._replace(**fields)).makespan_ns)
        found[name] = float(np.mean(taken)) / NS_PER_S / measured_s - 1
    return found


def measured_tables(
    program: Program, tables: EpTables, runs: Sequence[RankRun], step: int
) -> dict[str, dict[str, Array]]:
    """Return the fields of the cost tables that each class replaces."""
    ops = {
        key: at for at, key in enumerate(zip(*(column.tolist() for column in
               (program.op_kind, program.op_layer, program.op_micro, program.op_group)), strict=True))
    }  # fmt: skip
    exchanges = {
        key: at for at, key in enumerate(zip(*(column.tolist() for column in
               (program.ex_kind, program.ex_layer, program.ex_micro, program.ex_group)), strict=True))
    }  # fmt: skip
    repeats = len(runs[0].rows[step]) - 1
    work = np.zeros((repeats, *tables.work_ns.shape))
    begins = np.full((repeats, len(exchanges), NUM_TIERS), -1, np.int64)
    ends = np.full_like(begins, -1)
    for rank, run in enumerate(runs):
        for repeat in range(repeats):
            for row in run.rows[step][repeat + 1].tolist():
                key = (row[EP_OP], row[EP_LAYER], row[EP_MICRO], row[EP_GROUP])
                if row[EP_LANE] == LANE_COMPUTE:
                    work[repeat, ops[key], rank] += row[EP_END] - row[EP_START]
                else:
                    at = (repeat, exchanges[key], row[EP_LANE] - LANE_INTER)
                    begins[at], ends[at] = max(begins[at], row[EP_START]), max(ends[at], row[EP_END])
    ex = np.median(np.maximum(ends - begins, 0), axis=0).astype(np.int64)
    moves = tables.ex_ns.max(axis=2) > 0
    ex_ns = np.where(tables.ex_ns > 0, np.where(moves, ex, 0)[:, :, None], 0)
    return {
        "compute": {"work_ns": np.rint(np.median(work, axis=0)).astype(np.int64)},
        "exchange": {"ex_ns": np.ascontiguousarray(ex_ns)},
    }
