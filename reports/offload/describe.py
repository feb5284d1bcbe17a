"""A schedule in words: one short phrase for a headline, one row an option for a table.

Modelled: every option that changes what happens is named; options that a choice makes meaningless (a recall where nothing
is synthetic) are not. Ignored: what an option costs.
"""

from __future__ import annotations

from dataclasses import fields

from ...specs.schedules.offload import OffloadSchedule
from .. import numbers

_POLICIES = {
    "none": "no expert cache",
    "lru": "least-recently-used cache",
    "lfu": "least-frequently-used cache",
    "static": "fixed cache",
    "belady": "cache that knows the future",
    "least-stale": "cache that first drops layers this pass has left behind",
    "affinity": "cache that first drops what is least likely to come next",
    "activation": "cache that keeps what a similar request used",
}
_PLACEMENTS = {
    "popularity": "of the most popular experts",
    "uniform": "of as many experts of each layer",
    "front": "of the first layers",
    "back": "of the last layers",
}
_PREDICTORS = {
    "none": "nothing is fetched ahead",
    "all": "whole layers are fetched ahead",
    "next-gate": "the next gate, run early, says what to fetch ahead",
    "synthetic": "guesses of an assumed recall say what to fetch ahead",
    "pre-gate": "a pre-gate fixes the next layer's experts",
    "oracle": "the true choices are fetched ahead",
    "activation": "what a similar request used is fetched ahead",
}
_MISSES = {
    "fetch": "missing experts are fetched",
    "cpu": "missing experts run on the host's cores",
    "cheaper": "missing experts are fetched or run on the host's cores, whichever is predicted to be sooner",
    "balanced": "the link and the host's cores divide a layer's missing experts",
}
_FETCHES = {
    "layer": "every expert of a layer is fetched, whatever was routed",
    "layer-streamed": "every expert of a layer is fetched, each running as it arrives",
}
_GROUPINGS = {"grouped": "grouped: one launch for several experts", "per-expert": "one launch an expert"}


def cache_size(schedule: OffloadSchedule) -> str:
    """Return how much the cache holds, in words; empty where nothing is cached."""
    cache = schedule.cache
    if cache.policy == "none":
        return ""
    if cache.pooled_experts is not None:
        return f"{cache.pooled_experts:,} experts in one pool for all layers"
    if cache.experts_per_layer is not None:
        more = f", {cache.first_layer_extra:,} more of the first" if cache.first_layer_extra else ""
        return f"{cache.experts_per_layer:,} experts a layer{more}"
    if cache.bytes is not None:
        return f"{numbers.size(cache.bytes)} in one pool for all layers"
    if cache.host_layers is not None:
        return f"all but the first {cache.host_layers:,} layers"
    return "as many experts as fit"


def one_phrase(schedule: OffloadSchedule) -> str:
    """Return the schedule's main decisions in one phrase."""
    size = cache_size(schedule)
    parts = [_cache_words(schedule) + (f", {size}" if size else "")]
    predictor = schedule.predictor
    reach = f", {predictor.depth} layer{'s' if predictor.depth > 1 else ''} ahead" if predictor.kind != "none" else ""
    parts.append(_PREDICTORS[predictor.kind] + reach)
    if schedule.kernel.miss != "fetch":
        parts.append(_MISSES[schedule.kernel.miss])
    if schedule.copy.fetch in _FETCHES:
        parts.append(_FETCHES[schedule.copy.fetch])
    if schedule.experts.low_bits is not None:
        parts.append(f"some experts in {schedule.experts.low_bits} bits")
    if schedule.copy.host_experts is not None:
        parts.append("what the host's memory cannot hold is read from disk")
    parts.append("copies overlap compute" if schedule.copy.overlap else "copies and kernels take turns")
    return "; ".join(parts)


def _cache_words(schedule: OffloadSchedule) -> str:
    cache = schedule.cache
    words = _POLICIES[cache.policy]
    return f"{words} {_PLACEMENTS[cache.placement]}" if cache.policy == "static" else words


