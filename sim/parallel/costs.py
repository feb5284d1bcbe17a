"""The cost model tabulated for one expert-parallel step, in whole nanoseconds for every rank, operation and exchange.

Modelled: dense parts from each rank's own tokens; experts from the rows of each of a rank's slots, in one grouped launch or
one launch each; multiprocessors kept for exchanges slow kernels that compute bounds; an exchange port takes a latency and the
larger of what it sends and receives over its tier's bandwidth, and on a measured machine what all of its ranks send over what
they share; a reduction over n ranks moves 2 (n-1)/n of its tensor. Kernels are issued ahead (captured graphs), so the host costs
nothing. Where no multiprocessors are kept for exchanges, exchanges and kernels slow each other down while both run. Ignored: waves and
tiles of kernels, congestion in switches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ...base.errors import InputError, MissingCalibration
from ...base.units import NS_PER_S
from ...calibrate.costs.all_to_all_table import ExchangeTable, exchange_table
from ...calibrate.costs.cost_model import CostModel, Estimate, merge_sources
from ...calibrate.costs.gpu.exchanges import exchange_s, kernels_of
from ...calibrate.costs.rank_laws import COMBINE, DISPATCH, RankLaws, rank_laws
from ...specs.machines.gpu_kernels import BETWEEN, INSIDE, ExchangeKernel
from ...specs.machines.overlap import shared_speed
from ...specs.machines.profile import Constant, Profile
from ...specs.models import WeightFormat
from ...specs.schedules.parallel import ExpertParallelSchedule
from ..policies.state import Array
from .expert_stage import StageRows, parts_of, piece, sm_share, tabulate_experts
from .program import (
    GATHER,
    INTER,
    INTRA,
    NUM_TIERS,
    OP_COMBINE,
    OP_DENSE,
    OP_EXPERT,
    OP_HEAD,
    OP_REDUCE,
    Program,
)
from .rank_costs import tabulate_on_ranks
from .sharing import overlapped, stretched
from .tables import EpTables
from .traffic import FloatArray, StepLoad

# An all-to-all needs 10 to 20 multiprocessors to saturate (arXiv 2410.12247; 16 of 132 taken): below, it slows in proportion.
SATURATING_SM_FRACTION = 16 / 132
_LEAST_BYTE_S = 1e-15
# Reductions carry 16-bit values.
_REDUCE_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One rank's port of a tier: seconds = latency + (bytes + half size) / bandwidth, one direction; or as measured."""

    bytes_per_s: float
    latency_s: float
    half_size_bytes: float = 0.0
    source: str
    relative_uncertainty: float
    table: ExchangeTable | None = None
    """All-to-alls between just so many ranks, measured."""
    kernels: Mapping[str, tuple[ExchangeKernel, ...]] = field(default_factory=dict)
    """Measured kernels by operation (`specs.machines.gpu_kernels.EXCHANGES`): of several, the quickest for a size is taken."""

    def port_ns(
        self,
        num_bytes: FloatArray | Array,
        speed: float = 1.0,
        *,
        total_bytes: FloatArray | Array | None = None,
        beside_compute: bool = False,
        operation: str = "",
    ) -> Array:
        """Return whole nanoseconds for `num_bytes: [..., ranks]`; nothing to move takes none.

        operation: which exchange it is, where each has kernels of its own.
        total_bytes: [..., ranks] or [..., 1], what all ranks of a rank's node send meanwhile; None takes all of them for one node's.
        beside_compute: all ranks compute meanwhile. Both count on a measured machine only.
        """
        measured = self.kernels.get(operation, ())
        if measured:
            seconds = np.min([exchange_s(kernel, num_bytes, speed=speed) for kernel in measured], axis=0)
        elif self.table is None:
            seconds = self.latency_s + (num_bytes + self.half_size_bytes) / (self.bytes_per_s * speed)
        else:
            total = np.sum(num_bytes, axis=-1, keepdims=True) if total_bytes is None else total_bytes
            seconds = self.table.seconds(num_bytes, total, speed=speed, beside_compute=beside_compute)
        return np.where(np.asarray(num_bytes) > 0, np.ceil(seconds * NS_PER_S), 0).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpConstants:
    """What the cost model of one device does not know."""

    inter: Tier | None
    """Between nodes; None where there is one node."""
    intra: Tier
    grouped_rate: float = 1.0
    """Speed of a grouped launch where compute bounds it, relative to the cost model's."""
    dense_rate: float = 1.0
    """The same for launches of one expert. DeepGEMM's README (8002b769) shows no gain on equal shapes: 1346 TFLOP/s grouped
    and 1265 dense for 4096 x 7168 on H800."""
    shared_nic: bool = False
    """The ranks of a node share one port between nodes (of the tier's bandwidth), instead of having one each."""
    half_duplex_nic: bool = False
    """What a port between nodes sends and receives adds up, as where the host's processor moves it."""
    shared_speed: float = 1.0
    """Of kernels beside an exchange, and of exchanges beside kernels, where no multiprocessors are kept for exchanges, relative to
    running alone: they share multiprocessors, memory and links."""
    ranks: RankLaws | None = None
    """What stages cost ranks that are processes of one machine, measured in their steps; then all durations are theirs."""
    attention_rate: float = 1.0
    """Speed of what attention spends on context beyond a token's own, relative to the cost model's."""

    def tier(self, tier: int) -> Tier:
        """Return a tier; raises InputError for the missing one."""
        found = self.intra if tier == INTRA else self.inter
        if found is None:
            raise InputError("num_nodes", 1, "one node has no network", "describe the tier between nodes")
        return found


