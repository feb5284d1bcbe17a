"""Checkpoints of safetensors files: bytes as their headers state them, whatever the quantiser; one line for what is damaged."""

from __future__ import annotations

import dataclasses
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.specs.catalog import MODELS_FOLDER
from moeplan.specs.models import ModelSpec, weight_format
from moeplan.specs.models.config.safetensors.header import Tensor
from moeplan.specs.models.config.safetensors.stored import as_stored, is_expert
from moeplan.specs.models.load import list_models, load_model
from safetensors_files import Tensors, gpt_oss, header, num_bytes, qwen3_moe, write

QUANTISERS: dict[str, dict[str, Any]] = {
    "BF16": {}, "awq": {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "nvfp4": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
}  # fmt: skip


def config(name: str, **changes: Any) -> dict[str, Any]:
    return json.loads((MODELS_FOLDER / f"{name}.json").read_text(encoding="utf-8")) | changes  # type: ignore[no-any-return]


SMALL = config("qwen3-30b-a3b", num_hidden_layers=2, num_experts=8, vocab_size=512)


def total(model: ModelSpec) -> int:
    """Return what a prediction counts as weights."""
    experts = model.num_routed_experts * model.expert_bytes(weight_format(model.native_bits))
    return experts + model.dense_bytes(weight_format(model.native_dense_bits))


def stored(tensors: Tensors) -> int:
    return sum(num_bytes(*one) for one in tensors.values())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    path = tmp_path_factory.mktemp("plain") / "config.json"
    path.write_text(json.dumps(SMALL), encoding="utf-8")
    return load_model(path)


@pytest.mark.parametrize("experts", QUANTISERS)
@pytest.mark.parametrize("whole", [True, False])
def test_bytes_are_those_of_the_tensors(experts: str, whole: bool, small: ModelSpec, tmp_path: Path) -> None:
    table = {key: dict(value) for key, value in QUANTISERS[experts].items()}
    if table and not whole:
        table["quantization_config"]["modules_to_not_convert" if experts != "nvfp4" else "ignore"] = ["self_attn"]
    tensors = qwen3_moe(small, experts, experts if whole else "BF16")
    folder = write(tmp_path / "some", SMALL | table, tensors, parts=3)
    found = load_model(folder)
    assert abs(total(found) - stored(tensors)) <= small.num_routed_experts + 8
    assert load_model(folder / "model.safetensors.index.json") == found
    of_experts = sum(num_bytes(*one) for name, one in tensors.items() if ".experts." in name)
    each = found.expert_bytes(weight_format(found.native_bits))
    assert 0 <= each * found.num_routed_experts - of_experts <= found.num_routed_experts
    plain = weight_format(load_model(folder / "config.json").native_bits)
    assert weight_format(found.native_bits).quantised == plain.quantised == (experts != "BF16")


def test_experts_of_a_layer_together(tmp_path: Path) -> None:
    data = config(
        "gpt-oss-20b", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], vocab_size=640
    )
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(data), encoding="utf-8")
    tensors = gpt_oss(load_model(plain))
    found = load_model(write(tmp_path / "oss", data, tensors))
    assert found.native_bits == "mxfp4" and total(found) == stored(tensors)
    assert any("as its safetensors files store it" in one for one in found.remarks)


@pytest.mark.parametrize("said", [{"quantization_config": {"quant_method": "brand-new", "bits": 4}}, {}])
def test_a_quantiser_that_nobody_knows_is_read_from_the_files(
    said: dict[str, Any], small: ModelSpec, tmp_path: Path
) -> None:
    tensors = qwen3_moe(small, "awq", "BF16")
    folder = write(tmp_path / "some-AWQ", SMALL | said, tensors)
    found = load_model(folder)
    assert abs(total(found) - stored(tensors)) <= small.num_routed_experts + 8 and found.name == "some-AWQ"
    fmt = weight_format(found.native_bits)
    assert fmt.quantised and fmt.bits == 4 and fmt.bits_per_weight == pytest.approx(4.15625)
    with pytest.raises(InputError, match="quantization"):
        load_model(folder / "config.json")


def test_draft_layers_and_towers_are_told_apart(small: ModelSpec, tmp_path: Path) -> None:
    tensors = qwen3_moe(small, "BF16", "BF16")
    more: Tensors = {
        "model.layers.2.mlp.experts.0.up_proj.weight": ("BF16", (16, 16)), "mtp.fc.weight": ("BF16", (16, 16)),
        "model.visual.blocks.0.attn.qkv.weight": ("BF16", (16, 16)),
    }  # fmt: skip
    found = load_model(write(tmp_path / "some", SMALL | {"num_nextn_predict_layers": 1}, tensors | more))
    assert total(found) == stored(tensors)
    assert any("draft layers of 1024 bytes" in one for one in found.remarks) and any(
        "towers" in one for one in found.remarks
    )


def test_a_configuration_alone_is_read_as_before(small: ModelSpec, tmp_path: Path) -> None:
    folder = write(tmp_path / "some", SMALL, qwen3_moe(small, "BF16", "BF16"))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert load_model(folder).native_bits == "16" and load_model(folder).remarks == ()


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_model(path)
    line = str(caught.value)
    assert "\n" not in line and caught.value.exit_status == 2
    return line


