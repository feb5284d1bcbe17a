"""How long one MoE layer takes, predicted from its traffic: what the search minimises and every comparison reports.

Modelled: layer = dispatch + compute of the slowest rank + combine. An exchange takes the bytes of the largest inter-node port
and those of the largest intra-node port over their bandwidths (the larger of what a port sends and receives; it is the
largest port that matters, not the total), one tier after the other or both at once, with a latency each. Compute grows with
rows, or by a table of what an expert with so many rows costs; work that runs beside the dispatch may hide it. With the constants
of a machine this is the simulator's own time of a layer without overlap, apart from rounding; with two bandwidths and a
price per row it is a study's. What ranks of a node share counts for all of them (`sharing`). Where parts of a layer overlap, the
busier of compute and network decides (what a pipeline of equal parts tends to). Several steps: their mean. Ignored:
multiprocessors kept for exchanges, and how much kernels and exchanges slow each other down while they overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError, UnknownName
from ...base.jit import jit
from ...specs.schedules.parallel import ALL_TO_ALLS
from .sharing import NodeSharing, NodeTables, inside_seconds, node_port_tokens, node_tables
from .traffic import Traffic

NODE_SEND, NODE_RECEIVE, RANK_SEND, RANK_RECEIVE, WORK = range(5)  # rows of `Traffic.ports()` and of the search's state

WorkTable = npt.NDArray[np.int64]


class Prices(NamedTuple):
    """The constants as compiled code takes them, in seconds; `LayerCosts` says what they mean."""

    inter_out_s: float
    inter_back_s: float
    intra_out_s: float
    intra_back_s: float
    inter_latency_s: float
    intra_latency_s: float
    work_s: float
    beside_s: float
    fixed_s: float
    together: float
    """Not zero: both tiers work at once."""
    share: float
    """A group's part of the layer: 1 where nothing overlaps."""
    node: NodeTables
    """What ranks of a node share."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerCosts:
    """The constants of the prediction. Raises InputError for one that is negative, infinite, or a zero bandwidth."""

    token_bytes_dispatch: float
    """Bytes of one token on its way to an expert: hidden size × bytes per element (+ scales)."""
    token_bytes_combine: float
    """Bytes of one token on its way back."""
    intra_bytes_per_s: float
    """Bandwidth of one rank's port inside a node, one direction."""
    inter_bytes_per_s: float
    """Bandwidth of one rank's port between nodes, one direction."""
    row_s: float
    """Seconds of expert compute per row (one token for one expert) on a rank; with `row_work`, per unit of work."""
    row_work: WorkTable | None = None
    """int64 [n]: units of work of one expert with 0 … n − 1 rows, for kernels that do not grow in proportion; beyond, its last
    slope goes on. None: a row is a unit."""
    inter_latency_s: float = 0.0
    """What an exchange between nodes takes besides its bytes, each way."""
    intra_latency_s: float = 0.0
    """What an exchange inside nodes takes besides its bytes, each way."""
    beside_s: float = 0.0
    """Work that starts with the dispatch and must be done before experts run (shared experts)."""
    fixed_s: float = 0.0
    """What every layer takes besides (the launch)."""
    exchange: str = "hierarchical"
    """How tokens are de-duplicated, by the names of `specs.schedules.parallel.ALL_TO_ALLS`."""
    tiers_together: bool = False
    """Both tiers of an exchange work at once instead of one after the other."""
    groups: int = 1
    """Equal parts in which exchanges and experts overlap: compute waits for the first part's dispatch and the last one's
    combine, the network for one part's compute."""
    sharing: NodeSharing | None = None
    """What ranks of a node share; its tables, where it has them, take the place of bandwidth and latency inside nodes."""

    def __post_init__(self) -> None:
        names = ("token_bytes_dispatch", "token_bytes_combine", "intra_bytes_per_s", "inter_bytes_per_s", "row_s")
        for name in (*names, "inter_latency_s", "intra_latency_s", "beside_s", "fixed_s"):
            value = getattr(self, name)
            if not np.isfinite(value) or value < 0 or (name.endswith("bytes_per_s") and value == 0):
                raise InputError(name, value, "must be finite and positive", "take it from a profile or a data sheet")
        if self.groups < 1:
            raise InputError("groups", self.groups, "below one", "1 overlaps nothing")
        if self.exchange not in ALL_TO_ALLS:
            raise UnknownName("exchange", self.exchange, ALL_TO_ALLS)
        table = self.row_work
        if table is not None and (table.ndim != 1 or len(table) < 2 or table[0] != 0 or np.any(np.diff(table) < 0)):
            raise InputError(
                "row_work", table.shape, "must start at zero and never fall", "give the cost of 0, 1, 2 … rows"
            )

    @property
    def inter_token_s(self) -> float:
        """Seconds one token costs the inter-node port, there and back."""
        return (self.token_bytes_dispatch + self.token_bytes_combine) / self.inter_bytes_per_s

    @property
    def intra_token_s(self) -> float:
        """Seconds one token costs the intra-node port, there and back."""
        return (self.token_bytes_dispatch + self.token_bytes_combine) / self.intra_bytes_per_s

    @property
    def kind(self) -> int:
        """The exchange as its place in `ALL_TO_ALLS`."""
        return ALL_TO_ALLS.index(self.exchange)

    def prices(self) -> Prices:
        """Return the constants as compiled code takes them."""
        return Prices(
            self.token_bytes_dispatch / self.inter_bytes_per_s, self.token_bytes_combine / self.inter_bytes_per_s,
            self.token_bytes_dispatch / self.intra_bytes_per_s, self.token_bytes_combine / self.intra_bytes_per_s,
            self.inter_latency_s, self.intra_latency_s, self.row_s, self.beside_s, self.fixed_s, float(self.tiers_together),
            1.0 / self.groups, node_tables(self.sharing),
        )  # fmt: skip

    def work_table(self, most_rows: int) -> WorkTable:
        """Return int64 [≥ most_rows + 1]: units of work of an expert with so many rows."""
        if self.row_work is None:
            return np.arange(most_rows + 1, dtype=np.int64)
        missing = most_rows + 1 - len(self.row_work)
        if missing <= 0:
            return self.row_work
        last, slope = self.row_work[-1], self.row_work[-1] - self.row_work[-2]
        return np.concatenate([self.row_work, last + slope * np.arange(1, missing + 1)]).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """A predicted layer, in seconds, and what it is made of."""

    dispatch_s: float
    """All-to-all to the experts."""
    compute_s: float
    """Expert compute of the slowest rank."""
    combine_s: float
    """All-to-all back."""
    total_s: float
    """The layer, computed exactly as the search computes it; without work beside the dispatch and fixed costs, the sum."""


