"""The schedules a search looks at: every sensible combination of the options, at every amount of memory.

Modelled: what the user fixed (bits, batching, the model itself) stays; caches, predictors, launches, streams and chunks vary.
A *level* is a number of expert slots on the device, all of them counted, staging and streaming included; levels run from the
fewest that work to the most that fit, so that the search also gives the memory–speed front. Ignored: schedules that need
another model (a pre-gate) or the future (oracle, belady): those are references, never answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..schedule import OffloadSchedule
from ..sim.simulate import STREAM_SLOTS, Rehearsal

ASSUMED_RECALL = 0.8
"""Recall of an early gate one layer ahead, used where the recording holds no guesses: the middle of the 60–90 % that
different sources report for Mixtral (schedule presets cite them), and stated in the answer."""
NUM_LEVELS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One schedule at one level."""

    schedule: OffloadSchedule
    level: int
    """Expert slots on the device, all included."""
    cached_slots: int
    """Of those, slots of the cache."""


def levels(rehearsal: Rehearsal, base: OffloadSchedule) -> list[int]:
    """Return the numbers of slots to search, rising; the last is the most that fits. Raises DoesNotFit when none do."""
    most = rehearsal.slots_that_fit(base)
    layers = rehearsal.trace.num_layers
    least = min(layers, most)
    count = min(NUM_LEVELS, max(1, most // layers))
    found = {most} | {least + (most - least) * i // max(1, count - 1) for i in range(count)}
    return sorted(level for level in found if level >= 1)


def predictors(rehearsal: Rehearsal) -> Iterator[dict[str, object]]:
    """Yield the predictor options worth trying on this recording, none first."""
    yield {"predictor.kind": "none", "predictor.staging": 0}
    trace = rehearsal.trace
    top_k = trace.top_k
    if trace.predicted is not None:
        kind, reach, wide = "next-gate", trace.predicted.shape[2], trace.predicted.shape[3]
    else:
        kind, reach, wide = "dial", 3, trace.num_experts
    widths = sorted({w for w in (max(1, top_k // 2), top_k, top_k + top_k // 2, 2 * top_k) if w <= wide})
    for depth in range(1, min(3, reach, max(1, trace.num_layers - 1)) + 1):
        for width in widths:
            for staging in sorted({0, top_k, 2 * top_k, 4 * top_k}):
                options: dict[str, object] = {"predictor.kind": kind, "predictor.depth": depth, "predictor.width": width,
                                              "predictor.staging": staging}  # fmt: skip
                if kind == "dial":
                    options["predictor.recall"] = ASSUMED_RECALL
                yield options


def candidates(rehearsal: Rehearsal, base: OffloadSchedule, level: int) -> Iterator[Candidate]:
    """Yield every schedule of `level` slots that keeps the bits and batching of `base`."""
    layers, total = rehearsal.trace.num_layers, rehearsal.num_experts
    expert_bytes = rehearsal.expert_bytes(base)
    for guess in predictors(rehearsal):
        guessing = guess["predictor.kind"] != "none"
        for policy in ("lru", "lfu", "static", "none"):
            if policy == "none" and guessing:
                continue
            staging = int(str(guess["predictor.staging"]))
            if policy == "static" and guessing and not staging:
                continue
            for pooled in (False, True) if policy != "none" else (False,):
                slots = level - staging - (STREAM_SLOTS if policy == "static" else 0)
                settings: dict[str, object] = {"cache.policy": policy} | guess
                if policy == "none":
                    slots = 0
                elif pooled:
                    slots = min(slots, total)
                    settings["cache.pooled_experts"] = slots
                else:
                    each = min(slots // layers, rehearsal.trace.num_experts)
                    slots = each * layers
                    settings["cache.experts_per_layer"] = each
                if policy != "none" and slots < (1 if pooled else layers):
                    continue
                for grouping in ("grouped", "per-expert"):
                    for overlap, chunk in ((True, None), (True, _chunk(expert_bytes)), (False, None)):
                        if guessing and not overlap or chunk is not None and not guessing:
                            continue  # one stream hides nothing; only a demand that passes a prefetch gains from chunks
                        choice = settings | {"kernel.grouping": grouping, "copy.overlap": overlap, "copy.chunk_bytes": chunk}
                        schedule = base.with_options(name="search", **{key.replace(".", "__"): v for key, v in choice.items()})
                        yield Candidate(schedule=schedule, level=level, cached_slots=slots)


def _chunk(expert_bytes: int) -> int:
    """Return a quarter of an expert, but at least 256 KiB: smaller copies no longer reach the link's rate."""
    return max(expert_bytes // 4, 262144)
