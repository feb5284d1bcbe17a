"""What several expert-parallel engines have in common: how ranks become flags, how replicas and exchanges are told apart.

Modelled: DeepEP's two modes (github.com/deepseek-ai/DeepEP: normal sends a token once to every node and there once to every
rank, low latency once for every choice), used by SGLang and vLLM alike. Ignored: any one engine's spelling.
"""

from __future__ import annotations

from .choices import EpChoice

DEEPEP_NORMAL, DEEPEP_LOW_LATENCY = "normal", "low latency"
# Options that every engine of this kind maps or explains through the functions below.
COMMON = ("placement", "replica", "exchange.kind", "exchange.tiers", "parallel", "pipeline.micro_batches")


def deepep_mode(choice: EpChoice) -> str:
    """Return the mode of DeepEP that moves tokens as the plan's exchange does, or nearly (see `exchange_notes`)."""
    return DEEPEP_LOW_LATENCY if choice.schedule.exchange.kind == "all-choices" else DEEPEP_NORMAL


def exchange_notes(choice: EpChoice) -> list[str]:
    """Return what DeepEP does otherwise than the plan's exchange."""
    exchange = choice.schedule.exchange
    notes = []
    if exchange.kind == "per-rank" and choice.placement.num_nodes > 1:
        notes.append("exchange.kind=per-rank: DeepEP sends a token once to every node and there once to every rank, "
                     "which takes fewer bytes between nodes")  # fmt: skip
    if exchange.tiers != "together":
        notes.append(f"exchange.tiers={exchange.tiers}: DeepEP pipelines its two stages")
    return notes


def own_exchange_notes(choice: EpChoice, engine: str) -> list[str]:
    """Return the line for an engine that picks its all-to-all itself."""
    return [f"exchange.kind={choice.schedule.exchange.kind}: {engine} picks its all-to-all itself"]


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


def attention_groups(choice: EpChoice) -> tuple[int, int]:
    """Return (tensor, data): ranks that share each attention layer, and how many such groups there are."""
    placement = choice.placement
    if choice.schedule.parallel.attention == "tensor":
        return placement.ranks_per_node, placement.num_nodes
    return 1, placement.num_ranks
