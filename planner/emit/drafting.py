"""What a plan says of drafting, and how each engine is told to draft so.

Modelled: draft length and what drafts, as the flags of the engine's server; a draft model's file is the user's. Checked 2026-11-29 with
llama.cpp: common/arg.cpp and common/speculative.cpp of build 10615 (`--spec-type`, before May 2026 `--draft-max`); ik_llama.cpp:
docs/speculative.md and common/common.cpp; SGLang 0.5.23: srt/server_args.py; vLLM 0.26: vllm/config/speculative.py. Ignored: thresholds
below which an engine stops drafting, trees of guesses, two ways to draft at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...base.errors import InputError
from ...specs.drafting import MOST_DRAFTED
from .flags import JSON, SWITCH, TEXT, WHOLE, FlagValue
from .table import Row, names, row

NGRAM, MTP, MODEL = "n-gram", "mtp", "model"
_AGAIN = "give a plan.json written by moeplan plan"

LLAMA_CPP: Mapping[str, Row] = {
    "--spec-type": row(names("draft-simple", "draft-mtp", "ngram-simple"), "what drafts", since="2026-05; older builds: --draft-max alone"),
    "--spec-draft-n-max": row(WHOLE, "guesses of a step", least=1), "--model-draft": row(TEXT, "the draft model's file"),
    "--spec-ngram-simple-size-m": row(WHOLE, "guesses of a step, by n-grams", least=1, most=1024),
}  # fmt: skip
IK_LLAMA_CPP: Mapping[str, Row] = {
    "--spec-type": row(names("ngram-simple"), "what drafts"), "--multi-token-prediction": row(SWITCH, "draft layers of the file draft"),
    "--draft-max": row(WHOLE, "guesses of a step", least=1), "--model-draft": row(TEXT, "the draft model's file"),
    "--spec-ngram-size-m": row(WHOLE, "guesses of a step, by n-grams", least=1),
}  # fmt: skip
SGLANG: Mapping[str, Row] = {
    "--speculative-algorithm": row(names("EAGLE", "NGRAM", "STANDALONE"), "what drafts"),
    "--speculative-num-steps": row(WHOLE, "guesses of a step", least=1),
    "--speculative-eagle-topk": row(WHOLE, "1: no tree", least=1, most=1),
    "--speculative-num-draft-tokens": row(WHOLE, "tokens that are verified", least=1),
    "--speculative-draft-model-path": row(TEXT, "the draft model"),
}  # fmt: skip
VLLM_CONFIG, TRTLLM_CONFIG = "--speculative-config", "speculative_config"
VLLM: Mapping[str, Row] = {VLLM_CONFIG: row(JSON, "what drafts, and guesses of a step")}
_VLLM = {NGRAM: "ngram", MTP: "mtp", MODEL: "draft_model"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftChoice:
    """How the plan drafts."""

    length: int
    kind: str
    """n-gram, mtp or model."""
    name: str
    """The draft model's, or the kind's."""
    acceptance: str
    pays_from: tuple[tuple[float, float | None], ...]
    """(hit rate, acceptance from which drafts of this length pay) by rising hit rate."""

    @property
    def file(self) -> str:
        """What the draft model's file is called where the user has said no name: by the model."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-") + ".gguf"


def read_drafts(document: Mapping[str, Any]) -> DraftChoice | None:
    """Return how an offload plan drafts, None where it does not; raises InputError for a damaged one."""
    part = document.get("drafting")
    if part is None:
        return None
    if not isinstance(part, Mapping):
        raise InputError("plan: drafting", part, "not a table", _AGAIN)
    length, name = part.get("length"), str(part.get("draft"))
    if type(length) is not int or not 0 <= length <= MOST_DRAFTED:
        raise InputError("plan: drafting.length", length, "not a number of guesses", _AGAIN)
    if not length:
        return None
    return DraftChoice(
        length=length, kind=name if name in (NGRAM, MTP) else MODEL, name=name, acceptance=str(part.get("acceptance")),
        pays_from=_pays_from(part.get("break_even"), length),
    )  # fmt: skip


def read_ep_drafts(document: Mapping[str, Any]) -> DraftChoice | None:
    """Return how an expert-parallel plan drafts: with the model's own layer, as many tokens as its request says; None without any."""
    request = document.get("request")
    length = request.get("draft_tokens", 0) if isinstance(request, Mapping) else 0
    if type(length) is not int or not 0 <= length <= MOST_DRAFTED:
        raise InputError("plan: request.draft_tokens", length, "not a number of guesses", _AGAIN)
    if not length or not isinstance(request, Mapping):
        return None
    return DraftChoice(length=length, kind=MTP, name=MTP, acceptance=str(request.get("acceptance")), pays_from=())


