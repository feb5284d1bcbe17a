"""Counts the parameters of transformers' Mixture-of-Experts classes on the meta device, for the tests and for docs/models.md.

    python -P benchmarks/count_families.py     writes tests/specs/models/model_families.json

-P, because folders beside a script have names of packages that transformers looks for. Each class is made as it comes and with
drawn sizes; what is stored is its configuration as `config.json` would hold it, and the parameters of its language model. Needs
torch and transformers; takes about a minute and no memory to speak of.
"""

from __future__ import annotations

import glob
import importlib
import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

OUT = Path(__file__).resolve().parents[1] / "tests" / "specs" / "models" / "model_families.json"
_MODELS = Path(transformers.__file__).parent / "models"
_VARIANTS = 2
# Towers, projectors and what reads images or sound: not the language model.
_TOWERS = re.compile(r"vision|visual|audio|projector|resampler|word_timestamp|sam_|view_sep|image_newline")
# Classes whose own defaults cannot be made, or have no experts: sizes of a published member, or small ones.
_GIVEN: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704, "hidden_size": 2816,
        "intermediate_size": 2112, "num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True, "num_global_key_value_heads": 2, "sliding_window": 1024,
    },
    "lfm2_moe": {"layer_types": (["conv"] * 2 + ["full_attention"] + ["conv"]) * 6, "num_hidden_layers": 24},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "head_dim": 128},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "qwen4_exp_text": {
        "ple_layer_ids": [2], "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 2048,
        "indexer_compress_ratio": 4, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    },
    "nemotron_h": {
        "hybrid_override_pattern": "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*E-", "moe_latent_size": 1024, "n_routed_experts": 512,
        "moe_intermediate_size": 2688, "moe_shared_expert_intermediate_size": 5376, "num_experts_per_tok": 22,
    },
}  # fmt: skip
# Not decoders with experts: without experts by default and unlike its kin with them, parts of other models, or all of one kind.
_LEFT_OUT = {
    "doge",
    "gemma4",
    "diffusion_gemma",
    "qwen3_omni_moe",
    "qwen3_omni_moe_talker_code_predictor",
    "nemo_speechlm",
}
_DRAWN: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "layers": (("num_hidden_layers", "num_layers", "n_layers"), (6, 7, 9, 12)),
    "vocab": (("vocab_size",), (1000, 4096, 32_003)),
    "experts": (("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), (16, 24, 32)),
    "top_k": (("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), (1, 2, 3)),
    "width": (("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"), (96, 160, 256)),
}


def main() -> None:
    """Write tests/specs/models/model_families.json."""
    cases: list[dict[str, Any]] = []
    for name, folder in _classes():
        given = _GIVEN.get(name, {})
        for variant in range(_VARIANTS + 1):
            changes = _drawn(name, given, variant) if variant else {}
            if variant and not changes:
                continue
            case = _count(name, folder, given | changes, drawn=variant > 0)
            if case is not None and case["config"] not in [one["config"] for one in cases]:
                cases.append(case)
                print(name, case["class"], f"{case['num_parameters']:,}", file=sys.stderr)
    head = f"transformers {transformers.__version__}: parameters of each class's language model, on the meta device"
    lines = ",\n".join(json.dumps(case, sort_keys=True) for case in cases)
    OUT.write_text(f'{{\n"counted_with": {json.dumps(head)},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")


def _classes() -> list[tuple[str, str]]:
    """Return (model type, folder) of every class whose configuration speaks of experts."""
    found = []
    for folder in sorted(os.listdir(_MODELS)):
        text = "".join(
            Path(one).read_text(encoding="utf-8") for one in glob.glob(f"{_MODELS}/{folder}/configuration_*.py")
        )
        if re.search("expert", text):
            types = re.findall(r'model_type\s*=\s*"([^"]+)"', text)
            found += [(name, folder) for name in types if name not in _LEFT_OUT and name in CONFIG_MAPPING]
    return found


def _drawn(name: str, given: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return drawn sizes, under the names that the configuration has."""
    rng = random.Random(f"{name}{seed}")
    try:
        held = CONFIG_MAPPING[name](**given).to_dict()
    except Exception:  # noqa: BLE001 -- a class may refuse its own defaults in any way
        return {}
    drawn: dict[str, Any] = {}
    for names, choices in _DRAWN.values():
        key = next((one for one in names if isinstance(held.get(one), int)), None)
        if key is not None and not (
            key == "num_hidden_layers" and {"layer_types", "hybrid_override_pattern"} & set(given)
        ):
            drawn[key] = rng.choice(choices)
    return drawn


def _count(name: str, folder: str, changes: dict[str, Any], *, drawn: bool) -> dict[str, Any] | None:
    """Return a configuration and its parameters; None for parts of models and for sizes that cannot be made."""
    try:
        config = CONFIG_MAPPING[name](**changes)
        made = _class_of(config, folder)
        with torch.device("meta"):
            model = made(config)
    except Exception as error:  # noqa: BLE001 -- a class may refuse drawn sizes in any way
        print(f"{name}: {type(error).__name__}", file=sys.stderr)
        return None
    own = [(path, one.numel()) for path, one in model.named_parameters() if not _TOWERS.search(path)]
    total = sum(size for _, size in own)
    if not any("expert" in path for path, _ in own):
        return None
    # What every configuration has is kept in those that were not drawn only.
    usual = _as_file(transformers.PreTrainedConfig().to_dict()) if drawn else {}
    kept = {key: value for key, value in _as_file(config.to_dict()).items() if usual.get(key) != value}
    return {"class": type(model).__name__, "config": kept, "num_parameters": total, "drawn": drawn}


def _class_of(config: Any, folder: str) -> Any:
    """Return the class that generates text with `config`."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    for path in sorted(glob.glob(f"{_MODELS}/{folder}/modeling_*.py")):
        module = importlib.import_module(f"transformers.models.{folder}.{Path(path).stem}")
        for one in re.findall(
            r"^class (\w+For(?:CausalLM|ConditionalGeneration))\b", Path(path).read_text(encoding="utf-8"), re.M
        ):
            if getattr(module, one).config_class is type(config):
                return getattr(module, one)
    raise LookupError(folder)


def _as_file(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration as its file holds it: no nulls, no numbers JSON does not have, no tables of towers."""
    kept = {}
    for key, value in ((str(key), value) for key, value in values.items()):
        if (
            value is None
            or key in ("id2label", "label2id", "time_step_limit")
            or ("_config" in key and _TOWERS.search(key))
        ):
            continue
        kept[key] = _as_file(value) if isinstance(value, dict) else value
    return kept


if __name__ == "__main__":
    main()
