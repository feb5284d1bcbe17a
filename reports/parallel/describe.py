"""An expert-parallel schedule in words: one row an option.

Modelled: every option that changes what happens is named; options that a choice makes meaningless (a load cap where nothing is
capped) are not. Ignored: what an option costs.
"""

from __future__ import annotations

from ...specs.schedules.parallel import ExpertParallelSchedule
from .. import numbers

_POLICIES = {
    "contiguous": "in their own order, equally many on each rank",
    "round-robin": "dealt to ranks in turn",
    "eplb": "packed by load (EPLB, global)",
    "eplb-hierarchical": "packed by load, groups of experts kept inside nodes (EPLB, hierarchical)",
    "grace": "grouped by affinity, copies by load (GRACE)",
    "occult": "grouped so that experts used together sit together (Occult)",
    "metro": "spread so that ranks read equally many active experts (METRO)",
    "search": "searched for the least predicted layer time on recorded tokens",
}
_PARALLELISMS = {
    "tensor": "every rank of a node holds a slice of each",
    "node": "each node holds all, spread over its ranks, which hold all its tokens",
    "sharded": "spread over nodes, each sliced over the ranks of its node",
}
_COPIES = {
    "nearest": "the nearest one, by a fixed table",
    "even": "any, drawn evenly",
    "capped": "the nearest one whose rank is not yet full",
    "weighted": "drawn by predicted load, nearest tier first",
    "activated": "one on a rank that runs the expert anyway",
    "planned": "by the table that the placement was searched with",
}
_EXCHANGES = {
    "all-choices": "a token is sent once for every expert",
    "per-rank": "a token is sent once to every rank that needs it",
    "hierarchical": "a token crosses once to every node that needs it and is forwarded there",
}
_TIERS = {
    "together": "crossing and forwarding are pipelined",
    "in-turn": "crossing and forwarding take turns, holding the network",
    "free": "crossing and forwarding take turns; another exchange may use the free tier",
}
_SPLITS = {
    "expert": "the experts of a rank in {n} groups: one is exchanged while another computes",
    "token": "tokens in {n} chunks: one is exchanged while another computes",
    "tile": "{n} tiles without any loss: a bound, not a kernel",
}
_KERNELS = {
    "grouped": "one launch for all experts of a stage",
    "dense": "a launch for each expert",
    "best": "one launch for all or one for each, whichever is cheaper, stage by stage",
}


def parallel_rows(schedule: ExpertParallelSchedule) -> list[tuple[str, str]]:
    """Return (option, value in words) for everything that this schedule decides."""
    placement, replica, exchange = schedule.placement, schedule.replica, schedule.all_to_all
    rows = [("Experts are placed", _words(_POLICIES, placement.policy))]
    if placement.num_redundant or placement.policy == "grace":
        copies = (
            f"{placement.num_redundant:,} slots a layer beyond one an expert"
            if placement.num_redundant
            else "as the policy decides"
        )
        rows.append(("Room for copies", copies))
        choice = _words(_COPIES, replica.choice)
        full = f"; full is {replica.load_cap:g} times the mean rank" if replica.choice == "capped" else ""
        rows.append(("Which copy a token takes", choice + full))
    if schedule.parallel.experts in ("tensor", "node"):
        rows.append(("Exchange", "none: every rank already holds the tokens of its node; results are added up"))
        return rows + _compute_rows(schedule)
    rows.append(("Exchange", _words(_EXCHANGES, exchange.kind)))
    if exchange.kind == "hierarchical":
        rows.append(("Its two stages", _words(_TIERS, exchange.tiers)))
    sent = f"{exchange.dispatch_bytes_per_value:g} bytes a value there, {exchange.combine_bytes_per_value:g} back"
    rows.append(("Tokens travel with", sent))
    return rows + _overlap_rows(schedule) + _compute_rows(schedule)


def _compute_rows(schedule: ExpertParallelSchedule) -> list[tuple[str, str]]:
    rows = [("Expert kernels", _words(_KERNELS, schedule.kernel.choice))]
    rows.append(
        ("Expert weights", f"{schedule.kernel.bits} bits" if schedule.kernel.bits.isdigit() else schedule.kernel.bits)
    )
    attention = (
        "each rank computes its own requests"
        if schedule.parallel.attention == "data"
        else f"{schedule.parallel.attention_ranks} ranks share each layer"
        if schedule.parallel.attention_ranks
        else "the ranks of a node share each layer"
    )
    rows.append(("Attention", attention))
    if schedule.parallel.experts in _PARALLELISMS:
        rows.append(("Experts", _PARALLELISMS[schedule.parallel.experts]))
    if schedule.pipeline.shared_overlap and schedule.parallel.experts not in ("tensor", "node"):
        rows.append(("Shared experts", "run while tokens are dispatched"))
    return rows


def _overlap_rows(schedule: ExpertParallelSchedule) -> list[tuple[str, str]]:
    pipeline = schedule.pipeline
    rows = []
    if schedule.num_groups > 1:
        rows.append(("Overlap", _words(_SPLITS, pipeline.split).format(n=schedule.num_groups)))
    if pipeline.micro_batches > 1:
        rows.append(("Batches in alternation", f"{pipeline.micro_batches}: one computes while another is exchanged"))
    if pipeline.shortcut:
        rows.append(("Shortcut", "experts work on the layer before; the model is trained so"))
    if schedule.overlaps and pipeline.all_to_all_sm_fraction:
        rows.append(("Multiprocessors kept for exchanges", numbers.percent(pipeline.all_to_all_sm_fraction, 0)))
    return rows or [("Overlap", "none: exchanges and expert kernels take turns")]


def _words(table: dict[str, str], key: str) -> str:
    """Return a choice in words, or its own name where it has none here."""
    return table.get(key, key)