def llama_cpp_flags(draft: DraftChoice | None, *, ik: bool = False) -> dict[str, FlagValue]:
    """Return the flags of llama-server, of llama.cpp or ik_llama.cpp."""
    if draft is None:
        return {}
    if draft.kind == NGRAM:
        size: dict[str, FlagValue] = {"--spec-type": "ngram-simple"}
        if ik:
            return size | {"--draft-max": draft.length, "--spec-ngram-size-m": draft.length}
        return size | {"--spec-ngram-simple-size-m": draft.length}
    if ik:
        what: dict[str, FlagValue] = (
            {"--multi-token-prediction": True} if draft.kind == MTP else {"--model-draft": draft.file}
        )
        return what | {"--draft-max": draft.length}
    if draft.kind == MTP:
        return {"--spec-type": "draft-mtp", "--spec-draft-n-max": draft.length}
    return {"--spec-type": "draft-simple", "--model-draft": draft.file, "--spec-draft-n-max": draft.length}


def sglang_flags(draft: DraftChoice | None) -> dict[str, FlagValue]:
    """Return the flags of SGLang's server; it counts the token that is certain among those that it verifies."""
    if draft is None:
        return {}
    verified: dict[str, FlagValue] = {"--speculative-num-draft-tokens": draft.length + 1}
    if draft.kind == NGRAM:
        return {"--speculative-algorithm": "NGRAM"} | verified
    chain: dict[str, FlagValue] = {"--speculative-num-steps": draft.length, "--speculative-eagle-topk": 1} | verified
    if draft.kind == MTP:
        return {"--speculative-algorithm": "EAGLE"} | chain
    return {"--speculative-algorithm": "STANDALONE", "--speculative-draft-model-path": draft.name} | chain


def vllm_config(draft: DraftChoice) -> dict[str, Any]:
    """Return the value of vLLM's `--speculative-config`."""
    found: dict[str, Any] = {"method": _VLLM[draft.kind], "num_speculative_tokens": draft.length}
    return found | ({"model": draft.name} if draft.kind == MODEL else {})


def trtllm_config(draft: DraftChoice) -> dict[str, Any]:
    """Return the value of TensorRT-LLM's `speculative_config` for a draft layer of the model's own."""
    return {"decoding_type": "MTP", "num_nextn_predict_layers": draft.length}


def told_apart(target: str, draft: DraftChoice) -> str:
    """Return what a user adds to the command of an engine whose files do not ask for drafts."""
    told = ""
    if target == "vllm":
        told = f"add --speculative-config '{json.dumps(vllm_config(draft))}'"
    elif target == "sglang":
        told = "add " + " ".join(f"{name} {value}" for name, value in sglang_flags(draft).items())
    predicted = f"predicted with {draft.length} drafted tokens a step by {draft.name}, which these files do not ask for"
    return f"{predicted}: {told}" if told else predicted


def asks_for_drafts(files: Mapping[str, str]) -> bool:
    """Return whether any of an engine's files says how to draft."""
    asking = {*LLAMA_CPP, *IK_LLAMA_CPP, *SGLANG, VLLM_CONFIG, f"{TRTLLM_CONFIG}:"}
    return any(word in asking for text in files.values() for word in text.split())


def ep_facts(draft: DraftChoice | None) -> list[str]:
    """Return what a user must know of drafts that an expert-parallel plan's files ask for."""
    if draft is None:
        return []
    said = f"predicted with {draft.length} drafted tokens a step and an acceptance of {draft.acceptance}"
    return [f"{said}; the server's log prints the one it has"]


def facts_of(draft: DraftChoice | None, model_name: str, *, gguf: bool = True) -> list[str]:
    """Return what a user must know of drafts that the files ask for; gguf: models are files of that kind."""
    if draft is None:
        return []
    found = [f"the prediction takes an acceptance of {draft.acceptance}; the server's log prints the one that it has"]
    if draft.kind == MODEL:
        stands = (
            f"{draft.file} stands for your file of {draft.name}"
            if gguf
            else f"{draft.name} stands for your folder of it"
        )
        found.append(f"{stands}, which must have the vocabulary of {model_name}")
    if draft.kind == MTP:
        found.append(f"the file of {model_name} must have its draft (MTP) layers; many were made without them")
    if draft.kind == NGRAM:
        found.append(
            "n-grams draft only where the text repeats itself; the prediction takes it that every step has a draft"
        )
    if draft.pays_from:
        told = ", ".join(
            f"{hits:.1%}: {'never' if least is None else format(least, '.0%')}" for hits, least in draft.pays_from
        )
        found.append(f"drafts of this length pay from an acceptance of, by hit rate: {told}")
    return found


def _pays_from(part: object, length: int) -> tuple[tuple[float, float | None], ...]:
    if not isinstance(part, Mapping) or length not in part.get("lengths", ()):
        return ()
    at = list(part["lengths"]).index(length)
    return tuple((float(each["hit_rate"]), each["break_even"][at]) for each in part.get("levels", ()))
