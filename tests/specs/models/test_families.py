"""Families of models against transformers' classes: every class it has, as it comes and with drawn sizes; and the page that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark_modules import benchmark_module
from long_runs import examples
from moeplan.base.errors import InputError
from moeplan.specs.models import ModelSpec
from moeplan.specs.models.config import read_config
from moeplan.specs.models.config.families import FAMILIES, REFUSED
from moeplan.specs.models.load import list_models, load_model

CASES = json.loads((Path(__file__).parent / "model_families.json").read_text(encoding="utf-8"))["cases"]
PAGE = benchmark_module("models_page")
# Of Inkling 2, the dynamic convolutions and clips of its attention are counted roughly: at most this share of a small model.
ROUGH = {"inkling2_text": 0.0005, "inkling2": 0.0005}
REFUSED_CLASSES = {"ernie4_5_vl_moe": "model_type"}


def kind(case: dict[str, Any]) -> str:
    return str(case["config"]["model_type"])


@pytest.mark.parametrize("name", sorted({kind(case) for case in CASES}))
def test_classes_count_exactly(name: str) -> None:
    """Each class has the parameters that the reader counts, or its configuration is refused by the key."""
    for case in (case for case in CASES if kind(case) == name):
        if name in REFUSED_CLASSES:
            with pytest.raises(InputError) as caught:
                read_config(case["config"], "m", "config.json")
            assert caught.value.field == f"config.json: {REFUSED_CLASSES[name]}"
            continue
        model = read_config(case["config"], "m", "config.json")
        has = case["num_parameters"] - PAGE.surplus(model)
        assert abs(model.total_parameters - has) <= ROUGH.get(name, 0) * has


def test_at_least_sixty_classes_are_covered() -> None:
    counted = {kind(case) for case in CASES} - set(REFUSED_CLASSES)
    assert len(counted) >= 60 and sum(case["drawn"] for case in CASES) >= 90
    assert set(FAMILIES) & set(REFUSED) == set()


def test_the_page_is_what_the_reader_says() -> None:
    assert PAGE.PAGE.read_text(encoding="utf-8") == PAGE.page()


# Names that round to one or two digits, by up to 4 %; test_models.py holds them to what transformers' classes count.
ROUNDED = (
    "deepseek-v4-pro",
    "ernie-4.5-21b-a3b",
    "gemma-4-26b-a4b",
    "kimi-k2",
    "kimi-k2.5",
    "kimi-linear-48b-a3b",
    "ling-mini-2.0",
)


@pytest.mark.parametrize("name", sorted(PAGE.PUBLISHED))
def test_bundled_models_have_their_published_size(name: str) -> None:
    """Within 1.5 %, or what a rounded name, a vision tower or a draft layer explains."""
    total, active, _ = PAGE.PUBLISHED[name]
    found = load_model(name)
    slack = 0.04 if name in ROUNDED else 0.015
    assert found.total_parameters / 1e9 == pytest.approx(total, rel=slack)
    if active is not None:
        # Embeddings count whole here; names and cards round, and leave out one or both.
        embeddings = found.embedding_parameters / 1e9
        assert active - 0.5 <= found.active_parameters / 1e9 <= active + max(embeddings, 0.1 * active) + 0.6


# --- the cache of a context, by hand ----------------------------------------------------------------------------------

CONTEXT = 131_072


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # 9 of 48 layers see all with 4 heads of 192 + 128; 39 see 128 tokens with 8 heads.
        ("mimo-v2-flash", 9 * CONTEXT * 4 * 320 + 39 * 128 * 8 * 320),
        # 5 of 30 layers: 2 heads of 512, keys and values; 25 with 8 heads of 256 and a window of 1,024.
        ("gemma-4-26b-a4b", 5 * CONTEXT * 2 * 2 * 512 + 25 * 1024 * 8 * 2 * 256),
        # 6 attention layers; 23 states of 64 heads, 64 by 128, and three columns of 6,144 channels.
        ("nemotron-3-nano", 6 * CONTEXT * 2 * 2 * 128 + 23 * (64 * 64 * 128 + 3 * 6144)),
        # Windows of 128 in all 43; 21 keep an entry and an index entry for 4 tokens, 20 an entry for 128.
        ("deepseek-v4-flash", 43 * 128 * 512 + 21 * CONTEXT // 4 * (512 + 128) + 20 * CONTEXT // 128 * 512),
        # 12 layers see all, 36 a chunk of 8,192.
        ("llama-4-scout", (12 * CONTEXT + 36 * 8192) * 8 * 2 * 128),
        # 10 of 80 layers are softmax; 70 keep 64 states of 128 by 128.
        ("minimax-text-01", 10 * CONTEXT * 8 * 2 * 128 + 70 * 64 * 128 * 128),
        # 12 layers with 2 heads of 256 and an index of one head of 128 for 4 tokens; 36 delta nets of 48 heads.
        ("qwen3.8-flash-next", 12 * CONTEXT * (2 * 2 * 256 + 128 // 4) + 36 * (48 * 128 * 128 + 3 * (2 * 16 * 128 + 48 * 128))),
    ],
)  # fmt: skip
def test_cache_of_a_context_by_hand(name: str, values: int) -> None:
    assert load_model(name).kv_bytes(CONTEXT) == 2 * values


@given(name=st.sampled_from(list_models()), first=st.integers(10**5, 10**6), more=st.integers(1, 10**4))
def test_a_long_context_grows_by_the_bytes_of_a_token(name: str, first: int, more: int) -> None:
    """Once windows are full, the cache grows by `kv_bytes_per_token` a token, to whole compressed entries."""
    model = load_model(name)
    grown = model.kv_bytes(first + more) - model.kv_bytes(first)
    entries = sum(
        2 * attention.kv_values_per_token + 2 * attention.index_values
        for attention in map(model.attention_of, range(model.num_layers))
        if attention is not None and (attention.tokens_per_entry > 1 or attention.tokens_per_index > 1)
    )
    assert abs(grown - more * model.kv_bytes_per_token()) <= entries


# --- odd layers --------------------------------------------------------------------------------------------------------


def test_layers_without_mixer_or_mlp() -> None:
    model = load_model("nemotron-3-nano")
    kinds = [(model.attention_of(layer) is not None, model.is_recurrent(layer)) for layer in range(model.num_layers)]
    assert [kinds.count(kind) for kind in ((True, False), (False, True), (False, False))] == [6, 23, 23]
    assert model.dense_parameters(5) == 2688 * 128 * (32 + 2 + 2 + 32) + 2688  # attention and one norm, no MLP
    assert model.dense_parameters(1) == 2 * 2688 * 3712 + 128 * 2688 + 2688  # a shared expert, the router, one norm
    assert model.attended_tokens(1, 1000) == 0 and model.attended_tokens(5, 1000) == 1000


def test_experts_that_work_on_a_narrower_vector() -> None:
    model = load_model("nemotron-3-super")
    assert model.expert_hidden == 1024 and model.expert_parameters == 2 * 1024 * 2688
    into_and_out = 2 * 4096 * 1024
    assert model.dense_matrix_parameters(1) == into_and_out + 2 * 4096 * 5376


def test_what_sparse_attention_reads_is_bounded() -> None:
    model = load_model("deepseek-v4-flash")
    assert model.attended_tokens(2, 10**6) == 128 + 512 and model.attended_tokens(3, 10**6) == 128 + 10**6 // 128
    assert model.attended_tokens(0, 10**6) == 128


@given(name=st.sampled_from(list_models()), share=st.floats(0.2, 1))
def test_the_first_layers_of_a_model(name: str, share: float) -> None:
    model = load_model(name)
    least = model.moe_layers[0] + 1
    first = model.first_layers(max(least, round(share * model.num_layers)))
    assert [first.kind_of(n)[:3] for n in range(first.num_layers)] == [
        model.kind_of(n)[:3] for n in range(first.num_layers)
    ]
    assert [first.dense_parameters(n) for n in range(first.num_layers)] == [
        model.dense_parameters(n) for n in range(first.num_layers)
    ]


# --- damaged configurations --------------------------------------------------------------------------------------------

JUNK = st.one_of(
    st.booleans(), st.integers(-3, 2**40), st.floats(), st.text(max_size=5), st.lists(st.integers(-3, 40), max_size=9),
    st.lists(st.text(max_size=9), max_size=9), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2), st.integers(0, 300),
)  # fmt: skip


@settings(max_examples=examples(150))
@given(data=st.data())
def test_mutations_of_any_family_read_or_say_why_not(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(CASES))["config"]
    inner = case.get("text_config", case)
    keys = st.sampled_from(sorted(inner))
    dropped = data.draw(st.sets(keys, max_size=2))
    changed = {key: value for key, value in inner.items() if key not in dropped}
    changed |= data.draw(st.dictionaries(keys, JUNK, max_size=3))
    try:
        model: ModelSpec = read_config(
            {**case, "text_config": changed} if inner is not case else changed, "m", "config.json"
        )
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert model.total_parameters > 0 and model.kv_bytes(100) >= 0


def test_kimi_linear_as_published() -> None:
    """Layers are counted from one in a table of their own; 48 billion parameters, of which 3 meet a token."""
    full = [4, 8, 12, 16, 20, 24, 27]
    table = {"full_attn_layers": full, "kda_layers": [n for n in range(1, 28) if n not in full], "head_dim": 128, "num_heads": 32,
             "short_conv_kernel_size": 4}  # fmt: skip
    config = {
        "model_type": "kimi_linear", "hidden_size": 2304, "num_hidden_layers": 27, "vocab_size": 163_840, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 72, "num_experts": 256, "num_experts_per_token": 8, "moe_intermediate_size": 1024,
        "intermediate_size": 9216, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "num_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_expert_group": 1,
        "topk_group": 1, "mla_use_nope": True, "moe_renormalize": True, "model_max_length": 1_048_576, "linear_attn_config": table,
    }  # fmt: skip
    model = read_config(config, "m", "config.json")
    assert model.total_parameters / 1e9 == pytest.approx(48, rel=0.025) and 3 < model.active_parameters / 1e9 < 3.6
    assert [n + 1 for n in range(27) if not model.is_recurrent(n)] == full
    assert model.kv_bytes_per_token(1) == 7 * (512 + 64)
    for key, value in (("use_full_rank_gate", True), ("rank", 3)):
        with pytest.raises(InputError, match="linear_attn_config"):
            read_config({**config, "linear_attn_config": {**table, key: value}}, "m", "config.json")
    with pytest.raises(InputError, match="routed_expert_hidden_size = 3584"):
        read_config({**config, "routed_expert_hidden_size": 3584}, "m", "config.json")
