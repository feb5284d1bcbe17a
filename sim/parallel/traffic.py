"""Who sends how much to whom in one expert-parallel step, for every layer, batch and group: what the cost tables are made of.

Modelled: tokens live on ranks; each choice of an expert goes to the slot the run-time router picked. A schedule divides the
tokens into batches and chunks, or the slots of a rank into groups; every part is exchanged on its own, so a token that
needs a rank in two groups travels twice. De-duplication as the exchange does it: for every choice, once per rank, or once
per node (to the rank with the sender's place there) and from there once per rank. From counts only, choices are taken as
independent given how often each expert is used, and counts are expectations, not rounded, beside the chance that each slot is
active at all. Ignored: bytes and time (`ep_costs`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from ...base.jit import jit
from ...specs.schedules.parallel import ALL_TO_ALLS, ExpertParallelSchedule
from ..policies.state import Array
from .active_experts import active_chance, most_over_mean
from .program import INTER, INTRA, NUM_TIERS

# Divisions of experts in which every rank already holds the tokens it works on.
_NOT_SENT = ("tensor", "node")

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Ranks in nodes, slots on ranks; rank r owns slots [r·S, (r+1)·S) and node n ranks [n·N, (n+1)·N), N being ranks per node."""

    num_ranks: int
    num_nodes: int
    slots_per_rank: int

    def __post_init__(self) -> None:
        if min(self.num_ranks, self.num_nodes, self.slots_per_rank) < 1 or self.num_ranks % self.num_nodes:
            raise InputError("num_nodes", self.num_nodes, f"{self.num_ranks} ranks do not divide into equal nodes",
                             "give every node the same number of ranks")  # fmt: skip

    @property
    def ranks_per_node(self) -> int:
        """Ranks of every node."""
        return self.num_ranks // self.num_nodes

    @property
    def num_slots(self) -> int:
        """Slots of one layer."""
        return self.num_ranks * self.slots_per_rank


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Expectation:
    """What a step looks like on average, where only counts are known. Shapes and parts as in `StepLoad`."""

    rows: FloatArray
    active: FloatArray
    """Like rows: the chance that a slot computes any row; in one node, where every node holds all experts."""
    slowest: FloatArray
    """[layers, parts]: active experts of the rank that has most, over those of the rank that has most on average."""
    sent: FloatArray
    received: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepLoad:
    """Token counts of one step. Part p of a layer is group p % num_groups of batch p // num_groups."""

    topology: Topology
    num_micro: int
    num_groups: int
    """Groups that were counted apart; a tile-wise schedule counts one and divides it."""
    rank_tokens: Array
    """int64 [micro, ranks]: tokens living on each rank."""
    slot_rows: Array
    """int64 [layers, parts, slots]: rows each slot's expert computes."""
    sent: Array
    """int64 [layers, parts, 2, ranks]: tokens each rank sends between nodes and inside its node, dispatching."""
    received: Array
    """int64 [layers, parts, 2, ranks]."""
    links: Array
    """int64 [from rank, to rank]: tokens dispatched over each link, all layers and parts; the diagonal is zero."""
    exact: bool
    """False where counts are expectations under independence."""
    expected: Expectation | None = None
    """The expectations before they were rounded; None where counts are exact."""

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.slot_rows.shape[0])

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return int(self.rank_tokens.sum())

    def rank_rows(self) -> Array:
        """Return int64 [layers, ranks]: rows each rank computes in a layer."""
        return np.asarray(self._by_rank(self.slot_rows), np.int64)

    def _by_rank(self, rows: Array | FloatArray) -> FloatArray:
        by_rank = rows.sum(axis=1).reshape(self.num_layers, self.topology.num_ranks, -1)
        return np.asarray(by_rank.sum(axis=2), np.float64)

    def active_slots(self) -> FloatArray:
        """Return [layers, slots]: the chance that a slot computes any row in a layer; 0 or 1 where counts are exact."""
        if self.expected is None:
            return np.asarray(self.slot_rows.sum(axis=1) > 0, np.float64)
        return np.asarray(1 - np.prod(1 - self.expected.active, axis=1), np.float64)

    def times(self, weight: int) -> StepLoad:
        """Return the counts of a step in which each token stands for `weight` tokens like it."""
        if weight == 1:
            return self
        scaled = {
            name: getattr(self, name) * weight for name in ("rank_tokens", "slot_rows", "sent", "received", "links")
        }
        return replace(self, **scaled)

    def max_over_mean(self) -> float:
        """Return the mean over layers of the fullest rank's rows over the mean rank's; 1 where a layer has none."""
        rows = self._by_rank(self.slot_rows if self.expected is None else self.expected.rows)
        mean = rows.mean(axis=1)
        return float(np.divide(rows.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0).mean())


