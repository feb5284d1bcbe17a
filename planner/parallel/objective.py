"""What our placement search minimises in an expert-parallel plan: the simulator's own time of a layer without overlap.

Modelled: for each kind of exchange, the constants of `placement.objective` as `sim/ep_costs` would charge them: latency and
bandwidth of each tier, both tiers at once, an expert's kernel by its rows (reading its weights first), shared experts beside
the dispatch, one launch; on a measured machine what all ranks of a node send together, through what they share, and cores that
all of them compute on. Kernels are looked up at all small row counts and at a grid of larger ones, exchanges between ranks that
share something by every number of tokens. Ignored: dense parts (no placement changes them), overlap of exchanges with
experts and what they then cost each other, rounding to nanoseconds.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...base.units import NS_PER_S
from ...calibrate.costs.all_to_all_table import ExchangeTable
from ...sim.parallel.costs import EpCosting
from ...sim.parallel.tiers import Tier
from ...specs.models import weight_format
from ...specs.schedules.parallel import ALL_TO_ALLS, ExpertParallelSchedule
from ..placement.objective import LayerCosts, WorkTable
from ..placement.sharing import InsideTable, NodeSharing

# Row counts looked up one by one; beyond, kernels are straight between points of a grid of so many.
_DENSE_ROWS, _GRID_POINTS = 512, 128


def layer_costs(
    costing: EpCosting,
    schedule: ExpertParallelSchedule,
    *,
    step_tokens: int,
    num_ranks: int,
    ranks_per_node: int,
    weight: int = 1,
) -> Mapping[str, LayerCosts]:
    """Return the constants of a layer by kind of exchange, for steps of at most `step_tokens` tokens over all ranks.

    weight: tokens that each counted token stands for.
    """
    constants, exchange = costing.constants, schedule.all_to_all
    hidden = costing.costs.model.expert_hidden * weight
    inter = constants.inter or constants.intra
    slowdown = constants.intra.table.compute_slowdown if constants.intra.table is not None else 1.0
    work = kernel_ns(costing, schedule, step_tokens)[::weight]
    _, shared_s = costing.dense_s(0, -(-step_tokens // num_ranks), 1)
    sharing = node_sharing(
        costing, schedule, most_tokens=-(-step_tokens // weight), ranks_per_node=ranks_per_node, weight=weight
    )
    return {
        kind: LayerCosts(
            token_bytes_dispatch=exchange.dispatch_bytes_per_value * hidden,
            token_bytes_combine=exchange.combine_bytes_per_value * hidden,
            intra_bytes_per_s=constants.intra.bytes_per_s,
            inter_bytes_per_s=inter.bytes_per_s,
            row_s=slowdown / NS_PER_S,
            row_work=work,
            inter_latency_s=_latency_s(inter),
            intra_latency_s=_latency_s(constants.intra),
            beside_s=slowdown * shared_s if schedule.pipeline.shared_overlap else 0.0,
            fixed_s=slowdown * costing.costs.grouped_base(weight_format(schedule.kernel.bits)).seconds,
            exchange=kind,
            tiers_together=exchange.tiers == "together" or kind != "hierarchical",
            sharing=sharing,
        )
        for kind in ALL_TO_ALLS
    }


def node_sharing(
    costing: EpCosting, schedule: ExpertParallelSchedule, *, most_tokens: int, ranks_per_node: int, weight: int = 1
) -> NodeSharing | None:
    """Return what ranks of a node share in steps of at most `most_tokens` counted tokens; None where they share nothing.

    weight: tokens that each counted token stands for.
    """
    constants, exchange = costing.constants, schedule.all_to_all
    table = constants.intra.table
    if table is None and not constants.shared_nic and not constants.half_duplex_nic:
        return None
    hidden = costing.costs.model.expert_hidden * weight
    most_sent = most_tokens * costing.costs.model.top_k
    ways = (exchange.dispatch_bytes_per_value * hidden, exchange.combine_bytes_per_value * hidden)
    dispatch, combine = (inside_table(table, each, most_sent) if table is not None else None for each in ways)
    return NodeSharing(
        ranks_per_node=ranks_per_node, dispatch=dispatch, combine=combine, shared_port=constants.shared_nic,
        half_duplex_port=constants.half_duplex_nic,
    )  # fmt: skip


def inside_table(table: ExchangeTable, token_bytes: float, most_tokens: int) -> InsideTable:
    """Return exchanges of tokens of `token_bytes` bytes, by what all ranks send together up to `most_tokens` tokens.

    A measured exchange is straight in the busiest port's bytes, whatever is sent together: two ports tell the rest.
    """
    total = np.arange(most_tokens + 1) * token_bytes
    without = table.seconds(np.zeros(1), total)
    full = table.seconds(np.array([most_tokens * token_bytes]), total)
    return InsideTable(seconds=without, token_s=(full - without) / max(most_tokens, 1))


def kernel_ns(costing: EpCosting, schedule: ExpertParallelSchedule, most_rows: int) -> WorkTable:
    """Return int64 [most_rows + 1]: nanoseconds of one expert with so many rows in a grouped launch, never falling."""
    grid = np.geomspace(_DENSE_ROWS, max(most_rows, _DENSE_ROWS) + 1, _GRID_POINTS)
    at = np.unique(np.concatenate([np.arange(_DENSE_ROWS + 1), np.ceil(grid)]).astype(np.int64))
    seconds = costing.behind(schedule).item_s(
        at, weight_format(schedule.kernel.bits), rate=costing.constants.grouped_rate
    )
    table = np.interp(np.arange(max(most_rows, 1) + 1), at, seconds) * NS_PER_S
    return np.maximum.accumulate(np.rint(table)).astype(np.int64)


def _latency_s(tier: Tier) -> float:
    return tier.latency_s + tier.half_size_bytes / tier.bytes_per_s
