"""Layers that lie in host memory as a whole: what surrounds their experts is read by the cores, by hand arithmetic."""

import dataclasses
import math

import pytest

from moeplan.calibrate.costs.engine_costs import EngineCosts
from moeplan.sim.offload.simulate import Simulation
from moeplan.specs.machines.load import load_machine
from moeplan.specs.models import quantised_as, weight_format
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.presets import load_preset
from moeplan.traces.lengths import RequestLengths
from moeplan.traces.synthesis.prior import prior_recording

MACHINE = load_machine("rtx-3060 + ryzen-7-7700x + ddr5-5600x2:64GiB", engine="llama.cpp")
MODEL = load_model("qwen3-30b-a3b")
EXPERTS, DENSE = quantised_as("Q4_K_M", None, MODEL)


def costs(layers_off: int) -> EngineCosts:
    return EngineCosts(MACHINE, MODEL, dense_format=DENSE, layers_off=layers_off)


def test_a_step_reads_them_at_the_cores_bandwidth() -> None:
    off, on, cpu = costs(10), costs(0), MACHINE.host.cpu
    assert cpu is not None
    bandwidth = cpu.memory_bytes_per_s.value
    cached = 1000 * MODEL.attention_of(0).kv_values_per_token * 2  # type: ignore[union-attr]
    heads = MODEL.attention_of(0)
    assert heads is not None
    attending = 1000 * heads.num_heads * (heads.head_dim + heads.v_head_dim) * 2 / cpu.flops_per_s.value
    multiplying = 2 * MODEL.dense_matrix_parameters(0) / cpu.flops_per_s.value
    by_hand = math.hypot(MODEL.dense_layer_bytes(0, DENSE) / bandwidth, multiplying) + math.hypot(
        cached / bandwidth, attending
    )
    assert off.dense_layer(0, 1, 1000).seconds == pytest.approx(by_hand, rel=0.05)
    assert off.dense_layer(10, 1, 1000) == on.dense_layer(10, 1, 1000)
    assert off.head(1).seconds == pytest.approx(DENSE.head_bytes(MODEL.head_parameters) / bandwidth, rel=0.2)
    assert on.head(1).seconds < off.head(1).seconds / 3


def test_a_large_pass_copies_them_to_the_card() -> None:
    off, on = costs(10), costs(0)
    few, many = off.dense_layer(0, 16, 16), off.dense_layer(0, 512, 512)
    assert many.seconds > off.host_to_device(MODEL.dense_layer_bytes(0, DENSE)).seconds
    assert few.seconds > on.dense_layer(0, 16, 16).seconds and many.seconds < 32 * few.seconds


@pytest.mark.parametrize("layers", [1, 12, 47])
def test_both_simulators_agree_and_whole_layers_are_slower_than_their_experts_alone(layers: int) -> None:
    model = dataclasses.replace(MODEL, native_bits=EXPERTS.name)
    trace = prior_recording(model, RequestLengths.alike(prompt_tokens=40, reply_tokens=6))
    schedule = load_preset(f"n-cpu-moe={layers}")
    found = {}
    for off in (0, layers):
        simulation = Simulation(
            model=model, profile=MACHINE, trace=trace, dense_format=DENSE, memory_bytes=10**12, layers_off=off
        )
        prediction = simulation.predict(schedule, engine="both")
        found[off] = int(prediction.outcome.step_end[-1])
    assert found[0] < found[layers]
    assert weight_format(model.native_bits).bits_per_weight < 6
