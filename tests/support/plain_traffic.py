"""The slow, obvious statement of `traffic`: sets of ranks and nodes, token by token.

Modelled and ignored: exactly what `traffic` models and ignores; tests demand equal counts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplan.planner.placement.placement import Placement
from moeplan.planner.placement.traffic import Traffic


def count_traffic_slowly(
    slots: npt.NDArray[np.integer], source_rank: npt.NDArray[np.integer], placement: Placement
) -> Traffic:
    """Return what `traffic.count_traffic` returns, counted with Python sets."""
    ranks, ranks_per_node = placement.num_ranks, placement.ranks_per_node
    choices, per_rank, inter, intra = (np.zeros((ranks, ranks), np.int64) for _ in range(4))
    slot_rows = np.zeros(placement.num_slots, np.int64)
    for token_slots, source in zip(slots.tolist(), source_rank.tolist(), strict=True):
        wanted = [slot // placement.slots_per_rank for slot in token_slots]
        for slot, rank in zip(token_slots, wanted, strict=True):
            slot_rows[slot] += 1
            choices[source, rank] += 1
        home, seat = divmod(source, ranks_per_node)
        for node in {rank // ranks_per_node for rank in wanted}:
            gateway = node * ranks_per_node + seat  # on the home node this is the source itself
            if node != home:
                inter[source, gateway] += 1
            for rank in {rank for rank in wanted if rank // ranks_per_node == node}:
                per_rank[source, rank] += 1
                if rank != gateway:
                    intra[gateway, rank] += 1
    return Traffic(choices=choices, per_rank=per_rank, inter_node=inter, intra_node=intra, slot_rows=slot_rows,
                   ranks_per_node=ranks_per_node)  # fmt: skip
