"""What several offload engines have in common: how many whole layers a cache is worth, and what cannot be told to any of them.

Modelled: a cache of C experts holds C // experts whole layers; guesses, formats, streams. Ignored: any one engine's spelling.
"""

from __future__ import annotations

from collections.abc import Mapping

from .choices import OffloadChoice, left_out

# Options that every engine of this kind maps or explains through the functions below.
COMMON = ("cache.policy", "cache.experts_per_layer", "cache.pooled_experts", "cache.bytes", "predictor")


# What a schedule says where nothing is fetched ahead.
NO_GUESSES: Mapping[str, object] = {"predictor__kind": "none", "predictor__depth": 1, "predictor__staging": 0}


def whole_layers(choice: OffloadChoice, num_experts: int) -> int:
    """Return how many layers' experts fit where the plan's cache was."""
    return choice.cached_experts // num_experts


def per_layer(choice: OffloadChoice, num_layers: int) -> int:
    """Return the experts of each layer that fit where the plan's cache was, equally many everywhere."""
    return choice.cached_experts // num_layers


def pool_notes(choice: OffloadChoice, num_layers: int) -> list[str]:
    """Return a line where the plan's cache is shared by all layers and the engine wants one number for each of them."""
    if choice.schedule.cache.pooled_experts is None or choice.cached_experts == 0:
        return []
    each = per_layer(choice, num_layers)
    lost = choice.cached_experts - each * num_layers
    unused = f", {lost} are unused" if lost else ""
    return [f"cache.pooled_experts={choice.cached_experts}: each layer gets its own {each}{unused}"]


def guess_notes(choice: OffloadChoice, does: str) -> list[str]:
    """Return a line where the plan fetches guesses ahead; does: what the engine does instead."""
    predictor = choice.schedule.predictor
    if predictor.kind == "none":
        return []
    return [f"predictor.kind={predictor.kind} (depth {predictor.depth}, staging {predictor.staging}): {does}"]


def other_notes(choice: OffloadChoice, expressed: tuple[str, ...] = ()) -> list[str]:
    """Return the lines for every other option that differs from its default."""
    return left_out(choice.schedule, COMMON + expressed + (("experts.bits",) if choice.native_format else ()))
