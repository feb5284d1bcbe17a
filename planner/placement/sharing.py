"""Exchanges of one layer where the ranks of a node share what they move tokens through.

Modelled: the memory of a host, as a machine's own exchanges were fitted: inside a node the busiest port takes so many seconds for
each of its tokens, and the exchange so many besides, both by how many tokens the ranks of that node send together; the slowest
node decides. And a port between nodes which all ranks of a node use, or one that does not send and receive at once. Both are
tabulated by whole tokens, so that a look-up takes the place of the fitted form. Ignored: where the form comes from
(`planner/ep_objective`), and everything for which ranks do not meet (`objective`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from ...base.jit import jit

FloatArray = npt.NDArray[np.float64]


class NodeTables(NamedTuple):
    """What ranks share as compiled code takes it; `NodeSharing` says what it means."""

    ranks_per_node: int
    """Ranks of a node; 0 where ranks share nothing."""
    shared_port: bool
    half_duplex_port: bool
    out_s: FloatArray
    """float64 [n], as the three that follow; none where inside a node every port is its own."""
    out_token_s: FloatArray
    back_s: FloatArray
    back_token_s: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InsideTable:
    """One way of an exchange inside nodes, by the tokens that a node's ranks send together: float64 [n] each."""

    seconds: FloatArray
    """What the exchange takes besides the busiest port's tokens."""
    token_s: FloatArray
    """What each token through the busiest port takes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NodeSharing:
    """What the ranks of a node share. Raises InputError for tables of different lengths or numbers below zero."""

    ranks_per_node: int
    dispatch: InsideTable | None = None
    """None, as for `combine`: inside a node every port is its own."""
    combine: InsideTable | None = None
    shared_port: bool = False
    """A node has one port to others, through which goes what all its ranks send, and what they receive."""
    half_duplex_port: bool = False
    """A port between nodes takes what it sends and what it receives one after the other."""

    def __post_init__(self) -> None:
        arrays = [column for each in (self.dispatch, self.combine) if each for column in (each.seconds, each.token_s)]
        if len(arrays) not in (0, 4) or len({column.shape for column in arrays}) > 1:
            raise InputError("sharing", [column.shape for column in arrays], "tables of one length for both ways",
                             "tabulate the dispatch and the combine alike")  # fmt: skip
        if any(not np.all(np.isfinite(column) & (column >= 0)) for column in arrays):
            raise InputError("sharing", "a table", "must be finite and positive", "take it from a profile")

    def check_tokens(self, most: int) -> None:
        """Return nothing; raises InputError where the ranks of a node may send more than was tabulated."""
        if self.dispatch is not None and most >= len(self.dispatch.seconds):
            raise InputError("steps", f"{most} tokens sent inside a node", f"costs reach to {len(self.dispatch.seconds) - 1}",
                             "tabulate them for larger steps")  # fmt: skip


def node_tables(sharing: NodeSharing | None) -> NodeTables:
    """Return what compiled code takes; None where ranks share nothing."""
    none = np.zeros(0)
    columns = (none, none, none, none)
    if sharing is None:
        return NodeTables(0, False, False, *columns)
    if sharing.dispatch is not None and sharing.combine is not None:
        columns = (sharing.dispatch.seconds, sharing.dispatch.token_s, sharing.combine.seconds, sharing.combine.token_s)
    return NodeTables(sharing.ranks_per_node, sharing.shared_port, sharing.half_duplex_port, *columns)


@jit
def node_port_tokens(ports: npt.NDArray[np.integer], node: NodeTables) -> int:
    """Return the tokens through the busiest port between nodes, of `ports: [5, num_ranks]`."""
    most = 0
    for first in range(0, ports.shape[1], node.ranks_per_node):
        sent, received = 0, 0
        for rank in range(first, first + node.ranks_per_node):
            if node.shared_port:
                sent += ports[0, rank]
                received += ports[1, rank]
            else:
                sent, received = ports[0, rank], ports[1, rank]
            most = max(most, sent + received if node.half_duplex_port else max(sent, received))
    return most


@jit
def inside_seconds(
    ports: npt.NDArray[np.integer], ranks_per_node: int, seconds: FloatArray, token_s: FloatArray
) -> float:
    """Return the seconds of one exchange inside nodes, the slowest node's; a node that moves nothing takes none."""
    longest = 0.0
    for first in range(0, ports.shape[1], ranks_per_node):
        port, total = 0, 0
        for rank in range(first, first + ranks_per_node):
            port = max(port, ports[2, rank], ports[3, rank])
            total += ports[2, rank]
        if port > 0:
            longest = max(longest, seconds[total] + port * token_s[total])
    return longest
