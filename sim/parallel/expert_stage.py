"""What the experts of one stage cost every rank, in whole nanoseconds, under each division of experts and each kernel.

Modelled: exact rows cost what their kernels cost. Where only expectations are known, an expert costs what it takes with the rows
that it has when it is active, by the chance that it is; and the rank with the largest expectation takes as long as the slowest
rank of a real step does on average, which runs more experts than any rank's mean. Ignored: that rows of one expert scatter
around their mean (kernels are straight between whole rows, and nearly straight beyond).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...base.units import NS_PER_S
from ...specs.models import WeightFormat, weight_format
from ...specs.schedules.parallel import ExpertParallelSchedule
from ..policies.state import Array
from .program import OP_EXPERT, Program
from .traffic import FloatArray, StepLoad

if TYPE_CHECKING:
    from .costs import EpCosting
    from .tiers import EpConstants


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRows:
    """What the experts of all stages work on, [layers, parts, units, slots]; a unit computes on its own."""

    rows: Array | FloatArray
    active: FloatArray
    """1 or 0 where rows are exact, else the chance of any."""
    slowest: FloatArray | None
    """[layers, parts]: what the slowest unit takes over the largest mean; None where rows are exact."""

    @property
    def unit_rows(self) -> Array:
        """int64 [layers, parts, units]: rows of each unit."""
        return np.asarray(np.rint(self.rows.sum(axis=-1)), np.int64)


def stage_rows(load: StepLoad, num_units: int, num_replicas: int = 1) -> StageRows:
    """Return the rows of a step whose slots sit on `num_units` units, where each of `num_replicas` nodes holds all of them."""
    shape = (*load.slot_rows.shape[:2], num_units, -1)
    if load.expected is None:
        rows = (-(-load.slot_rows // num_replicas)).reshape(shape)
        return StageRows(rows=rows, active=(rows > 0).astype(np.float64), slowest=None)
    expected = load.expected
    return StageRows(
        rows=(expected.rows / num_replicas).reshape(shape),
        active=expected.active.reshape(shape),
        slowest=expected.slowest,
    )


def slot_s(
    costing: EpCosting, stage: StageRows, fmt: WeightFormat, *, rate: float, slices: int = 1, alone: bool = False
) -> FloatArray:
    """Return seconds of every slot, on average where rows are expected; rate, slices and alone as in `EpCosting.item_s`."""
    if stage.slowest is None:
        return costing.item_s(np.asarray(stage.rows, np.int64), fmt, rate=rate, slices=slices, alone=alone)
    runs = stage.active > 0
    rows = np.maximum(1.0, np.divide(stage.rows, stage.active, out=np.ones_like(stage.active), where=runs))
    whole = np.floor(rows).astype(np.int64)
    part = rows - whole
    least, more = (costing.item_s(whole + extra, fmt, rate=rate, slices=slices, alone=alone) for extra in (0, 1))
    return np.asarray(stage.active * (least + part * (more - least)))


def kernels_s(
    costing: EpCosting,
    stage: StageRows,
    schedule: ExpertParallelSchedule,
    share: float,
    *,
    slices: int = 1,
    nodes: int = 1,
) -> FloatArray:
    """Return seconds [layers, parts, units of all nodes] of a stage's experts under the schedule's kernels.

    share: of multiprocessors left to kernels. slices: each expert is cut over so many ranks, which count as one. nodes: replicas
    that each run all of it.
    """
    costing = costing.behind(schedule)
    fmt, constants = weight_format(schedule.kernel.bits), costing.constants
    whole = costing.whole_s(stage, fmt, rate=constants.grouped_rate * share, slices=slices)
    if whole is not None:
        return _measured_kernels_s(costing, stage, schedule, whole, share, slices, nodes)
    launch_s = costing.costs.grouped_base(fmt).seconds
    launch: FloatArray = np.array(launch_s)
    runs = np.tile(stage.active, (1, 1, nodes, 1))
    idle = np.prod(1 - runs, axis=-1)
    grouped = slot_s(costing, stage, fmt, rate=constants.grouped_rate * share, slices=slices).sum(-1)
    grouped = np.tile(grouped, (1, 1, nodes))
    rows = np.tile(
        stage.rows.sum(-1) / np.maximum(stage.active.sum(-1), 1e-9), (1, 1, nodes)
    )  # of an expert in the mean
    over = _over_one_launch(costing, stage, schedule, rows)
    if over is not None:
        # Launches of a layer together take the measured ratio of one: its start and its experts are divided among them.
        grouped, launch = grouped * over[0], launch * over[1]
    if stage.slowest is None:
        grouped = grouped + launch * (1 - idle)
    else:
        # The slowest rank launches wherever any rank does.
        last = longest(grouped)
        grouped = np.where(last, grouped * stage.slowest[..., None] + launch * (1 - np.prod(idle, -1, keepdims=True)),
                           grouped + launch * (1 - idle))  # fmt: skip
    if schedule.kernel.choice == "grouped":
        return np.asarray(grouped)
    ratio = None if constants.overlap is None else constants.overlap.dense_over_grouped(rows)
    if ratio is not None:
        dense = grouped * ratio
    else:
        dense = slot_s(costing, stage, fmt, rate=constants.dense_rate * share, slices=slices).sum(-1)
        dense = np.tile(dense, (1, 1, nodes)) + launch_s * runs.sum(-1)
        if stage.slowest is not None:
            dense = np.where(longest(dense), dense * stage.slowest[..., None], dense)
    if schedule.kernel.choice == "dense":
        return np.asarray(dense)
    # All ranks take the kernel whose slowest rank is faster: the stage ends with it.
    better = dense.max(-1, keepdims=True) < grouped.max(-1, keepdims=True)
    return np.asarray(np.where(better, dense, grouped))


def _over_one_launch(
    costing: EpCosting, stage: StageRows, schedule: ExpertParallelSchedule, rows: FloatArray
) -> tuple[FloatArray, FloatArray] | None:
    """Return (how many times as long experts take in a schedule's groups, how much of a launch each pays); None where it was not measured.

    rows: [layers, parts, units] of an expert in the mean.
    """
    groups, table = schedule.num_groups, costing.constants.overlap
    if table is None or groups == 1 or schedule.pipeline.split != "expert":
        return None
    ratio = table.over_one_launch(rows, groups)
    if ratio is None:
        return None
    apart = stage.rows.shape[1] == schedule.pipeline.micro_batches * groups  # else a stage is divided later
    return ratio, ratio / groups if apart else ratio


def _measured_kernels_s(
    costing: EpCosting,
    stage: StageRows,
    schedule: ExpertParallelSchedule,
    whole: FloatArray,
    share: float,
    slices: int,
    nodes: int,
) -> FloatArray:
    """Return the same where a stage's experts are one measured operation, of which `whole` are the seconds, or products one by one."""
    fmt = weight_format(schedule.kernel.bits)
    grouped = _ends_late(stage, np.tile(whole, (1, 1, nodes)), costing.costs.experts_start_s(fmt, stage.rows.shape[-1]))
    if schedule.kernel.choice == "grouped":
        return grouped
    rate = costing.constants.dense_rate * share
    alone = slot_s(costing, stage, fmt, rate=rate, slices=slices, alone=True).sum(-1)
    dense = _ends_late(stage, np.tile(alone, (1, 1, nodes)), 0.0)
    if schedule.kernel.choice == "dense":
        return dense
    better = dense.max(-1, keepdims=True) < grouped.max(-1, keepdims=True)
    return np.asarray(np.where(better, dense, grouped))


def _ends_late(stage: StageRows, seconds: FloatArray, start_s: float) -> FloatArray:
    """Return `seconds: [layers, parts, units]` with the work of each stage's slowest unit as long as the slowest is expected to take."""
    if stage.slowest is None:
        return seconds
    late = start_s + (seconds - start_s) * stage.slowest[..., None]
    return np.asarray(np.where(longest(seconds) & (seconds > start_s), late, seconds))


def longest(seconds: FloatArray) -> npt.NDArray[np.bool_]:
    """Return which unit of each stage takes longest, bool like `seconds: [layers, parts, units]`, one of each stage.

    Of equally long ones it is another in every layer, as in real steps, so that no rank looks busier than the others.
    """
    tied = np.isclose(seconds, seconds.max(-1, keepdims=True), rtol=1e-9, atol=0.0)
    turn = np.arange(len(seconds))[:, None, None] % tied.sum(-1, keepdims=True)
    return np.asarray(tied & (np.cumsum(tied, axis=-1) - 1 == turn))


def tabulate_experts(costing: EpCosting, schedule: ExpertParallelSchedule, program: Program, load: StepLoad, work: Array,
                     op_tokens: Array) -> None:  # fmt: skip
    """Fill expert operations, part by part."""
    topology, mine = load.topology, np.flatnonzero(program.op_kind == OP_EXPERT)
    layer, micro, group = program.op_layer[mine], program.op_micro[mine], program.op_group[mine]
    ranks_per_node, nodes, parallelism = topology.ranks_per_node, topology.num_nodes, schedule.parallel.experts
    if parallelism in ("node", "tensor"):
        # Every node, or all nodes that share attention, are a replica of their own. "node": the experts of so many consecutive ranks sit
        # on one rank of each; "tensor": its ranks hold a slice of each expert and see all the replica's tokens.
        ranks_per_node = schedule.parallel.replica_ranks(ranks_per_node)
        nodes = topology.num_ranks // ranks_per_node
        plain = schedule.with_options(kernel__choice="grouped")
        stage = stage_rows(load, ranks_per_node if parallelism == "node" else 1, nodes)
        seconds = kernels_s(
            costing, stage, plain, 1.0, slices=1 if parallelism == "node" else ranks_per_node, nodes=nodes
        )
        each = 1 if parallelism == "node" else ranks_per_node
        work[mine] = np.repeat(np.ceil(seconds * NS_PER_S).astype(np.int64), each, axis=-1)[layer, micro]
        op_tokens[mine] = np.repeat(np.tile(stage.unit_rows, nodes), each, axis=-1)[layer, micro]
        return
    # A node that shards its experts is as one rank, as many times faster as it has ranks.
    slices = ranks_per_node if parallelism == "sharded" else 1
    stage = stage_rows(load, topology.num_ranks // slices)
    seconds = kernels_s(costing, stage, schedule, sm_share(schedule, costing.constants), slices=slices)
    ns = np.repeat(np.ceil(seconds * NS_PER_S).astype(np.int64), slices, axis=-1)
    rank_rows = np.repeat(stage.unit_rows, slices, axis=-1)
    part, pieces = parts_of(schedule, load, micro, group)
    work[mine] = piece(ns[layer, part], group, pieces)
    op_tokens[mine] = piece(rank_rows[layer, part], group, pieces)


def sm_share(schedule: ExpertParallelSchedule, constants: EpConstants) -> float:
    """Return the speed of kernels on the multiprocessors that exchanges leave them: in proportion, or as measured."""
    left = 1.0 - schedule.pipeline.all_to_all_sm_fraction if schedule.overlaps else 1.0
    measured = None if constants.overlap is None or left == 1.0 else constants.overlap.speed_on(left)
    return left if measured is None else measured


def parts_of(schedule: ExpertParallelSchedule, load: StepLoad, micro: Array, group: Array) -> tuple[Array, int]:
    """Return (part of the load for each batch and group, pieces a part is divided into)."""
    if load.num_groups == schedule.num_groups:
        return micro * load.num_groups + group, 1
    return micro, schedule.num_groups


def piece(values: Array, group: Array, pieces: int) -> Array:
    """Return piece `group` of `pieces` nearly equal whole parts of `values: [n, …]`; the pieces add up to the whole."""
    at = group.reshape(-1, *[1] * (values.ndim - 1))
    return values if pieces == 1 else values * (at + 1) // pieces - values * at // pieces
