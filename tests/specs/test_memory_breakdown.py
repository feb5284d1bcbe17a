"""The memory breakdown: items that add up, budgets that leave what they say, an honest "does not fit"."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import DoesNotFit, InputError
from moeplan.specs.machines.engines import engines, load_engine
from moeplan.specs.memory import (
    LAYOUT_WORDS,
    LAYOUTS,
    MemoryNeeds,
    activation_bytes,
    break_down_memory,
    cache_budget_bytes,
    cache_budget_experts,
    kv_bytes_of,
    require_fits,
)
from moeplan.specs.models import ModelSpec, quantised_as, weight_format
from moeplan.specs.models.load import load_model

MIXTRAL, OSS = load_model("mixtral-8x7b"), load_model("gpt-oss-20b")
GIB = 2**30


def needs(**changes: object) -> MemoryNeeds:
    return dataclasses.replace(MemoryNeeds(model=OSS, expert_format=weight_format("mxfp4")), **changes)  # type: ignore[arg-type]


def test_a_whole_memory_breakdown() -> None:
    memory_breakdown = break_down_memory(
        needs(context_tokens=1000, concurrency=2, staging_experts=4, runtime_bytes=GIB), cached_experts=96
    )
    expert = 13_236_480  # 24,883,200 weights of 4.25 bits and 8,640 biases of 16
    assert OSS.expert_bytes(weight_format("mxfp4")) == expert
    layer_token = 2 * 8 * 64 * 2
    assert {item.name: item.num_bytes for item in memory_breakdown.items} == {
        "runtime": GIB,
        "embeddings": 2 * 201_088 * 2880 * 2,
        "dense weights": OSS.dense_bytes(weight_format(16)) - 2 * 201_088 * 2880 * 2,
        "kv cache": 2 * 12 * (128 + 1000) * layer_token,
        "activations": 2 * (2 * (4 * 2880 + 2 * 4 * 2880)) + 2 * 201_088 * 4,
        "staging": 4 * expert,
        "resident experts": 96 * expert,
        "expert store": 24 * 32 * expert,
    }
    assert memory_breakdown.host_bytes == 24 * 32 * expert == memory_breakdown.num_bytes("expert store")
    assert memory_breakdown.device_bytes == sum(item.num_bytes for item in memory_breakdown.items[:-1])
    assert (
        memory_breakdown.to_dict()["device_bytes"] == memory_breakdown.device_bytes
        and memory_breakdown.num_bytes("nothing") == 0
    )


def test_a_resident_model_needs_no_host() -> None:
    memory_breakdown = break_down_memory(needs(), cached_experts=OSS.num_routed_experts, offloaded=False)
    assert memory_breakdown.host_bytes == 0
    whole = OSS.dense_bytes(weight_format(16)) + OSS.num_routed_experts * OSS.expert_bytes(weight_format("mxfp4"))
    assert memory_breakdown.device_bytes == whole + memory_breakdown.num_bytes("kv cache") + memory_breakdown.num_bytes(
        "activations"
    )


def test_replicas_are_listed_apart() -> None:
    memory_breakdown = break_down_memory(needs(), cached_experts=10, replicas=3)
    assert memory_breakdown.num_bytes("replicas") == 3 * OSS.expert_bytes(weight_format("mxfp4"))
    assert all(item.name != "replicas" for item in break_down_memory(needs(), cached_experts=10).items)


def test_quantised_dense_layers() -> None:
    """Mixtral-offloading keeps attention in 4 bits, embeddings, routers and norms in 16 (arXiv 2312.17238 §3.3)."""
    four = break_down_memory(MemoryNeeds(model=MIXTRAL, expert_format=weight_format(2), dense_format=weight_format(4)))
    attention = 32 * 2 * (4096 * 4096 + 4096 * 1024)
    rest = 32 * (2 * 4096 + 8 * 4096) + 4096
    assert four.num_bytes("dense weights") == weight_format(4).num_bytes(attention) + 2 * rest
    assert four.num_bytes("embeddings") == 2 * 32_000 * 4096 * 2


def test_mixtral_offloading_fits_twelve_gigabytes_with_two_experts_a_layer() -> None:
    """As published for the RTX 3060: k = 2 of 8 experts a layer, four staging buffers (arXiv 2312.17238 §4)."""
    plan = MemoryNeeds(
        model=MIXTRAL, expert_format=weight_format(2), dense_format=weight_format(4), context_tokens=2048,
        staging_experts=4, runtime_bytes=GIB // 2,
    )  # fmt: skip
    require_fits(break_down_memory(plan, cached_experts=2 * 32), device_bytes=12 * GIB)
    assert cache_budget_experts(12 * GIB, plan) >= 2 * 32


@given(
    budget=st.integers(0, 80 * GIB), context=st.integers(1, 10**5), concurrency=st.integers(1, 64),
    staging=st.integers(0, 16), fmt=st.sampled_from(["16", "8", "4", "mxfp4", "2"]), least=st.integers(0, 8),
)  # fmt: skip
def test_what_is_left_is_exactly_what_a_cache_may_use(
    budget: int, context: int, concurrency: int, staging: int, fmt: str, least: int
) -> None:
    plan = needs(
        expert_format=weight_format(fmt), context_tokens=context, concurrency=concurrency, staging_experts=staging
    )
    each = OSS.expert_bytes(plan.expert_format)
    try:
        left = cache_budget_bytes(budget, plan, least_experts=least)
    except DoesNotFit as error:
        assert cache_budget_bytes(budget + error.missing_bytes, plan, least_experts=least) == least * each
        assert error.missing_bytes > 0 and error.exit_status == 3
    else:
        empty = break_down_memory(plan)
        assert empty.device_bytes + left == budget and left >= least * each
        count = cache_budget_experts(budget, plan, least_experts=least)
        require_fits(break_down_memory(plan, cached_experts=count), device_bytes=budget)
        if count < OSS.num_routed_experts:
            with pytest.raises(DoesNotFit):
                require_fits(break_down_memory(plan, cached_experts=count + 1), device_bytes=budget)


def test_the_message_says_what_is_missing() -> None:
    plan = needs(runtime_bytes=0)
    fixed = break_down_memory(plan).device_bytes
    with pytest.raises(DoesNotFit) as caught:
        cache_budget_bytes(fixed, plan)
    assert str(caught.value) == (
        f"does not fit: gpt-oss-20b needs {fixed} bytes beside its experts and 13236480 for 1, of {fixed}; "
        "13236480 bytes are missing (12.62 MiB)"
    )


def test_host_memory_is_checked_where_given() -> None:
    memory_breakdown = break_down_memory(needs(), cached_experts=1)
    require_fits(memory_breakdown, device_bytes=memory_breakdown.device_bytes, host_bytes=memory_breakdown.host_bytes)
    with pytest.raises(DoesNotFit, match=r"host memory.* 5 bytes are missing"):
        require_fits(
            memory_breakdown, device_bytes=memory_breakdown.device_bytes, host_bytes=memory_breakdown.host_bytes - 5
        )


def test_activations_grow_with_the_pass() -> None:
    fmt = weight_format(16)
    small, large = activation_bytes(OSS, 1, 1, fmt), activation_bytes(OSS, 4096, 1, fmt)
    assert large - small == 4095 * 2 * (4 * 2880 + 2 * 4 * 2880)
    assert activation_bytes(MIXTRAL, 1, 1, fmt) == 2 * (4 * 4096 + 2 * 2 * 14_336) + 32_000 * 4


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"context_tokens": 0}, "context_tokens"), ({"concurrency": 0}, "concurrency"),
        ({"staging_experts": -1}, "staging_experts"),
        ({"runtime_bytes": -1}, "runtime_bytes"), ({"pass_tokens": 0}, "pass_tokens"),
        ({"kv_bytes_per_value": 0}, "kv_bytes_per_value"),
        ({"encoder_tokens": -1}, "encoder_tokens"),
    ],
)  # fmt: skip
def test_negative_needs_are_refused(change: dict[str, int], field: str) -> None:
    with pytest.raises(InputError) as caught:
        needs(**change)
    assert caught.value.field == field


@pytest.mark.parametrize("counts", [{"cached_experts": -1}, {"replicas": -1}])
def test_negative_counts_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(InputError, match="below zero"):
        break_down_memory(needs(), **counts)


QWEN = load_model("qwen3-30b-a3b")


def of_ggml(model: ModelSpec, quant: str, **changes: object) -> MemoryNeeds:
    experts, dense = quantised_as(quant, None, model)
    return dataclasses.replace(
        MemoryNeeds(model=model, expert_format=experts, dense_format=dense, layout="ggml", pass_tokens=512), **changes
    )  # type: ignore[arg-type]


def test_a_breakdown_is_the_one_that_llama_cpp_prints() -> None:
    """`llama-server` on Qwen3-30B-A3B Q4_K_M and gpt-oss-20b at 512 tokens a micro-batch prints these buffers, in MiB."""
    found = break_down_memory(of_ggml(QWEN, "Q4_K_M"), cached_experts=QWEN.num_routed_experts, offloaded=False)
    assert found.num_bytes("token embedding") / 2**20 == pytest.approx(166.92, abs=0.01)
    assert found.host_bytes == found.num_bytes("token embedding")
    assert found.num_bytes("activations") / 2**20 == pytest.approx(304.75, abs=0.01)
    oss = break_down_memory(of_ggml(OSS, "MXFP4_MOE"), cached_experts=OSS.num_routed_experts, offloaded=False)
    assert oss.num_bytes("activations") / 2**20 == pytest.approx(398.38, rel=0.02)


def test_windows_have_room_for_a_micro_batch_and_caches_for_whole_blocks() -> None:
    found = break_down_memory(of_ggml(OSS, "MXFP4_MOE", context_tokens=1000), offloaded=False)
    assert found.num_bytes("kv cache") == 12 * (768 + 1024) * 2 * 8 * 64 * 2
    assert found.num_bytes("states") == 0


def test_states_keep_their_precision_whatever_keys_are_kept_in() -> None:
    """Qwen3.5 of 27 B prints 149.62 MiB of states a request; those of this model by the same rule."""
    model = load_model("qwen3.6-35b-a3b")
    recurrent = 30 * (32 * 128 * 128 + 3 * 8192)
    for kept in (2.0, 34 / 32):
        found = break_down_memory(
            of_ggml(model, "Q4_K_M", kv_bytes_per_value=kept, context_tokens=1024), offloaded=False
        )
        assert found.num_bytes("states") == 4 * recurrent
        assert found.num_bytes("kv cache") == 10 * 1024 * 2 * 2 * 256 * kept
        assert model.kv_bytes(1024, kept) == 10 * 1024 * 2 * 2 * 256 * kept + 2 * recurrent


@given(
    quant=st.sampled_from(["Q4_K_M", "Q8_0", "IQ2_M"]),
    name=st.sampled_from(["qwen3-30b-a3b", "gemma-4-26b-a4b", "qwen3.8-flash-next"]),
)
def test_where_things_lie_changes_no_weight(quant: str, name: str) -> None:
    model = load_model(name)
    needs = of_ggml(model, quant)
    plain = break_down_memory(dataclasses.replace(needs, layout="plain"), offloaded=False)
    found = break_down_memory(needs, offloaded=False)
    twice = needs.dense_format.head_bytes(model.vocab_size * model.hidden_size) if model.tied_embeddings else 0
    weights = ("embeddings", "dense weights", "token embedding")
    assert sum(found.num_bytes(one) for one in weights) == sum(plain.num_bytes(one) for one in weights) + twice


def test_copied_matrices_need_a_buffer() -> None:
    needs = of_ggml(OSS, "MXFP4_MOE", uploads=True, pass_tokens=64)
    layer = OSS.num_experts * OSS.expert_bytes(needs.expert_format)
    one, all_three = (
        break_down_memory(dataclasses.replace(needs, layout=layout)).num_bytes("activations") for layout in ("ggml", "ggml-layers")
    )  # fmt: skip
    assert all_three - one == pytest.approx(layer * 2 / 3, abs=2)
    with pytest.raises(InputError, match="layout"):
        of_ggml(OSS, "MXFP4_MOE", layout="elsewhere")


@pytest.mark.parametrize(
    ("name", "context", "kinds", "mib"),
    [
        ("deepseek-v3", 16384, "f16", 1098.0), ("qwen3-30b-a3b", 4096, "f16", 384.0), ("gpt-oss-20b", 4096, "f16", 96.0 + 18.0),
        ("deepseek-v3", 16384, "q8_0", 1098 * 34 / 64), ("qwen3-30b-a3b", 4096, "q8_0/q4_0", 384 * (34 + 18) / 128),
        ("deepseek-v3", 16384, "fp8_ds_mla", 61 * 16384 * 656 / 2**20), ("deepseek-v3", 16384, "q8_0/q4_0", 1098 * 34 / 64),
    ],
)  # fmt: skip
def test_caches_are_those_that_engines_print(name: str, context: int, kinds: str, mib: float) -> None:
    """llama.cpp's own lines for its caches (latents, grouped heads, 768 cells of windows), and vLLM's 656 bytes for a latent."""
    model = load_model(name)
    needs = of_ggml(model, "Q8_0", context_tokens=context, kv_bytes_per_value=kv_bytes_of(kinds, model))
    assert break_down_memory(needs, offloaded=False).num_bytes("kv cache") / 2**20 == pytest.approx(mib, rel=1e-6)


@pytest.mark.parametrize("kinds", ["q9_0", "f16/", "/f16", "f16/f16/f16", ""])
def test_other_cache_types_are_refused(kinds: str) -> None:
    with pytest.raises(InputError, match="--kv-type"):
        kv_bytes_of(kinds, QWEN)


def test_every_engine_says_where_things_lie() -> None:
    assert set(LAYOUT_WORDS) == set(LAYOUTS)
    assert {one.memory_layout for one in engines().values()} <= set(LAYOUTS)
    assert load_engine("llama.cpp").memory_layout == "ggml" and load_engine("vllm").memory_layout == "plain"
