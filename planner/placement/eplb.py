"""The expert-parallel load balancer of DeepSeek, written from its description and compiled over all layers.

Modelled: load only. Global: (1) one slot per expert, each further slot to the expert with the largest load per copy;
(2) copies, heaviest first, into the lightest rank that has room and not that expert yet; where all ranks with room have it, the
copy changes places with the one nearest in load that may leave a full rank. Hierarchical, where expert groups divide over nodes:
(1) groups packed onto nodes, (2) copies made inside a node, (3) copies packed onto its ranks. Ties go to the lower index. The
published code may put copies of an expert on one rank, which some engines cannot load; otherwise the two agree.
Ignored: which tokens go where, so affinity, traffic and topology beyond the grouping. `eplb_reference` says the same
slowly. Source: github.com/deepseek-ai/EPLB, README and published outputs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from ...base.jit import jit
from .placement import Placement, check_topology

FloatArray = npt.NDArray[np.float64]


def rebalance(
    load: npt.ArrayLike, num_slots: int, num_ranks: int, num_nodes: int = 1, num_groups: int | None = None
) -> Placement:
    """Return the balanced placement of `load: [num_layers, num_logical]` (tokens per expert, any scale).

    `num_groups` is the model's number of expert groups; where it divides over the nodes the hierarchical rule is used,
    otherwise (or with None, or where a rank has more slots than its node experts) the global one, which does not look at nodes.
    Raises InputError for loads that are not a finite non-negative matrix and for slots, ranks, nodes or groups that form no
    rectangle.
    """
    table = checked_load(load)
    num_layers, num_logical = table.shape
    check_topology(num_logical, num_slots, num_ranks, num_nodes)
    groups, nodes = effective_groups(num_logical, num_slots, num_nodes, num_groups)
    if num_slots // num_ranks > num_logical // nodes:
        groups = nodes = 1
    rows = np.empty((num_layers, num_slots), dtype=np.int32)
    _rebalance_layers(table, groups, nodes, num_ranks, rows)
    return Placement(physical_to_logical=rows, num_logical=num_logical, num_ranks=num_ranks, num_nodes=num_nodes)


def checked_load(load: npt.ArrayLike) -> FloatArray:
    """Return `load` as float64 [num_layers, num_logical]; raises InputError where it is not a finite non-negative matrix."""
    table = np.ascontiguousarray(load, dtype=np.float64)
    if table.ndim != 2 or 0 in table.shape:
        raise InputError(
            "load", f"shape {table.shape}", "must be [num_layers, num_logical]", "give one row per MoE layer"
        )
    bad = np.argwhere(~np.isfinite(table) | (table < 0))
    if len(bad):
        layer, expert = bad[0]
        raise InputError(
            f"load[{layer}][{expert}]",
            float(table[layer, expert]),
            "loads are finite and not negative",
            "check the recording",
        )
    return table


def effective_groups(num_logical: int, num_slots: int, num_nodes: int, num_groups: int | None) -> tuple[int, int]:
    """Return (groups, nodes) the rule works with: the given ones when groups divide over nodes, else (1, 1).

    Raises InputError when the groups do not divide the experts, or the slots the nodes.
    """
    if num_groups is None or num_groups % num_nodes:
        return 1, 1
    if num_groups < 1 or num_logical % num_groups:
        raise InputError(
            "num_groups",
            num_groups,
            f"{num_logical} experts do not divide into equal groups",
            "use the model's own number",
        )
    if num_slots % num_nodes:
        raise InputError("num_slots", num_slots, f"not divisible by {num_nodes} nodes", "change the redundant slots")
    return num_groups, num_nodes


def max_over_mean(rank_load: npt.ArrayLike) -> FloatArray:
    """Return the heaviest rank over the mean for every layer of `rank_load: [num_layers, num_ranks]`; 1 where all is zero."""
    table = np.asarray(rank_load, dtype=np.float64)
    mean = table.mean(axis=1)
    ratio: FloatArray = np.divide(table.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0)
    return ratio


def even_rank_load(load: npt.ArrayLike, placement: Placement) -> FloatArray:
    """Return the load of every rank, [num_layers, num_ranks], when all copies of an expert share its load evenly."""
    share = checked_load(load) / placement.replica_counts()
    per_slot = np.take_along_axis(share, placement.physical_to_logical.astype(np.int64), axis=1)
    rank_load: FloatArray = per_slot.reshape(placement.num_layers, placement.num_ranks, -1).sum(axis=2)
    return rank_load


@jit
def _pack(
    weight: FloatArray,
    kind: npt.NDArray[np.int64],
    num_packs: int,
    pack: npt.NDArray[np.int64],
    place: npt.NDArray[np.int64],
) -> None:
    """Put equally many items into every pack, heaviest first into the lightest pack with room, no kind twice into any.

    Ties go to the lower index. No kind may have more items than there are packs, nor a pack more room than there are kinds.
    """
    num_items = len(weight)
    per_pack = num_items // num_packs
    if per_pack == 1:
        for item in range(num_items):
            pack[item] = item
            place[item] = 0
        return
    filled = np.zeros(num_packs, dtype=np.int64)
    carried = np.zeros(num_packs, dtype=np.float64)
    has = np.zeros((num_packs, kind.max() + 1), dtype=np.bool_)
    pack[:] = -1
    for item in np.argsort(-weight, kind="mergesort"):
        lightest, room = -1, -1
        for candidate in range(num_packs):
            if filled[candidate] == per_pack:
                continue
            if room < 0 or carried[candidate] < carried[room]:
                room = candidate
            if not has[candidate, kind[item]] and (lightest < 0 or carried[candidate] < carried[lightest]):
                lightest = candidate
        if lightest < 0:
            lightest = room
            # The item goes where the nearest in weight is, which goes to the pack with room instead.
            leaves = -1
            for other in range(num_items):
                if pack[other] < 0 or has[pack[other], kind[item]] or has[room, kind[other]]:
                    continue
                if leaves < 0 or abs(weight[other] - weight[item]) < abs(weight[leaves] - weight[item]):
                    leaves = other
            full = pack[leaves]
            pack[item], place[item] = full, place[leaves]
            has[full, kind[leaves]], has[full, kind[item]] = False, True
            carried[full] += weight[item] - weight[leaves]
            moved = leaves
        else:
            moved = item
        pack[moved], place[moved] = lightest, filled[lightest]
        has[lightest, kind[moved]] = True
        filled[lightest] += 1
        carried[lightest] += weight[moved]


@jit
def _replicate(load: FloatArray, most: int, copy_of: npt.NDArray[np.int64], copies: npt.NDArray[np.int64]) -> None:
    """Name the expert of every copy: first one each, then always the expert with the largest load per copy, of those that have
    fewer than `most`.
    """
    num_experts = len(load)
    per_copy = load.copy()
    for expert in range(num_experts):
        copy_of[expert] = expert
        copies[expert] = 1
    for extra in range(num_experts, len(copy_of)):
        heaviest = -1
        for expert in range(num_experts):
            if copies[expert] < most and (heaviest < 0 or per_copy[expert] > per_copy[heaviest]):
                heaviest = expert
        copy_of[extra] = heaviest
        copies[heaviest] += 1
        per_copy[heaviest] = load[heaviest] / copies[heaviest]


@jit
def _rebalance_layers(
    load: FloatArray, num_groups: int, num_nodes: int, num_ranks: int, rows: npt.NDArray[np.int32]
) -> None:
    """Fill `rows: [num_layers, num_slots]` with the logical expert of every slot."""
    num_layers, num_logical = load.shape
    group_size = num_logical // num_groups
    groups_per_node = num_groups // num_nodes
    node_experts = num_logical // num_nodes
    node_slots = rows.shape[1] // num_nodes
    slots_per_rank = rows.shape[1] // num_ranks
    group_load = np.empty(num_groups, dtype=np.float64)
    group_node = np.empty(num_groups, dtype=np.int64)
    group_place = np.empty(num_groups, dtype=np.int64)
    expert_at = np.empty(num_logical, dtype=np.int64)
    node_load = np.empty(node_experts, dtype=np.float64)
    copy_of = np.empty(node_slots, dtype=np.int64)
    copies = np.empty(node_experts, dtype=np.int64)
    copy_load = np.empty(node_slots, dtype=np.float64)
    copy_rank = np.empty(node_slots, dtype=np.int64)
    copy_place = np.empty(node_slots, dtype=np.int64)
    for layer in range(num_layers):
        # 1. Groups onto nodes: `expert_at` lists experts in node order.
        for group in range(num_groups):
            group_load[group] = load[layer, group * group_size : (group + 1) * group_size].sum()
        _pack(group_load, np.arange(num_groups), num_nodes, group_node, group_place)
        for group in range(num_groups):
            first = (group_node[group] * groups_per_node + group_place[group]) * group_size
            for member in range(group_size):
                expert_at[first + member] = group * group_size + member
        for node in range(num_nodes):
            # 2. Copies inside the node.
            for member in range(node_experts):
                node_load[member] = load[layer, expert_at[node * node_experts + member]]
            _replicate(node_load, num_ranks // num_nodes, copy_of, copies)
            # 3. Copies onto the node's ranks.
            for copy in range(node_slots):
                copy_load[copy] = node_load[copy_of[copy]] / copies[copy_of[copy]]
            _pack(copy_load, copy_of, num_ranks // num_nodes, copy_rank, copy_place)
            for copy in range(node_slots):
                slot = node * node_slots + copy_rank[copy] * slots_per_rank + copy_place[copy]
                rows[layer, slot] = expert_at[node * node_experts + copy_of[copy]]
