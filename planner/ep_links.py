"""Bytes on every link: from which rank to which rank a step's tokens travel under a schedule, before and after a plan.

Modelled: the dispatch, summed over layers, as the schedule's exchange does it: a hierarchical exchange crosses to the rank
with the sender's place and is forwarded from there, so its links differ from those of a flat one. The combine takes the same
links backwards. From counts, expectations. Ignored: expert groups, which would send some tokens twice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..ep_schedule import ExpertParallelSchedule
from .ep_evidence import REPORT, CountEvidence, TokenEvidence
from .placement.comparison import Candidate
from .placement.traffic import count_traffic

FloatArray = npt.NDArray[np.float64]


def link_tokens(
    evidence: TokenEvidence | CountEvidence, candidate: Candidate, schedule: ExpertParallelSchedule
) -> FloatArray:
    """Return float64 [from rank, to rank]: tokens dispatched in a mean step, all layers; the diagonal is zero."""
    kind = schedule.exchange.kind
    if isinstance(evidence, CountEvidence):
        found = _expected(evidence, candidate, kind)
    else:
        found = _counted(evidence, candidate, kind)
    np.fill_diagonal(found, 0.0)
    return found


def _counted(evidence: TokenEvidence, candidate: Candidate, kind: str) -> FloatArray:
    placement, steps = candidate.placement, evidence.parts[REPORT]
    found = np.zeros((placement.num_ranks, placement.num_ranks))
    for slots, step in zip(evidence.routed(REPORT, candidate), steps, strict=True):
        for layer in range(placement.num_layers):
            traffic = count_traffic(slots[:, layer], step.source_rank, placement)
            if kind == "hierarchical":
                found += traffic.inter_node + traffic.intra_node
            else:
                found += traffic.choices if kind == "all-choices" else traffic.per_rank
    return found / len(steps)


def _expected(evidence: CountEvidence, candidate: Candidate, kind: str) -> FloatArray:
    placement = candidate.placement
    ranks, nodes, seats = placement.num_ranks, placement.num_nodes, placement.ranks_per_node
    each = evidence.num_tokens / ranks
    found = np.zeros((ranks, ranks))
    for chance in evidence.slot_chance(candidate):
        missed = np.prod(1 - chance.reshape(len(chance), ranks, -1), axis=2)  # [ranks or 1, target ranks]
        hits = np.broadcast_to(1 - missed, (ranks, ranks)) * each
        if kind == "all-choices":
            hits = np.broadcast_to(chance.reshape(len(chance), ranks, -1).sum(axis=2), (ranks, ranks)) * each
        if kind != "hierarchical":
            found += hits
            continue
        crossing = (
            np.broadcast_to(1 - np.prod(missed.reshape(len(chance), nodes, seats), axis=2), (ranks, nodes)) * each
        )
        for source in range(ranks):
            for node in range(nodes):
                away = node != source // seats
                landing = node * seats + source % seats if away else source
                found[source, landing] += crossing[source, node] if away else 0.0
                targets = slice(node * seats, (node + 1) * seats)
                forwarded = hits[source, targets].copy()
                forwarded[landing - node * seats] = 0.0
                found[landing, targets] += forwarded
    return found
