"""What no expert-parallel schedule can go below, under the division of work that a plan has chosen.

Modelled: dense parts as they are, experts level over all ranks, each active one's weights read once. Ignored: exchanges.
"""

from __future__ import annotations

import numpy as np

from ...base.units import NS_PER_S
from ...sim.parallel.program import OP_EXPERT
from ...specs.models import weight_format
from ...specs.schedules.parallel import ExpertParallelSchedule
from .evidence import REPORT
from .search import EpSearch


def lower_bound_s(search: EpSearch, chosen: ExpertParallelSchedule) -> float:
    """Return what no placement or overlap can beat: dense parts, and experts level over all ranks.

    A layer's experts take at least their operations at the fastest precision, and at least the reading of every active
    expert's weights once.
    """
    simulation, costing, model = search.simulation, search.simulation.costing, search.simulation.model
    plain = chosen.with_options(
        pipeline__split="none", pipeline__num_groups=1, pipeline__micro_batches=1, kernel__choice="grouped"
    )
    candidate = search.placements.candidate(plain)
    device, constants = simulation.profile.device, costing.constants
    peak = max(constant.value for constant in device.peak_flops_per_s.values())
    if simulation.profile.kernels is None:  # measured kernels may come nearer to the data sheet than its usual share
        peak *= device.compute_efficiency.value
    fastest = 1.0 if constants.overlap is None else constants.overlap.fastest
    peak *= max(1.0, constants.grouped_rate, constants.dense_rate) * fastest
    read_s = float(
        costing.item_s(np.array([1]), weight_format(chosen.kernel.bits), rate=max(1.0, constants.grouped_rate))[0]
    )
    read_s /= fastest
    found = []
    for load in search.evidence.loads(REPORT, candidate, plain):
        program, tables = simulation.program(plain), simulation.tables(plain, load)
        total = float(tables.work_ns[program.op_kind != OP_EXPERT].sum(axis=0).max()) / NS_PER_S
        counted = load.slot_rows if load.expected is None else load.expected.rows
        rows_of, runs = counted.sum(axis=(1, 2)), load.active_slots()
        for layer, rows in enumerate(rows_of.tolist()):
            idle = np.ones(model.num_experts)
            np.multiply.at(idle, candidate.placement.physical_to_logical[layer], 1 - runs[layer])
            active = float((1 - idle).sum())
            total += max(rows * model.expert_flops_per_token / peak, active * read_s) / simulation.num_ranks
        found.append(total)
    return float(np.mean(found))
