"""Reading config.json: every family to the last parameter, every way such a file can be wrong to one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.base.errors import InputError
from moeplan.specs.catalog import MODELS_FOLDER
from moeplan.specs.models import ModelSpec
from moeplan.specs.models.config import read_config

# Small configurations of every family with the parameters that transformers makes of them.
CASES = json.loads((Path(__file__).parent / "specs_families.json").read_text(encoding="utf-8"))["cases"]
MIXTRAL = json.loads((MODELS_FOLDER / "mixtral-8x7b.json").read_text(encoding="utf-8"))


def read(data: dict[str, Any]) -> ModelSpec:
    return read_config(data, "m", "config.json")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["config"]["model_type"])
def test_family_counts_exactly(case: dict[str, Any]) -> None:
    assert read(case["config"]).total_parameters == case["num_parameters"]


def test_an_unknown_family_is_read_by_its_keys() -> None:
    assert read({**MIXTRAL, "model_type": "brand_new_moe"}).total_parameters == read(MIXTRAL).total_parameters


@pytest.mark.parametrize("key", ["text_config", "language_config", "llm_config"])
def test_nested_text_models(key: str) -> None:
    nested = {
        "model_type": "mixtral_vl",
        "vision_config": {"hidden_size": 3},
        key: {**MIXTRAL, "model_type": "mixtral_text"},
    }
    assert read(nested).total_parameters == read(MIXTRAL).total_parameters


def test_absent_and_null_optional_keys_mean_the_same() -> None:
    null = {**MIXTRAL, "head_dim": None, "num_key_value_heads": None}
    absent = {key: value for key, value in MIXTRAL.items() if key != "num_key_value_heads"}
    assert read(null) == read(absent)
    assert read(null).attention.num_kv_heads == 32 and read(null).attention.kind == "mha"


LAYERS = {"num_hidden_layers": 6}


@pytest.mark.parametrize(
    ("keys", "moe_layers"),
    [
        ({}, (0, 1, 2, 3, 4, 5)), ({"first_k_dense_replace": 2}, (2, 3, 4, 5)), ({"num_dense_layers": 1}, (1, 2, 3, 4, 5)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)), ({"moe_layer_freq": [0, 1, 1, 0, 1, 0]}, (1, 2, 4)),
        ({"decoder_sparse_step": 2}, (1, 3, 5)), ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
        ({"expert_layer_period": 3, "expert_layer_offset": 1}, (1, 4)), ({"interleave_moe_layer_step": 3}, (2, 5)),
        ({"moe_layers": [4, 0]}, (0, 4)), ({"num_sparse_decoder_layers": 2}, (1, 4)),
        ({"mlp_layer_types": ["dense", "sparse"] * 3}, (1, 3, 5)), ({"moe_layer_start_index": 2}, (2, 3, 4, 5)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 4, "moe_layer_interval": 2}, (1, 3)),
        ({"moe_layer_start_index": 3, "moe_layer_end_index": -1}, (3, 4, 5)),
    ],
)  # fmt: skip
def test_which_layers_have_experts(keys: dict[str, Any], moe_layers: tuple[int, ...]) -> None:
    assert read({**MIXTRAL, **LAYERS, **keys}).moe_layers == moe_layers


@pytest.mark.parametrize(
    ("keys", "sliding", "recurrent"),
    [
        ({}, (), ()), ({"sliding_window": 64}, (0, 1, 2, 3, 4, 5), ()), ({"sliding_window": 0}, (), ()),
        ({"sliding_window": 64, "use_sliding_window": False}, (), ()),
        ({"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 3}, (0, 2, 4), ()),
        ({"layer_types": ["linear_attention", "full_attention"] * 3, "mamba_d_state": 4}, (), (0, 2, 4)),
        ({"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 4}, (), (0, 2, 3, 5)),
        ({"model_type": "minimax", "attn_type_list": [0, 0, 1] * 2}, (), (0, 1, 3, 4)),
        ({"full_attention_interval": 3, "linear_num_key_heads": 2}, (), (0, 1, 3, 4)),
    ],
)  # fmt: skip
def test_kinds_of_layers(keys: dict[str, Any], sliding: tuple[int, ...], recurrent: tuple[int, ...]) -> None:
    model = read({**MIXTRAL, **LAYERS, **keys})
    assert (model.sliding_layers, model.recurrent_layers) == (sliding, recurrent)
    assert (model.sliding_window is None) == (not sliding)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "4096"}, "hidden_size = '4096': input should be a valid integer"),
        ({"hidden_size": 4096.5}, "hidden_size = 4096.5: input should be a valid integer"),
        ({"hidden_size": True}, "hidden_size = True: input should be a valid integer"),
        ({"num_local_experts": 0}, "greater than or equal to 1"),
        ({"num_local_experts": None}, "num_local_experts = '(absent)'"),
        ({"encoder_layers": 2**30, "is_encoder_decoder": True}, "encoder_layers = 1073741824: input should be less than or equal to 4096"),
        ({"num_hidden_layers": 10**9}, "less than or equal to 4096"), ({"vocab_size": -5}, "vocab_size = -5"),
        ({"model_type": None}, "not the name of a model family"), ({"model_type": 5}, "not the name of a model family"),
        ({"model_type": "arctic"}, "model_type = 'arctic': a dense stack runs beside its experts"),
        ({"model_type": "doge"}, "model_type = 'doge': its experts are pairs of vectors"),
        ({"n_layers": 31}, "n_layers = 31: contradicts num_hidden_layers = 32"),
        ({"layer_types": ["wavelet"] * 32}, "layer_types = ['wavelet']: kinds of layers that are not known"),
        ({"num_experts_per_tok": 9}, "top_k = 9: more than the 8 experts"),
        ({"num_experts_per_tok": [2, 4]}, "differs between layers"),
        ({"num_key_value_heads": 5}, "does not divide the 32 heads"),
        ({"num_attention_heads": 2**20, "num_key_value_heads": 1}, "more heads"),
        ({"moe_layers": [99]}, "moe_layers"), ({"decoder_sparse_step": 0}, "no layer has routed experts"),
        ({"layer_types": ["mamba"] * 32}, "unknown kind"), ({"kv_lora_rank": 64}, "without a head width"),
        ({"intermediate_size": None}, "the key is needed"), ({"text_config": [1]}, "text_config = [1]: not a table"),
        ({"intermediate_size": None, "moe_intermediate_size": 5, "first_k_dense_replace": 1}, "some layers are dense"),
    ],
)  # fmt: skip
def test_wrong_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read({**MIXTRAL, **change})
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_configuration_of_another_kind_of_model() -> None:
    with pytest.raises(InputError, match=r"num_local_experts = '.absent.'"):
        read({key: value for key, value in MIXTRAL.items() if "expert" not in key})


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-3, 40), max_size=40), st.lists(st.text(max_size=9), max_size=40),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2), st.integers(0, 8), st.integers(0, 300),
)  # fmt: skip
# Keys of all families together, so that mutations meet each other.
KEYS = sorted({key for case in CASES for key in case["config"]} | {"text_config", "attn_type_list", "mlp_layer_types"})


@settings(max_examples=examples(400))
@given(
    case=st.sampled_from(CASES),
    changes=st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=4),
    drop=st.sets(st.sampled_from(KEYS), max_size=2),
)
def test_mutations_read_or_say_why_not(case: dict[str, Any], changes: dict[str, Any], drop: set[str]) -> None:
    data = {key: value for key, value in copy.deepcopy(case["config"]).items() if key not in drop} | changes
    try:
        model = read(data)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert model.total_parameters > 0 and model.kv_bytes(100) >= 0
