"""What our placement search minimises in an expert-parallel plan: the simulator's own time of a layer without overlap.

Modelled: for each kind of exchange, the constants of `placement.objective` as `sim/ep_costs` would charge them: latency and
bandwidth of each tier, both tiers at once, an expert's kernel by its rows (reading its weights first), shared experts beside
the dispatch, one launch. Kernels are looked up at all small row counts and at a grid of larger ones. Ignored: dense parts
(no placement changes them), overlap of exchanges with experts, rounding to nanoseconds.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..ep_schedule import EXCHANGES, ExpertParallelSchedule
from ..sim.ep_costs import EpCosting, Tier
from ..specs import weight_format
from ..units import NS_PER_S
from .placement.objective import LayerCosts, WorkTable

# Row counts looked up one by one; beyond, kernels are straight between points of a grid of so many.
_DENSE_ROWS, _GRID_POINTS = 512, 128


def layer_costs(
    costing: EpCosting, schedule: ExpertParallelSchedule, *, step_tokens: int, num_ranks: int, weight: int = 1
) -> Mapping[str, LayerCosts]:
    """Return the constants of a layer by kind of exchange, for steps of `step_tokens` tokens over all ranks.

    weight: tokens that each counted token stands for.
    """
    constants, exchange = costing.constants, schedule.exchange
    hidden = costing.costs.model.hidden_size * weight
    inter = constants.inter or constants.intra
    work = kernel_ns(costing, schedule, step_tokens)[::weight]
    _, shared_s = costing.dense_s(0, -(-step_tokens // num_ranks), 1)
    return {
        kind: LayerCosts(
            token_bytes_dispatch=exchange.dispatch_bytes_per_value * hidden,
            token_bytes_combine=exchange.combine_bytes_per_value * hidden,
            intra_bytes_per_s=constants.intra.bytes_per_s,
            inter_bytes_per_s=inter.bytes_per_s,
            row_s=1 / NS_PER_S,
            row_work=work,
            inter_latency_s=_latency_s(inter),
            intra_latency_s=_latency_s(constants.intra),
            beside_s=shared_s if schedule.pipeline.shared_overlap else 0.0,
            fixed_s=costing.costs.grouped_base().seconds,
            exchange=kind,
            tiers_together=exchange.tiers == "together" or kind != "hierarchical",
        )
        for kind in EXCHANGES
    }


def kernel_ns(costing: EpCosting, schedule: ExpertParallelSchedule, most_rows: int) -> WorkTable:
    """Return int64 [most_rows + 1]: nanoseconds of one expert with so many rows in a grouped launch, never falling."""
    grid = np.geomspace(_DENSE_ROWS, max(most_rows, _DENSE_ROWS) + 1, _GRID_POINTS)
    at = np.unique(np.concatenate([np.arange(_DENSE_ROWS + 1), np.ceil(grid)]).astype(np.int64))
    seconds = costing.item_s(at, weight_format(schedule.kernel.bits), rate=costing.constants.grouped_rate)
    table = np.interp(np.arange(max(most_rows, 1) + 1), at, seconds) * NS_PER_S
    return np.maximum.accumulate(np.rint(table)).astype(np.int64)


def _latency_s(tier: Tier) -> float:
    return tier.latency_s + tier.half_size_bytes / tier.bytes_per_s
