"""What a rank holds, item by item, and the largest batch beside it."""

from __future__ import annotations

import dataclasses

import pytest

from moeplan.sim.parallel.memory import RankShape, kv_shares, largest_batch, rank_memory
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import load_ep_preset

MODEL = load_model("deepseek-v3")
SHAPE = RankShape(
    num_nodes=4, ranks_per_node=8, slots_per_rank=9, context_tokens=4096, prefill=False, kv_bytes_per_value=2,
    dense_format=weight_format("8"), runtime_bytes=10**9,
)  # fmt: skip
EP = load_ep_preset("ep").with_options(kernel__bits="8", all_to_all__kind="all-choices")


def test_items_are_those_of_the_published_sizes() -> None:
    found = rank_memory(MODEL, EP, SHAPE, 128)
    each = MODEL.expert_bytes(weight_format("8"))
    assert found.num_bytes("expert weights") == 9 * 58 * each
    # A latent of 512 + 64 values in each of 61 layers.
    assert found.num_bytes("kv cache") == 128 * 4096 * 61 * 576 * 2
    # DeepEP's hint at 288 experts, 128 tokens, hidden 7168: two pairs of buffers of 14,352 and 14,560 bytes a message.
    assert found.num_bytes("exchange buffers") == 2 * 128 * 2 * 288 * 14560
    assert found.device_bytes == sum(item.num_bytes for item in found.items)


def test_ranks_that_share_attention_share_heads_but_not_a_latent() -> None:
    grouped = load_model("qwen3-30b-a3b")
    assert (kv_shares(MODEL, 8), kv_shares(grouped, 8), kv_shares(grouped, 2)) == (1, grouped.attention.num_kv_heads, 2)
    tensor = EP.with_options(parallel__attention="tensor")
    alone, shared = (rank_memory(MODEL, one, SHAPE, 16) for one in (EP, tensor))
    assert shared.num_bytes("kv cache") == 8 * alone.num_bytes("kv cache")  # the node's requests, whole on every rank
    assert shared.num_bytes("other weights") == pytest.approx(alone.num_bytes("other weights") / 8, rel=1e-6)


def test_the_largest_batch_is_the_last_that_fits() -> None:
    shape = dataclasses.replace(SHAPE, kv_bytes_per_value=1)
    budget = 100 * 2**30

    def needs(tokens: int) -> int:
        return rank_memory(MODEL, EP, shape, tokens).device_bytes

    most = largest_batch(lambda tokens: rank_memory(MODEL, EP, shape, tokens), budget)
    assert needs(most) <= budget < needs(most + 1)
    assert largest_batch(lambda tokens: rank_memory(MODEL, EP, shape, tokens), 10**9) == 0
