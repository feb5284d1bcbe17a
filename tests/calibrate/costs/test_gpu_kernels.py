"""Forms of datacentre kernels: hand arithmetic, limits, one by one against all at once; the bundled constants and who asks them."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from long_runs import examples
from moeplan.base.errors import InputError, UnknownName
from moeplan.calibrate.costs.cost_model import CostModel
from moeplan.calibrate.costs.engine_costs import EngineCosts
from moeplan.calibrate.costs.gpu.attention import decode_s, latent_decode_s, prompt_s
from moeplan.calibrate.costs.gpu.costs import KernelCosts, number_of
from moeplan.calibrate.costs.gpu.exchanges import exchange_s, kernels_of
from moeplan.calibrate.costs.gpu.experts import (
    ExpertShape,
    expected_load,
    experts_s,
    item_s,
    load_of_rows,
)
from moeplan.calibrate.costs.gpu.layer import layer_matrices
from moeplan.calibrate.costs.gpu.products import product_s
from moeplan.calibrate.costs.load import load_costs
from moeplan.commands.app import app
from moeplan.sim.parallel.program import OP_COMBINE, OP_DISPATCH, OP_EXPERT
from moeplan.sim.parallel.simulate import ParallelSimulation
from moeplan.sim.parallel.traffic import count_step, expect_step
from moeplan.specs.machines.bundled_kernels import as_measured, bundled_kernels, kernel_machines, with_kernels
from moeplan.specs.machines.compose import compose_text
from moeplan.specs.machines.gpu_kernels import (
    DecodeAttention,
    ExchangeKernel,
    ExpertKernel,
    LatentDecode,
    ProductKernel,
    PromptAttention,
)
from moeplan.specs.machines.profile import SET_BY_USER, profile_to_json
from moeplan.specs.machines.profile_file import load_hardware, profile_from_json
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import list_models, load_model
from moeplan.specs.schedules.parallel import ExpertParallelSchedule, load_ep_preset

KERNEL = ExpertKernel(name="k", start_s=20e-6, bytes_per_s=4e12, activation_bytes_per_s=2e12, flops_per_s=1e15, tile_s=1e-6,
                      relative_uncertainty=0.2)  # fmt: skip
SHAPE = ExpertShape(hidden=4096, intermediate=1536, gated=True, weight_bytes=2.0, activation_bytes=2.0)


def test_one_expert_by_hand():
    rows = np.array([[3, 0, 0, 0]])
    seconds = experts_s(KERNEL, SHAPE, load_of_rows(rows), 132)
    moved = 3 * (4096 * 8 + 1536 * 12) + 2 * 3 * 4096
    expected = 20e-6 + moved / 2e12
    for width, depth in ((3072, 4096), (4096, 1536)):
        memory = width * depth * 2 / 4e12
        tile = 2 * 16 * 128 * depth / (1e15 / 132) + 1e-6  # fewer tiles than units: one wave
        expected += (memory**1.3 + tile**1.3) ** (1 / 1.3)
    assert seconds == pytest.approx([expected])


def test_only_experts_with_rows_are_read_and_idle_ones_cost_what_they_cost():
    few, many = (
        experts_s(KERNEL, SHAPE, load_of_rows(np.eye(8, dtype=int)[:n].sum(axis=0, keepdims=True)), 132)[0]
        for n in (1, 8)
    )
    assert 7 * 37.7e6 / 4e12 < many - few < 3 * 7 * 37.7e6 / 4e12
    each = dataclasses.replace(KERNEL, expert_s=1e-6)
    rows = np.array([[1, 0, 0, 0]])
    assert experts_s(each, SHAPE, load_of_rows(rows), 132) - experts_s(
        KERNEL, SHAPE, load_of_rows(rows), 132
    ) == pytest.approx(4e-6)


@given(st.lists(st.integers(0, 600), min_size=16, max_size=64), st.integers(1, 400))
@settings(max_examples=examples(40), deadline=None)
def test_more_rows_never_take_less_time(rows, more):
    before = experts_s(KERNEL, SHAPE, load_of_rows([rows]), 132)[0]
    after = experts_s(KERNEL, SHAPE, load_of_rows([[rows[0] + more, *rows[1:]]]), 132)[0]
    assert after >= before


@pytest.mark.parametrize("rows", [1, 7, 16, 100, 1000])
def test_one_by_one_adds_up_to_all_at_once_where_waves_are_full(rows):
    """Offload predictions ask for experts one by one, expert-parallel ones for all of them: it must be the same prediction."""
    together = experts_s(KERNEL, SHAPE, load_of_rows([[rows] * 64]), 132)[0]
    alone, _ = item_s(KERNEL, SHAPE, np.array([float(rows)]), 132, num_experts=64, top_k=1)
    assert 20e-6 + 64 * alone[0] == pytest.approx(together, rel=1e-9)


@given(st.integers(0, 2**31), st.sampled_from((2.0, 20.0, 200.0)))
@settings(max_examples=examples(10), deadline=None)
def test_expected_rows_take_what_drawn_rows_take_on_average(seed, mean):
    drawn = np.random.default_rng(seed).poisson(mean, (300, 32))
    real = experts_s(KERNEL, SHAPE, load_of_rows(drawn), 132).mean()
    active = np.full((1, 32), 1 - math.exp(-mean))
    expected = experts_s(KERNEL, SHAPE, expected_load(np.full((1, 32), mean), active), 132)[0]
    assert expected == pytest.approx(real, rel=0.05)


def test_products_attention_and_exchanges_by_hand():
    plain = ProductKernel(name="p", start_s=4e-6, bytes_per_s=4e12, flops_per_s=8e14, relative_uncertainty=0.1)
    memory, compute = (4096 * 7168 * 2 + 2 * 64 * (4096 + 7168)) / 4e12, 2 * 64 * 4096 * 7168 / 8e14
    assert product_s(plain, 64, 4096, 7168, 2.0, 132) == pytest.approx(4e-6 + math.hypot(memory, compute))
    eight = dataclasses.replace(plain, quantised_values_per_s=1e12, waves=True)
    one_wave = 2 * 132 * 64 * 64 * 7168 / 8e14  # 64 tiles of 64 columns on 132 units
    memory = (4096 * 7168 + 2 * 64 * (4096 + 7168)) / 4e12
    expected = 4e-6 + math.hypot(memory, one_wave) + 64 * 7168 / 1e12
    assert product_s(eight, 64, 4096, 7168, 1.0, 132) == pytest.approx(expected)
    decode = DecodeAttention(
        name="d", start_s=8e-6, bytes_per_s=3e12, wave_s=3e-6, doubling_s=1e-6, relative_uncertainty=0.1
    )
    assert decode_s(decode, 3e6, 64, 4, 64, 132) == pytest.approx(8e-6 + 1e-6 + 2 * 3e-6 + 1e-6)
    prompt = PromptAttention(
        name="p",
        start_s=1e-5,
        flops_per_s=1e15,
        bytes_per_s=1e12,
        tile_s=2e-6,
        softmax_width=64,
        relative_uncertainty=0.1,
    )
    assert prompt_s(prompt, 1e9, 1e6, 1, 66, 256, 132, pairs=1e6) == pytest.approx(
        1e-5 + (1e9 + 128e6) / 1e15 + 1e-6 + 2e-6
    )
    port = ExchangeKernel(name="e", start_s=1e-5, bytes_per_s=1e11, half_bytes=4e6, relative_uncertainty=0.1)
    assert exchange_s(port, [0.0, 1e6], speed=0.5) == pytest.approx([1e-5, 1e-5 + (1e6 + 2e6) / 5e10])


@pytest.mark.parametrize("name", list_models())
def test_a_layers_matrices_are_all_of_its_weights(name):
    model = load_model(name)
    for layer in {model.kind_of(layer): layer for layer in range(model.num_layers)}.values():
        found = sum(matrix.parameters for matrix in layer_matrices(model, layer) if matrix.role != "router")
        assert found == pytest.approx(model.dense_matrix_parameters(layer), rel=1e-9)


def test_formats_find_what_they_are_multiplied_as():
    pairs = {
        "16": "bf16",
        "32": "bf16",
        "8": "fp8-block",
        "4": "int4",
        "mxfp4": "mxfp4",
        "nvfp4": "nvfp4",
        "int4-g128": "int4",
        "mxfp8": "fp8-block",
    }
    assert {name: number_of(weight_format(name)) for name in pairs} == pairs


# --- the bundled constants -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("machine", "engine"), [(m, e) for m, engines in kernel_machines().items() for e in engines])
def test_bundled_kernels_are_possible(machine, engine):
    """Weights are read no faster than the data sheet's memory, an operation takes microseconds, exchanges no more than NVLink."""
    profile = with_kernels(load_hardware(machine), engine)
    kernels = profile.kernels
    assert kernels is not None and kernels.engine == engine and "bf16" in kernels.experts and "bf16" in kernels.products
    peak = profile.device.memory_bytes_per_s.value * 1.06
    for part in (kernels.experts, kernels.products, kernels.decode_attention, kernels.latent_layer):
        assert all(1e11 < each.bytes_per_s <= peak for each in part.values())
    for name, each in kernels.kernels():
        assert 1e-6 < each.start_s < 200e-6 and 0 < each.relative_uncertainty < 1.2, name
    link = profile.node.gpu_link_bytes_per_s.value * 1.1
    for key, each in kernels.exchanges.items():  # switches that add up save a reduction half of its way
        assert each.bytes_per_s <= link * (1.5 if "all-reduce" in key else 1.0), key
    assert kernels.experts["bf16"].start_s > 10e-6  # what 3 µs of launch left out
    text = profile_to_json(profile)
    assert profile_to_json(profile_from_json(text)) == text