def constants_of(profile: Profile, num_nodes: int, ranks_per_node: int = 1) -> EpConstants:
    """Return the tiers of a profile; raises MissingCalibration where it describes no server or no network, or where its own
    exchanges were measured, but not between `ranks_per_node` ranks. One rank has nobody to exchange with.
    """
    node = profile.node
    if node is None:
        raise MissingCalibration(f"hardware {profile.name}: node", None, "this profile describes no server",
                                 "choose a profile of a server")  # fmt: skip
    laws = rank_laws(profile, num_nodes * ranks_per_node, num_nodes)
    if laws is not None:
        return _of_laws(laws)
    intra = _tier(node.gpu_link_bytes_per_s, node.gpu_link_latency_s)
    table = exchange_table(profile, ranks_per_node) if ranks_per_node > 1 else None
    if table is not None:
        intra = dataclasses.replace(
            intra, table=table, source=table.source, relative_uncertainty=table.relative_uncertainty
        )
    intra = _with_kernels(intra, profile, INSIDE, ranks_per_node)
    shared = shared_speed() if profile.device.kind == "gpu" else 1.0
    if num_nodes == 1:
        return EpConstants(inter=None, intra=intra, shared_speed=shared)
    if node.nic_bytes_per_s is None or node.nic_latency_s is None:
        raise MissingCalibration(f"hardware {profile.name}: node.nic_bytes_per_s", None, "this profile describes no network",
                                 "use one node or choose another profile")  # fmt: skip
    inter = _with_kernels(_tier(node.nic_bytes_per_s, node.nic_latency_s), profile, BETWEEN, num_nodes)
    return EpConstants(inter=inter, intra=intra, shared_speed=shared)


def _of_laws(laws: RankLaws) -> EpConstants:
    """Return the tiers that placements are searched by, where whole steps of these ranks were measured."""
    wrong = max(laws.relative_uncertainty[what] for what in (DISPATCH, COMBINE))
    start, between, inside, shared = laws.seconds[DISPATCH].tolist()

    def tier(per_byte: float) -> Tier:
        return Tier(
            bytes_per_s=1 / max(per_byte, _LEAST_BYTE_S),
            latency_s=start,
            source=laws.source,
            relative_uncertainty=wrong,
        )

    intra = tier(inside + laws.num_ranks * shared)
    if laws.num_nodes == 1:
        return EpConstants(inter=None, intra=intra, ranks=laws)
    return EpConstants(inter=tier(between + laws.num_ranks * shared), intra=intra, shared_nic=True, ranks=laws)


