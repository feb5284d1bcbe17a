"""A schedule in words: one short phrase for a headline, one row an option for a table.

Modelled: every option that changes what happens is named; options that a choice makes meaningless (a recall where nothing
is dialled) are not. Ignored: what an option costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import numbers

Options = Mapping[str, Any]

_POLICIES = {
    "none": "no expert cache",
    "lru": "least-recently-used cache",
    "lfu": "least-frequently-used cache",
    "static": "fixed cache of the most popular experts",
    "belady": "cache that knows the future",
}
_PREDICTORS = {
    "none": "nothing is fetched ahead",
    "all": "whole layers are fetched ahead",
    "next-gate": "the next gate, run early, says what to fetch ahead",
    "dial": "guesses of an assumed recall say what to fetch ahead",
    "pre-gate": "a pre-gate fixes the next layer's experts",
    "oracle": "the true choices are fetched ahead",
}


def cache_size(schedule: Options) -> str:
    """Return how much the cache holds, in words; empty where nothing is cached."""
    cache = schedule["cache"]
    if cache["policy"] == "none":
        return ""
    if cache["pooled_experts"] is not None:
        return f"{cache['pooled_experts']:,} experts in one pool for all layers"
    if cache["experts_per_layer"] is not None:
        return f"{cache['experts_per_layer']:,} experts a layer"
    if cache["bytes"] is not None:
        return f"{numbers.size(cache['bytes'])} in one pool"
    return "as many experts as fit"


def one_phrase(schedule: Options) -> str:
    """Return the schedule's main decisions in one phrase."""
    size = cache_size(schedule)
    parts = [_POLICIES[schedule["cache"]["policy"]] + (f", {size}" if size else "")]
    predictor = schedule["predictor"]
    if predictor["kind"] != "none":
        reach = f", {predictor['depth']} layer{'s' if predictor['depth'] > 1 else ''} ahead"
        parts.append(_PREDICTORS[predictor["kind"]] + reach)
    else:
        parts.append(_PREDICTORS["none"])
    parts.append("copies overlap compute" if schedule["copy"]["overlap"] else "copies and kernels take turns")
    return "; ".join(parts)


def option_rows(schedule: Options) -> list[tuple[str, str]]:
    """Return (option, value in words) for everything that this schedule decides."""
    cache, predictor, copy, work = schedule["cache"], schedule["predictor"], schedule["copy"], schedule["workload"]
    rows = [("Cache", _POLICIES[cache["policy"]])]
    if cache["policy"] != "none":
        rows.append(("Cache size", cache_size(schedule)))
        kept = "emptied at each request" if cache["reset"] == "request" else "kept from request to request"
        rows.append(("Cache contents", kept))
    rows.append(
        (
            "Expert weights",
            f"{schedule['experts']['bits']} bits"
            if str(schedule["experts"]["bits"]).isdigit()
            else str(schedule["experts"]["bits"]),
        )
    )
    rows.append(("Prediction", _PREDICTORS[predictor["kind"]]))
    if predictor["kind"] == "dial":
        rows.append(
            (
                "Assumed recall",
                f"{predictor['recall']:g} one layer ahead, times {predictor['recall_decay']:g} for each further one",
            )
        )
    if predictor["kind"] not in ("none", "pre-gate"):
        rows.append(("Layers ahead", str(predictor["depth"])))
        width = predictor["width"]
        rows.append(("Guesses a token and layer", "the model's top-k" if width is None else str(width)))
    if predictor["kind"] != "none" and cache["policy"] != "none":
        staging = predictor["staging"]
        rows.append(("Staging buffers", f"{staging} experts" if staging else "none: guesses enter the cache"))
    grouped = schedule["kernel"]["grouping"] == "grouped"
    rows.append(("Expert kernels", "grouped: one launch for several experts" if grouped else "one launch an expert"))
    rows.append(("Copies", "overlap compute" if copy["overlap"] else "take turns with kernels on one stream"))
    if copy["chunk_bytes"] is not None:
        rows.append(("Copy chunks", numbers.size(copy["chunk_bytes"])))
    if copy["fetch"] == "layer":
        rows.append(("Fetched on a miss", "every expert of the layer"))
    if copy["write_back"]:
        rows.append(("Evicted experts", "are copied back to the host"))
    if not copy["pinned"]:
        rows.append(("Host memory", "pageable"))
    rows.append(("Requests decoded together", str(work["concurrency"])))
    chunk = work["prefill_chunk_tokens"]
    rows.append(("Prompt tokens a pass", "the whole prompt" if chunk is None else str(chunk)))
    given = {key: value for key, value in schedule["host"].items() if value is not None}
    rows += [
        (f"Host, {key.removesuffix('_s').replace('_', ' ')}", f"{value:g} s, given by the user")
        for key, value in given.items()
    ]
    return rows
