"""Published offload schedules, one line each, by the name people call them.

Modelled: what each system decides, as options of one `OffloadSchedule`. Ignored: what a paper does beyond its schedule
(training, other kernels, quantisation methods); capacities, which follow from memory; and constants, which papers' own
reproductions fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...base.errors import InputError, UnknownName
from .offload import OffloadSchedule

FAMILIES: Mapping[str, str] = {
    "resident": "everything on the device", "naive": "no cache", "on-demand": "no cache", "infmoe": "no cache",
    "prefetch-all": "no cache, fetched ahead", "pre-gated": "no cache, fetched ahead", "scmoe": "no cache, fetched ahead",
    "mixtral-offloading-code": "cache", "least-stale": "cache", "affinity": "cache", "three-tiers": "cache",
    "mixtral-offloading": "cache and guesses", "lookahead": "cache and guesses", "moe-infinity": "cache and guesses",
    "promoe": "cache and guesses", "read-me": "cache and guesses",
    "fiddler": "host's cores", "hybrimoe": "host's cores", "cpu-moe": "host's cores", "n-cpu-moe": "host's cores",
    "kt-uniform": "host's cores", "kt-frequency": "host's cores", "kt-front-loading": "host's cores",
    "hobbit": "mixed precision", "edge-moe": "mixed precision",
}  # fmt: skip
"""What a preset mainly does, for grouping in tables and reports."""
ENGINE_FAMILY = "the engine's own settings"
"""The heading of what an engine does when it is told nothing, or little."""


def _preset(name: str, **changes: Any) -> OffloadSchedule:
    return OffloadSchedule(name=name).with_options(**changes)


# What each does and who published it stands in `catalog/schedules`; `moeplan schedule list` prints it.
PRESETS: Mapping[str, Callable[[], OffloadSchedule]] = {
    "resident": lambda: _preset("resident", cache__policy="static"),
    "naive": lambda: _preset(
        "naive", cache__policy="none", copy__fetch="layer",
        copy__overlap=False, kernel__grouping="per-expert",
    ),
    "on-demand": lambda: _preset("on-demand", cache__policy="none", kernel__grouping="per-expert"),
    "mixtral-offloading": lambda: _preset(
        "mixtral-offloading", predictor__kind="next-gate", predictor__width=2,
        predictor__staging=4, kernel__grouping="per-expert",
    ),
    "mixtral-offloading-code": lambda: _preset(
        "mixtral-offloading-code", copy__overlap=False, copy__write_back=True,
        kernel__grouping="per-expert",
    ),
    "pre-gated": lambda: _preset("pre-gated", cache__policy="none", predictor__kind="pre-gate", kernel__grouping="per-expert"),
    "prefetch-all": lambda: _preset("prefetch-all", cache__policy="none", predictor__kind="all", kernel__grouping="per-expert"),
    "infmoe": lambda: _preset("infmoe", cache__policy="none", copy__fetch="layer-streamed", kernel__grouping="per-expert"),
    "scmoe": lambda: _preset("scmoe", cache__policy="none", predictor__kind="pre-gate"),
    "lookahead": lambda: _preset(
        "lookahead", predictor__kind="next-gate", predictor__depth=2, predictor__benefit=True, predictor__staging=0,
    ),
    "moe-infinity": lambda: _preset(
        "moe-infinity", cache__policy="activation", predictor__kind="activation", predictor__depth=2, kernel__grouping="per-expert",
    ),
    "promoe": lambda: _preset(
        "promoe", predictor__kind="synthetic", predictor__recall=0.9, predictor__depth=2, copy__chunk_bytes=1 << 20, copy__cancel=True,
    ),
    "read-me": lambda: _preset("read-me", cache__policy="belady", predictor__kind="oracle", predictor__depth=4),
    "fiddler": lambda: _preset("fiddler", cache__policy="static", kernel__miss="cheaper", kernel__grouping="per-expert"),
    "hybrimoe": lambda: _preset(
        "hybrimoe", cache__policy="lfu", kernel__miss="balanced", predictor__kind="next-gate", kernel__grouping="per-expert",
    ),
    "cpu-moe": lambda: _preset("cpu-moe", cache__policy="none", kernel__miss="cpu"),
    "n-cpu-moe": lambda: _preset("n-cpu-moe", cache__policy="static", cache__placement="back", kernel__miss="cpu"),
    "kt-uniform": lambda: _preset("kt-uniform", cache__policy="static", cache__placement="uniform", kernel__miss="cpu"),
    "kt-frequency": lambda: _preset("kt-frequency", cache__policy="static", kernel__miss="cpu"),
    "kt-front-loading": lambda: _preset("kt-front-loading", cache__policy="static", cache__placement="front", kernel__miss="cpu"),
    "hobbit": lambda: _preset(
        "hobbit", experts__low_bits="2", experts__low_rank=1, predictor__kind="next-gate", kernel__grouping="per-expert",
    ),
    "edge-moe": lambda: _preset(
        "edge-moe", experts__low_bits="2", experts__low_fraction=0.5, predictor__kind="next-gate", kernel__grouping="per-expert",
    ),
    "least-stale": lambda: _preset("least-stale", cache__policy="least-stale"),
    "affinity": lambda: _preset("affinity", cache__policy="affinity"),
    "three-tiers": lambda: _preset("three-tiers", copy__host_experts=0),
}  # fmt: skip

NEEDS: Mapping[str, str] = {
    "pre-gated": "a model whose gates were trained to choose one layer ahead",
    "scmoe": "a model trained with shortcuts",
    "read-me": "a router that is separate from the layers, and to know the requests to come",
    "lookahead": "gates trained to look several layers ahead",
    "promoe": "a trained predictor; its recall is assumed",
    "hobbit": "experts in a second weight format: allow it with --bits",
    "edge-moe": "experts in a second weight format: allow it with --bits",
}
"""What a preset needs that the search does not assume: it is shown beside the answer, and may be faster."""


def load_preset(name: str) -> OffloadSchedule:
    """Return the preset called `name`; `n-cpu-moe=N` says how many layers stay on the cores.

    Raises UnknownName (with the nearest one) for another name and InputError for an N that is no count.
    """
    base, equals, count = name.partition("=")
    if equals and base == "n-cpu-moe":
        if not count.isascii() or not count.isdigit():
            raise InputError("schedule", name, "N is not a count of layers", "write for instance n-cpu-moe=12")
        return PRESETS[base]().with_options(cache__host_layers=int(count))
    if name not in PRESETS:
        raise UnknownName("schedule", name, PRESETS)
    return PRESETS[name]()
