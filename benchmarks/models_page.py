"""Makes docs/models.md: every family with what the reader counts beside what transformers' class has, every bundled model beside
what its makers publish.

    python -m benchmarks.models_page        writes docs/models.md

Counts of classes come from tests/specs/models/model_families.json (`count_families.py`); a test holds page, counts and reader together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moeplan.base.errors import InputError
from moeplan.specs.models import ModelSpec, quantised_as, weight_format
from moeplan.specs.models.config import read_config
from moeplan.specs.models.load import list_models, load_model

ROOT = Path(__file__).resolve().parents[1]
PAGE, COUNTS = ROOT / "docs" / "models.md", ROOT / "tests" / "specs" / "models" / "model_families.json"
FILES = ROOT / "tests" / "specs" / "models" / "published_files.json"
CONTEXT = 131_072
# Billions of parameters as published, all and for one token, and where. Active counts differ in what of the embeddings they hold.
PUBLISHED: dict[str, tuple[float, float | None, str]] = {
    "dbrx": (132, 36, "databricks/dbrx-base, model card"),
    "deepseek-v2-lite": (15.7, 2.4, "arXiv 2405.04434"),
    "deepseek-v3": (671, 37, "arXiv 2412.19437"),
    "deepseek-v4-flash": (284, 13, "deepseek-ai/DeepSeek-V4-Flash, model card"),
    "gemma-4-26b-a4b": (25.2, 3.8, "google/gemma-4-26B-A4B-it, model card"),
    "glm-4.5-air": (106, 12, "arXiv 2508.06471"),
    "glm-4.7": (355, 32, "zai-org/GLM-4.7, as GLM-4.5 (arXiv 2508.06471); with the draft layer"),
    "glm-4.7-flash": (30, 3, "zai-org/GLM-4.7-Flash, model card (30B-A3B)"),
    "gpt-oss-120b": (116.8, 5.1, "arXiv 2508.10925; active without the token embedding"),
    "gpt-oss-20b": (20.9, 3.6, "arXiv 2508.10925; active without the token embedding"),
    "kimi-k2.5": (1000, 32, "moonshotai/Kimi-K2.5, model card (1T, 32B)"),
    "llama-4-scout": (109, 17, "meta-llama/Llama-4-Scout-17B-16E, model card; with the vision tower"),
    "mimo-v2-flash": (309, 15, "XiaomiMiMo/MiMo-V2-Flash, model card"),
    "minimax-m2.5": (230, 10, "MiniMaxAI/MiniMax-M2, model card"),
    "minimax-text-01": (456, 45.9, "arXiv 2501.08313"),
    "mixtral-8x22b": (141, 39, "mistral.ai/news/mixtral-8x22b"),
    "mixtral-8x7b": (46.7, 12.9, "arXiv 2401.04088; mistral.ai/news/mixtral-of-experts"),
    "nemotron-3-nano": (31.6, 3.6, "arXiv 2512.20848; active with embeddings"),
    "nemotron-3-super": (120.7, 12.7, "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B, model card"),
    "nllb-moe-54b": (54.5, None, "arXiv 2207.04672"),
    "olmoe-1b-7b": (6.9, 1.3, "arXiv 2409.02060"),
    "qwen3-235b-a22b": (235, 22, "arXiv 2505.09388"),
    "qwen3-30b-a3b": (30.5, 3.3, "Qwen/Qwen3-30B-A3B, model card"),
    "qwen3-next-80b-a3b": (80, 3, "Qwen/Qwen3-Next-80B-A3B-Instruct, model card"),
    "qwen3.5-122b-a10b": (122, 10, "Qwen/Qwen3.5-122B-A10B, its name"),
    "qwen3.5-35b-a3b": (35, 3, "Qwen/Qwen3.5-35B-A3B, its name"),
    "qwen3.5-397b-a17b": (397, 17, "Qwen/Qwen3.5-397B-A17B, its name"),
    "qwen3.6-35b-a3b": (35, 3, "Qwen/Qwen3.6-35B-A3B, its name"),
    "deepseek-v2": (236, 21, "deepseek-ai/DeepSeek-V2, model card"),
    "deepseek-v3.2": (671, 37, "deepseek-ai/DeepSeek-V3.2, as DeepSeek-V3; counted with the indexers"),
    "deepseek-v4-pro": (1600, 49, "deepseek-ai/DeepSeek-V4-Pro, model card"),
    "dots.llm1": (142, 14, "arXiv 2506.05767"),
    "ernie-4.5-21b-a3b": (21, 3, "baidu/ERNIE-4.5-21B-A3B-PT, model card"),
    "ernie-4.5-300b-a47b": (300, 47, "baidu/ERNIE-4.5-300B-A47B-PT, model card"),
    "glm-5": (744, 40, "zai-org/GLM-5, model card"),
    "granite-3.1-3b-a800m": (
        3.3,
        0.8,
        "ibm-granite/granite-3.1-3b-a800m-instruct, model card; active without the embedding",
    ),
    "granite-4.0-h-small": (32, 9, "ibm-granite/granite-4.0-h-small, model card"),
    "granite-4.0-h-tiny": (7, 1, "ibm-granite/granite-4.0-h-tiny, model card"),
    "hunyuan-a13b": (80, 13, "tencent/Hunyuan-A13B-Instruct, model card"),
    "jamba-1.5-mini": (52, 12, "arXiv 2408.12570"),
    "kimi-k2": (1000, 32, "arXiv 2507.20534"),
    "kimi-linear-48b-a3b": (48, 3, "arXiv 2510.26692"),
    "lfm2-8b-a1b": (8.3, 1.5, "LiquidAI/LFM2-8B-A1B, model card"),
    "ling-mini-2.0": (16, 1.4, "inclusionAI/Ling-mini-2.0, model card"),
    "llama-4-maverick": (400, 17, "meta-llama/Llama-4-Maverick-17B-128E, model card"),
    "moonlight-16b-a3b": (16, 3, "arXiv 2502.16982"),
    "nemotron-3-ultra": (550, 55, "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B, its name"),
    "phi-3.5-moe": (41.9, 6.6, "arXiv 2404.14219"),
    "qwen1.5-moe-a2.7b": (14.3, 2.7, "Qwen/Qwen1.5-MoE-A2.7B, model card"),
    "qwen2-57b-a14b": (57.4, 14, "arXiv 2407.10671"),
    "qwen3-coder-480b-a35b": (480, 35, "Qwen/Qwen3-Coder-480B-A35B-Instruct, model card"),
    "solar-open-100b": (102.6, 12, "upstage/Solar-Open-100B, model card"),
    "step-3.7-flash": (196, 11, "stepfun-ai/Step-3.5-Flash, model card (the same shape)"),
    "trinity-mini": (26, 3, "arcee-ai/Trinity-Mini, model card"),
}
_HEAD = """# Models

