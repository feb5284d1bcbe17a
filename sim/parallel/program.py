"""The order of an expert-parallel step: what each rank computes, which exchanges run between, and what waits for what.

Modelled: every rank runs the same list of compute operations in program order; an exchange is requested when all ranks
have done the operation (or the exchange has ended) that it follows, and an operation waits for the exchanges it consumes. All
overlap (expert groups, chunks of tokens, two batches, a shortcut) is a different list, not a different engine; so are the passes of a
draft layer behind the output head. Ignored: how
long anything takes (`sim/ep_costs`) and who sends what to whom (`sim/ep_traffic`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from ...specs.schedules.parallel import ExpertParallelSchedule
from ..policies.state import Array

EP_OPS = ("dense", "shared", "expert", "head", "dispatch", "combine", "reduce")
OP_DENSE, OP_SHARED, OP_EXPERT, OP_HEAD, OP_DISPATCH, OP_COMBINE, OP_REDUCE = range(7)
# Classes that arbitration compares, lower first: a reduction holds everything up, a dispatch feeds kernels.
CLASS_REDUCE, CLASS_DISPATCH, CLASS_COMBINE = range(3)
# How the stages of an exchange use the tiers: both at once, one after the other holding both, one after the other.
TOGETHER, IN_TURN, FREE = range(3)
INTER, INTRA = 0, 1
NUM_TIERS = 2
NONE = -1
# The group of a reduction that only gathers.
GATHER = 2


class Program(NamedTuple):
    """The step as arrays. Operations and exchanges are numbered in program order: the operations that exchanges follow never
    fall, which the compiled simulator relies on.
    """

    op_kind: Array  # int64 [ops]
    op_layer: Array  # int64 [ops]
    op_micro: Array  # int64 [ops]
    op_group: Array  # int64 [ops]
    wait_start: (
        Array  # int64 [ops + 1]: exchanges that operation o waits for are wait_list[wait_start[o]:wait_start[o + 1]]
    )
    wait_list: Array  # int64
    ex_kind: Array  # int64 [exchanges]
    ex_layer: Array  # int64 [exchanges]
    ex_micro: Array  # int64 [exchanges]
    ex_group: Array  # int64 [exchanges]
    ex_class: Array  # int64 [exchanges]
    ex_mode: Array  # int64 [exchanges]: TOGETHER, IN_TURN or FREE
    ex_first: Array  # int64 [exchanges]: tier of the first stage
    ex_after_op: Array  # int64 [exchanges]: operation that all ranks must have done, NONE where an exchange is awaited
    ex_after_ex: Array  # int64 [exchanges]: exchange that must have ended, NONE where an operation is awaited


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a program depends on besides the schedule."""

    num_layers: int
    """MoE layers."""
    has_shared: bool
    """Shared experts are an operation of their own."""
    drafts: int = 0
    """Passes of a draft layer after the output head; pass p is layer `num_layers` + p."""
    reduces_apart: bool = False
    """Ranks of several nodes reduce: first inside nodes, then between them."""


class _Builder:
    """Collects operations and exchanges."""

    def __init__(self, mode: int, reduce_mode: int) -> None:
        self.ops: list[tuple[int, int, int, int]] = []
        self.waits: list[list[int]] = []
        self.exchanges: list[tuple[int, ...]] = []
        self._mode, self._reduce_mode = mode, reduce_mode

    def op(self, kind: int, layer: int, micro: int, group: int, waits: Sequence[int]) -> int:
        self.ops.append((kind, layer, micro, group))
        self.waits.append(list(waits))
        return len(self.ops) - 1

    def exchange(self, kind: int, layer: int, micro: int, group: int, *, op: int = NONE, ex: int = NONE) -> int:
        rank = {OP_REDUCE: CLASS_REDUCE, OP_DISPATCH: CLASS_DISPATCH, OP_COMBINE: CLASS_COMBINE}[kind]
        # A combine goes the other way: first inside the node, then between nodes.
        first = INTER if kind == OP_DISPATCH else INTRA
        mode = (
            self._reduce_mode
            if kind == OP_REDUCE and group != GATHER
            else TOGETHER
            if kind == OP_REDUCE
            else self._mode
        )
        self.exchanges.append((kind, layer, micro, group, rank, mode, first, op, ex))
        return len(self.exchanges) - 1

    def program(self) -> Program:
        ops = np.array(self.ops, np.int64).reshape(-1, 4).T
        exchanges = np.array(self.exchanges, np.int64).reshape(-1, 9).T
        start = np.zeros(len(self.waits) + 1, np.int64)
        start[1:] = np.cumsum([len(wait) for wait in self.waits])
        flat = np.array([exchange for wait in self.waits for exchange in wait], np.int64)
        columns = [np.ascontiguousarray(column) for column in (*ops, start, flat, *exchanges)]
        return Program(*columns)


_LayerOf: TypeAlias = Callable[[_Builder, ExpertParallelSchedule, Shape, int, Sequence[Sequence[int]]], list[list[int]]]


def build_program(schedule: ExpertParallelSchedule, shape: Shape) -> Program:
    """Return the program of one step of `schedule` over `shape.num_layers` MoE layers."""
    tiers = {"together": TOGETHER, "in-turn": IN_TURN, "free": FREE}[schedule.all_to_all.tiers]
    builder = _Builder(tiers, IN_TURN if shape.reduces_apart else TOGETHER)
    if schedule.parallel.experts in ("tensor", "node"):
        _tensor_parallel(builder, schedule, shape)
    elif schedule.pipeline.shortcut:
        _shortcut(builder, schedule, shape)
    else:
        _layer_by_layer(builder, schedule, shape)
    return builder.program()


