"""Schedules that the executor runs, one for each thing it does: of one weight format, and of two."""

from __future__ import annotations

from executor_stages import preset

SCHEDULES = {
    "on demand": preset("on-demand"),
    "whole layers": preset("naive"),
    "pre-gated": preset("pre-gated"),
    "all ahead": preset("pre-gated", predictor__kind="all", kernel__grouping="grouped"),
    "wrong guesses, nothing kept": preset(
        "on-demand", predictor__kind="synthetic", predictor__recall=0.5, predictor__depth=2
    ),
    "staged guesses": preset("mixtral-offloading"),
    "staged guesses in pieces": preset("mixtral-offloading", copy__chunk_bytes=4096, predictor__depth=2),
    "guesses into a tiny cache": preset("mixtral-offloading", predictor__staging=0, cache__experts_per_layer=2),
    "guesses and write-backs": preset(
        "mixtral-offloading", predictor__staging=0, copy__write_back=True, cache__experts_per_layer=1
    ),
    "public code": preset("mixtral-offloading-code"),
    "swaps beside the stream": preset("mixtral-offloading-code", copy__overlap=True, kernel__grouping="grouped"),
    "static cache": preset("mixtral-offloading", cache__policy="static"),
    "a disk below": preset("three-tiers", predictor__kind="next-gate"),
    "a disk below guesses in pieces": preset(
        "mixtral-offloading", copy__host_experts=2, copy__chunk_bytes=4096, cache__experts_per_layer=1
    ),
    "a disk below, nothing kept": preset("pre-gated", copy__host_experts=3),
    "all on the host's cores": preset("cpu-moe"),
    "cores and link": preset("hybrimoe", workload__concurrency=2),
    "cores and link, nothing kept": preset("on-demand", kernel__miss="balanced", kernel__grouping="grouped"),
}


TWO_FORMATS = {
    "coarse misses": preset("hobbit", experts__low_bits="4"),
    "coarse misses, nothing kept": preset("on-demand", experts__low_bits="4", experts__low_rank=1),
    "the less popular half": preset("edge-moe", experts__low_bits="4"),
    "the less popular half, grouped": preset("edge-moe", experts__low_bits="2", kernel__grouping="grouped"),
    "on one stream, written back": preset(
        "mixtral-offloading-code", experts__low_bits="4", experts__low_fraction=0.5, cache__experts_per_layer=2
    ),
    "written back beside it": preset(
        "mixtral-offloading", experts__low_bits="4", experts__low_rank=1, copy__write_back=True, predictor__staging=0,
        cache__experts_per_layer=1,
    ),
    "static": preset("kt-frequency", experts__low_bits="4", experts__low_fraction=0.7),
    "some of them on the cores": preset("hybrimoe", experts__low_bits="4", experts__low_rank=1),
}  # fmt: skip