What `moeplan model show` counts, checked. This page is made by `python -m benchmarks.models_page`; a test fails when it is not what the
reader says.

*Total* and *active* are billions of parameters of the language model, without vision or audio towers and draft layers. *Active* is all
that a token meets, both embeddings included, but for rows of tables it does not read; published figures differ in what they leave out.
*An expert* is its bytes as the checkpoint stores it, scales and zero points included. *KV a token* is what one more token of a long
context takes at 16 bits: full windows and states take nothing more; *KV at 128 Ki* is the whole cache of a request of 131,072 tokens.

A configuration is read by the table of its family (`specs/models/config/families/`). A key that nobody knows and that may carry a
size, a count, a rank, a pattern or a list of layers is refused by name. Families without a table are read by the usual keys, under the
same rule.
"""


def page() -> str:
    """Return the page."""
    counts = json.loads(COUNTS.read_text(encoding="utf-8"))
    return "\n".join([_HEAD, *_bundled(), *_files(), *_families(counts)]) + "\n"


def _bundled() -> list[str]:
    """Return the table of bundled models."""
    lines = [
        "## Bundled models", "",
        "| model | total | published | active | published | an expert | stored as | KV a token | KV at 128 Ki | published in |",
        "|---|--:|--:|--:|--:|--:|---|--:|--:|---|",
    ]  # fmt: skip
    for name in list_models():
        model = load_model(name)
        total, active, where = PUBLISHED.get(name, (None, None, ""))
        lines.append(
            f"| {name} | {_billions(model.total_parameters)} | {_plain(total)} | {_billions(model.active_parameters)} | {_plain(active)} "
            f"| {_mib(model.expert_bytes(weight_format(model.native_bits)))} | {model.native_bits} | {_kv(model)} | {where} |"
        )
    return [*lines, ""]


def _files() -> list[str]:
    """Return the table of published GGUF files."""
    text = (
        "What a name such as `Q4_K_M` comes to (`--quant`), beside files that people publish, in GB (10⁹ bytes). Files of the unchanged "
        "quantiser are met within 0.15 %; the rest of those is the tokenizer's words, and rounding."
    )
    lines = [
        "## Weight files",
        "",
        text,
        "",
        "| model | name | published | counted | difference | published by; why it differs |",
    ]
    lines.append("|---|---|--:|--:|--:|---|")
    for row in json.loads(FILES.read_text(encoding="utf-8")):
        counted, has = file_bytes(row["model"], row["quant"]) / 1e9, row["gigabytes"]
        why = f"; {row['differs']}" if "differs" in row else ""
        lines.append(
            f"| {row['model']} | {row['quant']} | {has:.2f} | {counted:.2f} | {counted / has - 1:+.2%} | {row['source']}{why} |"
        )
    return [*lines, ""]


def file_bytes(model: str, quant: str) -> int:
    """Return the bytes of a bundled model's weights under the name of a mix."""
    spec = load_model(model)
    experts, dense = quantised_as(quant, None, spec)
    return spec.dense_bytes(dense) + spec.num_routed_experts * spec.expert_bytes(experts)