def test_who_gets_measured_kernels():
    model = load_model("qwen3-30b-a3b")
    bare = load_hardware("h100-sxm")
    assert type(load_costs(bare, model)) is CostModel
    assert type(load_costs(with_kernels(bare), model)) is KernelCosts
    assert with_kernels(load_hardware("rtx-4090")).kernels is None
    served = compose_text("h100-sxm5-80gb", "vllm")
    assert served.kernels == bundled_kernels("h100-sxm", "vllm")
    assert type(load_costs(served, model)) is KernelCosts
    assert type(load_costs(compose_text("h100-sxm5-80gb", "llama.cpp"), model)) is EngineCosts
    with pytest.raises(InputError, match="not known; choose tensorrt-llm"):
        with_kernels(bare, "llama.cpp")


@pytest.mark.parametrize(
    ("part", "name", "kept"),
    [
        ("device", "memory_bytes_per_s", False), ("device", "launch_s", False), ("node", "nic_bytes_per_s", False),
        ("device", "memory_bytes", True),
    ],
)  # fmt: skip
def test_a_card_that_someone_makes_faster_is_a_roofline_again(part, name, kept):
    """A set constant must count: kernels measured on the card as it is would ignore it."""
    bare = load_hardware("h200-sxm")
    for profile in (bare, with_kernels(bare)):
        whole = getattr(profile, part)
        set_one = dataclasses.replace(getattr(whole, name), source=SET_BY_USER)
        changed = dataclasses.replace(profile, **{part: dataclasses.replace(whole, **{name: set_one})})
        assert (with_kernels(as_measured(changed)).kernels is not None) is kept


