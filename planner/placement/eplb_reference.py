"""The slow, obvious statement of `eplb`: plain lists, one layer at a time, the words of the description in order.

Modelled and ignored: exactly what `eplb` models and ignores; tests demand equal placements.
"""

from __future__ import annotations

from collections.abc import Sequence


def rebalance_layer(
    load: Sequence[float], num_slots: int, num_ranks: int, num_nodes: int = 1, num_groups: int | None = None
) -> list[int]:
    """Return the logical expert of every slot for one layer's loads; groups and nodes as in `eplb.rebalance`."""
    if num_groups is None or num_groups % num_nodes or num_slots // num_ranks > len(load) // num_nodes:
        num_groups = num_nodes = 1
    group_size = len(load) // num_groups
    groups = [list(range(first, first + group_size)) for first in range(0, len(load), group_size)]
    slots: list[int] = []
    for node_groups in pack([sum(load[e] for e in group) for group in groups], num_nodes):
        experts = [expert for group in node_groups for expert in groups[group]]
        copies = replicate([load[e] for e in experts], num_slots // num_nodes, num_ranks // num_nodes)
        share = [load[experts[c]] / copies.count(c) for c in copies]
        for rank in pack(share, num_ranks // num_nodes, copies):
            slots += [experts[copies[copy]] for copy in rank]
    return slots


def pack(weights: Sequence[float], num_packs: int, kinds: Sequence[int] | None = None) -> list[list[int]]:
    """Return the items of each of `num_packs` equally full packs: heaviest first into the lightest pack with room, no kind twice.

    An item for which there is no such pack takes the place of the packed item nearest in weight that may go where there is room.
    """
    kind = list(range(len(weights))) if kinds is None else kinds
    room = len(weights) // num_packs
    if room == 1:
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    carried = [0.0] * num_packs
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        open_packs = [p for p in range(num_packs) if len(packs[p]) < room]
        new_to = [p for p in open_packs if kind[item] not in {kind[i] for i in packs[p]}]
        lightest = min(new_to or open_packs, key=lambda p: carried[p])
        if not new_to:
            there = {kind[i] for i in packs[lightest]}
            may_leave = [(i, p) for p in range(num_packs) if kind[item] not in {kind[i] for i in packs[p]}
                         for i in packs[p] if kind[i] not in there]  # fmt: skip
            leaves, full = min(may_leave, key=lambda each: (abs(weights[each[0]] - weights[item]), each[0]))
            packs[full][packs[full].index(leaves)] = item
            carried[full] += weights[item] - weights[leaves]
            item = leaves
        packs[lightest].append(item)
        carried[lightest] += weights[item]
    return packs


def replicate(load: Sequence[float], num_copies: int, most: int) -> list[int]:
    """Return the expert of every copy: one each, then always one more of the expert with the largest load per copy, of those with
    fewer than `most`.
    """
    copies = list(range(len(load)))
    while len(copies) < num_copies:
        fewer = [e for e in range(len(load)) if copies.count(e) < most]
        copies.append(max(fewer, key=lambda e: load[e] / copies.count(e)))
    return copies
