"""Published offload schedules, one line each, by the name people call them.

Modelled: what each system decides, as options of one `OffloadSchedule`. Ignored: what a paper does beyond its schedule
(training, other kernels, quantisation methods); capacities, which follow from memory; and constants, which papers' own
reproductions fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .errors import InputError, UnknownName
from .schedule import OffloadSchedule

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


def _preset(name: str, **changes: Any) -> OffloadSchedule:
    return OffloadSchedule(name=name).with_options(**changes)


PRESETS: Mapping[str, Callable[[], OffloadSchedule]] = {
    # Everything on the device: the reference when it fits.
    "resident": lambda: _preset("resident", cache__policy="static"),
    # Whole layers are fetched, serially, whatever was routed (arXiv 2312.17238, "naive offloading").
    "naive": lambda: _preset(
        "naive", cache__policy="none", copy__fetch="layer",
        copy__overlap=False, kernel__grouping="per-expert",
    ),
    # Fetch what was routed, after it was routed; nothing is kept (arXiv 2308.12066, MoE-OnDemand).
    "on-demand": lambda: _preset("on-demand", cache__policy="none", kernel__grouping="per-expert"),
    # LRU per layer and the next gate's two likeliest into four shared staging buffers (arXiv 2312.17238 §3).
    "mixtral-offloading": lambda: _preset(
        "mixtral-offloading", predictor__kind="next-gate", predictor__width=2,
        predictor__staging=4, kernel__grouping="per-expert",
    ),
    # What the public code does: LRU only, one stream, victims are swapped back.
    "mixtral-offloading-code": lambda: _preset(
        "mixtral-offloading-code", copy__overlap=False, copy__write_back=True,
        kernel__grouping="per-expert",
    ),
    # The gate of block N chooses for block N+1; nothing is kept (arXiv 2308.12066).
    "pre-gated": lambda: _preset("pre-gated", cache__policy="none", predictor__kind="pre-gate", kernel__grouping="per-expert"),
    # Every expert of the next layer is fetched while this one computes (SE-MoE, arXiv 2205.10034).
    "prefetch-all": lambda: _preset("prefetch-all", cache__policy="none", predictor__kind="all", kernel__grouping="per-expert"),
    # Every expert of the layer is fetched once its dense part is done, each running as it arrives (CPM-2's InfMoE, 2106.10715).
    "infmoe": lambda: _preset("infmoe", cache__policy="none", copy__fetch="layer-streamed", kernel__grouping="per-expert"),
    # The routing comes from the block before, by a shortcut (arXiv 2404.05019): known early and final, like a pre-gate's.
    "scmoe": lambda: _preset("scmoe", cache__policy="none", predictor__kind="pre-gate"),
    # Gates trained to look several layers ahead; what they are unsure of, or what would not pay, is left (Ou et al., Computer
    # Standards & Interfaces 94, 103996; the text is not public: depth and width are this project's reading).
    "lookahead": lambda: _preset(
        "lookahead", predictor__kind="next-gate", predictor__depth=2, predictor__benefit=True, predictor__staging=0,
    ),
    # Requests that used the same experts before guide prefetching and eviction (arXiv 2401.14361).
    "moe-infinity": lambda: _preset(
        "moe-infinity", cache__policy="activation", predictor__kind="activation", predictor__depth=2, kernel__grouping="per-expert",
    ),
    # A trained predictor, chunked copies that a demand may pass, wrong guesses dropped (arXiv 2410.22134). Its recall is
    # assumed; the paper's figures are per model.
    "promoe": lambda: _preset(
        "promoe", predictor__kind="dial", predictor__recall=0.9, predictor__depth=2, copy__chunk_bytes=1 << 20, copy__cancel=True,
    ),
    # Routes are known before the first layer, so all are fetched ahead and the farthest used leaves (arXiv 2410.19123).
    "read-me": lambda: _preset("read-me", cache__policy="belady", predictor__kind="oracle", predictor__depth=4),
    # The most popular experts stay; of the others each runs where it is predicted to end sooner (arXiv 2402.07033).
    "fiddler": lambda: _preset("fiddler", cache__policy="static", kernel__miss="cheaper", kernel__grouping="per-expert"),
    # A layer's misses are divided between the cores and the link; the next layer is fetched ahead (arXiv 2504.05897).
    "hybrimoe": lambda: _preset(
        "hybrimoe", cache__policy="lfu", kernel__miss="balanced", predictor__kind="next-gate", kernel__grouping="per-expert",
    ),
    # llama.cpp: all experts on the cores (--cpu-moe), or those of the first N layers (--n-cpu-moe N; without N, what fits).
    "cpu-moe": lambda: _preset("cpu-moe", cache__policy="none", kernel__miss="cpu"),
    "n-cpu-moe": lambda: _preset("n-cpu-moe", cache__policy="static", cache__placement="back", kernel__miss="cpu"),
    # kt-kernel's static placements (--kt-expert-placement-strategy uniform, frequency, front-loading).
    "kt-uniform": lambda: _preset("kt-uniform", cache__policy="static", cache__placement="uniform", kernel__miss="cpu"),
    "kt-frequency": lambda: _preset("kt-frequency", cache__policy="static", kernel__miss="cpu"),
    "kt-front-loading": lambda: _preset("kt-front-loading", cache__policy="static", cache__placement="front", kernel__miss="cpu"),
    # A miss that is nobody's first choice comes in half the bits (arXiv 2411.01433, whose thresholds are on gate scores).
    "hobbit": lambda: _preset(
        "hobbit", experts__low_bits="2", experts__low_rank=1, predictor__kind="next-gate", kernel__grouping="per-expert",
    ),
    # Bits by expert: the less popular half of each layer in fewer bits (arXiv 2308.14352, which searches bits for accuracy).
    "edge-moe": lambda: _preset(
        "edge-moe", experts__low_bits="2", experts__low_fraction=0.5, predictor__kind="next-gate", kernel__grouping="per-expert",
    ),
    # Layers the pass has left behind are evicted first (SpecMD, arXiv 2602.03921), from one pool.
    "least-stale": lambda: _preset("least-stale", cache__policy="least-stale"),
    # The least likely to follow what its layer chose last is evicted first.
    "affinity": lambda: _preset("affinity", cache__policy="affinity"),
    # The host's memory holds what fits in it; the rest is read from disk.
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