def test_an_engine_whose_kernels_cannot_count_is_refused():
    with pytest.raises(InputError, match="not known; leave it out, or choose a100"):
        with_kernels(load_hardware("h800-sxm"), "vllm")
    with pytest.raises(InputError, match="has the kernels of vllm"):
        with_kernels(with_kernels(load_hardware("h200-sxm"), "vllm"), "sglang")
    bare = load_hardware("h200-sxm")
    faster = dataclasses.replace(bare.device, launch_s=dataclasses.replace(bare.device.launch_s, source=SET_BY_USER))
    with pytest.raises(InputError, match="set otherwise"):
        with_kernels(dataclasses.replace(bare, device=faster), "vllm")


def test_broken_kernels_are_refused_by_name():
    profile = with_kernels(load_hardware("h200-sxm"))
    kernel = profile.kernels.experts["bf16"]
    for change, match in (
        ({"bytes_per_s": 0.0}, "experts.bf16.bytes_per_s"),
        ({"start_s": -1.0}, "experts.bf16.start_s"),
    ):
        broken = dataclasses.replace(profile.kernels, experts={"bf16": dataclasses.replace(kernel, **change)})
        with pytest.raises(InputError, match=match):
            dataclasses.replace(profile, kernels=broken)
    with pytest.raises(UnknownName, match=r"kernels\.experts"):
        dataclasses.replace(profile, kernels=dataclasses.replace(profile.kernels, experts={"fp16": kernel}))