def _dense(
    builder: _Builder, schedule: ExpertParallelSchedule, layer: int, micro: int, waits: Sequence[int]
) -> tuple[int, int]:
    """Add a dense part and, where attention is shared by ranks, its reduction; return (operation, reduction or NONE)."""
    op = builder.op(OP_DENSE, layer, micro, 0, waits)
    if schedule.parallel.attention == "data":
        return op, NONE
    return op, builder.exchange(OP_REDUCE, layer, micro, 0, op=op)


def _dispatches(builder: _Builder, groups: int, layer: int, micro: int, op: int, reduction: int) -> list[int]:
    after = {"op": op} if reduction == NONE else {"ex": reduction}
    return [builder.exchange(OP_DISPATCH, layer, micro, group, **after) for group in range(groups)]


def _experts(builder: _Builder, layer: int, micro: int, dispatches: Sequence[int]) -> list[int]:
    """Add the expert operations of one batch and their combines; return the combines."""
    combines = []
    for group, dispatch in enumerate(dispatches):
        op = builder.op(OP_EXPERT, layer, micro, group, [dispatch])
        combines.append(builder.exchange(OP_COMBINE, layer, micro, group, op=op))
    return combines


def _layer_by_layer(builder: _Builder, schedule: ExpertParallelSchedule, shape: Shape) -> None:
    """Dense parts of all batches, then their experts: with two batches, one's exchange runs under the other's kernels."""
    batches = range(schedule.pipeline.micro_batches)
    combines: list[list[int]] = [[] for _ in batches]
    for layer in range(shape.num_layers):
        combines = _layer(builder, schedule, shape, layer, combines)
    for micro in batches:
        builder.op(OP_HEAD, shape.num_layers - 1, micro, 0, combines[micro])
    _drafts(builder, schedule, shape, _layer)


def _layer(
    builder: _Builder, schedule: ExpertParallelSchedule, shape: Shape, layer: int, before: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Add a layer that waits for what was combined `before` it, batch by batch; return its own combines."""
    batches = range(schedule.pipeline.micro_batches)
    dispatches, reductions, combines = [], [], []
    for micro in batches:
        op, reduction = _dense(builder, schedule, layer, micro, before[micro])
        dispatches.append(_dispatches(builder, schedule.num_groups, layer, micro, op, reduction))
        reductions.append(reduction)
    for micro in batches:
        if shape.has_shared:
            builder.op(OP_SHARED, layer, micro, 0, [] if reductions[micro] == NONE else [reductions[micro]])
        combines.append(_experts(builder, layer, micro, dispatches[micro]))
        if gathered(schedule):
            combines[micro].append(builder.exchange(OP_REDUCE, layer, micro, GATHER, ex=combines[micro][-1]))
    return combines


def _drafts(builder: _Builder, schedule: ExpertParallelSchedule, shape: Shape, layer_of: _LayerOf) -> None:
    """Add the passes of a draft layer, each with the output head: a guess is known when the pass before has ended."""
    batches = range(schedule.pipeline.micro_batches)
    for layer in range(shape.num_layers, shape.num_layers + shape.drafts):
        combines = layer_of(builder, schedule, shape, layer, [[] for _ in batches])
        for micro in batches:
            builder.op(OP_HEAD, layer, micro, 0, combines[micro])


def gathered(schedule: ExpertParallelSchedule) -> bool:
    """Return whether a node's ranks, each of which sent a part of the tokens they all hold, gather all results."""
    return schedule.parallel.experts == "sharded" and schedule.parallel.attention == "tensor"


def _shortcut(builder: _Builder, schedule: ExpertParallelSchedule, shape: Shape) -> None:
    """Experts of layer l run after the dense part of layer l + 1; its successor is the first to need their result."""
    pending: list[int] = []  # dispatches of the layer before
    combines: list[int] = []  # of the layer before that
    for layer in range(shape.num_layers):
        op, reduction = _dense(builder, schedule, layer, 0, combines)
        dispatches = _dispatches(builder, schedule.num_groups, layer, 0, op, reduction)
        combines = _experts(builder, layer - 1, 0, pending) if layer else []
        pending = dispatches
        if shape.has_shared:
            builder.op(OP_SHARED, layer, 0, 0, [] if reduction == NONE else [reduction])
    last = _experts(builder, shape.num_layers - 1, 0, pending)
    builder.op(OP_HEAD, shape.num_layers - 1, 0, 0, [*combines, *last])
    _drafts(builder, schedule, shape, _layer)


def _tensor_parallel(builder: _Builder, schedule: ExpertParallelSchedule, shape: Shape) -> None:
    """A node's ranks hold all its tokens and parts of its experts: a reduction takes the place of both exchanges."""
    batches = range(schedule.pipeline.micro_batches)
    before: list[list[int]] = [[] for _ in batches]
    for layer in range(shape.num_layers):
        before = _reduced_layer(builder, schedule, shape, layer, before)
    for micro in batches:
        builder.op(OP_HEAD, shape.num_layers - 1, micro, 0, before[micro])
    _drafts(builder, schedule, shape, _reduced_layer)


def _reduced_layer(
    builder: _Builder, schedule: ExpertParallelSchedule, shape: Shape, layer: int, before: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Add a layer whose results are reduced, after what was reduced `before` it, batch by batch; return its own reductions."""
    batches = range(schedule.pipeline.micro_batches)
    reductions: list[list[int]] = []
    for micro in batches:
        _, reduction = _dense(builder, schedule, layer, micro, before[micro])
        reductions.append([] if reduction == NONE else [reduction])
    found = []
    for micro in batches:
        if shape.has_shared:
            builder.op(OP_SHARED, layer, micro, 0, reductions[micro])
        op = builder.op(OP_EXPERT, layer, micro, 0, reductions[micro])
        found.append([builder.exchange(OP_REDUCE, layer, micro, 1, op=op)])
    return found
