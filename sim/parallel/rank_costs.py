"""Tables of a step of ranks that are processes of one machine, by laws that were measured in such steps.

Modelled: what `calibrate.costs.rank_laws` says: operations of ranks that share the machine's cores, exchanges with a start, ports
and bytes of all ranks; exchanges and kernels that run beside each other share cores. Layers may be divided over a node's ranks, whose
all-reduces were measured apart from steps. Of sums that go back, what ranks that are done first can send has passed when the last one
is done. Ignored: slices of experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...base.errors import InputError
from ...base.units import NS_PER_S
from ...calibrate.costs.estimate import Estimate
from ...calibrate.costs.rank_laws import (
    COMBINE,
    DENSE,
    DISPATCH,
    EXPERT,
    HEAD,
    HEADER_BYTES_PER_CHOICE,
    REDUCE,
    RankLaws,
    dense_features,
    exchange_law,
    expert_features,
    finish_s,
    head_features,
    still_to_pass,
)
from ...specs.models import weight_format
from ...specs.schedules.parallel import ExpertParallelSchedule
from ..policies.state import Array
from .expert_stage import parts_of, piece, stage_rows
from .memory import kv_shares
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
    TOGETHER,
    Program,
)
from .tables import EpTables
from .traffic import FloatArray, StepLoad

if TYPE_CHECKING:
    from .costs import EpCosting

# Reductions carry 16-bit values.
_REDUCE_BYTES = 2
_ROUNDS = 8


def tabulate_on_ranks(
    laws: RankLaws, costing: EpCosting, schedule: ExpertParallelSchedule, program: Program, load: StepLoad
) -> EpTables:
    """Return the tables of one step; raises InputError for slices of experts, MissingCalibration for a weight format without a law."""
    if schedule.parallel.experts != "expert":
        raise InputError("schedule.parallel", schedule.parallel.experts, "slices of experts were not measured between these ranks",
                         "keep whole experts on ranks")  # fmt: skip
    work, op_tokens = _operations(laws, costing, schedule, program, load)
    ex_ns, ex_bytes, ex_tokens, kept = _exchanges(laws, costing, schedule, program, load, work)
    if schedule.overlaps:
        work, ex_ns = _beside_each_other(laws, schedule, program, (work, ex_ns), kept)
    return EpTables(work_ns=work, op_tokens=op_tokens, ex_ns=ex_ns, ex_bytes=ex_bytes, ex_tokens=ex_tokens)


def _beside_each_other(
    laws: RankLaws, schedule: ExpertParallelSchedule, program: Program, alone: tuple[Array, Array], kept: FloatArray
) -> tuple[Array, Array]:
    """Return (kernels, exchanges) of a step whose exchanges and kernels run beside each other, of what they take `alone`.

    kept: [exchanges, tiers], for how many seconds all ranks together keep cores for one. As much of exchanges as has kernels beside it
    takes cores from these and waits for cores itself: of groups other groups' experts only, of batches and a shortcut all kernels.
    Kernels that lose cores last longer, and so have more exchanges beside them: the two are settled together.
    """
    work, ex_ns = alone
    pipeline, each = schedule.pipeline, work.max(axis=1) / NS_PER_S
    only_experts = pipeline.micro_batches == 1 and not pipeline.shortcut
    mine = program.op_kind == OP_EXPERT if only_experts else np.ones(len(each), bool)
    kernels = float(each[mine].sum())
    beside = kernels * (1 - 1 / schedule.num_groups) if only_experts else kernels
    exchanges = float(ex_ns.max(axis=(1, 2)).sum()) / NS_PER_S
    if not kernels or not exchanges:
        return alone
    on_cores = kept / laws.cores if laws.knows_busy else np.array(
        [[laws.start_s(_law_of(program, ex, tier)) for tier in (INTER, INTRA)] for ex in range(len(ex_ns))]
    )  # fmt: skip
    waits = np.where(ex_ns > 0, on_cores[..., None] * (laws.together - 1), 0.0)
    both = (program.ex_mode == TOGETHER)[:, None]  # both tiers at once keep cores once
    busy_s = float(np.where(both, kept.max(axis=1, keepdims=True) / NUM_TIERS, kept).sum())
    waited = float(waits.max(axis=(1, 2)).sum())
    share, lost = 0.0, 0.0
    for _ in range(_ROUNDS):
        share = min(1.0, (beside + lost) / (exchanges + share * waited))
        lost = laws.lost_s(busy_s * share, exchanges * share)
    work = np.where(mine[:, None], np.ceil(work * (1 + lost / kernels)), work).astype(np.int64)
    return work, ex_ns + _ns(waits * share)


def _law_of(program: Program, ex: int, tier: int) -> str:
    """Return the law of one tier of an exchange."""
    if program.ex_kind[ex] == OP_REDUCE:
        return exchange_law(REDUCE, INTRA)
    kind = COMBINE if program.ex_kind[ex] == OP_COMBINE else DISPATCH
    return exchange_law(kind, 2 if program.ex_mode[ex] == TOGETHER else tier)


def _operations(
    laws: RankLaws, costing: EpCosting, schedule: ExpertParallelSchedule, program: Program, load: StepLoad
) -> tuple[Array, Array]:
    """Return (nanoseconds, tokens) [ops, ranks] of every operation."""
    model, fmt = costing.costs.model, weight_format(schedule.kernel.bits)
    what = f"{EXPERT}.{fmt.name}"
    stage = stage_rows(load, load.topology.num_ranks)
    rows, active = np.asarray(stage.rows.sum(axis=-1), np.float64), stage.active.sum(axis=-1)
    alone = laws.op_s(what, expert_features(model, fmt, rows, active))  # [layers, parts, ranks]
    if stage.slowest is not None:
        alone = alone * stage.slowest[..., None]
    expert = _ns(finish_s(alone, laws.cores))
    work = np.zeros((len(program.op_kind), load.topology.num_ranks), np.int64)
    op_tokens = np.zeros_like(work)
    mine = np.flatnonzero(program.op_kind == OP_EXPERT)
    layer, group = program.op_layer[mine], program.op_group[mine]
    part, pieces = parts_of(schedule, load, program.op_micro[mine], group)
    work[mine] = piece(expert[layer, part], group, pieces)
    op_tokens[mine] = piece(stage.unit_rows[layer, part], group, pieces)
    share, rank_tokens = 1, load.rank_tokens
    if schedule.parallel.attention != "data":  # a node's ranks divide the layers of all its tokens
        share = load.topology.ranks_per_node
        rank_tokens = np.repeat(rank_tokens.reshape(load.num_micro, -1, share).sum(axis=2), share, axis=1)
    kv = kv_shares(model, share)
    for op in np.flatnonzero(program.op_kind != OP_EXPERT).tolist():
        tokens = rank_tokens[program.op_micro[op]]
        op_tokens[op] = tokens
        if program.op_kind[op] == OP_HEAD:
            kind, features = HEAD, [head_features(model, count, share) for count in tokens.tolist()]
        elif program.op_kind[op] == OP_DENSE:
            layers = costing.layer_groups[int(program.op_layer[op])]
            kind, features = (
                DENSE,
                [dense_features(model, layers, count, costing.context_tokens, share, kv) for count in tokens.tolist()],
            )
        else:
            raise InputError("schedule.pipeline.shared_overlap", True, "shared experts run with attention on these ranks",
                             "set pipeline.shared_overlap=false")  # fmt: skip
        work[op] = _ns(finish_s(laws.op_s(kind, np.array(features)), laws.cores))
    for name, law in (("dense", DENSE), ("head", HEAD), ("expert", what)):
        wrong = laws.relative_uncertainty[law]
        costing.estimates[name] = Estimate(seconds=0.0, source=laws.source, bound="compute", relative_uncertainty=wrong)
    return work, op_tokens


def _exchanges(
    laws: RankLaws, costing: EpCosting, schedule: ExpertParallelSchedule, program: Program, load: StepLoad, work: Array
) -> tuple[Array, Array, Array, FloatArray]:
    """Return (nanoseconds, bytes, tokens) [exchanges, tiers, ranks], and for how many seconds all ranks keep cores for each stage."""
    found: tuple[Array, Array, Array] = tuple(  # type: ignore[assignment]
        np.zeros((len(program.ex_kind), NUM_TIERS, load.topology.num_ranks), np.int64) for _ in range(3)
    )
    mine = np.flatnonzero(program.ex_kind != OP_REDUCE)
    kept = np.zeros((len(program.ex_kind), NUM_TIERS))
    before_s = None
    if laws.exchanges_first is not None and laws.link_bytes_per_s and not schedule.overlaps:
        # Where exchanges queue, all ranks are there when their turn comes; older calibrations counted what had passed as quick.
        ends = work[program.ex_after_op[mine]]
        before_s = (ends.max(axis=1, keepdims=True) - ends) / NS_PER_S
    *tables, kept[mine] = _all_to_alls(laws, costing, schedule, program, load, mine, before_s)
    for whole, each in zip(found, tables, strict=True):
        whole[mine] = each
    for ex in np.flatnonzero(program.ex_kind == OP_REDUCE).tolist():
        _reduction(laws, costing, program, load, ex, found)
    return (*found, kept)


def _reduction(
    laws: RankLaws, costing: EpCosting, program: Program, load: StepLoad, ex: int, found: tuple[Array, Array, Array]
) -> None:
    """Fill in what an all-reduce of a node's tokens among its ranks takes, or what gathering them takes, which is half of one."""
    each = load.topology.ranks_per_node
    tokens = load.rank_tokens[program.ex_micro[ex]].reshape(-1, each).sum(axis=1).repeat(each)
    rounds = 1 if program.ex_group[ex] == GATHER else 2
    num_bytes = tokens * costing.costs.model.expert_hidden * _REDUCE_BYTES * rounds * (each - 1) // each
    nothing = np.zeros(len(tokens))
    _, seconds = laws.exchange_s(
        exchange_law(REDUCE, INTRA), nothing, np.full(len(tokens), float(num_bytes.max())), nothing
    )
    for whole, values in zip(found, (np.where(num_bytes > 0, _ns(seconds), 0), num_bytes, tokens), strict=True):
        whole[ex, INTRA] = values