# --- in predictions ------------------------------------------------------------------------------------------------------


def test_costs_of_measured_kernels_grow_with_work_and_hold_their_floors():
    model = load_model("deepseek-v3")
    costs = load_costs(with_kernels(load_hardware("h200-sxm")), model, dense_format=weight_format("8"))
    layers = [costs.dense_layer(5, tokens, tokens * 4096, tokens).seconds for tokens in (1, 8, 64, 256)]
    assert layers == sorted(layers) and layers[0] > 60e-6
    contexts = [costs.dense_layer(5, 64, 64 * context, 64).seconds for context in (128, 4096, 65536)]
    assert contexts == sorted(contexts) and contexts[2] > 3 * contexts[1]
    prompt, decode = costs.dense_layer(5, 4096, 4096, 1), costs.dense_layer(5, 1, 4096, 1)
    assert prompt.seconds > 10 * decode.seconds and prompt.bound == "compute"
    assert costs.dense_layer(5, 1, 4096, 1).source.startswith("published")
    assert 0 < decode.relative_uncertainty < 0.6


@pytest.mark.parametrize("machine", sorted(kernel_machines()))
def test_no_expert_is_faster_than_the_data_sheet(machine):
    """Tile slopes are no rates: at sizes that nobody measured they would promise more than the card has."""
    model = dataclasses.replace(load_model("mixtral-8x7b"), expert_intermediate_size=65536)
    for engine in kernel_machines()[machine]:
        profile = with_kernels(load_hardware(machine), engine)
        costs = load_costs(profile, model)
        for bits in ("16", "8"):
            peak = profile.device.peak_flops_per_s[
                "float8" if bits == "8" and "float8" in profile.device.peak_flops_per_s else "float16"
            ]
            rows = 200_000
            least = model.expert_flops_per_token * rows / peak.value
            assert costs.grouped_item(rows, weight_format(bits)).seconds >= least
            assert costs.whole_experts_s(np.array([[rows, rows]]), None, weight_format(bits))[0] >= 2 * least


def routed(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((tokens, 2, 64)), axis=2)[:, :, :6], np.arange(tokens) % 8


@pytest.mark.parametrize("kind", ["all-choices", "per-rank"])
def test_an_expert_parallel_step_takes_whole_operations_and_measured_exchanges(kind):
    model = dataclasses.replace(load_model("deepseek-v2-lite"), num_layers=3, moe_layers=(1, 2))
    profile = with_kernels(load_hardware("h200-sxm"))
    case = ParallelSimulation(model, profile, 1, 8, prefill=False)
    schedule = ExpertParallelSchedule().with_options(all_to_all__kind=kind)
    load = count_step(*routed(512), case.topology(64), schedule)
    program, tables = case.program(schedule), case.tables(schedule, load)
    rows = load.slot_rows[0, 0].reshape(8, 8)
    costs = case.costing.costs
    expected = costs.whole_experts_s(rows, None, weight_format("16"))
    assert tables.work_ns[program.op_kind == OP_EXPERT][0].tolist() == np.ceil(expected * 1e9).astype(int).tolist()
    mode = "low-latency" if kind == "all-choices" else "normal"
    for operation, name in ((OP_DISPATCH, "dispatch"), (OP_COMBINE, "combine")):
        kernel = profile.kernels.exchanges[f"{mode}-{name}/node-8"]
        assert tables.ex_ns[program.ex_kind == operation, 1].min() > kernel.start_s * 1e9
    case.predict(schedule, [load], engine="both")


