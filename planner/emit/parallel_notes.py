"""What several expert-parallel engines have in common: how ranks become flags, how replicas and exchanges are told apart.

Modelled: DeepEP's two modes (github.com/deepseek-ai/DeepEP: normal sends a token once to every node and there once to every
rank, low latency once for every choice), used by SGLang and vLLM alike. Ignored: any one engine's spelling.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...sim.parallel.groups import check_groups
from .choices import EpChoice, Placement, contiguous

# Options that every engine of this kind maps or explains through the functions below.
COMMON = ("placement", "replica", "all_to_all.kind", "all_to_all.tiers", "parallel", "pipeline.micro_batches")


def exchange_notes(choice: EpChoice) -> list[str]:
    """Return what DeepEP does otherwise than the plan's exchange."""
    exchange = choice.schedule.all_to_all
    notes = []
    if not normal_mode(choice):
        if exchange.kind != "all-choices":
            notes.append(f"all_to_all.kind={exchange.kind}: decode steps use DeepEP's low-latency kernels, which send a token once for "
                         "every expert; its other mode turns CUDA graphs off in decode")  # fmt: skip
        return notes
    if exchange.kind == "per-rank" and choice.placement.num_nodes > 1:
        notes.append("all_to_all.kind=per-rank: DeepEP sends a token once to every node and there once to every rank, "
                     "which takes fewer bytes between nodes")  # fmt: skip
    if exchange.tiers != "together":
        notes.append(f"all_to_all.tiers={exchange.tiers}: DeepEP pipelines its two stages")
    return notes


def exchange_kind(choice: EpChoice) -> str:
    """Return what DeepEP's mode is called in a schedule; inside one node both of normal mode's are the same."""
    own = choice.schedule.all_to_all.kind
    if not normal_mode(choice):
        return "all-choices"
    return own if choice.placement.num_nodes == 1 else "hierarchical"


def own_exchange_notes(choice: EpChoice, engine: str) -> list[str]:
    """Return the line for an engine that picks its all-to-all itself."""
    return [f"all_to_all.kind={choice.schedule.all_to_all.kind}: {engine} picks its all-to-all itself"]


OWN_EXCHANGE = "which all-to-all moves its tokens is the engine's own choice"


def replica_notes(choice: EpChoice, does: str, how: str) -> list[str]:
    """Return a line where copies exist and the engine's choice among them is not the plan's.

    does: the replica choice the engine makes, by the schedule's name for it; how: the same in words.
    """
    replica = choice.schedule.replica
    if choice.placement.num_redundant == 0 or replica.choice == does:
        return []
    return [f"replica.choice={replica.choice}: {how}"]


def micro_batch_notes(choice: EpChoice, most: int) -> list[str]:
    """Return a line where the plan alternates more batches than the `most` an engine can."""
    batches = choice.schedule.pipeline.micro_batches
    return [f"pipeline.micro_batches={batches}: at most {most} here"] if batches > most else []


def normal_mode(choice: EpChoice) -> bool:
    """Return whether DeepEP's normal mode is asked for: never in decode, where it takes CUDA graphs away."""
    return not choice.decode and choice.schedule.all_to_all.kind != "all-choices"


def moved(choice: EpChoice, kinds: Mapping[str, object]) -> dict[str, object]:
    """Return `kinds` without what the plan says already, and without copies' choices where there are no copies."""
    own = choice.schedule.to_dict()
    copies = choice.placement.num_redundant > 0
    return {
        key: value
        for key, value in kinds.items()
        if own[key.split("__")[0]][key.split("__")[1]] != value and (copies or not key.startswith("replica__"))
    }


def plain(choice: EpChoice) -> Placement:
    """Return the placement of an engine that was told none: contiguous, without copies."""
    own = choice.placement
    return contiguous(own.num_layers, own.num_logical, own.num_logical, own.num_ranks, own.num_nodes)


def attention_groups(choice: EpChoice) -> tuple[int, int]:
    """Return (tensor, data): ranks that share each attention layer, and how many such groups there are."""
    placement = choice.placement
    check_groups(choice.schedule, placement.num_nodes, placement.ranks_per_node)
    tensor = choice.schedule.parallel.group(placement.ranks_per_node)
    return tensor, placement.num_ranks // tensor