def _families(counts: dict[str, Any]) -> list[str]:
    """Return the table of families."""
    beside = (
        f"Beside {counts['counted_with']}. Each class with its own defaults (or, where those have no experts or cannot be made, the sizes "
        "of a published member); the tests read each again with drawn sizes."
    )
    lines = [
        "## Families", "", beside, "",
        "| `model_type` | class | total | the class has | difference | active | an expert | KV a token | KV at 128 Ki |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for case in counts["cases"]:
        if case["drawn"]:
            continue
        kind, made = case["config"]["model_type"], case["class"]
        try:
            model = read_config(case["config"], kind, "config.json")
        except InputError as error:
            lines.append(
                f"| {kind} | {made} | refused | {_billions(case['num_parameters'])} | | | | | {error.field.split(': ')[-1]}: {error.rule} |"
            )
            continue
        has = case["num_parameters"] - surplus(model)
        lines.append(
            f"| {kind} | {made} | {_billions(model.total_parameters)} | {_billions(has)} | {model.total_parameters / has - 1:+.3%} "
            f"| {_billions(model.active_parameters)} | {_mib(model.expert_bytes(weight_format(model.native_bits)))} | {_kv(model)} |"
        )
    note = (
        "LongCat's class allots the first matrices of experts that do nothing; those (and only those) are taken off its count: no "
        "checkpoint has them."
    )
    return [*lines, "", note]


def surplus(model: ModelSpec) -> int:
    """Return the parameters that transformers' class allots to experts that do nothing, and that no checkpoint has."""
    into = 2 if model.gated else 1
    return model.zero_experts * model.num_moe_layers * into * model.expert_hidden * model.expert_intermediate_size


def _kv(model: ModelSpec) -> str:
    return f"{model.kv_bytes_per_token():,} B | {_mib(model.kv_bytes(CONTEXT))}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
