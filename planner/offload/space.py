"""The schedules a search looks at: every sensible combination of the options, at every amount of memory.

Modelled: what the user fixed (bits, batching, the model itself) stays; caches, predictors, launches, streams and chunks vary;
the host's cores take part where the machine's profile has costs for them, a second weight format where the user allows it.
A *level* is a number of expert slots on the device, all of them counted, staging and streaming included; levels run from the
fewest that work to the most that fit, so that the search also gives the memory–speed front. Ignored: schedules that need
another model (a pre-gate) or the future (oracle, belady): those are references, never answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from ...base.errors import DoesNotFit, InputError
from ...sim.offload.memory.device import STREAM_SLOTS
from ...sim.offload.simulate import Simulation
from ...specs.schedules.offload import OffloadSchedule

ASSUMED_RECALL = 0.8
"""Recall of an early gate one layer ahead, used where the recording holds no guesses: the middle of the 60–90 % that
different sources report for Mixtral (schedule presets cite them), and stated in the answer."""
LEVEL_SHARES = (0.4, 0.55, 0.7, 0.85, 1.0)
"""Levels searched, as shares of the slots that fit: far below what one has, nobody buys."""

FEWER_LEVEL_SHARES = (0.5, 0.75, 1.0)
"""The same for models of more than `MOST_SCANNED` experts, whose runs take longer and whose levels lie closer."""
MOST_SCANNED = 2048
"""Experts up to which a pool shared by all layers is tried with policies that look through all of it for each victim: in larger ones
a run takes ten times as long, and the same policies with places by layer stand for them."""
_SCANNING = ("lfu", "lfuda", "least-stale", "affinity", "activation")

# (layers ahead, guesses per token as a share of top-k) worth trying: looking far and wide at once moves more than a link can.
_REACHES = ((1, 0.5), (1, 1.0), (1, 1.5), (1, 2.0), (2, 0.5), (2, 1.0), (3, 0.5), (3, 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One schedule at one level."""

    schedule: OffloadSchedule
    level: int
    """Expert slots on the device, all included."""
    cached_slots: int
    """Of those, slots of the cache."""

    def words(self) -> str:
        """Return the options in which the schedule differs from the plainest one, for messages."""
        plain = OffloadSchedule().to_dict()
        return " ".join(
            f"{section}.{key}={value}"
            for section, part in self.schedule.to_dict().items()
            if isinstance(part, dict)
            for key, value in part.items()
            if value != plain[section].get(key)
        )


# A schedule and the slots of its cache.
_Sized: TypeAlias = tuple[OffloadSchedule, int]


def levels(simulation: Simulation, base: OffloadSchedule) -> list[int]:
    """Return the numbers of slots to search, rising; the last is the most that fits. Raises DoesNotFit when none do."""
    most = simulation.slots_that_fit(base)
    least = min(simulation.trace.num_layers, most)
    shares = LEVEL_SHARES if simulation.num_experts <= MOST_SCANNED else FEWER_LEVEL_SHARES
    return sorted({level for share in shares if (level := max(least, round(most * share))) >= 1})


def predictors(simulation: Simulation) -> Iterator[dict[str, object]]:
    """Yield the predictor options worth trying on this recording, none first."""
    yield {"predictor.kind": "none", "predictor.staging": 0}
    trace = simulation.trace
    top_k = trace.top_k
    if trace.predicted is not None:
        kind, reach, wide = "next-gate", trace.predicted.shape[2], trace.predicted.shape[3]
    else:
        kind, reach, wide = "synthetic", 3, trace.num_experts
    for depth, share in _REACHES:
        width = max(1, round(share * top_k))
        if depth > min(reach, max(1, trace.num_layers - 1)) or width > wide:
            continue
        for staging in (0, top_k, 4 * top_k):
            options: dict[str, object] = {"predictor.kind": kind, "predictor.depth": depth, "predictor.width": width,
                                          "predictor.staging": staging}  # fmt: skip
            if kind == "synthetic":
                options["predictor.recall"] = ASSUMED_RECALL
            yield options


