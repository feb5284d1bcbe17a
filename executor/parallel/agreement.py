"""What a run must share with its prediction and its reference: bytes of every port and link exactly, states to rounding.

Modelled: bytes are those of tokens' payload, as the simulator counts them; headers and sizes are reported beside them. States are
compared with `reference`; what rounding may do follows from what tokens travel as. Ignored: time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...sim.parallel.program import INTER, INTRA, NUM_TIERS, OP_DISPATCH
from ...sim.parallel.runnable import WIRE
from ...sim.policies.state import Array
from .job import Job
from .launch import RankRun
from .prepare import Prepared

# Rounding of one value, times how often a state is rounded on its way: twice an exchange's stages, in every layer, and once more for
# what the next layers make of it.
_GROWTH = 8


def port_bytes(job: Job, runs: Sequence[RankRun], step: int) -> Array:
    """Return int64 [exchanges, 2, ranks]: payload bytes each rank sent between nodes and inside its node, as `EpTables.ex_bytes`."""
    sent = np.stack([run.payload[step] for run in runs], axis=1)  # [exchanges, from, to]
    node = np.arange(job.topology.num_ranks) // job.topology.ranks_per_node
    away = node[:, None] != node[None, :]
    found = np.zeros((sent.shape[0], NUM_TIERS, sent.shape[1]), np.int64)
    found[:, INTER], found[:, INTRA] = (sent * away).sum(axis=2), (sent * ~away).sum(axis=2)
    return found


def link_bytes(prepared: Prepared, runs: Sequence[RankRun], step: int) -> Array:
    """Return int64 [from rank, to rank]: payload bytes dispatched over each link."""
    dispatches = prepared.program.ex_kind == OP_DISPATCH
    return np.stack([run.payload[step][dispatches].sum(axis=0) for run in runs])


def first_difference(prepared: Prepared, runs: Sequence[RankRun]) -> str | None:
    """Return None where every byte of every port and link is as predicted, else the first that is not."""
    job = prepared.job
    each = job.schedule.all_to_all.dispatch_bytes_per_value * job.model.expert_hidden
    for step, (tables, load) in enumerate(zip(prepared.tables, prepared.loads, strict=True)):
        measured = port_bytes(job, runs, step)
        for at in np.argwhere(measured != tables.ex_bytes)[:1].tolist():
            ex, tier, rank = at
            return (f"step {step}, exchange {ex}, {('between', 'inside')[tier]} nodes, rank {rank}: {measured[ex, tier, rank]} bytes sent, "
                    f"{tables.ex_bytes[ex, tier, rank]} predicted")  # fmt: skip
        sent, predicted = link_bytes(prepared, runs, step), np.rint(load.links * each).astype(np.int64)
        for source, target in np.argwhere(sent != predicted)[:1].tolist():
            return f"step {step}, link {source} to {target}: {sent[source, target]} bytes sent, {predicted[source, target]} predicted"
    return None


def other_bytes(runs: Sequence[RankRun]) -> int:
    """Return the bytes of headers and sizes of all steps."""
    return int(sum(part.sum() for run in runs for part in run.other))


def worst_error(job: Job, runs: Sequence[RankRun], reference: Sequence[torch.Tensor]) -> float:
    """Return the largest distance of a token's final state from the reference's, relative to that state's norm."""
    worst = 0.0
    for step, expected in enumerate(reference):
        for run in runs:
            mine = expected[torch.from_numpy(run.tokens[step])]
            found = torch.from_numpy(run.states[step])
            if len(mine):
                worst = max(worst, float(((found - mine).norm(dim=1) / mine.norm(dim=1)).max()))
    return worst


def rounding_bound(job: Job) -> float:
    """Return what `worst_error` may be: float32 everywhere, but tokens on their way as they travel."""
    exchange = job.schedule.all_to_all
    wire = max(torch.finfo(getattr(torch, WIRE[each])).eps
               for each in (exchange.dispatch_bytes_per_value, exchange.combine_bytes_per_value))  # fmt: skip
    return _GROWTH * job.model.num_moe_layers * wire
