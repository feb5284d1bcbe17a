"""Keys of configurations: read, harmless, or refused by name where they may shape layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.specs.catalog import MODELS_FOLDER
from moeplan.specs.models.config import read_config
from moeplan.specs.models.load import load_model

QWEN = json.loads((MODELS_FOLDER / "qwen3-30b-a3b.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("moe_latent_size", 1024), ("num_routed_groups", 4), ("kv_compress_rank", 64), ("hybrid_layer_pattern", [0, 1] * 24),
        ("attention_pattern", "MMM*"), ("moe_layer_ids_list", [1, 2]), ("swa_layers", [1, 3]), ("num_kv_shared_layers", 20),
        ("ffn_expand_ratio", 1.5), ("adapter_dim", 64), ("layer_period", 3), ("mixer_config", {"state_dim": 16}),
        ("num_meta_experts", 2), ("expert_layout", "abab"), ("block_types", ["a", "b"]), ("linear_layers", 12),
    ],
)  # fmt: skip
def test_a_key_nobody_knows_that_may_shape_layers_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        read_config({**QWEN, key: value}, "m", "config.json")
    line = str(caught.value)
    assert line.startswith(f"config.json: {key} = ") and len(line.splitlines()) == 1


HARMLESS = {
    "pad_token_id": 5, "max_position_embeddings": 99999, "rope_theta": 1e6, "rope_scaling": {"factor": 4, "type": "yarn"},
    "router_aux_loss_coef": 0.1, "num_beams": 1, "id2label": {"0": "LABEL_0"}, "initializer_range": 0.2, "head_drop": 0.1,
    "num_nextn_predict_layers": 1, "transformers_version": "9.9", "quantization_status": None, "routed_scaling_factor": 2.5,
    "num_latent_things": 0, "use_a_layer_norm": True, "mtp_layer_types": ["a"], "vision_layers": 3, "hidden_act": "silu",
}  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(HARMLESS)), st.none(), max_size=6))
def test_keys_that_change_no_size_change_nothing(drawn: dict[str, Any]) -> None:
    plain = read_config(QWEN, "m", "config.json")
    more = read_config({**QWEN, **{key: HARMLESS[key] for key in drawn}}, "m", "config.json")
    assert (more.total_parameters, more.kv_bytes(9999)) == (plain.total_parameters, plain.kv_bytes(9999))


def test_towers_beside_a_language_model_are_left_out() -> None:
    nested = {"model_type": "x_vl", "vision_config": {"num_layers": 3}, "projector_width": 7, "text_config": QWEN}
    assert read_config(nested, "m", "c").total_parameters == read_config(QWEN, "m", "c").total_parameters


def test_numbers_without_end_are_read_past_and_never_taken_for_a_size(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({**QWEN, "time_step_limit": [0.0, float("inf")]}), encoding="utf-8")
    assert load_model(path).total_parameters == read_config(QWEN, "m", "c").total_parameters
    for value in (float("inf"), float("nan")):
        path.write_text(json.dumps({**QWEN, "hidden_size": value}), encoding="utf-8")
        with pytest.raises(InputError, match="hidden_size = "):
            load_model(path)


# --- what must be said ---------------------------------------------------------------------------------------------------


def test_which_layers_have_a_window_must_be_said() -> None:
    """Only where a family's code puts a window everywhere may a configuration leave it unsaid: guessing changed caches 200-fold."""
    plain = {key: value for key, value in QWEN.items() if "window" not in key}
    unknown = {**plain, "model_type": "brand_new_moe", "sliding_window": 128}
    with pytest.raises(InputError, match="sliding_window = 128 is set, and no key says which layers have it"):
        read_config(unknown, "m", "config.json")
    words = ["sliding_attention"] * 47 + ["full_attention"]
    model = read_config({**unknown, "layer_types": words}, "m", "config.json")
    assert len(model.sliding_layers) == 47 and model.kv_bytes(10_000) < 10_000 * 3 * model.kv_bytes_per_token()
    # A window that no context fills is none.
    wide = read_config({**unknown, "sliding_window": 10**6}, "m", "config.json")
    assert wide.sliding_layers == () and wide.kv_bytes(10_000) == 10_000 * model.kv_bytes_per_token() * 48


@pytest.mark.parametrize("key", ["num_kv_heads", "n_kv_heads", "num_query_groups", "kv_n_heads"])
def test_grouped_heads_under_other_names(key: str) -> None:
    renamed = {(key if name == "num_key_value_heads" else name): value for name, value in QWEN.items()}
    assert read_config(renamed, "m", "c").kv_bytes(5) == read_config(QWEN, "m", "c").kv_bytes(5)


def test_a_default_gives_way_to_another_name_of_the_same_thing() -> None:
    config = {
        **QWEN,
        "model_type": "switch_transformers",
        "num_decoder_layers": 4,
        "num_selected_experts": 3,
        "is_encoder_decoder": False,
    }
    config = {key: value for key, value in config.items() if key not in ("num_experts_per_tok", "num_hidden_layers")}
    assert read_config(config, "m", "c").top_k == 3