def option_rows(schedule: OffloadSchedule) -> list[tuple[str, str]]:
    """Return (option, value in words) for everything that this schedule decides."""
    bits = schedule.experts.bits
    rows = [
        *_cache_rows(schedule),
        ("Expert weights", f"{bits} bits" if bits.isdigit() else bits),
        *_precision_rows(schedule),
        *_predictor_rows(schedule),
        ("Expert kernels", _GROUPINGS[schedule.kernel.grouping]),
        *([("Misses", _MISSES[schedule.kernel.miss])] if schedule.kernel.miss != "fetch" else []),
        *_copy_rows(schedule),
        ("Requests decoded together", str(schedule.workload.concurrency)),
    ]
    chunk = schedule.workload.prefill_chunk_tokens
    rows.append(("Prompt tokens a pass", "the whole prompt" if chunk is None else str(chunk)))
    for option in fields(schedule.host):
        value = getattr(schedule.host, option.name)
        if value is not None:
            name = option.name.removesuffix("_s").replace("_", " ")
            rows.append((f"Host time {name}", f"{numbers.seconds(value)}, given by the user"))
    return rows


def _cache_rows(schedule: OffloadSchedule) -> list[tuple[str, str]]:
    cache = schedule.cache
    rows = [("Cache", _cache_words(schedule))]
    if cache.policy != "none":
        rows.append(("Cache size", cache_size(schedule)))
        rows.append(
            (
                "Cache contents",
                "emptied at each request" if cache.reset == "request" else "kept from request to request",
            )
        )
    return rows


def _precision_rows(schedule: OffloadSchedule) -> list[tuple[str, str]]:
    experts = schedule.experts
    if experts.low_bits is None:
        return []
    rows = []
    if experts.low_rank is not None:
        ranked = "its first choice" if experts.low_rank == 1 else f"one of its first {experts.low_rank} choices"
        rows.append(("A miss in fewer bits", f"{experts.low_bits} bits where no token has it as {ranked}"))
    if experts.low_fraction:
        share = numbers.percent(experts.low_fraction, 0)
        rows.append(("Experts in fewer bits", f"{experts.low_bits} bits for the least popular {share} of each layer"))
    return rows


def _predictor_rows(schedule: OffloadSchedule) -> list[tuple[str, str]]:
    predictor = schedule.predictor
    rows = [("Prediction", _PREDICTORS[predictor.kind])]
    if predictor.kind == "none":
        return rows
    if predictor.kind == "synthetic":
        decay = f"times {predictor.recall_decay:g} for each further layer"
        rows.append(("Assumed recall", f"{predictor.recall:g} one layer ahead, {decay}"))
    if predictor.kind != "pre-gate":
        width = predictor.width
        rows.append(("Layers ahead", str(predictor.depth)))
        if predictor.kind != "all":
            rows.append(("Guesses a token and layer", "the model's top-k" if width is None else str(width)))
    if predictor.kind == "activation":
        rows.append(("Requests remembered", f"{predictor.library:,}"))
    if predictor.threshold:
        rows.append(("Guesses left out", f"those less probable than {numbers.percent(predictor.threshold, 0)}"))
    if predictor.benefit:
        rows.append(("Guesses fetched", "while they are expected to hide more than a wrong one costs"))
    if schedule.cache.policy != "none":
        staging = predictor.staging
        rows.append(("Staging buffers", f"{staging} experts" if staging else "none: guesses enter the cache"))
    return rows


def _copy_rows(schedule: OffloadSchedule) -> list[tuple[str, str]]:
    copy = schedule.copy
    rows = [("Copies", "overlap compute" if copy.overlap else "take turns with kernels on one stream")]
    if copy.chunk_bytes is not None:
        rows.append(("Copy chunks", numbers.size(copy.chunk_bytes)))
    if copy.fetch in _FETCHES:
        rows.append(("Fetches", _FETCHES[copy.fetch]))
    if copy.cancel:
        rows.append(("Wrong guesses", "are dropped while their copy waits; counts then depend on time"))
    if copy.host_experts is not None:
        held = f"{copy.host_experts:,} experts" if copy.host_experts else "as many experts as fit"
        rows.append(("Host memory holds", f"{held}; the others are read from disk"))
    if copy.write_back:
        rows.append(("Evicted experts", "are copied back to the host"))
    if not copy.pinned:
        rows.append(("Host memory", "pageable"))
    return rows
