"""Models read from GGUF headers: the sizes of the same model's configuration, the bytes of its tensors, one line for what is damaged."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from gguf_files import ARCHITECTURES, NUMBERS, Tensors, header, keys_of, num_bytes, tensors_of, text, write
from moeplan.base.errors import InputError
from moeplan.commands.app import app
from moeplan.specs.memory import MemoryNeeds, break_down_memory
from moeplan.specs.models import ModelSpec, quantised_as, weight_format
from moeplan.specs.models.load import load_model
from moeplan.specs.models.mixes.names import mix
from moeplan.specs.models.mixes.tensors import matrices_of, shape_of

SMALL = load_model("qwen3-30b-a3b").first_layers(2)


def plain(name: str) -> str:
    return "Q8_0"


def weights(model: ModelSpec) -> int:
    """Return what a prediction counts as weights."""
    formats = {
        "expert_format": weight_format(model.native_bits),
        "dense_format": weight_format(model.native_dense_bits),
    }
    memory_breakdown = break_down_memory(
        MemoryNeeds(model=model, **formats), cached_experts=model.num_routed_experts, offloaded=False
    )  # type: ignore[arg-type]
    return sum(memory_breakdown.num_bytes(name) for name in ("resident experts", "embeddings", "dense weights"))


def stored(tensors: Tensors, model: ModelSpec) -> int:
    """Return the bytes of the tensors that are used."""
    return sum(
        num_bytes(shape, kind) for name, (shape, kind) in tensors.items()
        if not name.endswith("attn_kv_b.weight") and not name.startswith(f"blk.{model.num_layers}.")
    )  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_header_says_what_the_configuration_says(arch: str, tmp_path: Path) -> None:
    model = load_model(ARCHITECTURES[arch])
    model = model.first_layers(5 if arch in ("deepseek2", "glm4moe") else 4)
    drafts = int(arch == "glm4moe")
    tensors = tensors_of(
        arch, model, plain if model.hidden_size % 256 == 0 else lambda _: "MXFP4", drafts, split_experts=arch == "llama"
    )
    found = load_model(write(tmp_path / "some.gguf", keys_of(arch, model, drafts), tensors))
    own = {
        "name": "",
        "family": "",
        "native_bits": "",
        "native_dense_bits": "",
        "remarks": (),
        "dense_intermediate_size": 0,
    }
    if model.moe_layers != tuple(range(model.num_layers)):
        own.pop("dense_intermediate_size")
    assert dataclasses.replace(found, **own) == dataclasses.replace(model, **own)  # type: ignore[arg-type]
    assert abs(weights(found) / stored(tensors, model) - 1) < 1e-6
    assert ("draft layers" in " ".join(found.remarks)) == bool(drafts)


@given(data=st.data())
def test_bytes_are_those_of_the_tensors_whatever_their_types(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    types = (
        "Q8_0",
        "Q4_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q6_K",
        "IQ1_S",
        "IQ4_XS",
        "IQ2_KS",
        "IQ4_K",
        "MXFP4",
        "NVFP4",
        "F16",
        "BF16",
        "F32",
    )
    chosen = {
        ending: data.draw(st.sampled_from(types))
        for ending in ("gate_exps", "up_exps", "down_exps", "attn_q", "attn_k", "token_embd", "output.weight", "")
    }
    tensors = tensors_of(
        "qwen3moe", SMALL, lambda name: next(kind for ending, kind in chosen.items() if ending in name)
    )
    path = write(tmp_path_factory.mktemp("gguf") / "drawn.gguf", keys_of("qwen3moe", SMALL), tensors)
    found = load_model(path)
    assert abs(weights(found) / stored(tensors, SMALL) - 1) < 1e-6
    experts = sum(num_bytes(*tensor) for name, tensor in tensors.items() if "_exps" in name)
    each = found.expert_bytes(weight_format(found.native_bits))
    assert 0 <= each * found.num_routed_experts - experts <= found.num_routed_experts + experts * 1e-9
    assert found.embedding_bytes(weight_format(found.native_dense_bits)) == pytest.approx(
        num_bytes(*tensors["token_embd.weight"]) + num_bytes(*tensors["output.weight"]), abs=2
    )


HEADER = header(keys_of("qwen3moe", SMALL), tensors_of("qwen3moe", SMALL, plain))


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_model(path)
    line = str(caught.value)
    assert "\n" not in line
    return line


@given(cut=st.integers(0, len(HEADER) - 1))
def test_a_header_cut_anywhere_is_one_line(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    refused(tmp_path_factory.mktemp("gguf") / "cut.gguf", HEADER[:cut])


@given(at=st.integers(0, len(HEADER) - 9), value=st.sampled_from([0, 255, 1 << 31, (1 << 63) - 1, (1 << 64) - 1]))
def test_damage_anywhere_is_one_line_or_a_model(at: int, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("gguf") / "damaged.gguf"
    path.write_bytes(HEADER[:at] + struct.pack("<Q", value) + HEADER[at + 8 :])
    tracemalloc.start()
    try:
        load_model(path)
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < 64 << 20


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    path, tensors, values = tmp_path / "x.gguf", tensors_of("qwen3moe", SMALL, plain), keys_of("qwen3moe", SMALL)
    assert "cut short" in refused(path, HEADER + bytes(4096))
    assert "does not start with GGUF" in refused(path, b"GGML" + HEADER[4:])
    assert "announces" in refused(path, HEADER[:8] + struct.pack("<Q", 1 << 60) + HEADER[16:])
    unknown = HEADER.replace(text("blk.0.attn_q.weight") + struct.pack("<IQQI", 2, 2048, 4096, NUMBERS["Q8_0"]),
                             text("blk.0.attn_q.weight") + struct.pack("<IQQI", 2, 2048, 4096, 9999))  # fmt: skip
    assert unknown != HEADER and "type 9999" in refused(path, unknown)
    assert "architecture 'mamba'" in refused(path, header(values | {"general.architecture": "mamba"}, tensors))
    assert "keys describe" in refused(path, header(values | {"qwen3moe.expert_count": 64}, tensors))
    assert "block_count" in refused(
        path, header({key: one for key, one in values.items() if "block" not in key}, tensors)
    )
    with pytest.raises(InputError, match="No such file"):
        load_model(tmp_path / "absent.gguf")


def test_parts_are_one_model(tmp_path: Path) -> None:
    tensors, values = tensors_of("qwen3moe", SMALL, plain), keys_of("qwen3moe", SMALL)
    names = list(tensors)
    for part in range(2):
        mine = {name: tensors[name] for name in names[part::2]}
        write(tmp_path / f"big-{part + 1:05d}-of-00002.gguf", (values if part == 0 else {}) | {"split.count": 2}, mine)
    found = load_model(tmp_path / "big-00001-of-00002.gguf")
    assert found.name == "big" and abs(weights(found) / stored(tensors, SMALL) - 1) < 1e-6
    assert load_model(tmp_path / "big-00002-of-00002.gguf") == found
    (tmp_path / "big-00002-of-00002.gguf").unlink()
    with pytest.raises(InputError, match="not beside it"):
        load_model(tmp_path / "big-00001-of-00002.gguf")


def test_a_file_is_simulated_in_its_own_types(tmp_path: Path) -> None:
    path = str(write(tmp_path / "small.gguf", keys_of("qwen3moe", SMALL), tensors_of("qwen3moe", SMALL, plain)))
    asked = [
        "simulate",
        "--model",
        path,
        "--hardware",
        "rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB",
        "--prompt-tokens",
        "8",
        "--reply-tokens",
        "4",
    ]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 0, found.output
    named = CliRunner().invoke(app, [*asked, "--quant", "Q4_K_M"])
    assert isinstance(named.exception, InputError) and "leave out --quant" in str(named.exception)


@pytest.mark.parametrize(
    "quant", ["Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_M", "IQ3_XXS", "IQ4_KS", "IQ2_KS", "Q8_0", "MXFP4_MOE"]
)
@pytest.mark.parametrize("arch", ["qwen3moe", "deepseek2", "qwen35moe", "gpt-oss"])
def test_a_name_and_a_file_of_the_same_types_take_the_same_bytes(arch: str, quant: str, tmp_path: Path) -> None:
    model = load_model(ARCHITECTURES[arch]).first_layers(9)
    recipe = mix(quant)
    assert recipe is not None
    kinds = {
        f"{'' if one.layer is None else f'blk.{one.layer}.'}{one.name}.weight": kind
        for one, kind in recipe.types(shape_of(model), matrices_of(model))
    }
    named = quantised_as(quant, None, model)
    tensors = tensors_of(arch, model, lambda name: kinds.get(name, "F32"))
    tensors = {name: tensor for name, tensor in tensors.items() if "attn_kv_b" not in name}
    found = load_model(write(tmp_path / "some.gguf", keys_of(arch, model), tensors))
    by_name = dataclasses.replace(model, native_bits=named[0].name, native_dense_bits=named[1].name)
    assert abs(weights(by_name) / weights(found) - 1) < 1e-6
    assert weights(found) == pytest.approx(stored(tensors, model), rel=1e-6)
