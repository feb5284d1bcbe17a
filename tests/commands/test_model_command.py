"""`moeplan model list|show`: what is printed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeplan.api.subject import open_subject
from moeplan.base.errors import InputError
from moeplan.commands.app import app
from moeplan.specs.catalog import MODELS_FOLDER
from moeplan.specs.models.load import list_models, load_model

CONFIGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "configs"
KEYS = {
    "total_parameters", "active_parameters", "num_moe_layers", "num_routed_experts", "top_k", "num_shared_experts", "expert_bytes",
    "expert_bits_per_weight", "kv_bytes_per_token", "native_bits",
}  # fmt: skip


def run(*words: str) -> str:
    return CliRunner().invoke(app, ["model", *words], catch_exceptions=False).stdout


def test_list_names_every_bundled_model() -> None:
    assert [row["name"] for row in json.loads(run("list", "--json"))["models"]] == list_models()
    assert [line.split()[0] for line in run("list").splitlines()[1:]] == list_models()


@pytest.mark.parametrize("name", ["gpt-oss-20b", "kimi-k2.5", "nemotron-3-super", "switch-base-8"])
def test_show(name: str) -> None:
    document, model = json.loads(run("show", name, "--json", "--context", "131072")), load_model(name)
    assert set(document) >= KEYS
    assert (
        document["total_parameters"] == model.total_parameters and document["num_routed_experts"] == model.num_experts
    )
    assert document["expert_bytes"] == document["expert_bits_per_weight"] * model.expert_parameters / 8
    assert document["kv_bytes"] == model.kv_bytes(131_072)
    text = run("show", name)
    assert f"{model.num_experts} in each of {model.num_moe_layers} layers" in text and all(
        line.isprintable() for line in text.splitlines()
    )


def test_show_says_what_was_taken_from_where(tmp_path: Path) -> None:
    path = tmp_path / "Some-30B-NVFP4.json"
    config = {"model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "num_attention_heads": 4,
              "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}  # fmt: skip
    path.write_text(json.dumps(config), encoding="utf-8")
    document = json.loads(run("show", str(path), "--json"))
    assert document["native_bits"] == "nvfp4" and "its name says nvfp4" in document["remarks"][0]
    path.write_text(json.dumps({**config, "num_latent_groups": 3}), encoding="utf-8")
    with pytest.raises(InputError, match="num_latent_groups = 3"):
        run("show", str(path))


def test_the_rest_of_a_checkpoint_can_be_taken_as_it_is_stored(tmp_path: Path) -> None:
    config = json.loads((MODELS_FOLDER / "tiny-moe.json").read_text(encoding="utf-8"))
    table = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "own.json").write_text(json.dumps(config | {"quantization_config": table}), encoding="utf-8")
    for asked, taken in (("native", "8"), ("16", "16")):
        simulation = open_subject(
            model=str(tmp_path / "own.json"), hardware="t4", trace="bundled", window=3, dense_bits=asked
        ).simulation
        assert simulation.dense_format.name == taken and simulation.model.native_bits == "8"


# What `configs/README.md` says must be found: billions of parameters, bits of a stored weight of an expert.
FOUND = {
    "moonshotai--Kimi-K2.5_config": (1026.4, 4.5), "nvidia--DeepSeek-V3.1-NVFP4_config": (671.0, 4.5), "Qwen3-30B-A3B-AWQ": (30.53, 4.156),
    "Qwen3-30B-A3B-GPTQ-Int4": (30.53, 4.156), "GLM-4.5-FP8-ct": (352.8, 8.0), "XiaomiMiMo--MiMo-V2-Flash_config": (309, 8.0),
    "MiniMax-Text-01": (456, 16), "SmallThinker-4B-A0.6B": (4.0, 16), "longcat-flash": (560, 16),
    "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-FP8_config": (120.7, 8.0),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_configurations_as_published(name: str) -> None:
    path = CONFIGS / f"{name}.json"
    if not path.exists():
        pytest.skip("the shared configurations are not here")
    document = json.loads(run("show", str(path), "--json"))
    total, bits = FOUND[name]
    assert document["total_parameters"] / 1e9 == pytest.approx(total, rel=0.015)
    assert document["expert_bits_per_weight"] == pytest.approx(bits, rel=0.005)
