"""Numbers, speeds and schedules as a reader sees them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.reports import numbers
from moeplan.reports.offload.describe import one_phrase, option_rows
from moeplan.reports.offload.speed import (
    CHOSEN,
    PUBLISHED,
    REFERENCE,
    entries,
    interval_text,
    is_roomier,
    speed_of,
    speed_words,
)
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.specs.schedules.presets import PRESETS, load_preset
from report_documents import plan_document


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.000123456, "0.000123"), (0.9996, "1.00"), (9.996, "10.0"), (23.71, "23.7"), (99.96, "100"), (1234.4, "1,234"),
        (1234567, "1,234,567"), (-4.5, "−4.50"), (math.inf, "∞"), (-math.inf, "−∞"), (math.nan, "unknown"),
    ],
)  # fmt: skip
def test_three_significant_digits(value: float, text: str) -> None:
    assert numbers.significant(value) == text


@given(st.floats(1e-6, 1e12))
def test_what_is_shown_is_within_half_a_percent(value: float) -> None:
    shown = float(numbers.significant(value).replace(",", ""))
    assert shown == pytest.approx(value, rel=0.005)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (numbers.percent(0.0004), "0.0 %"), (numbers.percent(0.1234, 0), "12 %"), (numbers.percent(-0.05, signed=True), "−5.0 %"),
        (numbers.percent(0.05, signed=True), "+5.0 %"), (numbers.seconds(0), "0 s"), (numbers.seconds(2.5e-9), "2.50 ns"),
        (numbers.seconds(3e-6), "3.00 µs"), (numbers.seconds(0.0412), "41.2 ms"), (numbers.seconds(12.3), "12.3 s"),
        (numbers.size(12), "12 B"), (numbers.size(1536), "1.50 KiB"), (numbers.size(6 * 2**30), "6.00 GiB"),
        (numbers.size(-(2**20)), "−1.00 MiB"),
        (numbers.rate(1.008e12), "1.01 TB/s"), (numbers.rate(25e9), "25.0 GB/s"), (numbers.rate(10), "10.0 B/s"),
        (numbers.flops(165.2e12), "165 TFLOP/s"), (numbers.flops(5), "5.00 FLOP/s"),
    ],
)  # fmt: skip
def test_units(shown: str, text: str) -> None:
    assert shown == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("device.peak_flops_per_s.float16", 165.2e12, "165 TFLOP/s"), ("device.memory_bytes_per_s", 1.008e12, "1.01 TB/s"),
        ("device.memory_bytes", 24 * 2**30, "24.0 GiB"),
        ("host_to_device.half_size_bytes", 65536, "64.0 KiB"), ("device.launch_s", 3e-6, "3.00 µs"),
        ("device.dequantise_efficiency.4", 0.8, "80.0 %"), ("contention.compute/h2d", 0.97, "97.0 %"),
        ("host.kernels_per_head", 4, "4"), ("host.kernels_per_head", 4.5, "4.50"),
    ],
)  # fmt: skip
def test_a_constant_is_shown_in_the_unit_of_its_name(name: str, value: float, text: str) -> None:
    assert numbers.constant(name, value) == text


def test_a_schedule_is_told_by_its_decoding_and_by_its_prompts_where_it_decodes_nothing() -> None:
    one = {"prefill_tokens_per_s": 90.0, "prefill_tokens_per_s_interval": [80, 100]}
    both = one | {"decode_tokens_per_s": 40.0, "decode_tokens_per_s_interval": [32, 53.333]}
    assert (speed_of(both), speed_words(both), interval_text(both)) == (40.0, "decoded tokens/s", "32.0 to 53.3")
    prompts = one | {"decode_tokens_per_s": None, "decode_tokens_per_s_interval": None}
    assert (speed_of(prompts), speed_words(prompts), interval_text(prompts)) == (90.0, "prompt tokens/s", "80.0 to 100")


def test_entries_are_the_plan_in_its_own_order() -> None:
    found = entries(plan_document())
    assert [(entry.name, entry.title, entry.kind, is_roomier(entry)) for entry in found] == [
        ("best", "best", CHOSEN, False),
        ("on-demand", "on-demand", PUBLISHED, False),
        ("mixtral-offloading-code", "mixtral-offloading-code", PUBLISHED, False),
        ("belady", "Belady's cache", REFERENCE, False),
        ("memory x1.5", "1.5 × memory", REFERENCE, True),
        ("memory x2", "2 × memory", REFERENCE, True),
    ]
    assert found[1].schedule == load_preset("on-demand")


def test_a_schedule_that_is_none_is_refused() -> None:
    document = plan_document()
    document["best"]["schedule"]["cache"]["policy"] = "lur"
    with pytest.raises(InputError, match=r"cache\.policy = 'lur'.*did you mean 'lru'"):
        entries(document)


def test_every_preset_has_a_phrase_and_a_table() -> None:
    phrases = {name: one_phrase(load_preset(name)) for name in PRESETS}
    wanted = {
        "resident": "fixed cache of the most popular experts, as many experts as fit; nothing is fetched ahead; "
        "copies overlap compute",
        "naive": "no expert cache; nothing is fetched ahead; every expert of a layer is fetched, whatever was routed; "
        "copies and kernels take turns",
        "on-demand": "no expert cache; nothing is fetched ahead; copies overlap compute",
        "mixtral-offloading": "least-recently-used cache, as many experts as fit; the next gate, run early, says what to "
        "fetch ahead, 1 layer ahead; copies overlap compute",
        "mixtral-offloading-code": "least-recently-used cache, as many experts as fit; nothing is fetched ahead; "
        "copies and kernels take turns",
        "pre-gated": "no expert cache; a pre-gate fixes the next layer's experts, 1 layer ahead; copies overlap compute",
        "n-cpu-moe": "fixed cache of the last layers, as many experts as fit; nothing is fetched ahead; "
        "missing experts run on the host's cores; copies overlap compute",
        "hybrimoe": "least-frequently-used cache, as many experts as fit; the next gate, run early, says what to fetch "
        "ahead, 1 layer ahead; the link and the host's cores divide a layer's missing experts; copies overlap compute",
        "edge-moe": "least-recently-used cache, as many experts as fit; the next gate, run early, says what to fetch "
        "ahead, 1 layer ahead; some experts in 2 bits; copies overlap compute",
        "three-tiers": "least-recently-used cache, as many experts as fit; nothing is fetched ahead; "
        "what the host's memory cannot hold is read from disk; copies overlap compute",
    }
    assert {name: phrases[name] for name in wanted} == wanted
    for name in PRESETS:
        rows = option_rows(load_preset(name))
        assert len({option for option, _ in rows}) == len(rows)


def test_the_table_of_a_schedule_names_every_option_that_matters() -> None:
    schedule = OffloadSchedule().with_options(
        cache__bytes=3 * 2**30, cache__reset="request", experts__bits="mxfp4", predictor__kind="synthetic", predictor__depth=2,
        predictor__recall=0.7, predictor__staging=4, kernel__grouping="per-expert", copy__chunk_bytes=2**20, copy__write_back=True,
        copy__pinned=False, host__per_layer_s=2e-5, workload__prefill_chunk_tokens=64,
    )  # fmt: skip
    assert option_rows(schedule) == [
        ("Cache", "least-recently-used cache"),
        ("Cache size", "3.00 GiB in one pool for all layers"),
        ("Cache contents", "emptied at each request"),
        ("Expert weights", "mxfp4"),
        ("Prediction", "guesses of an assumed recall say what to fetch ahead"),
        ("Assumed recall", "0.7 one layer ahead, times 0.9 for each further layer"),
        ("Layers ahead", "2"),
        ("Guesses a token and layer", "the model's top-k"),
        ("Staging buffers", "4 experts"),
        ("Expert kernels", "one launch an expert"),
        ("Copies", "overlap compute"),
        ("Copy chunks", "1.00 MiB"),
        ("Evicted experts", "are copied back to the host"),
        ("Host memory", "pageable"),
        ("Requests decoded together", "1"),
        ("Prompt tokens a pass", "64"),
        ("Host time per layer", "20.0 µs, given by the user"),
    ]
    whole_layers = load_preset("naive").with_options(predictor__width=3)
    assert ("Fetches", "every expert of a layer is fetched, whatever was routed") in option_rows(whole_layers)
    bits = option_rows(load_preset("hobbit")) + option_rows(load_preset("edge-moe"))
    assert ("A miss in fewer bits", "2 bits where no token has it as its first choice") in bits
    assert ("Experts in fewer bits", "2 bits for the least popular 50 % of each layer") in bits
    ahead = option_rows(load_preset("promoe").with_options(predictor__threshold=0.25, predictor__benefit=True))
    assert ("Guesses left out", "those less probable than 25 %") in ahead
    assert ("Guesses fetched", "while they are expected to hide more than a wrong one costs") in ahead
    assert ("Wrong guesses", "are dropped while their copy waits; counts then depend on time") in ahead
    tiers = option_rows(load_preset("three-tiers").with_options(copy__host_experts=1200))
    assert ("Host memory holds", "1,200 experts; the others are read from disk") in tiers


def test_published_schedules_stand_under_their_families() -> None:
    document = plan_document()
    extra = [dict(document["baselines"][0], name=name) for name in ("zeta", "alpha")]
    for one, family in zip([*document["baselines"], *extra], ("no cache", "cache", "new", None), strict=True):
        if family is not None:
            one["family"] = family
    document["baselines"] += extra
    assert [(entry.name, entry.heading) for entry in entries(document)][:6] == [
        ("best", "Chosen"),
        ("on-demand", "No cache"),
        ("mixtral-offloading-code", "Cache"),
        ("zeta", "New"),
        ("alpha", "Other published schedules"),
        ("belady", "References out of reach"),
    ]
    assert {entry.heading for entry in entries(plan_document())} == {
        "Chosen", "Published schedules", "References out of reach",
    }  # fmt: skip