def work_ports(traffic: Traffic, costs: LayerCosts) -> npt.NDArray[np.int64]:
    """Return int64 [5, num_ranks]: tokens through every port under the exchange, and each rank's units of work.

    Raises InputError where the traffic goes beyond what costs were tabulated for.
    """
    ports = traffic.ports(costs.exchange)
    if costs.sharing is not None:
        costs.sharing.check_tokens(int(ports[RANK_SEND].sum()))
    if costs.row_work is not None:
        table = costs.work_table(int(traffic.slot_rows.max(initial=0)))
        ports[WORK] = table[traffic.slot_rows].reshape(ports.shape[1], -1).sum(axis=1)
    return ports


def layer_time(traffic: Traffic, costs: LayerCosts) -> LayerTime:
    """Return the predicted time of one layer in one step."""
    ports, prices = work_ports(traffic, costs), costs.prices()
    inter = int(ports[NODE_SEND : NODE_RECEIVE + 1].max())
    intra = int(ports[RANK_SEND : RANK_RECEIVE + 1].max())
    dispatch_s, combine_s = _exchanges_s(ports, inter, intra, prices)
    return LayerTime(
        dispatch_s=float(dispatch_s),
        compute_s=costs.row_s * int(ports[WORK].max()),
        combine_s=float(combine_s),
        total_s=float(port_seconds(ports, prices, 1.0)),
    )


def mean_layer_seconds(traffics: Sequence[Traffic], costs: LayerCosts) -> float:
    """Return the mean predicted layer time over several steps, summed in the order the search sums it."""
    total = 0.0
    for traffic in traffics:
        total += float(port_seconds(work_ports(traffic, costs), costs.prices(), 1.0))
    return total / len(traffics)


def balanced_row_s(traffics: Sequence[Traffic], costs: LayerCosts, compute_over_exchange: float) -> float:
    """Return the seconds per row at which perfectly balanced compute takes `compute_over_exchange` times balanced exchange.

    Balanced means the mean port and the mean rank of the given steps (the "r1", "r3", "r03" of a study: 1, 3, 1/3).
    """
    exchange_s, rows = 0.0, 0.0
    for traffic in traffics:
        ports = traffic.ports(costs.exchange)
        exchange_s += (
            float(ports[NODE_SEND].mean()) * costs.inter_token_s + float(ports[RANK_SEND].mean()) * costs.intra_token_s
        )
        rows += float(ports[WORK].mean())
    return compute_over_exchange * exchange_s / rows


@jit
def _exchange_s(between: float, inside: float, prices: Prices) -> float:
    """Return the seconds of one exchange from those of its tiers."""
    return max(between, inside) if prices.together != 0.0 else between + inside


@jit
def _exchanges_s(ports: npt.NDArray[np.integer], inter: int, intra: int, prices: Prices) -> tuple[float, float]:
    """Return seconds of (dispatch, combine); a tier without tokens takes none.

    inter, intra: the most tokens that a rank's own port of the tier sends or receives.
    """
    node, latency_s = prices.node, prices.inter_latency_s
    if node.shared_port or node.half_duplex_port:
        inter = node_port_tokens(ports, node)
    out = latency_s + inter * prices.inter_out_s if inter > 0 else 0.0
    back = latency_s + inter * prices.inter_back_s if inter > 0 else 0.0
    if len(node.out_s) > 0:
        inside_out = inside_seconds(ports, node.ranks_per_node, node.out_s, node.out_token_s)
        inside_back = inside_seconds(ports, node.ranks_per_node, node.back_s, node.back_token_s)
    else:
        inside_out = prices.intra_latency_s + intra * prices.intra_out_s if intra > 0 else 0.0
        inside_back = prices.intra_latency_s + intra * prices.intra_back_s if intra > 0 else 0.0
    return _exchange_s(out, inside_out, prices), _exchange_s(back, inside_back, prices)


@jit
def port_seconds(ports: npt.NDArray[np.integer], prices: Prices, work_weight: float) -> float:
    """Return the layer time of `ports: [5, num_ranks]`, work counted `work_weight` times.

    The one formula both the search and the evaluation use.
    """
    inter, intra, work = 0, 0, 0
    for rank in range(ports.shape[1]):
        inter = max(inter, ports[0, rank], ports[1, rank])
        intra = max(intra, ports[2, rank], ports[3, rank])
        work = max(work, ports[4, rank])
    dispatch, combine = _exchanges_s(ports, inter, intra, prices)
    compute = work * (prices.work_s * work_weight)
    lane = max(dispatch * prices.share, prices.beside_s) + compute + combine * prices.share
    return max(lane, dispatch + compute * prices.share + combine) + prices.fixed_s
