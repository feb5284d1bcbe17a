"""How long one MoE layer takes, predicted from its traffic: what the search minimises and every comparison reports.

Modelled: layer = dispatch + compute of the slowest rank + combine. Either exchange takes the bytes of the largest
inter-node port over its bandwidth plus those of the largest intra-node port over its own (the larger of what a port sends
and receives; it is the largest port that matters, not the total). A token crosses once to a node and once to a rank. Compute
grows with rows. Several steps: their mean. Ignored: latency, overlap, the shape of bandwidth and kernel curves and weight
reading; the simulator has those, this has to be evaluated tens of thousands of times a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...jit import jit
from .traffic import Traffic

NODE_SEND, NODE_RECEIVE, RANK_SEND, RANK_RECEIVE, ROWS = range(5)  # rows of `Traffic.ports()`


@dataclass(frozen=True, slots=True, kw_only=True)
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
    """Seconds of expert compute per row (one token for one expert) on a rank."""

    def __post_init__(self) -> None:
        for name in ("token_bytes_dispatch", "token_bytes_combine", "intra_bytes_per_s", "inter_bytes_per_s", "row_s"):
            value = getattr(self, name)
            if not np.isfinite(value) or value < 0 or (name.endswith("per_s") and value == 0):
                raise InputError(name, value, "must be finite and positive", "take it from a profile or a data sheet")

    @property
    def inter_token_s(self) -> float:
        """Seconds one token costs the inter-node port, there and back."""
        return (self.token_bytes_dispatch + self.token_bytes_combine) / self.inter_bytes_per_s

    @property
    def intra_token_s(self) -> float:
        """Seconds one token costs the intra-node port, there and back."""
        return (self.token_bytes_dispatch + self.token_bytes_combine) / self.intra_bytes_per_s


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
    """The sum, computed exactly as the search computes it."""


def layer_time(traffic: Traffic, costs: LayerCosts) -> LayerTime:
    """Return the predicted time of one layer in one step."""
    ports = traffic.ports()
    inter = int(ports[NODE_SEND : NODE_RECEIVE + 1].max())
    intra = int(ports[RANK_SEND : RANK_RECEIVE + 1].max())
    per_byte_s = inter / costs.inter_bytes_per_s + intra / costs.intra_bytes_per_s
    return LayerTime(
        dispatch_s=costs.token_bytes_dispatch * per_byte_s,
        compute_s=costs.row_s * int(ports[ROWS].max()),
        combine_s=costs.token_bytes_combine * per_byte_s,
        total_s=float(port_seconds(ports, costs.inter_token_s, costs.intra_token_s, costs.row_s)),
    )


def mean_layer_seconds(traffics: Sequence[Traffic], costs: LayerCosts) -> float:
    """Return the mean predicted layer time over several steps, summed in the order the search sums it."""
    total = 0.0
    for traffic in traffics:
        total += float(port_seconds(traffic.ports(), costs.inter_token_s, costs.intra_token_s, costs.row_s))
    return total / len(traffics)


def balanced_row_s(traffics: Sequence[Traffic], costs: LayerCosts, compute_over_exchange: float) -> float:
    """Return the seconds per row at which perfectly balanced compute takes `compute_over_exchange` times balanced exchange.

    Balanced means the mean port and the mean rank of the given steps (the "r1", "r3", "r03" of a study: 1, 3, 1/3).
    """
    exchange_s, rows = 0.0, 0.0
    for traffic in traffics:
        ports = traffic.ports()
        exchange_s += (
            float(ports[NODE_SEND].mean()) * costs.inter_token_s + float(ports[RANK_SEND].mean()) * costs.intra_token_s
        )
        rows += float(ports[ROWS].mean())
    return compute_over_exchange * exchange_s / rows


@jit
def port_seconds(ports: npt.NDArray[np.integer], inter_token_s: float, intra_token_s: float, row_s: float) -> float:
    """Return the layer time of `ports: [5, num_ranks]`; the one formula both the search and the evaluation use."""
    inter, intra, rows = 0, 0, 0
    for rank in range(ports.shape[1]):
        inter = max(inter, ports[0, rank], ports[1, rank])
        intra = max(intra, ports[2, rank], ports[3, rank])
        rows = max(rows, ports[4, rank])
    return inter * inter_token_s + intra * intra_token_s + rows * row_s
