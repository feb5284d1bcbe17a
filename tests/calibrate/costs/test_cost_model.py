"""The roofline: small numbers by hand, laws that hold for any numbers, published times it must come near."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.base.errors import InputError, MissingCalibration, UnknownName
from moeplan.calibrate.costs.attention import attention_work
from moeplan.calibrate.costs.cost_model import CostModel
from moeplan.calibrate.costs.estimate import BOUNDS, Estimate, merge_sources
from moeplan.specs.machines.profile import Constant, CpuConstants, Profile
from moeplan.specs.machines.profile_file import list_hardware, load_hardware
from moeplan.specs.models import AttentionSpec, ModelSpec, RecurrentSpec, weight_format
from moeplan.specs.models.load import list_models, load_model

W16, W32, W4, MX = weight_format(16), weight_format(32), weight_format(4), weight_format("mxfp4")


def constant(value: float, source: str = "assumed", uncertainty: float = 0.1) -> Constant:
    return Constant(value=value, source=source, citation="made up for a test", relative_uncertainty=uncertainty)


BASE = load_hardware("t4")
# A machine of round numbers: 1 MB/s of memory, 1 MFLOP/s, 1 kB/s a link, half of each reached.
ROUND = dataclasses.replace(
    BASE,
    name="round",
    device=dataclasses.replace(
        BASE.device, memory_bytes_per_s=constant(1e6, "datasheet"), memory_efficiency=constant(0.5), launch_s=constant(0.25),
        peak_flops_per_s={"float16": constant(1e6, "datasheet", 0.3)}, compute_efficiency=constant(0.5, uncertainty=0.4),
        dequantise_efficiency={"mxfp4": constant(0.25, uncertainty=0.2)},
    ),
    host_to_device=dataclasses.replace(
        BASE.host_to_device, pinned_bytes_per_s=constant(1000, "published", 0.01), pageable_bytes_per_s=constant(1000 / 2),
        latency_s=constant(0.125), half_size_bytes=constant(250),
    ),
    host=dataclasses.replace(
        BASE.host, per_kernel_s=constant(0.001), kernels_per_dense_layer=constant(2), kernels_per_head=constant(1),
        per_step_s=constant(3.0), per_layer_s=constant(4.0), per_transfer_s=constant(5.0), cpu=None,
    ),
    contention={"compute/h2d": constant(0.5), "compute/d2h": constant(0.25), "h2d/d2h": constant(0.75)},
)  # fmt: skip
# The same with operations for free.
FAST = dataclasses.replace(
    ROUND, device=dataclasses.replace(ROUND.device, peak_flops_per_s={"float16": constant(1e15)})
)
SMALL = ModelSpec(
    name="small", family="made-up", hidden_size=10, num_layers=3, moe_layers=(1, 2), num_experts=4, top_k=2,
    expert_intermediate_size=6, gated=True, vocab_size=7, dense_intermediate_size=8, sliding_layers=(2,), sliding_window=4,
    attention=AttentionSpec(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=3, v_head_dim=3),
)  # fmt: skip
COSTS = CostModel(ROUND, SMALL)

# --- by hand -----------------------------------------------------------------------------------------------------------


def test_expert_by_hand() -> None:
    weights = 3 * 10 * 6
    one = COSTS.grouped_item(1, W16)
    assert one.seconds == pytest.approx((2 * weights + 2 * (10 + 6) * 2) / 5e5) and one.bound == "memory"
    many = COSTS.grouped_item(1000, W16)
    assert many.seconds == pytest.approx(2 * weights * 1000 / 5e5) and many.bound == "compute"
    assert COSTS.grouped_base().seconds == 0.25 and COSTS.grouped_base().bound == "launch"
    assert COSTS.expert_kernel(1000, W16) == many + COSTS.grouped_base()


def test_quantised_weights_are_read_at_a_further_efficiency() -> None:
    item = COSTS.grouped_item(1, MX)
    assert item.seconds == pytest.approx((math.ceil(180 * 17 / 32) + 64) / 1.25e5)
    assert item.relative_uncertainty == pytest.approx(math.hypot(0.1, 0.1, 0.2))
    assert item.source == "datasheet+assumed"


def test_no_tokens_cost_nothing() -> None:
    assert COSTS.expert_kernel(0, W16).seconds == 0 == COSTS.grouped_item(0, W16).seconds
    assert COSTS.host_to_device(0).seconds == 0


def test_dense_layer_by_hand() -> None:
    """One token: weights, keys and values of nine tokens of context and the new one, activations; then two launches."""
    mixer, norms, router, mlp = 10 * (12 + 12 + 12), 20, 40, 3 * 10 * 8
    activations = 2 * (8 * 10 + 2 * 4 * 6)
    for layer, parameters, context in (
        (0, mixer + norms + mlp, 9),
        (1, mixer + norms + router, 9),
        (2, mixer + norms + router, 4),
    ):
        num_bytes = 2 * parameters + (context + 1) * 12 * 2 + activations
        assert COSTS.dense_layer(layer, 1, 9).seconds == pytest.approx(num_bytes / 5e5 + 2 * 0.25), layer


def test_dense_layer_of_a_prompt_by_hand() -> None:
    """A thousand tokens of one request: 1 + 2 + … + 1000 pairs, two for each multiplication, heads of 3 + 3 values."""
    parameters = 360 + 20 + 40
    flops = 2 * parameters * 1000 + 2 * 4 * 6 * (1000 * 1001 // 2)
    estimate = COSTS.dense_layer(1, 1000, 1000)
    assert estimate.seconds == pytest.approx(flops / 5e5 + 0.5) and estimate.bound == "compute"


def test_requests_decoded_together_do_not_meet_each_other() -> None:
    apart = COSTS.dense_layer(1, 100, 100 * 50, num_requests=100)
    flops = 2 * 420 * 100 + 48 * 100 * 50
    num_bytes = 2 * 420 + 12 * 2 * (100 + 5000) + 100 * 2 * 128
    assert apart.seconds == pytest.approx(max(flops, num_bytes) / 5e5 + 0.5)
    assert COSTS.dense_layer(1, 100, 100 * 50).seconds > 2 * apart.seconds


def test_head_by_hand() -> None:
    num_bytes = 2 * (7 * 10 + 10) + 3 * 2 * (10 + 7)
    flops = 2 * 80 * 3
    assert COSTS.head(3).seconds == pytest.approx(max(num_bytes, flops) / 5e5 + 0.25)


def test_the_head_is_never_quantised() -> None:
    four = CostModel(ROUND, SMALL, dense_format=MX)
    assert four.head(1) == COSTS.head(1)
    assert four.dense_layer(0, 1, 1) != COSTS.dense_layer(0, 1, 1)


def test_copies_by_hand() -> None:
    assert COSTS.host_to_device(1000).seconds == 0.125 + (1000 + 250) / 1000
    assert COSTS.host_to_device(1000, pinned=False).seconds == 0.125 + (1000 + 250) / 500
    one = COSTS.host_to_device(1000)
    assert one.bound == "link" and one.source == "published+assumed"
    # latency 0.125 s and ramp 0.25 s are less certain than the bandwidth's 1 %.
    wrong = 0.125 * 0.1 + 0.25 * math.hypot(0.1, 0.01) + 1.0 * 0.01
    assert one.relative_uncertainty == pytest.approx(wrong / 1.375)


def test_host_costs_are_the_profiles() -> None:
    asked = (COSTS.host_per_step(), COSTS.host_per_layer(), COSTS.host_per_kernel(), COSTS.host_per_transfer())
    assert [estimate.seconds for estimate in asked] == [3.0, 4.0, 0.001, 5.0]
    assert {estimate.bound for estimate in asked} == {"host"}


def test_a_layer_that_waits_for_the_host_to_launch_its_kernels_is_bound_by_launches() -> None:
    slow = dataclasses.replace(ROUND, host=dataclasses.replace(ROUND.host, per_kernel_s=constant(7.0)))
    estimate = CostModel(slow, SMALL).dense_layer(0, 1, 1)
    assert estimate.seconds == 14.0 and estimate.bound == "launch"
    own_cores = dataclasses.replace(slow, device=dataclasses.replace(slow.device, kind="cpu", host_shares_compute=True))
    costs = CostModel(own_cores, SMALL)
    assert costs.host_shares_compute and costs.dense_layer(0, 1, 1) == COSTS.dense_layer(0, 1, 1)


def test_rates_of_activities_that_run_together() -> None:
    assert COSTS.rate_fraction("compute", frozenset()) == 1.0
    assert COSTS.rate_fraction("compute", frozenset({"h2d"})) == 0.5
    assert COSTS.rate_fraction("compute", frozenset({"h2d", "d2h"})) == 0.125
    assert COSTS.rate_fraction("h2d", frozenset({"compute", "d2h"})) == 0.75  # a pair that is not listed is 1
    assert COSTS.rate_fraction("d2h", frozenset({"d2h", "cpu", "disk"})) == 1.0
    with pytest.raises(UnknownName, match="lane = 'gpu'"):
        COSTS.rate_fraction("compute", frozenset({"gpu"}))


def test_states_replace_the_cache() -> None:
    spec = RecurrentSpec(kind="made-up", matrix_parameters=50, vector_parameters=4, state_values=30)
    model = dataclasses.replace(SMALL, recurrent=spec, recurrent_layers=(1,))
    costs = CostModel(ROUND, model)
    num_bytes = 2 * (50 + 4 + 20 + 40) + 2 * 30 * 2 + 2 * 128
    assert costs.dense_layer(1, 1, 9).seconds == pytest.approx(num_bytes / 5e5 + 0.5)
    assert costs.dense_layer(1, 1, 10**6) == costs.dense_layer(1, 1, 9)


def test_cross_attention_reads_the_input() -> None:
    model = dataclasses.replace(SMALL, cross_attention=True, num_encoder_layers=1)
    without, with_input = CostModel(FAST, model), CostModel(FAST, model, encoder_tokens=100)
    more = with_input.dense_layer(0, 2, 10, 2).seconds - without.dense_layer(0, 2, 10, 2).seconds
    assert more == pytest.approx(2 * 100 * 12 * 2 / 5e5)
    assert CostModel(ROUND, model, encoder_tokens=10**6).dense_layer(0, 1, 1).seconds == pytest.approx(
        (2 * (2 * 360 + 30 + 240) + 48 + 48 * 10**6) / 5e5 + 0.5
    )


def test_experts_on_the_host() -> None:
    cpu = CpuConstants(flops_per_s=constant(1000), memory_bytes_per_s=constant(2000), launch_s=constant(0.5))
    costs = CostModel(dataclasses.replace(ROUND, host=dataclasses.replace(ROUND.host, cpu=cpu)), SMALL)
    assert costs.cpu_expert(1, W16).seconds == pytest.approx(0.36 + 0.5) and costs.cpu_expert(1, W16).bound == "launch"
    assert (
        costs.cpu_expert(100, W16).seconds == pytest.approx(36 + 0.5) and costs.cpu_expert(100, W16).bound == "compute"
    )
    assert costs.cpu_expert(0, W16).seconds == 0


def test_disks() -> None:
    profile = load_hardware("rtx-4090")
    assert profile.disk is not None
    seconds = CostModel(profile, SMALL).disk_to_host(10**9).seconds
    assert seconds == pytest.approx(profile.disk.latency_s.value + 1e9 / 7.45e9)


# --- holes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: COSTS.grouped_item(1, W4),
            "hardware round: dequantise_efficiency[4] = None: nearest known format: mxfp4",
        ),
        (lambda: COSTS.grouped_item(1, W32), "peak_flops_per_s[float32] = None: known for float16 only"),
        (lambda: COSTS.disk_to_host(1), "hardware round: disk = None: this profile describes no disk"),
        (lambda: COSTS.cpu_expert(1, W16), "hardware round: host.cpu = None"),
    ],
)
def test_a_hole_is_an_error_that_names_it(ask: Callable[[], Estimate], message: str) -> None:
    with pytest.raises(MissingCalibration) as caught:
        ask()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: COSTS.dense_layer(0, -1, 0), lambda: COSTS.dense_layer(0, 1, -1), lambda: COSTS.grouped_item(-1, W16),
        lambda: COSTS.host_to_device(-1), lambda: COSTS.head(-1), lambda: COSTS.dense_layer(3, 1, 1),
    ],
)  # fmt: skip
def test_impossible_questions_are_refused(ask: Callable[[], Estimate]) -> None:
    with pytest.raises(InputError):
        ask()


# --- laws --------------------------------------------------------------------------------------------------------------

estimates = st.builds(
    Estimate, seconds=st.floats(0, 1e3), source=st.sampled_from(["published", "assumed", "measured+datasheet", "user"]),
    bound=st.sampled_from(BOUNDS), relative_uncertainty=st.floats(0, 2),
)  # fmt: skip


@given(estimates, estimates)
def test_sums_merge_sources_and_uncertainties(one: Estimate, two: Estimate) -> None:
    both = one + two
    assert both.seconds == one.seconds + two.seconds
    assert set(both.source.split("+")) == set(one.source.split("+")) | set(two.source.split("+"))
    assert both.bound == (one.bound if one.seconds >= two.seconds else two.bound)
    wrong = one.seconds * one.relative_uncertainty + two.seconds * two.relative_uncertainty
    assert both.relative_uncertainty * both.seconds == pytest.approx(wrong, rel=1e-9, abs=1e-12)


def test_sources_are_listed_by_trust() -> None:
    assert merge_sources("assumed", "user", "published+measured", "", "measured") == "measured+published+assumed+user"


@settings(max_examples=examples(60))
@given(
    name=st.sampled_from(list_hardware()), model=st.sampled_from(list_models()), tokens=st.integers(1, 4096),
    context=st.integers(0, 20_000), fmt=st.sampled_from(["32", "16", "8", "4", "mxfp4", "3", "2"]), requests=st.integers(1, 64),
)  # fmt: skip
def test_costs_are_positive_sourced_and_grow(
    name: str, model: str, tokens: int, context: int, fmt: str, requests: int
) -> None:
    costs, weights = CostModel(load_hardware(name), load_model(model)), weight_format(fmt)
    layer = costs.model.num_layers - 1
    asked: list[tuple[Callable[[int], Estimate], int]] = [
        (lambda n: costs.grouped_item(n, weights), tokens), (lambda n: costs.expert_kernel(n, weights), tokens),
        (lambda n: costs.dense_layer(layer, tokens, n, requests), context), (costs.head, tokens),
        (lambda n: costs.host_to_device(n), context + 1), (lambda n: costs.device_to_host(n, pinned=False), context + 1),
    ]  # fmt: skip
    for ask, size in asked:
        small, large = ask(size), ask(2 * size + 1)
        assert 0 < small.seconds <= large.seconds < 1e5
        assert small.bound in BOUNDS and small.source and 0 < small.relative_uncertainty < 2
        # A roofline's slope never falls below what doubling the work costs less than: no economy beyond fixed parts.
        assert large.seconds <= 2 * small.seconds + ask(1).seconds + 1e-12


@given(tokens=st.integers(1, 60), before=st.integers(0, 60), window=st.one_of(st.none(), st.integers(1, 80)))
def test_attention_work_equals_counting(tokens: int, before: int, window: int | None) -> None:
    """The slow way: list, for each token, the context tokens it meets."""
    limit = window if window is not None else 10**9
    met = [range(max(0, position - limit + 1), position + 1) for position in range(before, before + tokens)]
    pairs, read = attention_work(tokens, before + tokens, 1, window)
    assert pairs == pytest.approx(sum(len(seen) for seen in met))
    assert read == len(set().union(*met))


@given(tokens=st.integers(1, 20), before=st.integers(0, 60), requests=st.integers(1, 9), window=st.integers(1, 80))
def test_attention_work_of_equal_requests_adds_up(tokens: int, before: int, requests: int, window: int) -> None:
    pairs, read = attention_work(tokens, before + tokens, 1, window)
    many = attention_work(requests * tokens, requests * (before + tokens), requests, window)
    assert many == pytest.approx((requests * pairs, requests * read))


# --- published times ---------------------------------------------------------------------------------------------------


def test_naive_mixtral_offloading_copies_what_was_published() -> None:
    """256 experts of 2 bits: 718 ms on A100, 1.51 s on T4 (arXiv 2312.17238), if copying is all there is to it."""
    model = load_model("mixtral-8x7b")
    for name, seconds in (("a100-80gb-sxm", 1 / 1.392), ("t4", 1 / 0.661)):
        costs = CostModel(load_hardware(name), model)
        copy = costs.host_to_device(model.expert_bytes(weight_format(2)))
        assert 256 * copy.seconds == pytest.approx(seconds, rel=0.01)
        assert copy.relative_uncertainty < 0.1


def test_switch_large_expert_on_a100() -> None:
    """One fp32 expert of Switch-Large crosses PCIe 4 in about 1.34 ms (arXiv 2308.12066, at 25 GB/s)."""
    costs = CostModel(load_hardware("a100-80gb-sxm"), load_model("switch-large-128"), dense_format=W32)
    copy = costs.host_to_device(costs.model.expert_bytes(W32))
    assert abs(copy.seconds - 1.34e-3) <= copy.seconds * copy.relative_uncertainty


def test_decoding_reads_memory_and_prompts_compute() -> None:
    costs = CostModel(load_hardware("h200-sxm"), load_model("mixtral-8x7b"))
    assert costs.grouped_item(1, W16).bound == "memory" and costs.grouped_item(4096, W16).bound == "compute"
    assert costs.dense_layer(0, 8192, 8192).bound == "compute"
    assert (
        costs.dense_layer(0, 1, 1000).bound == "launch"
    )  # eager Python cannot issue sixteen kernels as fast as they run


def test_an_eager_decode_step_is_near_a_published_one() -> None:
    """Llama 3.1 8B, eager, H100: 8.4 ms a token. A dense model of its size, 32 layers with an MLP, head included."""
    attention = AttentionSpec(kind="gqa", num_heads=32, num_kv_heads=8, head_dim=128, v_head_dim=128)
    llama = ModelSpec(
        name="llama-like", family="llama", hidden_size=4096, num_layers=33, moe_layers=(32,), num_experts=1, top_k=1,
        expert_intermediate_size=1, gated=True, vocab_size=128_256, attention=attention, dense_intermediate_size=14_336,
    )  # fmt: skip
    costs = CostModel(load_hardware("h100-sxm"), llama)
    step = costs.head(1) + costs.host_per_step()
    for layer in range(32):
        step += costs.dense_layer(layer, 1, 500)
    assert abs(step.seconds - 8.4e-3) <= step.seconds * step.relative_uncertainty


def test_every_bundled_profile_answers_for_every_format() -> None:
    for name in list_hardware():
        profile: Profile = load_hardware(name)
        costs = CostModel(profile, SMALL)
        for fmt in ("32", "16", "8", "4", "mxfp4", "3", "2"):
            assert costs.expert_kernel(1, weight_format(fmt)).seconds > profile.device.launch_s.value
