"""How checkpoints store experts: what quantisers write, its bytes to the bit, and what they leave out."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.specs.catalog import MODELS_FOLDER
from moeplan.specs.models import ModelSpec, weight_format
from moeplan.specs.models.config import read_config
from moeplan.specs.models.load import load_model

QWEN = {
    key: value
    for key, value in json.loads((MODELS_FOLDER / "qwen3-30b-a3b.json").read_text(encoding="utf-8")).items()
    if key != "quantization_config"
}


def read(table: dict[str, Any] | None, key: str = "quantization_config", name: str = "m", **more: Any) -> ModelSpec:
    return read_config({**QWEN, **more, **({} if table is None else {key: table})}, name, "config.json")


def bits(model: ModelSpec) -> Fraction:
    """Return the bits of one weight of an expert, scales and zero points included."""
    return weight_format(model.native_bits).bits_per_weight


def compressed(weights: dict[str, Any], layout: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, **more}


def quark(dtype: str, scheme: str, group: int | None = None, **more: Any) -> dict[str, Any]:
    weight = {"dtype": dtype, "qscheme": scheme, "group_size": group}
    return {"quant_method": "quark", "global_quant_config": {"weight": weight}, **more}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


@pytest.mark.parametrize(
    ("table", "per_weight"),
    [
        (compressed(INT4), 4 + Fraction(16, 32)), (compressed(INT4 | {"symmetric": False}), 4 + Fraction(16 + 4, 32)),
        (compressed({"num_bits": 8, "type": "int", "strategy": "channel"}, "int-quantized"), 8 + Fraction(16, 1316)),
        (compressed({"num_bits": 8, "type": "float", "strategy": "channel"}, "float-quantized"), 8 + Fraction(32, 1316)),
        (compressed({"num_bits": 8, "type": "float", "strategy": "tensor"}, "float-quantized"), 8 + Fraction(32, 2048 * 768)),
        (compressed({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}), 8 + Fraction(32, 16384)),
        (compressed({"num_bits": 4, "type": "float", "group_size": 16}, "nvfp4-pack-quantized"), Fraction(9, 2)),
        (compressed({"num_bits": 4, "type": "float", "group_size": 32}, "mxfp4-pack-quantized"), Fraction(17, 4)),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, Fraction(9, 2)),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8 + Fraction(32, 2048 * 768)),
        ({"quant_method": "modelopt_fp4", "quant_algo": "NVFP4"}, Fraction(9, 2)),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, 8 + Fraction(8, 32)),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, 4 + Fraction(16 + 4, 128)),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": False}, 4 + Fraction(16, 64)),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True}, 8 + Fraction(16 + 8, 32)),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 4 + Fraction(16 + 4, 1316)),
        ({"quant_method": "auto-round", "bits": 2, "group_size": 64}, 2 + Fraction(16 + 2, 64)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4 + Fraction(32, 64)),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
            4 + Fraction(8, 64) + Fraction(32, 16384),
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8 + Fraction(16, 1316)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + Fraction(32, 16384)),
        ({"quant_method": "fp8", "weight_block_size": [1, 128]}, 8 + Fraction(32, 128)),
        ({"quant_method": "fp8"}, 8 + Fraction(32, 2048 * 768)),
        ({"quant_method": "fbgemm_fp8"}, 8 + Fraction(32, 1316)), ({"quant_method": "mxfp4"}, Fraction(17, 4)),
        (quark("fp4", "per_group", 32), Fraction(17, 4)), (quark("fp8_e4m3", "per_tensor"), 8 + Fraction(32, 2048 * 768)),
        (quark("int4", "per_group", 128), 4 + Fraction(16, 128)), (quark("fp8_e4m3", "per_channel"), 8 + Fraction(32, 1316)),
        ({"group_size": 64, "bits": 4}, 4 + Fraction(32, 64)), ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, Fraction(17, 4)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}, Fraction(17, 4)),
    ],
)  # fmt: skip
def test_bits_of_a_weight(table: dict[str, Any], per_weight: Fraction) -> None:
    """A row's scale serves 3·2048·768 / (2·768 + 2048) = 1,316 weights of an expert on average."""
    assert bits(read(table)) == per_weight


