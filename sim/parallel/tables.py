"""The cost tables both expert-parallel engines index: whole nanoseconds, bytes and tokens per rank.

Modelled: one entry for every operation and exchange of a program, for every rank: no layer is copied to stand for all.
Ignored: where the numbers come from (`ep_costs`).
"""

from __future__ import annotations

from typing import NamedTuple

from ..policies.state import Array


class EpTables(NamedTuple):
    """Durations and sizes as int64 arrays. Tiers: 0 between nodes, 1 inside a node."""

    work_ns: Array  # [ops, ranks]: kernels of each operation
    op_tokens: Array  # [ops, ranks]: tokens or rows they work on
    ex_ns: Array  # [exchanges, 2, ranks]: time of each rank's port; 0 where it moves nothing
    ex_bytes: Array  # [exchanges, 2, ranks]: bytes the rank sends
    ex_tokens: Array  # [exchanges, 2, ranks]: tokens the rank sends