def token_chunks(source_rank: Array, num_ranks: int, num_chunks: int) -> Array:
    """Return int64 [tokens]: the chunk of every token, consecutive tokens of a rank together, chunks of a rank equally long."""
    order = np.argsort(source_rank, kind="stable")
    counts = np.bincount(source_rank, minlength=num_ranks)
    first = np.cumsum(counts) - counts
    place = np.empty(len(source_rank), np.int64)
    place[order] = np.arange(len(source_rank)) - first[source_rank[order]]
    return np.asarray(place * num_chunks // np.maximum(counts, 1)[source_rank], np.int64)


def slot_groups(topology: Topology, num_groups: int) -> Array:
    """Return int64 [slots]: the group of every slot, consecutive slots of a rank together.

    Raises InputError where a rank has fewer slots than groups.
    """
    if num_groups > topology.slots_per_rank:
        raise InputError(
            "pipeline.num_groups", num_groups, f"a rank has {topology.slots_per_rank} experts", "use fewer groups"
        )
    return np.asarray(
        np.arange(topology.num_slots) % topology.slots_per_rank * num_groups // topology.slots_per_rank, np.int64
    )


def count_step(slots: npt.NDArray[np.integer], source_rank: npt.NDArray[np.integer], topology: Topology,
               schedule: ExpertParallelSchedule) -> StepLoad:  # fmt: skip
    """Return the counts of a step whose token t on `source_rank[t]` goes to `slots: [tokens, layers, top_k]`.

    Raises InputError for shapes or ids that do not belong to the topology.
    """
    _check_ids("slots", slots, topology.num_slots)
    _check_ids("source_rank", source_rank, topology.num_ranks)
    if slots.ndim != 3 or source_rank.shape != slots.shape[:1]:
        raise InputError("slots", f"shapes {slots.shape} and {source_rank.shape}", "must be [tokens, layers, top_k] and [tokens]",
                         "pass one rank per token")  # fmt: skip
    micro, groups, by_slot, by_token = _parallelism(schedule)
    source = np.ascontiguousarray(source_rank, np.int64)
    chunk = token_chunks(source, topology.num_ranks, micro * by_token)
    group_of_slot = slot_groups(topology, by_slot)
    layers, parts, ranks = slots.shape[1], micro * groups, topology.num_ranks
    rows = np.zeros((layers, parts, topology.num_slots), np.int64)
    sent = np.zeros((layers, parts, NUM_TIERS, ranks), np.int64)
    received, links = np.zeros_like(sent), np.zeros((ranks, ranks), np.int64)
    kind = ALL_TO_ALLS.index(schedule.all_to_all.kind)
    rule = _Rule(slots_per_rank=topology.slots_per_rank, ranks_per_node=topology.ranks_per_node, kind=kind, by_slot=by_slot,
                 sharded=int(schedule.parallel.experts == "sharded"))  # fmt: skip
    ports = _Ports(sent=sent, received=received, links=links)
    _count(np.ascontiguousarray(slots), source, chunk, group_of_slot, rule, rows, ports)
    if schedule.parallel.experts in _NOT_SENT:
        sent[:], received[:], links[:] = 0, 0, 0
    tokens = np.zeros((micro, ranks), np.int64)
    np.add.at(tokens, (chunk // by_token, source), 1)
    return StepLoad(topology=topology, num_micro=micro, num_groups=groups, rank_tokens=tokens, slot_rows=rows, sent=sent,
                    received=received, links=links, exact=True)  # fmt: skip


def expect_step(
    inclusion: FloatArray, rank_tokens: Array, topology: Topology, schedule: ExpertParallelSchedule
) -> StepLoad:
    """Return the expected counts of a step from marginals alone.

    inclusion: [layers, ranks or 1, slots], the chance that a token of a source rank takes a slot; chances are taken as
    independent. rank_tokens: int64 [ranks]. Raises InputError for chances outside 0..1 or shapes that do not fit.
    """
    ranks, ranks_per_node, nodes = topology.num_ranks, topology.ranks_per_node, topology.num_nodes
    if inclusion.ndim != 3 or inclusion.shape[1] not in (1, ranks) or inclusion.shape[2] != topology.num_slots:
        raise InputError(
            "inclusion", inclusion.shape, "must be [layers, ranks or 1, slots]", "use the placement's own slots"
        )
    if not np.isfinite(inclusion).all() or inclusion.min() < 0 or inclusion.max() > 1 + 1e-9:
        raise InputError("inclusion", float(inclusion.max()), "chances lie between 0 and 1", "give tokens per expert")
    micro, groups, by_slot, by_token = _parallelism(schedule)
    layers, replica = inclusion.shape[0], schedule.parallel.replica_ranks(ranks_per_node)
    rows = np.zeros((layers, groups, topology.num_slots))
    active = np.zeros_like(rows)
    out, links = np.zeros((2, layers, groups, NUM_TIERS, ranks)), np.zeros((ranks, ranks))
    group_of_slot = slot_groups(topology, by_slot)
    share = rank_tokens.astype(np.float64) / (micro * by_token)
    for group in range(groups):
        chance = inclusion if by_slot == 1 else np.where(group_of_slot == group, inclusion, 0.0)
        per_source = np.broadcast_to(chance, (layers, ranks, topology.num_slots))
        rows[:, group] = np.einsum("lrs,r->ls", per_source, share)
        active[:, group] = active_chance(per_source, share)
        # Where a node's ranks hold slices of its experts, whoever needs the node needs all of them.
        sharded = schedule.parallel.experts == "sharded"
        by_target = per_source.reshape(layers, ranks, nodes if sharded else ranks, -1)
        hits = (
            by_target.sum(axis=3) if schedule.all_to_all.kind == "all-choices" else 1 - np.prod(1 - by_target, axis=3)
        )
        if sharded:
            hits = np.repeat(hits, ranks_per_node, axis=2)
        missed = hits
        if schedule.all_to_all.kind == "hierarchical":
            missed = np.prod(1 - hits.reshape(layers, ranks, nodes, ranks_per_node), axis=3)
        _expected_ports(
            hits * share[None, :, None],
            ranks_per_node,
            nodes,
            schedule.all_to_all.kind,
            missed,
            share,
            out[:, :, group],
            links,
        )
    if schedule.parallel.experts in _NOT_SENT:
        out[:], links[:] = 0.0, 0.0
    rows, active, ports = (
        np.tile(rows, (1, micro, 1)),
        np.tile(active, (1, micro, 1)),
        np.tile(out, (1, 1, micro, 1, 1)),
    )
    if schedule.parallel.experts in _NOT_SENT:
        # Nodes, or all that share attention, are replicas: each meets only its own tokens.
        active = -np.expm1(np.log1p(-np.minimum(active, 1 - 1e-16)) / (ranks // replica))
    expected = Expectation(
        rows=rows, active=active, sent=ports[0], received=ports[1],
        slowest=most_over_mean(by_unit(active, topology, schedule.parallel.experts, replica)),
    )  # fmt: skip
    whole, counted = np.rint(rows).astype(np.int64), np.rint(ports).astype(np.int64)
    per_micro = np.diff(np.rint(np.arange(micro + 1)[:, None] * rank_tokens / micro).astype(np.int64), axis=0)
    return StepLoad(topology=topology, num_micro=micro, num_groups=groups, rank_tokens=per_micro, slot_rows=whole, sent=counted[0],
                    received=counted[1], links=np.rint(links * micro).astype(np.int64), exact=False, expected=expected)  # fmt: skip


def by_unit(active: FloatArray, topology: Topology, parallelism: str, replica: int = 0) -> FloatArray:
    """Return [layers, parts, units, slots]: `active: [layers, parts, slots]` by what runs on its own and ends with the slowest.

    replica: ranks that hold all experts where these wait for no token; 0: those of a node.
    """
    shape, replica = active.shape[:2], replica or topology.ranks_per_node
    replicas = topology.num_ranks // replica
    if parallelism == "tensor":
        return np.repeat(active[:, :, None], replicas, axis=2)
    if parallelism == "node":
        return np.tile(active.reshape(*shape, replica, -1), (1, 1, replicas, 1))
    return active.reshape(*shape, topology.num_nodes if parallelism == "sharded" else topology.num_ranks, -1)


def _expected_ports(tokens: FloatArray, ranks_per_node: int, nodes: int, kind: str, missed: FloatArray, share: FloatArray,
                    out: FloatArray, links: FloatArray) -> None:  # fmt: skip
    """Add the expected tokens through every port to `out: [2 (sent, received), layers, tiers, ranks]`, and over every link to
    `links: [from rank, to rank]`.

    tokens: [layers, source, target], tokens of a source that a target needs. missed: [layers, source, nodes], the chance that
    a node is not needed at all (hierarchical only).
    """
    ranks = tokens.shape[1]
    node = np.arange(ranks) // ranks_per_node
    near = node[:, None] == node[None, :]
    other = ~np.eye(ranks, dtype=bool)
    if kind != "hierarchical":
        for tier, mask in ((INTRA, near & other), (INTER, ~near)):
            out[0][:, tier] += (tokens * mask).sum(axis=2)
            out[1][:, tier] += (tokens * mask).sum(axis=1)
        links += (tokens * other).sum(axis=0)
        return
    crossing = (1 - missed) * share[None, :, None]
    for target in range(nodes):
        away = node != target
        landing = np.where(away, target * ranks_per_node + np.arange(ranks) % ranks_per_node, np.arange(ranks))
        lands = np.eye(ranks)[landing]  # [source, landing rank]: tokens of several nodes land on one rank
        out[0][:, INTER] += crossing[:, :, target] * away
        out[1][:, INTER] += (crossing[:, :, target] * away) @ lands
        links += (crossing[:, :, target] * away).sum(axis=0)[:, None] * lands
        for rank in range(target * ranks_per_node, (target + 1) * ranks_per_node):
            forwarded = tokens[:, :, rank] * (landing != rank)
            out[0][:, INTRA] += forwarded @ lands
            out[1][:, INTRA, rank] += forwarded.sum(axis=1)
            links[:, rank] += forwarded.sum(axis=0) @ lands


def _parallelism(schedule: ExpertParallelSchedule) -> tuple[int, int, int, int]:
    """Return (batches, groups counted apart, of them by slot, of them by token)."""
    groups = schedule.num_groups
    by_slot = groups if schedule.pipeline.split == "expert" else 1
    by_token = groups if schedule.pipeline.split == "token" else 1
    return schedule.pipeline.micro_batches, by_slot * by_token, by_slot, by_token


def _check_ids(field: str, ids: npt.NDArray[np.integer], limit: int) -> None:
    if ids.dtype.kind not in "iu" or (ids.size and (int(ids.min()) < 0 or int(ids.max()) >= limit)):
        raise InputError(field, str(ids.dtype), f"must be whole numbers from 0 to {limit - 1}", "check the placement")


class _Rule(NamedTuple):
    """Who gets a token, as whole numbers."""

    slots_per_rank: int
    ranks_per_node: int
    kind: int  # 0 every choice, 1 per rank, 2 per node and rank
    by_slot: int
    sharded: int


class _Ports(NamedTuple):
    """Tokens of a step; see `StepLoad`."""

    sent: Array
    received: Array
    links: Array


@jit
def _count(
    slots: Array, source: Array, chunk: Array, group_of_slot: Array, rule: _Rule, rows: Array, ports: _Ports
) -> None:
    """Add up rows and tokens of ports and links; see `count_step`."""
    slots_per_rank, ranks_per_node, kind, by_slot, sharded = rule
    sent, received, links = ports
    num_tokens, num_layers, top_k = slots.shape
    ranks = sent.shape[3]
    nodes = ranks // ranks_per_node
    at_rank = np.full((by_slot, ranks), -1, np.int64)
    at_node = np.full((by_slot, nodes), -1, np.int64)
    for layer in range(num_layers):
        at_rank[:] = -1
        at_node[:] = -1
        for token in range(num_tokens):
            home = source[token]
            for choice in range(top_k):
                slot = slots[token, layer, choice]
                group = group_of_slot[slot]
                part = chunk[token] * by_slot + group
                rank = slot // slots_per_rank
                node = rank // ranks_per_node
                rows[layer, part, slot] += 1
                if sharded:
                    # All ranks of the node hold a slice: each of them gets the token.
                    if kind != 0:
                        if at_node[group, node] == token:
                            continue
                        at_node[group, node] = token
                    tier = 1 if node == home // ranks_per_node else 0
                    for member in range(node * ranks_per_node, (node + 1) * ranks_per_node):
                        if member != home:
                            sent[layer, part, tier, home] += 1
                            received[layer, part, tier, member] += 1
                            links[home, member] += 1
                    continue
                if kind != 0:
                    if at_rank[group, rank] == token:
                        continue
                    at_rank[group, rank] = token
                if kind != 2:
                    if rank != home:
                        tier = 1 if node == home // ranks_per_node else 0
                        sent[layer, part, tier, home] += 1
                        received[layer, part, tier, rank] += 1
                        links[home, rank] += 1
                    continue
                landing = home
                if node != home // ranks_per_node:
                    landing = node * ranks_per_node + home % ranks_per_node
                    if at_node[group, node] != token:
                        at_node[group, node] = token
                        sent[layer, part, 0, home] += 1
                        received[layer, part, 0, landing] += 1
                        links[home, landing] += 1
                if rank != landing:
                    sent[layer, part, 1, landing] += 1
                    received[layer, part, 1, rank] += 1
                    links[landing, rank] += 1