def test_what_is_wrong_is_said(small: ModelSpec, tmp_path: Path) -> None:
    tensors = qwen3_moe(small, "BF16", "BF16")
    folder = write(tmp_path / "some", SMALL, tensors, parts=2)
    first, index = folder / "model-00001-of-00002.safetensors", folder / "model.safetensors.index.json"
    whole = first.read_bytes()
    for content, says in {
        whole + bytes(100): "cut short", whole[:40]: "announces a header", b"": "shorter than", whole[:3]: "shorter than",
        struct.pack("<Q", 1 << 62) + whole[8:]: "announces a header of", struct.pack("<Q", 2) + b"[]": "no table",
        header({"a": ("BF16", (2,)), "b": ("BF16", (2,))}).replace(b"[4, 8]", b"[2, 6]"): "overlaps",
        header({"a": ("BF16", (2,)), "b": ("BF16", (2,))}).replace(b"[4, 8]", b"[5, 9]"): "leaves a hole",
        header({"a": ("BF16", (2,))}).replace(b"[0, 4]", b"[0, 9]"): "which it cannot",
        header({"a": ("BF16", (2,))}).replace(b'"BF16"', b'"PICK"'): "type 'PICK'",
    }.items():  # fmt: skip
        first.write_bytes(content)
        assert says in refused(folder), says
    first.unlink()
    assert "not beside" in refused(folder)
    first.write_bytes(whole)
    for names, says in (({}, "no table of files"), ({"a": "../../etc/x.safetensors"}, "none beside it")):
        index.write_text(json.dumps({"weight_map": names}), encoding="utf-8")
        assert says in refused(folder)
    index.write_text("{", encoding="utf-8")
    assert "JSON" in refused(folder)
    index.unlink()
    assert load_model(folder).native_bits == "16"
    first.unlink()
    assert "1 of 2 parts" in refused(folder)


def test_files_of_another_model_are_refused(small: ModelSpec, tmp_path: Path) -> None:
    tensors = qwen3_moe(small, "BF16", "BF16")
    assert "config.json describes" in refused(
        write(tmp_path / "wide", SMALL | {"moe_intermediate_size": 1536}, tensors)
    )
    assert "config.json describes" in refused(write(tmp_path / "deep", SMALL | {"num_hidden_layers": 1}, tensors | {}))
    packed = qwen3_moe(small, "awq", "BF16")
    assert "are of 16 experts" in refused(
        write(tmp_path / "few", SMALL | QUANTISERS["awq"] | {"num_experts": 12}, packed)
    )


HEADER = header({f"model.layers.{n}.mlp.experts.0.up_proj.weight": ("BF16", (8, 8)) for n in range(4)})


@given(at=st.integers(0, len(HEADER) - 1), value=st.integers(0, 255), cut=st.integers(0, len(HEADER)))
def test_damage_anywhere_is_one_line(at: int, value: int, cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    (folder / "model.safetensors").write_bytes((HEADER[:at] + bytes([value]) + HEADER[at + 1 :])[:cut])
    tracemalloc.start()
    try:
        refused(folder)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", list_models())
def test_what_files_hold_is_what_is_counted(name: str, tmp_path: Path) -> None:
    """Tables, states, encoders, experts' biases: of every bundled model at 16 bits, all bytes are found again."""
    model = dataclasses.replace(load_model(name), native_bits="16", native_dense_bits="16")
    matrices = (
        sum(model.dense_matrix_parameters(layer) for layer in range(model.num_layers)) + model.encoder_matrix_parameters
    )
    sizes = {
        "model.layers.0.mlp.experts.gate_up_proj": model.num_routed_experts * model.expert_parameters,
        "model.layers.0.self_attn.q_proj.weight": matrices + model.vector_parameters + model.table_parameters,
        "model.embed_tokens.weight": model.vocab_size * model.hidden_size,
    }
    if not model.tied_embeddings:
        sizes["lm_head.weight"] = model.vocab_size * model.hidden_size
    tensors = {key: Tensor(kind="BF16", shape=(size,), num_bytes=2 * size) for key, size in sizes.items()}
    found = as_stored(model, tensors, tmp_path)
    assert (found.native_bits, found.native_dense_bits) == ("16", "16") and total(found) == 2 * sum(sizes.values())
    assert total(found) == 2 * model.total_parameters


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("model.layers.3.mlp.experts.7.up_proj.weight", True), ("model.layers.3.block_sparse_moe.input_linear.weight", True),
        ("backbone.layers.3.mixer.experts.0.down_proj.weight_scale", True), ("model.layers.3.mlp.switch_mlp.gate_proj.scales", True),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", False), ("model.layers.3.mlp.experts.post_expert_norm.weight", False),
        ("model.layers.3.self_attention.experts.input_linear.weight", False), ("model.layers.3.mlp.gate.weight", False),
    ],
)  # fmt: skip
def test_experts_are_known_by_their_names(name: str, expert: bool) -> None:
    assert is_expert(name) == expert