def test_kernels_of_other_numbers_of_ranks_are_the_nearest_and_reductions_take_the_quicker():
    found = kernels_of(bundled_kernels("h200-sxm", "vllm"), "node", 6)
    assert found["all-gather"] == (bundled_kernels("h200-sxm", "vllm").exchanges["all-gather/node-8"],)
    assert len(found["all-reduce"]) == 2
    no_deepep = kernels_of(bundled_kernels("a100-80gb-sxm", "vllm"), "node", 8)
    assert no_deepep["normal-dispatch"] == no_deepep["all-to-all"]
    model = dataclasses.replace(load_model("deepseek-v2-lite"), num_layers=3, moe_layers=(1, 2))
    case = ParallelSimulation(model, with_kernels(load_hardware("h100-sxm"), "sglang"), 1, 8)
    schedule = load_ep_preset("parallel-folding")
    case.predict(schedule, [count_step(*routed(64), case.topology(64), schedule)], engine="both", check_memory=False)


def test_expected_and_counted_steps_take_about_as_long():
    model = dataclasses.replace(load_model("deepseek-v2-lite"), num_layers=3, moe_layers=(1, 2))
    case = ParallelSimulation(model, with_kernels(load_hardware("h200-sxm")), 1, 8, prefill=False)
    schedule = ExpertParallelSchedule()
    counted = np.mean(
        [
            case.predict(schedule, [count_step(*routed(1024, seed), case.topology(64), schedule)]).step_s
            for seed in range(4)
        ]
    )
    chance = np.full((2, 1, 64), 6 / 64)
    expected = case.predict(schedule, [expect_step(chance, np.full(8, 128), case.topology(64), schedule)]).step_s
    assert expected == pytest.approx(counted, rel=0.06)


def test_hardware_show_has_every_constant_of_measured_kernels(tmp_path):
    profile = with_kernels(load_hardware("h200-sxm"), "vllm")
    (tmp_path / "mine.json").write_text(profile_to_json(profile), encoding="utf-8")
    show = CliRunner().invoke(app, ["hardware", "show", str(tmp_path / "mine.json"), "--json"])
    shown = {one["name"]: one["constants"] for one in json.loads(show.stdout)["kernels"]}
    assert set(shown) == {name for name, _ in profile.kernels.kernels()}
    assert shown["experts.bf16"]["tile_s"] == profile.kernels.experts["bf16"].tile_s
    text = CliRunner().invoke(app, ["hardware", "show", str(tmp_path / "mine.json")]).stdout
    assert all(f"kernels.{name}" in text for name in shown)
    assert "expert-parallel plans go by them" in CliRunner().invoke(app, ["hardware", "show", "h200-sxm"]).stdout


@settings(max_examples=examples(30), deadline=None)
@given(
    requests=st.integers(1, 4096), heads=st.integers(1, 256), context=st.integers(1, 10**6), units=st.integers(1, 200)
)
def test_contexts_that_no_kernel_divides_take_a_unit_each_and_waves_of_them(requests, heads, context, units):
    whole = LatentDecode(name="k", start_s=1e-5, bytes_per_s=1e12, flops_per_s=1e15, head_bytes_per_s=1e12, doubling_s=1e-6,
                         relative_uncertainty=0.2)  # fmt: skip
    alone = dataclasses.replace(whole, page_s=2e-6)
    sizes = (1e6, 1e9, heads, 1e5, context)
    waves = math.ceil(requests * math.ceil(heads / 64) / units)
    more = latent_decode_s(alone, *sizes, requests=requests, num_units=units) - latent_decode_s(whole, *sizes)
    assert float(more) == pytest.approx(waves * context / 64 * 2e-6, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "more"), [("qwen3-235b-a22b", 20), ("minimax-m2.5", 20), ("deepseek-v3", 0), ("kimi-k2", 0)]
)
def test_an_engine_that_fuses_little_has_more_small_kernels_outside_latent_attention(name: str, more: int) -> None:
    model = load_model(name)
    parts = {
        engine: KernelCosts(with_kernels(load_hardware("h200-sxm"), engine), model).layer_parts(
            model.moe_layers[0], 1, 512, 1
        )
        for engine in ("sglang", "vllm")
    }
    # Where only one of them has attention measured with its projections, rotation and cache writes are in that.
    apart = 2 * (("mixing" in parts["sglang"]) - ("mixing" in parts["vllm"]))
    assert parts["sglang"]["small"].launch_s - parts["vllm"]["small"].launch_s == pytest.approx((more + apart) * 3e-6)
