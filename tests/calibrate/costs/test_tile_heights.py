"""Which rows of a tile engines take before they know the rows of each expert, and what follows from it."""

import dataclasses

import numpy as np
import pytest

from moeplan.base.errors import InputError, UnknownName
from moeplan.calibrate.costs.gpu.experts import ExpertShape, entering, experts_s, load_of_rows
from moeplan.calibrate.imports.aiconfigurator.routing import entering_tokens
from moeplan.specs.machines.bundled_kernels import bundled_kernels
from moeplan.specs.machines.gpu_kernels import ExpertKernel, check_kernels

BEST = ExpertKernel(name="k", start_s=0.0, bytes_per_s=1e15, activation_bytes_per_s=1e15, flops_per_s=1e12, tile_s=0.0,
                    relative_uncertainty=0.2)  # fmt: skip
SHAPE = ExpertShape(hidden=1024, intermediate=512, gated=True, weight_bytes=1.0, activation_bytes=1.0)
UNITS = 4


def tiles_s(kernel, rows, **facts):
    """What compute takes: memory and activations are so fast here that they count for nothing."""
    return float(experts_s(kernel, SHAPE, load_of_rows(np.array(rows), **facts), UNITS))


def by_hand(height, tiles):
    columns = [(1024 // 128, 1024), (1024 // 128, 512)]
    return sum(tiles * wide / UNITS * 2 * height * 128 * depth / (1e12 / UNITS) for wide, depth in columns)


@pytest.mark.parametrize(("tokens", "height"), [(8, 16), (9, 64)])
def test_untuned_kernels_take_low_tiles_until_as_many_tokens_enter_as_experts_are_there(tokens, height):
    kernel = dataclasses.replace(BEST, heights="tokens")
    assert tiles_s(kernel, [16] * 8, tokens=tokens) == pytest.approx(by_hand(height, 8), rel=1e-2)


@pytest.mark.parametrize(("choices", "height"), [(115, 16), (116, 32), (230, 32), (231, 64)])
def test_marlin_takes_tiles_by_the_choices_an_expert(choices, height):
    kernel = dataclasses.replace(BEST, heights="choices")
    assert tiles_s(kernel, [16] * 8, choices=choices) == pytest.approx(by_hand(height, 8), rel=1e-2)


def test_transposed_tiles_are_given_their_weights_anew_until_even_choices_fill_them():
    kernel = dataclasses.replace(BEST, heights="transposed", refill_bytes_per_s=1e12)
    facts = {"choices": 31 * 64, "all_experts": 64.0}
    refills = sum(8 * 8 / UNITS * 128 * depth * UNITS / 1e12 for depth in (1024, 512))
    assert tiles_s(kernel, [32] * 8, **facts) == pytest.approx(by_hand(32, 8) + refills, rel=1e-2)
    assert tiles_s(kernel, [32] * 8, **facts | {"choices": 32 * 64}) == pytest.approx(by_hand(32, 8), rel=1e-2)
    # A hot expert has 16 tiles of 16 rows where even choices are few, and one of 256 where they are many.
    hot, even = (
        tiles_s(kernel, [256], choices=16, all_experts=1.0),
        tiles_s(kernel, [256], choices=256, all_experts=1.0),
    )
    assert hot > even


@pytest.mark.parametrize(("choices", "height"), [(128, 16), (129, 32), (512, 64), (513, 128), (9999, 128)])
def test_gpt_oss_triton_kernels_take_the_next_power_of_two_and_are_given_weights_for_every_tile(choices, height):
    kernel = dataclasses.replace(BEST, heights="powers", refill_bytes_per_s=1e12)
    refills = sum(8 * 8 / UNITS * 128 * depth * UNITS / 1e12 for depth in (1024, 512))
    assert tiles_s(kernel, [16] * 8, choices=choices) == pytest.approx(by_hand(height, 8) + refills, rel=1e-2)


@pytest.mark.parametrize(("rows", "choices", "slots"), [([3] * 8, 64, 64.0), ([16] * 8, 4096, 256.0), ([1], 8, 8.0)])
def test_choices_cost_their_own_and_leaving_some_out_costs_once(rows, choices, slots):
    kernel = dataclasses.replace(BEST, choice_s=1e-6, elsewhere_s=3e-3)
    plain = tiles_s(BEST, rows, choices=choices, all_experts=slots)
    more = 0.0 if slots == len(rows) else 3e-3
    assert tiles_s(kernel, rows, choices=choices, all_experts=slots) - plain == pytest.approx(choices * 1e-6 + more)


def test_a_token_with_several_choices_on_a_gpu_enters_once():
    assert entering(np.array(80.0), 8, 1.0) == pytest.approx(10)
    assert entering(np.array(80.0), 8, 1 / 256) == pytest.approx(80, rel=0.02)
    assert entering(np.array(80.0), 1, 0.5) == pytest.approx(80)


def test_the_collector_deals_choices_out_expert_by_expert():
    # Three tokens, two choices each: expert 0 is chosen first by all, 1 by two, 2 by one.
    counts = np.array([3, 2, 1])
    assert [entering_tokens(counts, np.array(mine), 2) for mine in ([0], [1], [2], [1, 2], [0, 2])] == [3, 2, 1, 3, 3]


def test_kernels_without_a_known_way_are_refused():
    kernels = bundled_kernels("h200-sxm", "tensorrt-llm")
    for change, error in (
        ({"heights": "tall"}, UnknownName),
        ({"heights": "transposed"}, InputError),
        ({"refill_bytes_per_s": 1e12}, InputError),
    ):
        wrong = dataclasses.replace(kernels, experts={"bf16": dataclasses.replace(BEST, **change)})
        with pytest.raises(error):
            check_kernels(wrong, ("published",))


def test_an_earlier_version_has_its_own_experts_and_all_else_of_the_current_one():
    now, before, unknown = (
        bundled_kernels("h200-sxm", "tensorrt-llm", version) for version in ("", "1.3.0rc10", "0.1")
    )
    assert before.experts["fp8-block"] != now.experts["fp8-block"]
    assert dataclasses.replace(before, experts=now.experts) == now == unknown
