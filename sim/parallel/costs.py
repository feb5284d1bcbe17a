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
from dataclasses import dataclass, field

import numpy as np

from ...base.units import NS_PER_S
from ...calibrate.costs.cost_model import CostModel
from ...calibrate.costs.estimate import Estimate
from ...calibrate.costs.gpu.exchanges import ALL_GATHER, ALL_REDUCE
from ...specs.models import WeightFormat
from ...specs.models.divided import divided
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
from .tiers import EpConstants
from .traffic import FloatArray, StepLoad

# An all-to-all needs 10 to 20 multiprocessors to saturate (arXiv 2410.12247; 16 of 132 taken): below, it slows in proportion.
SATURATING_SM_FRACTION = 16 / 132
# Reductions carry 16-bit values.
_REDUCE_BYTES = 2


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
    _dense: dict[tuple[int, int, int, int], tuple[Estimate, float]] = field(default_factory=dict)
    _parts: dict[int, CostModel] = field(default_factory=dict)
    """Costs by the number of ranks that share each layer."""
    _items: dict[tuple[str, int, bool], tuple[float, bool]] = field(default_factory=dict)
    estimates: dict[str, Estimate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.costs = graph_costs(self.costs)

    def behind(self, schedule: ExpertParallelSchedule) -> EpCosting:
        """Return the costing of a schedule's experts: behind an all-to-all, where each rank has tokens of its own."""
        if schedule.parallel.attention != "data" or schedule.parallel.experts in ("node", "tensor"):
            return self
        costs = self.costs.behind_dispatch()
        return self if costs is self.costs else dataclasses.replace(self, costs=costs, _items={})

    # --- dense parts ----------------------------------------------------------------------------------------------

    @property
    def layer_groups(self) -> list[list[int]]:
        """Decoder layers that run up to and with each MoE layer; those after the last belong to the head."""
        begin, groups = 0, []
        for layer in self.costs.model.moe_layers:
            groups.append(list(range(begin, layer + 1)))
            begin = layer + 1
        return groups

    def of_share(self, share: int) -> CostModel:
        """Return the costs of what each of `share` ranks computes of every layer: the kernels of its own heads and widths.

        What no rank can be spared stays whole: routers, projections to latents, a latent's keys and values, a start of every kernel.
        """
        if share == 1:
            return self.costs
        if share not in self._parts:
            part = divided(self.costs.model, share, evenly=False)
            self._parts[share] = dataclasses.replace(self.costs, model=part)
        return self._parts[share]

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
            whole += self.costs.product(-(-model.hidden_size // share), 2 * model.hidden_size, tokens).seconds
            queries = queries if moe_layer == model.num_moe_layers else 1
        for layer in layers:
            each, inside = self._dense_layer(layer, tokens, queries, share)
            whole, shared = whole + each.seconds, shared + inside
            self.estimates["dense"] = each
        return whole, shared

    def _dense_layer(self, layer: int, tokens: int, queries: int, share: int) -> tuple[Estimate, float]:
        """Return the estimate of a layer and the seconds of its shared experts; queries: tokens of each request in a decode step."""
        key = (self._kind(layer), tokens, queries, share)
        if key not in self._dense:
            costs, (context, requests) = self.of_share(share), self._context(tokens, queries)
            whole = costs.dense_layer(layer, tokens, context, requests)
            model, inside = costs.model, 0.0
            if model.num_shared_experts and layer in model.moe_layers:
                bare = dataclasses.replace(model, num_shared_experts=0, shared_intermediate_size=0, shared_gate=False)
                plain = dataclasses.replace(costs, model=bare).dense_layer(layer, tokens, context, requests)
                inside = max(0.0, whole.seconds - plain.seconds)
            if self.constants.attention_rate != 1.0:
                alone = costs.dense_layer(layer, tokens, tokens, tokens).seconds
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
        head = self.of_share(share).head(self._context(tokens, queries)[1] if self.prefill else tokens)
        self.estimates["head"] = head
        tail = range(self.costs.model.moe_layers[-1] + 1, self.costs.model.num_layers)
        return head.seconds + sum(self._dense_layer(layer, tokens, queries, share)[0].seconds for layer in tail)

    def draft_head_s(self, sequences: int, share: int) -> float:
        """Return the seconds of the output head after a pass of the draft layer: logits of one token of every sequence."""
        return self.of_share(share).head(sequences).seconds if sequences else 0.0

    def shared_s(self, moe_layer: int | None, tokens: int, share: int, ranks_per_node: int) -> float:
        """Return the seconds of what ranks that share layers exchange beside the program's own reductions: two reductions of each layer
        without experts before a MoE layer, or (None) of those after the last one, and the parts of the logits that each rank has.
        """
        if share == 1 or tokens == 0:
            return 0.0
        model, constants = self.costs.model, self.constants
        if moe_layer is None:
            bare = model.num_layers - 1 - model.moe_layers[-1]
        else:
            bare = len(self.layer_groups[moe_layer]) - 1 if moe_layer < model.num_moe_layers else 0
        found = 0.0
        if bare:
            state = tokens * model.hidden_size * _REDUCE_BYTES
            found = 2 * bare * constants.among_s(ALL_REDUCE, 2 * state, share, ranks_per_node)
        if moe_layer is None:
            logits = self._context(tokens, self.draft_tokens + 1)[1] if self.prefill else tokens
            found += constants.among_s(ALL_GATHER, logits * model.vocab_size * _REDUCE_BYTES, share, ranks_per_node)
        return found

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
    size = schedule.parallel.group(load.topology.ranks_per_node)
    return size, _of_node(load.rank_tokens, size)


def _tabulate_dense(costing: EpCosting, schedule: ExpertParallelSchedule, program: Program, load: StepLoad, work: Array,
                    op_tokens: Array) -> None:  # fmt: skip
    """Fill dense parts, shared experts and the head."""
    share, tokens = _attention_ranks(schedule, load)
    # Two batches overlap everything; groups only overlap experts.
    slow = (
        sm_share(schedule, costing.constants)
        if schedule.pipeline.micro_batches > 1 or schedule.pipeline.shortcut
        else 1.0
    )
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
                seconds += costing.shared_s(None, count, share, load.topology.ranks_per_node)
            else:
                whole, shared = costing.dense_s(int(program.op_layer[op]), count, share)
                whole += costing.shared_s(int(program.op_layer[op]), count, share, load.topology.ranks_per_node)
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
    for exchange in np.flatnonzero(program.ex_kind == OP_REDUCE).tolist():
        _tabulate_reduction(costing, schedule, program, load, exchange, (ex_ns, ex_bytes, ex_tokens), beside_compute)


def _tabulate_reduction(costing: EpCosting, schedule: ExpertParallelSchedule, program: Program, load: StepLoad, exchange: int,
                        tables: tuple[Array, Array, Array], beside_compute: bool) -> None:  # fmt: skip
    """Fill a reduction: ranks that hold the same tokens add up among themselves, each sending 2 (n-1)/n of the tensor.

    Over m nodes they do so inside nodes first; each rank then adds up its part with its peers of the other nodes, in a tree.
    """
    ex_ns, ex_bytes, ex_tokens = tables
    constants, ranks_per_node = costing.constants, load.topology.ranks_per_node
    parallel = schedule.parallel
    size = ranks_per_node if parallel.attention == "data" else parallel.group(ranks_per_node)
    inside, nodes = min(size, ranks_per_node), max(1, size // ranks_per_node)
    tokens = _of_node(load.rank_tokens[program.ex_micro[exchange]], size)
    # To gather is half of it: nothing is added up on the way.
    gathers = program.ex_group[exchange] == GATHER
    whole = tokens * costing.costs.model.expert_hidden * _REDUCE_BYTES * (1 if gathers else 2)
    num_bytes = whole * (inside - 1) // inside
    ex_tokens[exchange, INTRA] = tokens
    ex_bytes[exchange, INTRA] = num_bytes
    ex_ns[exchange, INTRA] = constants.group_tier(size, ranks_per_node).port_ns(
        num_bytes, total_bytes=_of_node(num_bytes, ranks_per_node), beside_compute=beside_compute,
        operation=ALL_GATHER if gathers else ALL_REDUCE,
    )  # fmt: skip
    if nodes > 1:
        between, tier = whole // inside * (nodes - 1) // nodes, constants.network or constants.tier(INTER)
        port = _inter_port(constants, ranks_per_node, between, between)
        ns = tier.port_ns(port, total_bytes=_of_node(between, ranks_per_node), beside_compute=beside_compute)
        ex_bytes[exchange, INTER] = between
        ex_tokens[exchange, INTER] = tokens
        ex_ns[exchange, INTER] = np.where(between > 0, ns + tier.tree_ns(nodes), 0)


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
