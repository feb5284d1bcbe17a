"""Names of models as people write them: owners, capitals, separators, makers' editions and short forms.

Modelled: `Qwen/Qwen3-30B-A3B-Instruct-2507`, `gpt_oss_20b` and `qwen3-30b` stand for bundled models, as do models published with the
configuration of a bundled one. Ignored: what a name says of how weights are stored ("-FP8", "-AWQ"): such a name is not known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

# Models published with the configuration of a bundled one: another training or edition, the same shape.
SAME_SHAPE = {
    "deepseek-r1": "deepseek-v3", "deepseek-v3.1": "deepseek-v3", "deepseek-v3.1-terminus": "deepseek-v3",
    "deepseek-v2.5": "deepseek-v2", "deepseek-coder-v2": "deepseek-v2", "deepseek-coder-v2-lite": "deepseek-v2-lite",
    "glm-4.5": "glm-4.7", "glm-4.6": "glm-4.7", "glm-4.5v": "glm-4.5-air", "glm-4.6v": "glm-4.5-air",
    "intellect-3": "glm-4.5-air", "glm-5.1": "glm-5",
    "gpt-oss-safeguard-20b": "gpt-oss-20b", "gpt-oss-safeguard-120b": "gpt-oss-120b",
    "kimi-k2-thinking": "kimi-k2.5", "kimi-k2.6": "kimi-k2.5", "kimi-k2.7-code": "kimi-k2.5",
    "minimax-m2": "minimax-m2.5", "minimax-m2.1": "minimax-m2.5", "minimax-m2.7": "minimax-m2.5", "minimax-m1": "minimax-text-01",
    "qwen3-coder-30b-a3b": "qwen3-30b-a3b", "qwen3-coder-next": "qwen3-next-80b-a3b", "qwen3-vl-30b-a3b": "qwen3-30b-a3b",
    "qwen3-vl-235b-a22b": "qwen3-235b-a22b", "ring-mini-2.0": "ling-mini-2.0", "step-3.5-flash": "step-3.7-flash",
    "nemotron-3.5-lightning": "nemotron-3-nano",
}  # fmt: skip
# Short forms and whole names of the same model.
SAME_MODEL = {
    "deepseek-v3-671b": "deepseek-v3", "deepseek-r1-671b": "deepseek-r1", "deepseek-v3.1-671b": "deepseek-v3.1",
    "llama4-16x17b": "llama-4-scout", "llama4-128x17b": "llama-4-maverick",
    "dots.llm1.inst": "dots.llm1", "dots1": "dots.llm1", "granite-4-h-small": "granite-4.0-h-small",
    "granite-4-h-tiny": "granite-4.0-h-tiny",
    "hunyuan-80b-a13b": "hunyuan-a13b", "jamba-mini-1.5": "jamba-1.5-mini", "ai21-jamba-1.5-mini": "jamba-1.5-mini",
    "llama-4-maverick-17b-128e": "llama-4-maverick", "llama-4-scout-17b-16e": "llama-4-scout", "lfm2-8b": "lfm2-8b-a1b",
    "nvidia-nemotron-3-nano-30b-a3b": "nemotron-3-nano", "nemotron-3-nano-30b-a3b": "nemotron-3-nano",
    "nvidia-nemotron-3-super-120b-a12b": "nemotron-3-super", "nemotron-3-super-120b-a12b": "nemotron-3-super",
    "nvidia-nemotron-3-ultra-550b-a55b": "nemotron-3-ultra", "nemotron-3-ultra-550b-a55b": "nemotron-3-ultra",
    "nvidia-nemotron-3.5-lightning-30b-a3b": "nemotron-3.5-lightning", "nemotron-3.5-lightning-30b-a3b": "nemotron-3.5-lightning",
    "kimi-linear": "kimi-linear-48b-a3b", "moonlight": "moonlight-16b-a3b", "olmoe": "olmoe-1b-7b", "qwen3-next": "qwen3-next-80b-a3b",
    "qwen3-coder": "qwen3-coder-480b-a35b", "solar-open": "solar-open-100b",
}  # fmt: skip
OWNERS = {
    "qwen", "openai", "deepseek-ai", "meta-llama", "mistralai", "moonshotai", "minimaxai", "zai-org", "thudm", "nvidia",
    "google", "allenai",
    "baidu", "tencent", "ibm-granite", "rednote-hilab", "microsoft", "liquidai", "ai21labs", "inclusionai", "upstage", "arcee-ai",
    "stepfun-ai",
    "xiaomimimo", "databricks", "facebook", "unsloth", "bartowski", "ggml-org", "ubergarm", "lmstudio-community",
}  # fmt: skip
"""Who publishes them or files of them: any other "folder/name" is a path."""
_ACTIVE = re.compile(r"-a[0-9]+(?:\.[0-9]+)?[bm]$")
_EDITION = re.compile(
    r"-(?:instruct|thinking|chat|base|it|inst|pt|preview|exp|speciale|gguf|hf|bf16|[0-9]{4}|v0\.[0-9]|latest)$"
)
"""Makers' words at a name's end that change no shape."""

_MAKERS = {"zai", "deepseek", "mistral", "moonshot", "minimax", "arcee"}
_STORED = re.compile(
    r"(?:u?d|smol|gguf|mlx|i1|imat(?:rix)?|xl|xxl|xs|xxs|[sml]|nl|k|k[smlt]|kss|kv|[0-9]{1,2}bit|[0-9]\.[0-9]+bpw|bf16|f16|fp16|f32|fp8|fp4|nvfp4|moe|dynamic|block"
    r"|mxfp4|int[48]|[wa][0-9]{1,2}|w[0-9]{1,2}a[0-9]{1,2}|awq|gptq|exl[23]|quant(?:ized)?|t?q[0-9](?:\.[0-9])?|iq[0-9]|[01]|r[48]|g[0-9]{2,3}"
    r"|it|instruct|thinking|chat|base|[0-9]{4}|latest|preview|v[0-9.]+|[0-9]{5}|of)(?:\.[0-9]+bpw)?"
)
"""Pieces of a file's or repository's name that say how weights are stored, which part it is, or an edition of the same shape."""


@lru_cache(maxsize=8)
def _table(bundled: tuple[str, ...]) -> dict[str, str]:
    found = {_compact(name): name for name in bundled}
    found |= {_compact(name): other for name, other in SAME_SHAPE.items()}
    found |= {_compact(name): SAME_SHAPE.get(other, other) for name, other in SAME_MODEL.items()}
    short: dict[str, set[str]] = {}
    for name in (*bundled, *SAME_SHAPE, *SAME_MODEL):
        cut = _ACTIVE.sub("", name)
        if cut != name:
            whole = SAME_MODEL.get(name, name)
            short.setdefault(_compact(cut), set()).add(SAME_SHAPE.get(whole, whole))
    for one, owners in short.items():
        if len(owners) == 1:
            found.setdefault(one, next(iter(owners)))
    return found


def bundled_name(text: str, bundled: Iterable[str]) -> str | None:
    """Return which of the `bundled` models `text` names, or one of its shape; None for any other text."""
    table = _table(tuple(bundled))
    owner, slash, name = text.strip().lower().rpartition("/")
    if slash and owner not in OWNERS:
        return None
    while name:
        found = table.get(_compact(name))
        if found is not None:
            return found
        cut = _EDITION.sub("", name.replace("_", "-").replace(" ", "-"))
        if cut == name:
            return None
        name = cut
    return None


def model_in(text: str, bundled: Iterable[str]) -> str | None:
    """Return which of the `bundled` models a file or repository is of by its name, as people write it into commands; None where none is.

    What follows the model's name may say how weights are stored, which part of several files it is, and who made it, and nothing else:
    "DeepSeek-R1-Distill-Llama-70B" is no DeepSeek-R1.
    """
    names = tuple(bundled)
    last = re.sub(r"\.gguf$", "", re.split(r"[/\\]", text.strip().rstrip("/\\"))[-1].lower())
    repository, _, tag = re.sub(r"\.(?=i?q[0-9]|i1-|b?f16|w[0-9])", "-", last).partition(":")
    owner, _, bare = repository.partition(
        "_"
    )  # "Qwen_Qwen3-30B-A3B": whose model it is, of who publishes others' files
    whole = (repository, *([bare] if bare and owner in OWNERS | _MAKERS else []))
    for name in (f"{repository}-{tag}", *whole) if tag else whole:
        pieces = re.split(r"([-_ ])", name)
        for end in range(len(pieces), 0, -2):
            head, after = "".join(pieces[:end]), pieces[end:]
            found = bundled_name(head, names)
            if found is not None and all(_STORED.fullmatch(piece) for piece in after[1::2]):
                return found
    return None


def _compact(name: str) -> str:
    return re.sub(r"[-_ :]", "", name)
