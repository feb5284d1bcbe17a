"""Options of expert-parallel questions, and the request they make.

Modelled: one declaration per option, so that `plan` and `simulate` read alike; lengths of requests as the context that a step is timed
at and the one that memory is kept for. Ignored: what is done with the request.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...base.errors import InputError, UnknownName
from ...base.units import parse_quantity
from ...specs.drafting import MOST_DRAFTED
from .bounds import RANKS, SLOTS, TOKENS_PER_RANK, WEEK_S, between

if TYPE_CHECKING:
    from ...planner.parallel.case import ParallelRequest

# Context of a request where nothing is said of it.
CONTEXT_TOKENS = 4096
PHASES = ("prefill", "decode")
_EP = "ep"
# Fields of a request and the parameters whose options say the same.
REQUEST_OPTIONS = {
    "bits": "bits", "num_nodes": "nodes", "ranks_per_node": "ranks_per_node", "num_redundant": "redundant", "prefill": "phase",
    "context_tokens": "context", "kept_context_tokens": "context", "tokens_per_rank": "tokens_per_rank", "concurrency": "concurrency",
    "draft_tokens": "draft_tokens", "acceptance": "acceptance", "prefill_share": "prefill_share", "prompt_tokens": "prompt_tokens",
    "ttft_s": "ttft", "tpot_s": "tpot",
    "attention_ranks": "attention_tp",
    "kv_type": "kv_type", "search_moves": "search_moves", "dense_bits": "dense_bits", "memory_bytes": "memory",
}  # fmt: skip

NodesOption = Annotated[int, typer.Option("--nodes", help="ep: nodes.", callback=between(1, RANKS, "nodes"))]
RanksOption = Annotated[
    int,
    typer.Option(
        "--ranks-per-node", "--gpus-per-node", help="ep: devices in each node.", callback=between(1, RANKS, "devices")
    ),
]
RedundantOption = Annotated[
    int | None,
    typer.Option(
        "--redundant",
        help="ep: slots of a layer beyond one for each of the model's experts, over all ranks; default: how many is searched.",
        callback=between(0, SLOTS, "slots"),
    ),
]
AttentionTpOption = Annotated[
    int | None,
    typer.Option(
        "--attention-tp",
        help="ep: devices that share each attention layer (tensor parallel), inside a node or over whole nodes; 1: each has its own "
        "requests (data parallel); default: the preset's, and plan tries 1 and a node's.",
        callback=between(1, RANKS, "devices"),
    ),
]
PhaseOption = Annotated[str, typer.Option("--phase", help="ep: prefill or decode.")]
TokensPerRankOption = Annotated[
    int | None,
    typer.Option(
        "--tokens-per-rank",
        help="ep: tokens on each rank in a step (else 4096 in prefill, 128 in decode, or what --concurrency says).",
        callback=between(1, TOKENS_PER_RANK, "tokens"),
    ),
]
DraftTokensOption = Annotated[
    int | None,
    typer.Option(
        "--draft-tokens",
        help="Tokens drafted in a step for every sequence (ep: by the model's draft layer, MTP); beside --acceptance; with "
        "--speculative the most.",
        callback=between(1, MOST_DRAFTED, "drafted tokens"),
    ),
]
AcceptanceOption = Annotated[
    str | None,
    typer.Option(
        "--acceptance",
        help="How many drafts are accepted: the chance of each whose forerunners were right (0.85), or by position the shares "
        "that engines print (0.85,0.7,0.55), or a file with either.",
    ),
]
PrefillShareOption = Annotated[
    str | None,
    typer.Option(
        "--prefill-share",
        help="ep: of all tokens that a decoding server computes, those of prompts that it takes in meanwhile (0.5), or 'lengths': "
        "as --prompt-tokens and --reply-tokens have it; default: none.",
    ),
]
EpTtftOption = Annotated[
    str | None,
    typer.Option("--ttft", help="ep: most that the first token may take, e.g. 2s; whether that is kept is said."),
]
EpTpotOption = Annotated[
    str | None,
    typer.Option(
        "--tpot",
        help="ep: most that each further token may take, e.g. 50ms; says the largest batch that keeps it.",
    ),
]
PeriodOption = Annotated[
    list[str] | None,
    typer.Option(
        "--period",
        help="ep: recording or loads that are served after --trace, in order: does rebalancing pay (never, once from --trace, every few "
        "steps, or both)? Repeatable.",
    ),
]
RebalanceEveryOption = Annotated[
    int | None,
    typer.Option(
        "--rebalance-every",
        help="ep, beside --period: steps between rearrangements; default: 1000, 3000 and 10000, as engines come with them.",
        callback=between(1, SLOTS, "steps"),
    ),
]
CountWindowOption = Annotated[
    int | None,
    typer.Option(
        "--count-window",
        help="ep, beside --period: last steps whose counts a placement is made from; default: 1000.",
        callback=between(1, SLOTS, "steps"),
    ),
]
MovesOption = Annotated[
    str | None,
    typer.Option(
        "--moves",
        help="ep, beside --period: how experts move: at-once, layer-by-layer or background; default: all three are compared.",
    ),
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        "--against",
        help="ep: preset that the headline is against (moeplan schedule list --kind parallel); default: the balancing that engines ship.",
    ),
]
FactorOption = Annotated[
    list[str] | None,
    typer.Option(
        "--factor",
        help="ep: what the table of factors switches on, NAME=VALUE: placement=eplb, replicas=32, all-to-all=all-choices, "
        "overlap=two-batch (or expert-4, token-2); default: what the plan does. Repeatable.",
    ),
]
SecondsOption = Annotated[
    float | None,
    typer.Option(
        "--seconds",
        help="After so long the search begins no further candidate; default: all of them.",
        callback=between(1e-3, WEEK_S, "seconds"),
    ),
]
BitsOption = Annotated[
    str | None,
    typer.Option("--bits", help="ep: weight format of the experts, e.g. 8 or 4; default: native, the checkpoint's."),
]


def factors_of(texts: list[str] | None) -> dict[str, str]:
    """Return the levels of `--factor NAME=VALUE` by name; raises InputError for a wrong form or a name given twice."""
    found: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not value:
            raise InputError("--factor", text, "not of the form NAME=VALUE", "write for instance --factor replicas=32")
        if name in found:
            raise InputError("--factor", name, "is given twice", "give it once")
        found[name] = value
    return found


def latency_of(ctx: typer.Context) -> dict[str, Any]:
    """Return drafts, the prompts' share and limits of a request as the command line has them; raises InputError."""
    from ...specs.drafting import read_acceptance

    given = ctx.params
    acceptance = None if given["acceptance"] is None else read_acceptance(given["acceptance"]).to_text()
    return {
        "draft_tokens": given["draft_tokens"] or 0, "acceptance": acceptance, "speculative": given.get("speculative", False),
        "prefill_share": _share(given["prefill_share"], given["prompt_tokens"], given["reply_tokens"]),
        "prompt_tokens": given["prompt_tokens"] or None,
        "ttft_s": time_of(given["ttft"], "--ttft"), "tpot_s": time_of(given["tpot"], "--tpot"),
    }  # fmt: skip


