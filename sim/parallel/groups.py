"""Which ranks can share attention layers on a machine, and with which division of experts.

Modelled: groups of consecutive ranks of equal size, inside a node or made of whole nodes, because a reduction runs inside a node first and
then between nodes. Experts that wait for no token need ranks that all hold the same tokens. Ignored: what a group costs (`costs`).
"""

from __future__ import annotations

from ...base.errors import InputError
from ...specs.schedules.parallel import ExpertParallelSchedule


def check_groups(schedule: ExpertParallelSchedule, num_nodes: int, ranks_per_node: int) -> None:
    """Return nothing; raises InputError for groups that the machine cannot be divided into, or that experts cannot work with."""
    parallel, key = schedule.parallel, "parallel.attention_ranks"
    size = parallel.group(ranks_per_node)
    if parallel.attention == "data" or size == ranks_per_node:
        return
    inside = size < ranks_per_node
    if (ranks_per_node % size if inside else size % ranks_per_node or num_nodes * ranks_per_node % size) != 0:
        whole = (
            f"{num_nodes} x {ranks_per_node} ranks do not divide into groups of {size} inside a node or of whole nodes"
        )
        raise InputError(key, size, whole, f"give a divisor of {ranks_per_node}, or a multiple of it that divides "
                         f"{num_nodes * ranks_per_node}")  # fmt: skip
    if parallel.experts == "sharded":
        raise InputError(key, size, "sharded experts need the ranks of exactly one node to hold the same tokens",
                         f"give {ranks_per_node}, or set parallel.experts=expert")  # fmt: skip
    if inside and parallel.experts in ("tensor", "node"):
        raise InputError(key, size, f"{parallel.experts} experts wait for no token: all ranks of a node must hold the same ones",
                         f"give {ranks_per_node} or a multiple of it, or set parallel.experts=expert")  # fmt: skip


def group_fits(schedule: ExpertParallelSchedule, num_nodes: int, ranks_per_node: int) -> bool:
    """Return whether `check_groups` refuses nothing."""
    try:
        check_groups(schedule, num_nodes, ranks_per_node)
    except InputError:
        return False
    return True