def test_mlx_writes_its_table_under_a_key_of_its_own() -> None:
    assert bits(read({"group_size": 64, "bits": 8}, key="quantization")) == 8 + Fraction(1, 2)
    mixed = {"group_size": 64, "bits": 4, "model.layers.24.mlp.switch_mlp.gate_proj": {"bits": 6, "group_size": 64}}
    assert bits(read(mixed, key="quantization")) == 6 + Fraction(1, 2)


@pytest.mark.parametrize(
    ("table", "experts", "dense"),
    [
        (compressed(INT4, ignore=["lm_head", "re:.*self_attn.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]), "int4-g32", "16"),
        (compressed(INT4, ignore=["re:.*experts.*"]), "16", "int4-g32"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head", "*self_attn*"]}, "nvfp4", "16"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["self_attn"]}, "int4-g128-zero", "16"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {r"-:.*self_attn.*": {}}}, "int4-g128-zero", "16"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 64, "dynamic": {r".*experts.*": {"bits": 4}}}, "int4-g64-zero", "int8-g64-zero"),
        (quark("fp4", "per_group", 32, exclude=["*self_attn*", "lm_head", "*mlp.gate"]), "mxfp4", "16"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["gate*", "*router*", "*.self_attn.*"]}, "nvfp4", "16"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}, "mxfp4", "16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["gate", "lm_head"]}, "8", "8"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
            "model.layers.3.mlp.experts.7.gate_proj": {"quant_algo": "W4A8_AWQ", "group_size": 128},
            "model.layers.3.self_attn.q_proj": {"quant_algo": "FP8"}}}, "int4-g128", "fp8-g1572864"),
    ],
)  # fmt: skip
def test_modules_that_are_left_out_or_stored_otherwise(table: dict[str, Any], experts: str, dense: str) -> None:
    model = read(table)
    assert (model.native_bits, model.native_dense_bits) == (experts, dense)


@given(
    width=st.sampled_from([2, 3, 4, 8]), group=st.sampled_from([16, 32, 64, 128, 256]), zero=st.booleans(),
    method=st.sampled_from(["awq", "compressed-tensors"]),
)  # fmt: skip
def test_bytes_count_values_scales_and_zero_points(width: int, group: int, zero: bool, method: str) -> None:
    """An expert's matrices in bits: every value, a 16-bit scale for each group, a zero point as wide as a value."""
    if method == "awq":
        table = {"quant_method": "awq", "bits": width, "group_size": group, "zero_point": zero}
    else:
        table = compressed(INT4 | {"num_bits": width, "group_size": group, "symmetric": not zero})
    model, weights = read(table), 3 * 2048 * 768
    by_hand = weights * width + weights // group * (16 + (width if zero else 0))
    assert model.expert_bytes(weight_format(model.native_bits)) == -(-by_hand // 8)


@pytest.mark.parametrize(
    ("table", "named"),
    [
        (quark("fp6", "per_group", 32), "dtype = 'fp6'"), ({"quant_method": "quark"}, "global_quant_config"),
        ({"quant_method": "vptq"}, "quant_method = 'vptq'"), ({"bits": 4}, "quant_method = '(absent)'"),
        ({"quant_method": "awq", "bits": 99}, "bits = 99"), ({"quant_method": "gptq", "bits": "four"}, "bits = 'four'"),
        ({"quant_method": "gptq", "group_size": [1]}, "group_size = [1]"),
        ({"quant_method": "fp8", "weight_block_size": 5}, "weight_block_size"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        ({"quant_method": "modelopt", "quant_algo": "ROT13"}, "quant_algo = 'ROT13'"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit"),
        ({"quant_method": "awq", "modules_to_not_convert": 7}, "modules_to_not_convert"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(table: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as caught:
        read(table)
    assert named in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_name_that_states_a_format_counts_where_no_file_does() -> None:
    model = read(None, name="Some-30B-NVFP4")
    assert model.native_bits == "nvfp4" and "its name says nvfp4" in model.remarks[0]
    with pytest.raises(InputError, match="the name says awq and not in which groups"):
        read(None, name="Some-30B-AWQ")


def test_what_modelopt_writes_beside_the_configuration_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN), encoding="utf-8")
    beside = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["*self_attn*"]},
    }
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside), encoding="utf-8")
    model = load_model(tmp_path)
    assert (model.native_bits, model.native_dense_bits, model.remarks) == ("nvfp4", "16", ())
