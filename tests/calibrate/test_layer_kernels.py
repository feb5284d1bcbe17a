"""What a layer's kernels and formats cost an engine: shared experts, linear attention old and new, codebooks on cores."""

from __future__ import annotations

import dataclasses

import pytest

from moeplan.calibrate.costs.engine_costs import EngineCosts
from moeplan.specs.machines.compose import compose, compose_text
from moeplan.specs.machines.engines import load_engine
from moeplan.specs.machines.notation import parse_parts
from moeplan.specs.machines.profile import DELTA_KERNELS, USUAL_KERNELS
from moeplan.specs.models import is_codebook, weight_format
from moeplan.specs.models.load import load_model

CARD = compose_text("rtx-4090")


def kernels(name: str, layer: int, profile=CARD) -> int:  # type: ignore[no-untyped-def]
    model = load_model(name)
    return EngineCosts(model=model, profile=profile, dense_format=weight_format("Q4_K_M"))._kernels(layer)


def test_kernels_of_a_layer_are_those_of_its_parts() -> None:
    plain, shared = kernels("qwen3-30b-a3b", 1), kernels("ernie-4.5-21b-a3b", 5)
    assert plain == USUAL_KERNELS < shared
    linear = kernels("qwen3-next-80b-a3b", 0)
    assert linear - kernels("qwen3-next-80b-a3b", 3) == DELTA_KERNELS - 12
    assert kernels("gemma-4-26b-a4b", 1) == shared  # a dense MLP beside its experts
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