def candidates(
    simulation: Simulation,
    base: OffloadSchedule,
    level: int,
    low_bits: str | None = None,
    refused: list[DoesNotFit] | None = None,
    *,
    exhaustive: bool = True,
) -> Iterator[Candidate]:
    """Yield every schedule of `level` slots that keeps the bits (and `low_bits`, a second format) and batching of `base`.

    refused: is given the reasons why the host cannot hold what others must keep there. exhaustive: pools are searched whatever
    their size (`MOST_SCANNED`).
    """
    for schedule, cached in (
        *_plain(simulation, base, level),
        *(one for settings in _special(simulation, low_bits) for one in _sized(simulation, base, level, settings)),
        *_by_layer(simulation, base, level),
    ):
        cache = schedule.cache
        scanned = cache.pooled_experts is not None and cache.policy in _SCANNING
        if scanned and not exhaustive and simulation.num_experts > MOST_SCANNED:
            continue
        if simulation.split is not None and not _on_cards(simulation, schedule, cached):
            continue
        try:
            held = simulation.within_host(schedule, cached_experts=cached)
        except DoesNotFit as reason:
            if refused is not None:
                refused.append(reason)
        else:
            yield Candidate(schedule=held.with_upload(simulation.upload_tokens), level=level, cached_slots=cached)


def _on_cards(simulation: Simulation, schedule: OffloadSchedule, cached: int) -> bool:
    """Return whether each of several cards can hold its layers' part of a cache; one pool of changing experts lies on no one card."""
    try:
        return simulation.lacking_bytes(schedule, cached_experts=cached) <= 0
    except InputError:
        return False


def _special(simulation: Simulation, low_bits: str | None) -> Iterator[dict[str, object]]:
    """Yield the options of schedules that the plain grid does not hold, apart from their size."""
    guesses = [guess for guess in predictors(simulation) if not guess["predictor.staging"]]
    none, near = guesses[0], guesses[1:]
    top_k = simulation.trace.top_k
    wide = [guess for guess in near if guess["predictor.width"] in (top_k, 2 * top_k)]
    next_layer = [guess for guess in wide if guess["predictor.depth"] == 1 and guess["predictor.width"] == top_k]
    weighs = simulation.trace.predicted is None or simulation.trace.predicted_prob is not None
    for grouping in ("grouped", "per-expert"):
        launch: dict[str, object] = {"kernel.grouping": grouping}
        for policy in ("least-stale", "affinity"):
            for guess in (none, *next_layer):
                yield launch | guess | {"cache.policy": policy}
        for depth in (1, 2):
            guess = {"predictor.kind": "activation", "predictor.depth": depth, "predictor.staging": 0}
            yield launch | guess | {"cache.policy": "activation"}
        if weighs:
            for guess in wide:
                yield launch | guess | {"cache.policy": "lru", "predictor.benefit": True}
        if simulation.profile.host.cpu is not None:
            for policy in ("lru", "lfu", "static"):
                for miss in ("cpu", "cheaper", "balanced"):
                    if policy != "static" and miss == "cpu":
                        continue  # nothing would ever enter the cache
                    for guess in (none, *(next_layer if policy != "static" else [])):
                        yield launch | guess | {"cache.policy": policy, "kernel.miss": miss}
            if grouping == "grouped":  # nothing is launched on the device, so how does not matter
                yield launch | none | {"cache.policy": "none", "kernel.miss": "cpu"}
            for placement in ("front", "back"):
                yield launch | none | {"cache.policy": "static", "cache.placement": placement, "kernel.miss": "cpu"}
        for key, name in simulation.own_rules:
            for guess in (none, *next_layer):
                if key != "predictor.score" or guess is not none:
                    yield launch | guess | {"cache.policy": "lru"} | {key: name}
        if low_bits is not None:
            for use in ({"experts.low_rank": 1}, {"experts.low_fraction": 0.5}):
                for guess in (none, *next_layer):
                    yield launch | guess | {"cache.policy": "lru", "experts.low_bits": low_bits} | use


