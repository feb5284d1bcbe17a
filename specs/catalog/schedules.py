"""What each bundled schedule is, in a line, and where it is published: offload presets and parallel presets by name.

Modelled: one entry for every preset (a test compares). Ignored: their options (`presets`, `ep_schedule`), and what they need and
which family they belong to (`presets.NEEDS`, `presets.FAMILIES`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class About:
    """What a schedule does and who published it."""

    what: str
    citation: str
    """Paper, code or documentation; "" for what is nobody's in particular."""


OFFLOAD: Mapping[str, About] = {
    "resident": About("everything is on the device: the reference when it fits", ""),
    "naive": About("whole layers are fetched, serially, whatever was routed", "naive offloading in arXiv 2312.17238"),
    "on-demand": About("what was routed is fetched after it was routed; nothing is kept", "MoE-OnDemand in arXiv 2308.12066"),
    "mixtral-offloading": About("LRU per layer, and the next gate's two likeliest in four shared staging buffers",
                                "arXiv 2312.17238 §3"),
    "mixtral-offloading-code": About("LRU only, one stream, victims are copied back", "github.com/dvmazur/mixtral-offloading"),
    "pre-gated": About("the gate of a block chooses for the next one; nothing is kept", "arXiv 2308.12066"),
    "prefetch-all": About("every expert of the next layer is fetched while this one computes", "SE-MoE, arXiv 2205.10034"),
    "infmoe": About("every expert of the layer is fetched after its dense part, each running as it arrives",
                    "InfMoE of CPM-2, arXiv 2106.10715"),
    "scmoe": About("routing comes from the block before, by a shortcut: known early and final", "arXiv 2404.05019"),
    "lookahead": About("gates look two layers ahead; a guess is fetched only while it is expected to pay (depth "
                       "and width are this project's reading)",
                       "Ou et al., Computer Standards & Interfaces 94, 103996"),
    "moe-infinity": About("earlier requests that used the same experts guide prefetching and eviction", "arXiv 2401.14361"),
    "promoe": About("a trained predictor, chunked copies that a demand may pass, wrong guesses dropped; its recall is assumed",
                    "arXiv 2410.22134"),
    "read-me": About("routes are known before the first layer: all are fetched ahead and the farthest used leaves",
                     "arXiv 2410.19123"),
    "fiddler": About("the most popular experts stay; of the others each runs where it is predicted to end sooner",
                     "arXiv 2402.07033"),
    "hybrimoe": About("a layer's misses are divided between cores and link; the next layer is fetched ahead",
                      "arXiv 2504.05897"),
    "cpu-moe": About("all experts on the cores", "llama.cpp --cpu-moe"),
    "n-cpu-moe": About("the experts of the first N layers on the cores (n-cpu-moe=N; without N, what fits)",
                       "llama.cpp --n-cpu-moe N"),
    "kt-uniform": About("as many experts of each layer on the device, lowest numbers first; the rest on the cores",
                        "kt-kernel --kt-expert-placement-strategy uniform"),
    "kt-frequency": About("the most popular experts on the device, the rest on the cores",
                          "kt-kernel --kt-expert-placement-strategy frequency"),
    "kt-front-loading": About("the first layers whole on the device, the rest on the cores",
                              "kt-kernel --kt-expert-placement-strategy front-loading"),
    "hobbit": About("a miss that is nobody's first choice comes in fewer bits (the paper's thresholds are on gate scores)",
                    "arXiv 2411.01433"),
    "edge-moe": About("the less popular half of each layer in fewer bits (the paper searches bits for accuracy)",
                      "arXiv 2308.14352"),
    "least-stale": About("layers the pass has left behind are evicted first, from one pool", "SpecMD, arXiv 2602.03921"),
    "affinity": About("the least likely to follow what its layer chose last is evicted first", ""),
    "three-tiers": About("the host's memory holds what fits in it; the rest is read from disk", ""),
}  # fmt: skip
"""By preset; the order is that of `presets.PRESETS`."""

PARALLEL: Mapping[str, About] = {
    "tensor-parallel": About("every rank of a node holds a slice of everything", "Megatron-LM, arXiv 1909.08053"),
    "ep": About("data-parallel attention, whole experts in their own order, one exchange there and one back",
                "GShard, arXiv 2006.16668"),
    "eps-moe": About("local experts in groups, the kernel chosen for each stage, multiprocessors divided (16 of 132 exchange)",
                     "arXiv 2410.12247"),
    "tbo": About("two batches in alternation; 24 of 132 multiprocessors exchange",
                 "SGLang's two-batch overlap, vLLM's dual-batch overlap; github.com/deepseek-ai/profile-data"),
    "tutel": About("chunks of tokens and a two-level all-to-all", "arXiv 2206.03382"),
    "comet": About("tile by tile inside one kernel: here a bound without losses", "arXiv 2502.19811"),
    "scmoe": About("a shortcut lets the layer before drive the exchange; needs a model trained so", "arXiv 2404.05019"),
    "grace": About("affinity groups, dynamic copies, nearest tier first by predicted load", "arXiv 2509.25041"),
    "occult": About("experts used together sit together, and a token travels once to each rank", "arXiv 2505.13345"),
    "eplb": About("32 copies of the busiest experts, packed by load", "github.com/deepseek-ai/EPLB; 32 as in arXiv 2412.19437"),
    "eplb-hierarchical": About("the same, expert groups kept inside nodes", "github.com/deepseek-ai/EPLB"),
    "metro": About("decoding reads weights: experts that are active are balanced, not tokens", "arXiv 2512.09277"),
    "fsmoe": About("exchanges between and inside nodes scheduled beside each other", "arXiv 2501.10714"),
    "parallel-folding": About("attention and experts mapped apart: tensor there, whole experts here", "arXiv 2504.14960"),
    "parm": About("attention and experts sliced inside nodes, one fused all-to-all between all ranks, its results gathered",
                  "arXiv 2407.00599"),
    "ppmoe": About("ranks of a node pick their experts' tokens out of those they all hold, and add up: no all-to-all",
                   "arXiv 2304.11414"),
}  # fmt: skip
"""By parallel preset; the order is that of `ep_schedule.EP_PRESETS`."""