def _all_to_alls(
    laws: RankLaws,
    costing: EpCosting,
    schedule: ExpertParallelSchedule,
    program: Program,
    load: StepLoad,
    mine: Array,
    before_s: FloatArray | None,
) -> tuple[Array, Array, Array, FloatArray]:
    """Return the same of the exchanges `mine` that are dispatches and combines.

    before_s: [exchanges, ranks], how long before the last rank each one begins; None: all begin at once.
    """
    model, exchange = costing.costs.model, schedule.all_to_all
    layer, group = program.ex_layer[mine], program.ex_group[mine]
    part, pieces = parts_of(schedule, load, program.ex_micro[mine], group)
    counted = load.expected or load
    back = (program.ex_kind[mine] == OP_COMBINE)[:, None, None]
    forth, receive = counted.sent[layer, part], counted.received[layer, part]
    sent, came = np.where(back, receive, forth), np.where(back, forth, receive)
    each = np.where(back, exchange.combine_bytes_per_value, exchange.dispatch_bytes_per_value) * model.expert_hidden
    ex_tokens = piece(np.rint(sent).astype(np.int64), group, pieces)
    ex_bytes = piece(np.rint(sent * each).astype(np.int64), group, pieces)
    wire = (each + np.where(back, 0, HEADER_BYTES_PER_CHOICE * model.top_k)) / pieces
    ports = np.maximum(sent, came) * wire
    node = np.maximum(_of_node(sent[:, INTER], load), _of_node(came[:, INTER], load)) * wire[:, 0]
    moved = (sent * wire).sum(axis=2)  # [exchanges, tiers]
    # Both tiers are one exchange, or a stage for each.
    together = (program.ex_mode[mine] == TOGETHER)[:, None]
    total = np.where(together, moved.sum(axis=1, keepdims=True), moved)
    ex_ns, kept = (
        np.zeros((len(layer), NUM_TIERS, load.topology.num_ranks), np.int64),
        np.zeros((len(layer), NUM_TIERS)),
    )
    for kind, of_kind in ((DISPATCH, ~back[:, 0, 0]), (COMBINE, back[:, 0, 0])):
        for both in (True, False):
            where = of_kind & (together[:, 0] == both)
            if kind == COMBINE and both and before_s is not None:
                to, of = (part[where, INTER] * wire[where, 0] for part in (sent, came))
                node[where] = still_to_pass(
                    to, of, before_s[where], laws.link_bytes_per_s, load.topology.ranks_per_node
                )[:, None]
            for tier in (INTER, INTRA):
                law = exchange_law(kind, 2 if both else tier)
                found = laws.exchange_s(law, node[where], ports[where, INTRA], total[where, tier][:, None])[tier]
                ex_ns[where, tier] = np.where(ports[where, tier] > 0, _ns(found), 0)
                kept[where, tier] = laws.busy_s(law, total[where, tier])
    return ex_ns, ex_bytes, ex_tokens, kept


def _of_node(values: Array | FloatArray, load: StepLoad) -> FloatArray:
    """Return [..., ranks]: for every rank the sum over its node's ranks."""
    each = load.topology.ranks_per_node
    of_node = np.asarray(values, np.float64).reshape(*values.shape[:-1], -1, each).sum(axis=-1)
    return np.asarray(np.repeat(of_node, each, axis=-1))


def _ns(seconds: FloatArray) -> Array:
    return np.asarray(np.ceil(seconds * NS_PER_S), np.int64)
