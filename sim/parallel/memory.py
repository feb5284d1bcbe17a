"""What one rank holds while it serves: weights by kind, KV cache by its type, buffers; and the largest batch that fits beside them.

Modelled: the experts of its slots (or its slices of them), its part of everything else, keys and values of the requests it keeps,
activations of its step, the buffers of the all-to-all, what the runtime takes; where drafts are checked, a draft layer with its experts,
keys and values of drafted tokens and of that layer. Ranks that share attention split weights and keys and
values by heads: a latent has none, and lies whole on each of them. Buffers are those of DeepEP's low-latency kernels
(csrc/config.hpp at 030cdf0a: two pairs of a message for each expert and token), of which the decode step of an all-choices exchange
needs one set; in other exchanges those of its normal kernels (the same file's hints at its defaults: for each of 10 channels 288 tokens
of each peer inside a node and twice 128 of each node, with 2 KiB of choices and scales each).
Ignored: fragmentation beyond the runtime's share, weights that an engine keeps twice while it rebalances.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ...specs.memory import DEVICE, MemoryBreakdown, MemoryItem, activation_bytes
from ...specs.models import ModelSpec, WeightFormat, weight_format
from ...specs.schedules.parallel import ExpertParallelSchedule

# Normal kernels: channels, tokens in flight for each peer of a node and for each node, bytes beside a token's values.
_CHANNELS, _PEER_TOKENS, _NODE_TOKENS, _TOKEN_META_BYTES = 10, 288, 128, 2048
# A message of a token carries, beside 16-bit values, sixteen bytes of control there, and four bytes for 128 values back.
_CONTROL_BYTES, _SCALED_VALUES, _SCALE_BYTES, _VALUE_BYTES = 16, 128, 4, 2
_MOST_TOKENS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShape:
    """What a rank's memory depends on besides model and schedule."""

    num_nodes: int
    ranks_per_node: int
    slots_per_rank: int
    """Slots of a layer on every rank, where whole experts are spread over all of them."""
    context_tokens: int
    """Tokens of a request that keys and values are kept for."""
    prefill: bool
    kv_bytes_per_value: float
    dense_format: WeightFormat
    runtime_bytes: int
    tokens_per_request: int = 1
    """Tokens of a request in a decode step: more than one where drafts are checked."""


def attention_ranks(schedule: ExpertParallelSchedule, ranks_per_node: int) -> int:
    """Return how many ranks share each attention layer."""
    return schedule.parallel.group(ranks_per_node)


def rank_memory(
    model: ModelSpec, schedule: ExpertParallelSchedule, shape: RankShape, rank_tokens: int
) -> MemoryBreakdown:
    """Return what a rank holds in steps of which `rank_tokens` tokens are its own."""
    share = attention_ranks(schedule, shape.ranks_per_node)
    fmt = weight_format(schedule.kernel.bits)
    expert, layers = model.expert_bytes(fmt), model.num_moe_layers
    ranks = shape.num_nodes * shape.ranks_per_node
    replica = schedule.parallel.replica_ranks(shape.ranks_per_node)
    if schedule.parallel.experts == "tensor":
        experts = -(-model.num_experts * expert // replica)
        held = f"{model.num_experts} experts a layer, each over {replica} ranks"
    else:
        over = replica if schedule.parallel.experts == "node" else ranks
        slots = -(-shape.slots_per_rank * ranks // over)
        experts = slots * expert
        held = f"{slots} experts a layer"
    tokens = rank_tokens * share
    requests = max(1, round(tokens / shape.context_tokens)) if shape.prefill else -(-tokens // shape.tokens_per_request)
    drafts = shape.tokens_per_request - 1
    kept = shape.context_tokens + drafts
    each = model.kv_bytes(kept, shape.kv_bytes_per_value, 0)
    dense = model.dense_bytes(shape.dense_format)
    drafting = ""
    if drafts:  # a layer like the last one, behind a projection of two hidden states to one
        last = model.moe_layers[-1]
        each += math.ceil(model.kept_values(last, kept, 0) * shape.kv_bytes_per_value)
        dense += model.dense_layer_bytes(last, shape.dense_format) + shape.dense_format.num_bytes(
            2 * model.hidden_size**2
        )
        layers, drafting = layers + 1, ", the draft layer included"
    cached = requests * each // kv_shares(model, share)
    divided = f", over {share} ranks" if share > 1 else ""
    items = (
        _item("expert weights", experts * layers, f"{held} in {fmt.name} bits, {layers} layers{drafting}"),
        _item("other weights", -(-dense // share), f"attention, shared experts, embeddings in "
              f"{shape.dense_format.name} bits{divided}"),
        _item("kv cache", cached, f"{requests} requests of {kept} tokens, {shape.kv_bytes_per_value:g} bytes a value"
              + (divided if kv_shares(model, share) > 1 else "")),
        _item("activations", activation_bytes(model, tokens, requests, shape.dense_format) // share, f"a step of {tokens} tokens"),
        _item("exchange buffers", buffer_bytes(model, schedule, shape, rank_tokens), "of the all-to-all"),
        _item("runtime", shape.runtime_bytes, "driver, libraries, allocator"),
    )  # fmt: skip
    return MemoryBreakdown(items=items)


def kv_shares(model: ModelSpec, share: int) -> int:
    """Return over how many of `share` ranks that share attention keys and values are divided: by heads, a latent not at all."""
    return 1 if model.attention.kind == "mla" else max(1, min(share, model.attention.num_kv_heads))


def buffer_bytes(model: ModelSpec, schedule: ExpertParallelSchedule, shape: RankShape, rank_tokens: int) -> int:
    """Return the bytes of the buffers through which a rank's tokens go to experts and back."""
    ranks = shape.num_nodes * shape.ranks_per_node
    if schedule.parallel.experts in ("tensor", "node") or ranks == 1:
        return 0
    if shape.prefill or schedule.all_to_all.kind != "all-choices":
        token = model.expert_hidden * _VALUE_BYTES + _TOKEN_META_BYTES
        between = 2 * shape.num_nodes * _NODE_TOKENS if shape.num_nodes > 1 else 0
        return _CHANNELS * (shape.ranks_per_node * _PEER_TOKENS + between) * token
    hidden = model.expert_hidden
    scales = hidden // _SCALED_VALUES
    forth = _CONTROL_BYTES + max(hidden * _VALUE_BYTES, hidden + scales * _SCALE_BYTES)
    back = scales * _SCALE_BYTES + hidden * _VALUE_BYTES
    slots = shape.slots_per_rank * ranks
    return 2 * rank_tokens * (max(forth, slots * back) + slots * max(forth, back))


def largest_batch(memory: Callable[[int], MemoryBreakdown], budget_bytes: int) -> int:
    """Return the most tokens of a rank whose memory breakdown stays within a budget; 0 where not even one's does."""
    low, high = 0, 1
    while high <= _MOST_TOKENS and memory(high).device_bytes <= budget_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory(middle).device_bytes <= budget_bytes else (low, middle)
    return low


def _item(name: str, num_bytes: int, note: str) -> MemoryItem:
    return MemoryItem(name=name, place=DEVICE, num_bytes=int(num_bytes), note=note)
