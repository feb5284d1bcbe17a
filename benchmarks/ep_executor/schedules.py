"""The schedules that are compared: one change at a time over plain expert parallelism with contiguous experts, and what is published.

Modelled: every kind of decision that ranks on cores can run: placements, copies and which of them a token takes, ways of exchanging,
ways of overlapping; and the plan's own choice. Ignored: whether any of them is good.
"""

from __future__ import annotations

from collections.abc import Mapping

from moeplan.executor.validation.rank_results import Contender
from moeplan.planner.parallel.search import EpSearch
from moeplan.sim.parallel.runnable import as_run_on_cores
from moeplan.specs.models import ModelSpec
from moeplan.specs.schedules.parallel import ExpertParallelSchedule, load_ep_preset

CONTIGUOUS, CHOSEN = "contiguous", "the plan's choice"
GAINS: Mapping[str, tuple[str, str]] = {
    "grouping (GRACE-style)": ("grouped placement", CONTIGUOUS),
    "our placement": ("our placement", CONTIGUOUS),
    "replication": ("copies, drawn evenly", CONTIGUOUS),
    "locality routing": ("copies, nearest", "copies, drawn evenly"),
    "our placement with copies": ("our placement, copies", CONTIGUOUS),
    "two batches": ("two batches", CONTIGUOUS),
    "groups of experts": ("2 groups of experts", CONTIGUOUS),
    "a shortcut": ("shortcut", CONTIGUOUS),
}
"""What is gained by what: (with it, without it)."""


def schedules(copies: int) -> dict[str, ExpertParallelSchedule]:
    """Return the schedules by name, `copies` slots more over all ranks where there are copies."""
    plain = load_ep_preset("ep").with_options(kernel__bits="32")
    spare = {"placement__num_redundant": copies}
    hierarchical = {"all_to_all__kind": "hierarchical", "all_to_all__tiers": "in-turn"}
    groups = {"pipeline__split": "expert", "pipeline__num_groups": 2}
    ours = plain.with_options(placement__policy="search")
    found = {
        CONTIGUOUS: plain,
        "every choice sent": plain.with_options(all_to_all__kind="all-choices"),
        "hierarchical": plain.with_options(**hierarchical),
        "round robin": plain.with_options(placement__policy="round-robin"),
        "grouped placement": plain.with_options(placement__policy="grace", replica__choice="weighted"),
        "grace": plain.with_options(placement__policy="grace", replica__choice="weighted", **hierarchical),
        "occult": plain.with_options(placement__policy="occult"),
        "copies, drawn evenly": plain.with_options(placement__policy="eplb", replica__choice="even", **spare),
        "copies, nearest": plain.with_options(placement__policy="eplb", **spare),
        "copies by node": plain.with_options(placement__policy="eplb-hierarchical", **spare, **hierarchical),
        "metro": plain.with_options(placement__policy="metro", replica__choice="activated", **spare),
        "our placement": ours,
        "our placement, copies": ours.with_options(replica__choice="planned", **spare),
        "two batches": plain.with_options(pipeline__micro_batches=2),
        "2 groups of experts": plain.with_options(**groups),
        "4 groups of experts": plain.with_options(**groups | {"pipeline__num_groups": 4}),
        "2 chunks of tokens": plain.with_options(**groups | {"pipeline__split": "token"}),
        "chunks, free tiers": load_ep_preset("fsmoe").with_options(kernel__bits="32"),
        "shortcut": plain.with_options(pipeline__shortcut=True),
        "our placement, copies, two batches": ours.with_options(replica__choice="planned", pipeline__micro_batches=2, **spare),
    }  # fmt: skip
    return {name: schedule.with_options(name=name) for name, schedule in found.items()}


def contenders(search: EpSearch, model: ModelSpec, copies: int) -> list[Contender]:
    """Return every schedule as ranks on cores run it, with its placement."""
    found = []
    for name, schedule in schedules(copies).items():
        told = as_run_on_cores(schedule, model)
        if told is not None:
            found.append(Contender(name=name, schedule=told, candidate=search.placements.candidate(schedule)))
    return found