def _with_kernels(tier: Tier, profile: Profile, place: str, ranks: int) -> Tier:
    """Return a tier with the profile's measured exchanges between `ranks` ranks of a node, or nodes; its linear constants are then those of
    a dispatch, which placements are searched by.
    """
    if profile.kernels is None or tier.table is not None or ranks < 2:
        return tier
    found = kernels_of(profile.kernels, place, ranks)
    if not found:
        return tier
    dispatch = found.get("normal-dispatch", next(iter(found.values())))[0]
    wrong = max(kernel.relative_uncertainty for group in found.values() for kernel in group[:1])
    return dataclasses.replace(
        tier, kernels=found, source=profile.kernels.source, relative_uncertainty=wrong, latency_s=dispatch.start_s,
        bytes_per_s=dispatch.bytes_per_s, half_size_bytes=0.0,
    )  # fmt: skip


def _tier(rate: Constant, latency: Constant) -> Tier:
    return Tier(bytes_per_s=rate.value, latency_s=latency.value, source=merge_sources(rate.source, latency.source),
                relative_uncertainty=rate.relative_uncertainty)  # fmt: skip


def graph_costs(costs: CostModel) -> CostModel:
    """Return the cost model of an engine that replays captured graphs: the host issues nothing kernel by kernel."""
    host = dataclasses.replace(
        costs.profile.host, per_kernel_s=dataclasses.replace(costs.profile.host.per_kernel_s, value=0.0)
    )
    return dataclasses.replace(costs, profile=dataclasses.replace(costs.profile, host=host))


