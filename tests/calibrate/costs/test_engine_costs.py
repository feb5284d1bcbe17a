"""What work costs under an engine on a machine made of parts: which way every figure moves, and what it cannot go beyond."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.calibrate.costs.engine_costs import EngineCosts
from moeplan.calibrate.costs.load import load_costs
from moeplan.sim.offload.simulate import Simulation
from moeplan.specs.machines.catalogue import gpu_parts
from moeplan.specs.machines.compose import compose, compose_text, parse_parts
from moeplan.specs.machines.engine_on_card import STACKED_PACE
from moeplan.specs.machines.engines import UNSORTED, UNTUNED_LAYER_S, fitted_table, load_engine, rates, unfamiliarity
from moeplan.specs.machines.profile import Profile
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.presets import load_preset
from moeplan.traces.lengths import RequestLengths
from moeplan.traces.synthesis.prior import prior_recording

CARDS = sorted(name for name, part in gpu_parts().items() if part.name == name and part.memory_bytes >= 1 << 34)
QWEN = "qwen3-30b-a3b"


def costs(profile: Profile, model: str = QWEN, fmt: str = "Q4_K_M") -> EngineCosts:
    found = load_costs(profile, load_model(model), dense_format=weight_format(fmt))
    assert isinstance(found, EngineCosts)
    return found


def built(month: str | None, engine: str = "llama.cpp", card: str = "rtx-3090") -> float:
    engine_constants = compose(parse_parts(card), load_engine(engine), built=month).engine
    assert engine_constants is not None
    return engine_constants.layer_s.value


def test_builds_that_launch_one_by_one_take_longer_a_layer() -> None:
    assert built("2023") == built("2024-04") > 1.3 * built("2024-05")
    assert (
        built("2024-05") == built("2025-10") > built(None) > built("2025-11") == built("2026-01")
    )  # kernels are merged
    assert built("2025-03", "ik_llama.cpp") > built("2025-10", "ik_llama.cpp")
    assert built(None, "transformers") > 3 * built("2023")


def test_a_graph_goes_by_the_cards_clock_and_launching_one_by_one_does_not() -> None:
    slow, fast, stacked = (gpu_parts()[name].boost_ghz for name in ("rtx-3090", "rtx-4090", "a100-sxm4-80gb"))
    assert slow is not None and fast is not None and stacked is not None
    assert built(None, card="rtx-3090") / built(None, card="rtx-4090") == pytest.approx(fast / slow)
    later = built(None, card="a100-sxm4-80gb") / built(None, card="rtx-4090")
    assert later == pytest.approx(STACKED_PACE * fast / stacked)  # stacked memory answers later
    assert built("2023", card="a100-sxm4-80gb") == built("2023", card="rtx-4090")


def test_builds_that_look_tokens_up_everywhere_multiply_experts_more_slowly() -> None:
    engine, cards = load_engine("llama.cpp"), ("rx-7900-xtx", "strix-halo", "rtx-4090")
    early, late = (
        [compose(parse_parts(card), engine, built=month).engine for card in cards] for month in ("2025-08", "2026-01")
    )
    for card, one, other in zip(cards, early, late, strict=True):
        assert one is not None and other is not None
        share = UNSORTED if engine.unsorted("2025-08", one.backend) else 1.0
        assert other.expert_efficiency.value == pytest.approx(share * one.expert_efficiency.value), card
        assert other.dense_efficiency == one.dense_efficiency
    assert (
        engine.unsorted("2025-08", "rocm") and not engine.unsorted(None, "rocm") and not engine.unsorted("2023", "cuda")
    )


def test_engines_without_kernels_for_a_card_take_longer_a_layer() -> None:
    engine = load_engine("vllm")
    for card, backend, untuned in (("mi300x", "rocm", False), ("mi50", "rocm", True), ("rtx-4090", "cuda", False)):
        made = compose(parse_parts(card), engine, backend).engine
        assert made is not None and engine.untuned(backend, gpu_parts()[card].architecture) is untuned
        assert (made.layer_s.value > UNTUNED_LAYER_S) is untuned
    assert engine.prompt_chunk(24e9) < engine.prompt_chunk(128e9)


def test_a_cache_that_the_card_fills_waits_for_no_host() -> None:
    on_card, by_host = (compose_text("rtx-5090", name).engine for name in ("freetoken", "imp"))
    assert on_card is not None and by_host is not None
    assert on_card.fetch_layer_s.value == 0 < by_host.fetch_layer_s.value


def test_prompts_of_delta_rules_wait_for_a_kernel_that_goes_token_by_token() -> None:
    tokens = 512
    serial = costs(compose_text("rtx-3090", "llama.cpp"), "qwen3.6-35b-a3b")
    engine = serial.engine
    assert engine.delta_flops_per_s is not None
    blocks = dataclasses.replace(engine, delta_flops_per_s=None)
    other = costs(dataclasses.replace(serial.profile, engine=blocks), "qwen3.6-35b-a3b")
    longer = serial.dense_layer(0, tokens, tokens).seconds - other.dense_layer(0, tokens, tokens).seconds
    assert 0 < longer < 2e-3
    assert serial.dense_layer(0, 1, tokens).seconds == other.dense_layer(0, 1, tokens).seconds


@pytest.mark.parametrize("card", ["rtx-3090", "rtx-5090", "radeon-8060s"])
def test_delta_rules_as_operations_of_their_own_wait_for_memory(card: str) -> None:
    tokens = 512
    parts = parse_parts(card)

    def seconds(built: str) -> float:
        made = costs(compose(parts, load_engine("llama.cpp"), built=built), "qwen3-next-80b-a3b")
        layers = [
            made.dense_layer(layer, tokens, tokens).seconds for layer in (0, 3)
        ]  # of linear and of full attention
        return layers[0] - layers[1]

    assert parts.gpu is not None
    bandwidth = parts.gpu.bandwidth_bytes_per_s
    longer = (seconds("2026-02") - seconds("2026-03")) * bandwidth / tokens  # bytes a token
    assert seconds("2025-12") == seconds("2026-02") > seconds("2026-03")
    assert 1e6 < longer < 1e7


def test_layers_of_more_kernels_take_longer() -> None:
    machine = compose_text("rtx-4090")
    free = dataclasses.replace(machine.device.memory_bytes_per_s, value=1e18)  # nothing but kernels is left
    at_once = dataclasses.replace(machine, device=dataclasses.replace(machine.device, memory_bytes_per_s=free))
    grouped, other = (costs(at_once, name).dense_layer(1, 1, 1).seconds for name in (QWEN, "deepseek-v2-lite"))
    assert other > 1.2 * grouped
    lite = costs(at_once, "deepseek-v2-lite")
    assert lite.dense_layer(1, 1, 1).launch_s > lite.dense_layer(0, 1, 1).launch_s  # the first has no experts


def test_memory_behind_few_units_is_used_less_well_by_kernels_that_expand_blocks() -> None:
    cards = ("rtx-4090", "rtx-3090", "a100-sxm4-80gb", "mi50")  # bytes a unit and clock grow
    reached = [compose_text(card, "llama.cpp").device.memory_efficiency.value for card in cards]
    assert reached[0] > reached[1] > max(reached[2:]) and min(reached) > 0.4
    others = {compose_text(card, "vllm").device.memory_efficiency.value for card in cards}
    assert len(others) == 1


def test_generations_without_reports_are_less_certain() -> None:
    table = fitted_table()
    assert "maxwell" not in table["architectures"] and "ada-geforce" in table["architectures"]
    seen, unseen = (compose_text(card).device.memory_efficiency for card in ("rtx-4090", "gtx-980-ti"))
    assert unseen.relative_uncertainty > seen.relative_uncertainty and "no report" in unseen.citation
    cards, cores = (compose_text("gtx-980-ti").host.cpu, compose_text("rtx-4090").host.cpu)
    assert cards is not None and cores is not None
    assert cards.memory_bytes_per_s.relative_uncertainty == cores.memory_bytes_per_s.relative_uncertainty


def test_engines_of_few_machines_and_early_builds_are_less_certain() -> None:
    def wide(engine: str, built: str | None = None) -> float:
        machine = compose(parse_parts("rtx-4090"), load_engine(engine), built=built)
        assert machine.engine is not None
        return machine.engine.layer_s.relative_uncertainty

    assert unfamiliarity(0) > unfamiliarity(1) > unfamiliarity(20) > 1.0
    assert wide("transformers") > wide("vllm") > wide("llama.cpp")
    assert wide("llama.cpp", "2023-09") == pytest.approx(wide("transformers")) and wide("llama.cpp", "2026-01") == wide(
        "llama.cpp"
    )
    links = {
        compose_text("rtx-4090", engine).host_to_device.pinned_bytes_per_s.relative_uncertainty
        for engine in ("sglang", "llama.cpp")
    }
    assert len(links) == 1  # engines have no part in a slot


def test_products_are_at_the_peak_of_halves_under_metal_and_as_under_cuda_on_nvidias_cards() -> None:
    def share(parts: str, engine: str, backend: str) -> float:
        machine = compose_text(parts, engine, backend)
        assert machine.engine is not None
        return machine.engine.expert_efficiency.value

    assert share("apple-m2-ultra", "llama.cpp", "metal") == share("apple-m1-max", "mlx", "metal") == pytest.approx(0.63)
    assert share("rtx-5090", "llama.cpp", "vulkan") == share("rtx-5090", "llama.cpp", "cuda")
    assert share("rx-7900-xtx", "llama.cpp", "vulkan") != share("rx-7900-xtx", "llama.cpp", "rocm")


def test_attention_on_cores_is_slow_with_narrow_heads_and_by_engine() -> None:
    def depth_s(engine: str, model: str) -> float:
        alone = costs(compose_text("ryzen-9-7950x + ddr5-4000x2:64GiB", engine, "cpu"), model)
        return alone.dense_layer(1, 512, 8704).seconds - alone.dense_layer(1, 512, 512).seconds

    assert depth_s("llama.cpp", "gpt-oss-20b") > 2 * depth_s("ik_llama.cpp", "gpt-oss-20b")
    narrow, wide = load_model("gpt-oss-20b").attention, load_model(QWEN).attention
    assert (narrow.head_dim, wide.head_dim) == (64, 128)
    per_flop = [
        depth_s("ik_llama.cpp", name) / (each.num_heads * each.head_dim)
        for name, each in (("gpt-oss-20b", narrow), (QWEN, wide))
    ]
    assert per_flop[0] > 1.5 * per_flop[1]


def test_cores_without_dot_products_of_8_bits_do_two_thirds_of_those_with() -> None:
    old, new = (compose_text(cpu, "llama.cpp", "cpu").host.cpu for cpu in ("ryzen-9-5950x", "ryzen-9-7950x"))
    assert old is not None and new is not None
    assert old.flops_per_s.value / 3.9 == pytest.approx(new.flops_per_s.value / 4.7 * 72 / 112)


def test_a_chiplet_reads_what_its_link_gives() -> None:
    one, two = (
        compose_text(f"{cpu} + ddr5-6000x2:64GiB", "llama.cpp", "cpu").host.cpu
        for cpu in ("ryzen-7-7700x", "ryzen-9-7950x")
    )
    assert one is not None and two is not None
    share = rates("llama.cpp", "cpu")["chiplet_share"].value
    assert one.memory_bytes_per_s.value == pytest.approx(64e9 * share) and share < 1
    assert one.memory_bytes_per_s.value < two.memory_bytes_per_s.value <= 96e9


def test_ordinary_memory_is_copied_at_what_a_driver_stages() -> None:
    early, late = (
        compose(parse_parts("rtx-5090"), load_engine("imp"), built=month) for month in ("2026-08", "2026-09")
    )
    assert early.host_to_device.pinned_bytes_per_s.value == early.host_to_device.pageable_bytes_per_s.value < 10e9
    assert late.host_to_device.pinned_bytes_per_s.value > 4 * late.host_to_device.pageable_bytes_per_s.value
    slow = compose_text("rtx-5090 + pcie-3.0x4", "deepspeed").host_to_device
    assert slow.pinned_bytes_per_s.value < 4e9  # the slot is slower still


def test_products_of_8_bit_blocks_are_alike_a_unit_and_others_follow_the_peak() -> None:
    pair = ("rtx-3090", "rtx-a6000")
    units, peak = (
        [costs(compose_text(card, engine)).grouped_item(2048, weight_format("Q4_K_M")).seconds for card in pair]
        for engine in ("llama.cpp", "vllm")
    )
    assert units[0] / units[1] == pytest.approx(1.0, abs=0.2)  # 82 and 84 units of one generation
    assert peak[0] / peak[1] > 1.8


@given(st.sampled_from(CARDS), st.sampled_from(["llama.cpp", "generic"]), st.integers(1, 20_000))
def test_no_card_decodes_faster_than_its_memory_is_read(card: str, engine: str, context: int) -> None:
    profile, fmt = compose_text(card, engine), weight_format("Q4_K_M")
    model = load_model(QWEN)
    lengths = RequestLengths.alike(prompt_tokens=context, reply_tokens=2, cached_tokens=context)
    trace = prior_recording(model, lengths)
    simulation = Simulation(model=model, profile=profile, trace=trace, dense_format=fmt, memory_bytes=1 << 50)
    speed = simulation.predict(load_preset("resident").with_options(experts__bits="Q4_K_M")).metrics.decode_tokens_per_s
    active = sum(model.dense_layer_bytes(layer, fmt) for layer in range(model.num_layers))
    active += model.num_moe_layers * model.top_k * model.expert_bytes(fmt)
    assert speed is not None
    share = speed * active / profile.device.memory_bytes_per_s.value
    assert 0.02 < share < 0.9


@given(st.sampled_from(CARDS), st.integers(1, 4096), st.integers(1, 4096))
def test_more_tokens_never_take_less(card: str, one: int, other: int) -> None:
    found, fmt = costs(compose_text(card)), weight_format("Q4_K_M")
    few, many = sorted((one, other))
    assert found.grouped_item(few, fmt).seconds <= found.grouped_item(many, fmt).seconds
    assert found.dense_layer(0, few, few).seconds <= found.dense_layer(0, many, many).seconds + 1e-12
    assert found.dense_layer(0, 1, few).seconds <= found.dense_layer(0, 1, many).seconds


def test_cores_alone_are_no_second_set_of_shares() -> None:
    alone = compose_text("ryzen-9-7950x + ddr5-6000x2:64GiB")
    beside = compose_text("rtx-3060 + ryzen-9-7950x + ddr5-6000x2:64GiB", backend="cuda")
    assert beside.host.cpu is not None and alone.host.cpu is not None
    fmt, model = weight_format("Q4_K_M"), load_model(QWEN)
    rate = model.expert_flops_per_token / (alone.host.cpu.flops_per_s.value)
    assert costs(alone).grouped_item(512, fmt).seconds == pytest.approx(512 * rate, rel=0.1)
    wide, narrow = (costs(compose_text(f"{name} + ddr5-6000x2:64GiB")) for name in ("ryzen-9-9950x", "ryzen-9-7950x"))
    assert wide.grouped_item(512, fmt).seconds < 0.8 * narrow.grouped_item(512, fmt).seconds


def test_four_channels_lie_between_desktops_and_servers() -> None:
    def share(text: str) -> float:
        machine = compose_text(f"rtx-3060 + {text}")
        assert machine.host.cpu is not None
        channels = int(text.split("x")[-1].split(":")[0])
        return machine.host.cpu.memory_bytes_per_s.value / channels

    two, four, eight = (
        share(f"{cpu} + ddr4-3200x{channels}:64GiB")
        for cpu, channels in (("ryzen-9-5950x", 2), ("threadripper-3970x", 4), ("epyc-7543", 8))
    )
    assert two > four > eight