def _share(text: str | None, prompt: int | None, reply: int | None) -> float | None:
    if text is None:
        return None
    if text == "lengths":
        if not prompt or not reply:
            raise InputError("--prefill-share", text, "lengths of prompts and replies are not both given",
                             "add --prompt-tokens and --reply-tokens")  # fmt: skip
        return prompt / (prompt + reply)
    try:
        return float(text)
    except ValueError:
        raise InputError("--prefill-share", text, "neither a number nor 'lengths'", "write for instance 0.5") from None


def time_of(text: str | None, option: str) -> float | None:
    """Return a time that is asked for in seconds; raises InputError for nought."""
    if text is None:
        return None
    seconds = parse_quantity(text, "s", option)
    if not 0 < seconds <= WEEK_S:
        raise InputError(option, text, f"not a time above zero, up to {WEEK_S:g} s", "write for instance 50ms")
    return seconds


def check_mode(mode: str) -> bool:
    """Return whether a question is of expert parallelism; raises UnknownName for a mode that there is not."""
    if mode not in ("offload", _EP):
        raise UnknownName("--mode", mode, ("offload", _EP))
    return mode == _EP


def drafts_of(ctx: Any) -> dict[str, Any]:
    """Return what is said of drafting for one device, as arguments of `plan`."""
    return {name: ctx.params[name] for name in ("speculative", "draft_tokens", "acceptance", "draft")}


def contexts_of(context: int | None, prompt: int | None, reply: int | None, *, prefill: bool) -> dict[str, int | None]:
    """Return the contexts of a request: what a step is timed at, and what memory is kept for where that is more.

    A decode step meets a reply half written, a prefill step a prompt.
    """
    if prompt is None and reply is None:
        return {"context_tokens": context or CONTEXT_TOKENS, "kept_context_tokens": None}
    whole = (prompt or 0) + (reply or 0)
    if whole == 0:
        raise InputError("--prompt-tokens", 0, "a request without any token", "give --prompt-tokens or --reply-tokens")
    if prefill and not prompt:
        raise InputError("--prompt-tokens", prompt or 0, "prefill is of prompts", "give their length")
    timed = (prompt or 0) if prefill else (prompt or 0) + (reply or 0) // 2
    if context is not None and context < whole:
        raise InputError("--context", context, f"a request has {whole} tokens", "give at least that, or leave it out")
    return {"context_tokens": max(1, timed), "kept_context_tokens": context or whole}


def parallel_request(phase: str, bits: str, **more: Any) -> ParallelRequest:
    """Return what is asked of many devices; raises for a phase or formats that there are not."""
    from ...planner.parallel.case import ParallelRequest

    if phase not in PHASES:
        raise UnknownName("--phase", phase, PHASES)
    if "," in bits:
        raise InputError("--bits", bits, "the experts of an expert-parallel plan have one format", "name one of them")
    return ParallelRequest(prefill=phase == "prefill", bits=bits, workers=os.cpu_count() or 1, **more)