@dataclass(slots=True)
class EpCosting:
    """Durations of one model on one kind of rank; keeps what it has looked up.

    context_tokens: context of each request. prefill: a step's tokens are whole prompts of that length, otherwise one token of
    each request, and as many more as are drafted for it.
    """

    costs: CostModel
    constants: EpConstants
    prefill: bool
    context_tokens: int
    draft_tokens: int = 0
    _dense: dict[tuple[int, int, int], tuple[Estimate, float]] = field(default_factory=dict)
    _items: dict[tuple[str, int, bool], tuple[float, bool]] = field(default_factory=dict)
    estimates: dict[str, Estimate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.costs = graph_costs(self.costs)

    # --- dense parts ----------------------------------------------------------------------------------------------

    @property
    def layer_groups(self) -> list[list[int]]:
        """Decoder layers that run up to and with each MoE layer; those after the last belong to the head."""
        begin, groups = 0, []
        for layer in self.costs.model.moe_layers:
            groups.append(list(range(begin, layer + 1)))
            begin = layer + 1
        return groups

    def dense_s(self, moe_layer: int, tokens: int, share: int) -> tuple[float, float]:
        """Return (dense part, of which shared experts) in seconds for `tokens`, each layer divided over `share` ranks.

        Layers beyond the model's are passes of its draft layer: made like its last one, behind a projection of two hidden states.
        """
        if tokens == 0:
            return 0.0, 0.0
        whole = shared = 0.0
        model, queries = self.costs.model, self.draft_tokens + 1
        layers = self.layer_groups[moe_layer] if moe_layer < model.num_moe_layers else [model.moe_layers[-1]]
        if moe_layer >= model.num_moe_layers:
            whole += self.costs.product(model.hidden_size, 2 * model.hidden_size, tokens).seconds / share
            queries = queries if moe_layer == model.num_moe_layers else 1
        for layer in layers:
            each, inside = self._dense_layer(layer, tokens, queries)
            fixed = min(each.launch_s, each.seconds)
            whole += fixed + (each.seconds - fixed) / share
            shared += inside / share
            self.estimates["dense"] = each
        return whole, shared

    def _dense_layer(self, layer: int, tokens: int, queries: int) -> tuple[Estimate, float]:
        """Return the estimate of a layer and the seconds of its shared experts; queries: tokens of each request in a decode step."""
        key = (self._kind(layer), tokens, queries)
        if key not in self._dense:
            context, requests = self._context(tokens, queries)
            whole = self.costs.dense_layer(layer, tokens, context, requests)
            model, inside = self.costs.model, 0.0
            if model.num_shared_experts and layer in model.moe_layers:
                bare = dataclasses.replace(model, num_shared_experts=0, shared_intermediate_size=0, shared_gate=False)
                plain = dataclasses.replace(self.costs, model=bare).dense_layer(layer, tokens, context, requests)
                inside = max(0.0, whole.seconds - plain.seconds)
            if self.constants.attention_rate != 1.0:
                alone = self.costs.dense_layer(layer, tokens, tokens, tokens).seconds
                longer = max(0.0, whole.seconds - alone) * (1 / self.constants.attention_rate - 1)
                whole = dataclasses.replace(whole, seconds=whole.seconds + longer)
            self._dense[key] = (whole, inside)
        return self._dense[key]

    def _kind(self, layer: int) -> int:
        """Return the first layer like this one: layers of one make cost the same, whatever is routed in them."""
        model = self.costs.model
        mark = model.kind_of(layer)
        return next(at for at in range(layer + 1) if model.kind_of(at) == mark)

    def _context(self, tokens: int, queries: int) -> tuple[int, int]:
        """Return (context tokens read, requests) of a rank's `tokens`."""
        if not self.prefill:
            requests = -(-tokens // queries)
            return max(tokens, requests * self.context_tokens), requests
        requests = max(1, round(tokens / self.context_tokens))
        return max(tokens, requests * self.context_tokens), requests

    def head_s(self, tokens: int, share: int) -> float:
        """Return the seconds of what follows the last MoE layer; logits of each request's last token, of every token in decoding."""
        if tokens == 0:
            return 0.0
        queries = self.draft_tokens + 1
        head = self.costs.head(self._context(tokens, queries)[1] if self.prefill else tokens)
        self.estimates["head"] = head
        tail = range(self.costs.model.moe_layers[-1] + 1, self.costs.model.num_layers)
        return (head.seconds + sum(self._dense_layer(layer, tokens, queries)[0].seconds for layer in tail)) / share

    def draft_head_s(self, sequences: int, share: int) -> float:
        """Return the seconds of the output head after a pass of the draft layer: logits of one token of every sequence."""
        return self.costs.head(sequences).seconds / share if sequences else 0.0

    # --- experts --------------------------------------------------------------------------------------------------

    def whole_s(self, stage: StageRows, fmt: WeightFormat, *, rate: float, slices: int = 1) -> FloatArray | None:
        """Return seconds [layers, parts, units] of stages' experts where a grouped launch was measured as a whole, nothing where no unit
        has rows; None where its experts add up. rate, slices: as in `item_s`.
        """
        counted = stage.slowest is None
        seconds = self.costs.whole_experts_s(
            np.asarray(stage.rows, np.float64), None if counted else stage.active, fmt, rate=rate, slices=slices
        )
        if seconds is None:
            return None
        if "expert" not in self.estimates:
            self.estimates["expert"] = self.costs.grouped_item(1, fmt)
        idle = np.prod(1 - stage.active, axis=-1)
        if not counted:  # the slowest unit runs wherever any does
            idle = np.broadcast_to(np.prod(idle, axis=-1, keepdims=True), idle.shape)
        start_s = self.costs.experts_start_s(fmt, stage.rows.shape[-1])
        return np.asarray(seconds - start_s * idle if not counted else seconds * (1 - idle))

    def item_s(
        self, rows: Array, fmt: WeightFormat, *, rate: float, slices: int = 1, alone: bool = False
    ) -> FloatArray:
        """Return seconds of each expert with `rows` rows, in an array of the same shape, where 0 rows take none.

        rate: speed of compute relative to the cost model's. slices: each expert is cut over so many ranks. alone: in launches of
        its own, what these take included.
        """
        distinct, where = np.unique(rows, return_inverse=True)
        seconds = np.zeros(len(distinct))
        for at, count in enumerate(distinct.tolist()):
            if count:
                key = (fmt.name, int(count), alone)
                if key not in self._items:
                    one = self.costs.expert_kernel if alone else self.costs.grouped_item
                    item = one(int(count), fmt)
                    self.estimates["expert"] = item
                    self._items[key] = (item.seconds, item.bound == "compute")
                each, bound_by_compute = self._items[key]
                seconds[at] = (each / rate if bound_by_compute else each) / slices
        return np.asarray(seconds[where.reshape(rows.shape)], np.float64)


def tabulate_ep(costing: EpCosting, schedule: ExpertParallelSchedule, program: Program, load: StepLoad) -> EpTables:
    """Return the tables of one step; raises InputError or MissingCalibration where a cost is not known."""
    if costing.constants.ranks is not None:
        return tabulate_on_ranks(costing.constants.ranks, costing, schedule, program, load)
    ops, exchanges, ranks = len(program.op_kind), len(program.ex_kind), load.topology.num_ranks
    work, op_tokens = np.zeros((ops, ranks), np.int64), np.zeros((ops, ranks), np.int64)
    table = costing.constants.intra.table
    ex_ns = np.zeros((exchanges, NUM_TIERS, ranks), np.int64)
    ex_bytes, ex_tokens = np.zeros_like(ex_ns), np.zeros_like(ex_ns)
    _tabulate_dense(costing, schedule, program, load, work, op_tokens)
    tabulate_experts(costing, schedule, program, load, work, op_tokens)
    _tabulate_exchanges(costing, schedule, program, load, ex_ns, ex_bytes, ex_tokens)
    shared = costing.constants.shared_speed
    if table is None and schedule.overlaps and shared < 1 and not schedule.pipeline.all_to_all_sm_fraction:
        beside = np.ceil(ex_ns / shared).astype(np.int64)
        work, ex_ns = overlapped(work, ex_ns, beside, shared)
    if table is not None:
        work = stretched(work, table.compute_slowdown)
        if schedule.overlaps:
            beside = np.zeros_like(ex_ns)
            _tabulate_exchanges(costing, schedule, program, load, beside, ex_bytes, ex_tokens, beside_compute=True)
            work, ex_ns = overlapped(work, ex_ns, beside, table.compute_speed)
    return EpTables(work_ns=work, op_tokens=op_tokens, ex_ns=ex_ns, ex_bytes=ex_bytes, ex_tokens=ex_tokens)


def _attention_ranks(schedule: ExpertParallelSchedule, load: StepLoad) -> tuple[int, Array]:
    """Return (ranks that share a dense part, tokens [micro, ranks] each of them works on)."""
    if schedule.parallel.attention == "data":
        return 1, load.rank_tokens
    ranks_per_node = load.topology.ranks_per_node
    per_node = load.rank_tokens.reshape(load.num_micro, -1, ranks_per_node).sum(axis=2)
    return ranks_per_node, np.repeat(per_node, ranks_per_node, axis=1)


def _tabulate_dense(costing: EpCosting, schedule: ExpertParallelSchedule, program: Program, load: StepLoad, work: Array,
                    op_tokens: Array) -> None:  # fmt: skip
    """Fill dense parts, shared experts and the head."""
    share, tokens = _attention_ranks(schedule, load)
    # Two batches overlap everything; groups only overlap experts.
    slow = sm_share(schedule) if schedule.pipeline.micro_batches > 1 or schedule.pipeline.shortcut else 1.0
    apart = bool((program.op_kind == OP_DENSE + 1).any())
    own, drafts = costing.costs.model.num_moe_layers, costing.draft_tokens
    for op, kind in enumerate(program.op_kind.tolist()):
        if kind == OP_EXPERT:
            continue
        mine, drafted = tokens[program.op_micro[op]], int(program.op_layer[op]) - own
        if drafted > 0 or (drafted == 0 and kind == OP_HEAD):
            mine = -(-mine // (drafts + 1))  # one token of every sequence
        op_tokens[op] = mine
        for count in np.unique(mine).tolist():
            if kind == OP_HEAD:
                seconds = costing.head_s(count, share) if drafted < 0 else costing.draft_head_s(count, share)
            else:
                whole, shared = costing.dense_s(int(program.op_layer[op]), count, share)
                seconds = shared if kind != OP_DENSE else whole - shared if apart else whole
            work[op, mine == count] = math.ceil(seconds / slow * NS_PER_S)


def _tabulate_exchanges(costing: EpCosting, schedule: ExpertParallelSchedule, program: Program, load: StepLoad, ex_ns: Array,
                        ex_bytes: Array, ex_tokens: Array, *, beside_compute: bool = False) -> None:  # fmt: skip
    """Fill dispatches, combines and reductions."""
    hidden, constants = costing.costs.model.expert_hidden, costing.constants
    fraction = schedule.pipeline.all_to_all_sm_fraction
    speed = min(1.0, fraction / SATURATING_SM_FRACTION) if schedule.overlaps and fraction else 1.0
    mine = np.flatnonzero(program.ex_kind != OP_REDUCE)
    layer, micro, group = program.ex_layer[mine], program.ex_micro[mine], program.ex_group[mine]
    back = (program.ex_kind[mine] == OP_COMBINE)[:, None, None]
    part, pieces = parts_of(schedule, load, micro, group)
    mode = "low-latency" if schedule.all_to_all.kind == "all-choices" else "normal"
    if len(mine):
        counted = load.expected or load
        forth, receive = counted.sent[layer, part], counted.received[layer, part]
        each = (
            np.where(back, schedule.all_to_all.combine_bytes_per_value, schedule.all_to_all.dispatch_bytes_per_value)
            * hidden
        )
        sent = np.where(back, receive, forth)
        ex_tokens[mine] = piece(np.rint(sent).astype(np.int64), group, pieces)
        ex_bytes[mine] = piece(np.rint(sent * each).astype(np.int64), group, pieces)
        port = np.maximum(forth, receive) * each
        port[:, INTER] = (
            _inter_port(constants, load.topology.ranks_per_node, forth[:, INTER], receive[:, INTER]) * each[:, 0]
        )
        for tier in (INTER, INTRA):
            if (port[:, tier] > 0).any():
                total = _of_node(forth[:, tier] * each[:, 0], load.topology.ranks_per_node)
                for kind, where in (("dispatch", ~back[:, 0, 0]), ("combine", back[:, 0, 0])):
                    if where.any():
                        ns = constants.tier(tier).port_ns(
                            port[where, tier], speed, total_bytes=total[where], beside_compute=beside_compute,
                            operation=f"{mode}-{kind}",
                        )  # fmt: skip
                        ex_ns[mine[where], tier] = piece(ns, group[where], pieces)
    ranks_per_node = load.topology.ranks_per_node
    for exchange in np.flatnonzero(program.ex_kind == OP_REDUCE).tolist():
        # Ranks of a node reduce among themselves; each sends 2 (n-1)/n of the tensor, which all of them hold.
        tokens = (
            load.rank_tokens[program.ex_micro[exchange]].reshape(-1, ranks_per_node).sum(axis=1).repeat(ranks_per_node)
        )
        # To gather is half of it: nothing is added up on the way.
        rounds = 1 if program.ex_group[exchange] == GATHER else 2
        num_bytes = tokens * hidden * _REDUCE_BYTES * rounds * (ranks_per_node - 1) // ranks_per_node
        ex_tokens[exchange, INTRA] = tokens
        ex_bytes[exchange, INTRA] = num_bytes
        total = _of_node(num_bytes, ranks_per_node)
        ex_ns[exchange, INTRA] = constants.intra.port_ns(
            num_bytes, total_bytes=total, beside_compute=beside_compute,
            operation="all-gather" if program.ex_group[exchange] == GATHER else "all-reduce",
        )  # fmt: skip


def _of_node(values: FloatArray | Array, ranks_per_node: int) -> FloatArray | Array:
    """Return [..., ranks]: for every rank the sum over the ranks of its node, of `values: [..., ranks]`."""
    of_node = values.reshape(*values.shape[:-1], -1, ranks_per_node).sum(axis=-1)
    return np.repeat(of_node, ranks_per_node, axis=-1)


def _inter_port(
    constants: EpConstants, ranks_per_node: int, sent: FloatArray | Array, received: FloatArray | Array
) -> FloatArray | Array:
    """Return tokens [n, ranks] through each rank's port between nodes, of what the ranks send and receive."""
    if constants.shared_nic:
        sent, received = _of_node(sent, ranks_per_node), _of_node(received, ranks_per_node)
    return sent + received if constants.half_duplex_nic else np.maximum(sent, received)
