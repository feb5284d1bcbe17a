"""What a layer's kernels and formats cost an engine: shared experts, linear attention old and new, codebooks on cores."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.calibrate.costs.engine_costs import EngineCosts
from moeplan.specs.machines.compose import compose, compose_text
from moeplan.specs.machines.engines import fitted_table, load_engine
from moeplan.specs.machines.notation import parse_parts
from moeplan.specs.machines.profile import DELTA_KERNELS, USUAL_KERNELS
from moeplan.specs.models import is_codebook, is_repacked, weight_format
from moeplan.specs.models.load import load_model

CARD = compose_text("rtx-4090")


def kernels(name: str, layer: int, profile=CARD) -> int:  # type: ignore[no-untyped-def]
    model = load_model(name)
    return EngineCosts(model=model, profile=profile, dense_format=weight_format("Q4_K_M"))._kernels(layer)


def test_kernels_of_a_layer_are_those_of_its_parts() -> None:
    plain, shared = kernels("qwen3-30b-a3b", 1), kernels("ernie-4.5-21b-a3b", 5)
    assert plain == USUAL_KERNELS < shared
    linear = kernels("qwen3-next-80b-a3b", 0)
    assert linear - kernels("qwen3-next-80b-a3b", 3) == load_engine("llama.cpp").delta_kernels(None) - 12
    assert kernels("gemma-4-26b-a4b", 1) > shared  # a dense MLP beside its experts, and norms around both
    assert kernels("lfm2-8b-a1b", 3) < plain  # a short convolution in place of attention


@pytest.mark.parametrize("engine", ["llama.cpp", "ollama"])
def test_builds_before_a_delta_rule_was_one_operation_have_more(engine: str) -> None:
    found = load_engine(engine)
    assert found.delta_kernels("2026-02") > 3 * found.delta_kernels("2026-03") == 3 * found.delta_kernels(None)
    parts = parse_parts("rtx-4090")
    early, late = (compose(parts, found, built=month) for month in ("2025-12", "2026-06"))
    assert kernels("qwen3-next-80b-a3b", 0, early) > kernels("qwen3-next-80b-a3b", 0, late)
    assert load_engine("ik_llama.cpp").delta_kernels("2025-12") == DELTA_KERNELS


def test_sycl_no_longer_waits_for_each_expert() -> None:
    found = load_engine("llama.cpp")
    assert found.launched("2026-05", "sycl") == "python"
    assert found.launched("2026-07", "sycl") == found.launched(None, "sycl") == "eager"


@pytest.mark.parametrize(("name", "codebook"), [
    ("IQ1_S", True), ("UD-IQ2_XXS", True), ("IQ3_S@3.4375bpw", True), ("IQ2_M", True), ("IQ2_K", False), ("IQ4_XS", False),
    ("IQ3_KS", False), ("IQ1_S_R4", False), ("Q2_K", False), ("UD-Q2_K_XL", False),
])  # fmt: skip
def test_formats_with_codebooks_are_known_by_name(name: str, codebook: bool) -> None:
    assert is_codebook(name) == codebook


def test_codebooks_cost_cores_and_not_cards() -> None:
    model, cores = load_model("qwen3-30b-a3b"), compose_text("ryzen-9-7950x + ddr5-6000x2:64GiB")
    plain, slow = (weight_format(name) for name in ("Q2_K", "IQ2_M"))
    for profile, grows in ((cores, True), (CARD, False)):
        costs = EngineCosts(model=model, profile=profile, dense_format=plain)
        for tokens in (1, 64):
            times = [costs.grouped_item(tokens, fmt).seconds / float(model.expert_bytes(fmt)) for fmt in (plain, slow)]
            assert (times[1] > 1.3 * times[0]) == grows, (profile.name, tokens)
    assert costs.cpu_expert(1, slow).seconds > costs.cpu_expert(1, plain).seconds


def test_many_cores_of_an_unknown_maker_are_a_servers() -> None:
    few, many = (dataclasses.replace(parse_parts("rtx-4090"), threads=count) for count in (8, 64))
    slow, fast = (compose(parts, load_engine("llama.cpp")).host.cpu for parts in (few, many))
    assert slow is not None and fast is not None
    assert fast.flops_per_s.value > 3 * slow.flops_per_s.value
    assert fast.memory_bytes_per_s.value > slow.memory_bytes_per_s.value


ENGINES = ("llama.cpp", "ik_llama.cpp", "ktransformers")


@given(st.integers(1, 4096), st.sampled_from(["Q4_K_M", "Q8_0", "MXFP4", "Q4_0"]), st.sampled_from(ENGINES))
@settings(max_examples=examples(60), deadline=None)
def test_cores_unpack_a_matrix_once_at_most(tokens: int, name: str, engine: str) -> None:
    model, fmt = load_model("qwen3-30b-a3b"), weight_format(name)
    costs = EngineCosts(
        model=model, profile=compose_text("rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB", engine), dense_format=fmt
    )
    found = costs.engine
    assert (
        found.expand_tokens >= 0
        and found.core_tokens(tokens, codebook=False, repacked=False) == found.expand_tokens + tokens
    )
    each, more = costs.cpu_expert(tokens, fmt).seconds, costs.cpu_expert(2 * tokens, fmt).seconds
    assert each <= more <= 2 * each


def test_arms_cores_multiply_blocks_laid_out_for_them_faster() -> None:
    assert [is_repacked(name) for name in ("Q4_0", "q4_0@4.55bpw", "Q4_0_R8", "Q4_K_M", "IQ4_NL")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    model, plain = load_model("qwen3-30b-a3b"), weight_format("Q4_0")
    arm, other = (compose_text(text) for text in ("raspberry-pi-5", "ryzen-9-7950x"))
    assert arm.engine is not None and other.engine is not None
    assert arm.engine.repack_gain > 2 and other.engine.repack_gain == 1
    costs = EngineCosts(model=model, profile=arm, dense_format=plain)
    assert costs.cpu_expert(512, plain).seconds < costs.cpu_expert(512, weight_format("Q4_K_M")).seconds / 1.8


def test_waiting_takes_clocks_and_hosts_that_are_not_known_are_less_certain() -> None:
    slow, fast = (compose_text(f"rtx-4090 + {cpu}").engine for cpu in ("epyc-7663", "ryzen-9-7950x"))
    assert slow is not None and fast is not None and slow.cpu_layer_s.value > fast.cpu_layer_s.value
    known, unknown, two = (
        compose_text(text).host.cpu for text in ("rtx-4090 + ryzen-7-7700x", "rtx-4090", "rtx-4090 + 2 x epyc-9355")
    )
    assert known is not None and unknown is not None and two is not None
    least, scatter = known.memory_bytes_per_s.relative_uncertainty, fitted_table()["scatter"]
    assert unknown.memory_bytes_per_s.relative_uncertainty == pytest.approx(least * scatter["unknown"])
    assert two.memory_bytes_per_s.relative_uncertainty == pytest.approx(least * scatter["sockets"])
    assert unknown.flops_per_s.relative_uncertainty == pytest.approx(
        known.flops_per_s.relative_uncertainty * scatter["unknown"]
    )


@pytest.mark.parametrize("card", ["rtx-3060", "rtx-5090", "rx-7900-xtx"])
def test_the_slot_of_a_box_that_nobody_describes_is_less_certain(card: str) -> None:
    def doubt(text: str) -> float:
        link = compose_text(text).host_to_device.pinned_bytes_per_s
        return link.relative_uncertainty

    stated, described, neither = doubt(f"{card} + pcie-4.0x8"), doubt(f"{card} + ryzen-7-7700x"), doubt(card)
    assert stated == described
    assert neither == pytest.approx(described * fitted_table()["scatter"]["unknown"])