def _sized(simulation: Simulation, base: OffloadSchedule, level: int, settings: dict[str, object]) -> Iterator[_Sized]:
    """Yield the schedule of `settings` with `level` slots in one pool and, where that makes a difference, by layer."""
    layers, total = simulation.trace.num_layers, simulation.num_experts
    if settings["cache.policy"] == "none":
        yield from _allowed(base, {name.replace(".", "__"): value for name, value in settings.items()}, 0)
        return
    slots = level - (STREAM_SLOTS if settings["cache.policy"] == "static" and level < total else 0)
    whole = settings.get("cache.placement") in ("front", "back")
    pooled = slots // simulation.trace.num_experts * simulation.trace.num_experts if whole else min(slots, total)
    sizes = [("cache.pooled_experts", pooled, pooled)]
    each = min(slots // layers, simulation.trace.num_experts)
    if settings["cache.policy"] != "least-stale" and not whole:  # by layer that is recency
        sizes.append(("cache.experts_per_layer", each, each * layers))
    for key, size, cached in sizes:
        if size >= 1:
            options = {name.replace(".", "__"): value for name, value in (settings | {key: size}).items()}
            yield from _allowed(base, options, cached)


def _plain(simulation: Simulation, base: OffloadSchedule, level: int) -> Iterator[_Sized]:
    """Yield the grid of caches, predictors, launches, streams and chunks."""
    layers, total = simulation.trace.num_layers, simulation.num_experts
    expert_bytes = simulation.expert_bytes(base)
    for guess in predictors(simulation):
        guessing = guess["predictor.kind"] != "none"
        for policy in ("lru", "lfu", "static", "none"):
            if policy == "none" and guessing:
                continue
            staging = int(str(guess["predictor.staging"]))
            if policy == "static" and guessing and not staging:
                continue
            for pooled in (False, True) if policy != "none" else (False,):
                slots = level - staging
                if policy == "static" and slots < total:  # misses pass through slots of their own, where there are any
                    slots -= STREAM_SLOTS
                settings: dict[str, object] = {"cache.policy": policy} | guess
                if policy == "none":
                    slots = 0
                elif pooled:
                    slots = min(slots, total)
                    settings["cache.pooled_experts"] = slots
                else:
                    each = min(slots // layers, simulation.trace.num_experts)
                    slots = each * layers
                    settings["cache.experts_per_layer"] = each
                if policy != "none" and slots < (1 if pooled else layers):
                    continue
                for grouping in ("grouped", "per-expert"):
                    for overlap, chunk in ((True, None), (True, _chunk(expert_bytes)), (False, None)):
                        # One stream hides nothing; only a demand that passes a prefetch gains from chunks, and by as
                        # much however the experts are then launched.
                        if (guessing and not overlap) or (
                            chunk is not None and (not guessing or grouping != "grouped")
                        ):
                            continue
                        choice = settings | {
                            "kernel.grouping": grouping,
                            "copy.overlap": overlap,
                            "copy.chunk_bytes": chunk,
                        }
                        options = {key.replace(".", "__"): v for key, v in choice.items()}
                        yield from _allowed(base, options, slots)


def _by_layer(simulation: Simulation, base: OffloadSchedule, level: int) -> Iterator[_Sized]:
    """Yield caches by layer that fetch what pays of guesses one layer ahead; the first layer's, which nothing guesses, larger or not."""
    top_k, trace = simulation.trace.top_k, simulation.trace
    if trace.predicted is not None and trace.predicted_prob is None:
        return
    for guess in predictors(simulation):
        staging, width = int(str(guess["predictor.staging"])), guess.get("predictor.width")
        if (
            guess.get("predictor.depth") != 1
            or width not in (top_k, round(1.5 * top_k))
            or staging not in (0, 4 * top_k)
        ):
            continue
        for policy in ("lru", "affinity"):
            for each, extra in shares_of(level - staging, trace.num_layers, trace.num_experts):
                if policy == "lru" and not staging and not extra:
                    continue  # `_special` has it
                for grouping in ("grouped", "per-expert"):
                    choice = guess | {
                        "cache.policy": policy, "cache.experts_per_layer": each, "cache.first_layer_extra": extra,
                        "predictor.benefit": True, "kernel.grouping": grouping,
                    }  # fmt: skip
                    options = {key.replace(".", "__"): value for key, value in choice.items()}
                    yield from _allowed(base, options, each * trace.num_layers + extra)


def shares_of(slots: int, num_layers: int, num_experts: int) -> list[tuple[int, int]]:
    """Return ways to divide slots among layers, as (each layer's, how many more the first has): evenly, with what is left for the first
    layer, and with one of each other layer's for it too, where it can use most of those.
    """
    each = min(slots // num_layers, num_experts)
    found = [(each, 0)] if each else []
    for held in (each, each - 1):
        extra = min(slots - held * num_layers, num_experts - held)
        if held >= 1 and extra > 0 and slots - held * num_layers - extra < num_layers // 2:
            found.append((held, extra))
    return found


def _allowed(base: OffloadSchedule, options: dict[str, object], cached_slots: int) -> Iterator[_Sized]:
    """Yield the schedule of `options`, unless they contradict what the user or the machine fixed."""
    try:
        yield base.with_options(name="search", **options), cached_slots
    except InputError:
        return


def _chunk(expert_bytes: int) -> int:
    """Return a quarter of an expert, but at least 256 KiB: smaller copies no longer reach the link's rate."""
    return max(expert_bytes // 4, 262144)
