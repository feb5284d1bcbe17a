"""Several cards in both simulators: equal to the nanosecond, and what a step takes is the sum of what its cards take."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.sim.offload.simulate import Simulation
from moeplan.specs.card_split import by_counts
from moeplan.specs.machines.compose import compose_text
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.presets import load_preset
from moeplan.traces.lengths import RequestLengths
from moeplan.traces.synthesis.prior import prior_recording

MODEL = load_model("gpt-oss-20b")
BOX = compose_text("rtx-3090 + rtx-3060 + pcie-3.0x4 + ryzen-9-5950x + ddr4-3200x2:64GiB")
TRACE = prior_recording(MODEL, RequestLengths.alike(prompt_tokens=24, reply_tokens=3, requests=1))
SCHEDULES = {
    "resident": load_preset("resident"),
    "n-cpu-moe": load_preset("n-cpu-moe=9"),
    "uploads": load_preset("n-cpu-moe=9").with_upload(16),
    "lru": load_preset("mixtral-offloading-code").with_options(cache__experts_per_layer=7),
    "guesses": load_preset("mixtral-offloading").with_options(cache__experts_per_layer=6, predictor__kind="synthetic"),
    "balanced": load_preset("on-demand").with_options(kernel__miss="balanced"),
}


def simulation(counts: tuple[int, ...]) -> Simulation:
    return Simulation(model=MODEL, profile=BOX, trace=TRACE, split=by_counts(counts), memory_bytes=2**40)


@settings(max_examples=examples(12), deadline=None)
@given(st.integers(1, 23), st.sampled_from(sorted(SCHEDULES)))
def test_both_simulators_agree_to_the_nanosecond(first: int, name: str) -> None:
    one = simulation((first, 24 - first))
    found = one.run(one.resolve(SCHEDULES[name]), engine="both", rows=True)
    assert found.engine == "compiled, checked by simpy" and found.timeline is not None
    found.timeline.check()


def test_a_step_takes_what_its_layers_take_on_their_cards() -> None:
    one = simulation((15, 9))
    schedule = one.resolve(load_preset("resident"))
    outcome, (tables, _) = one.run(schedule), one.tables(schedule)
    experts, sizes = tables.expert_format.reshape(24, 32), tables.kernel_ns
    assert (experts[:15] == 0).all() and (experts[15:] == 1).all()
    line, steps = tables.step_class[-1], one.workload(schedule).steps
    last = one.workload(schedule).num_steps - 1
    total = int(tables.dense_ns[line].sum() + tables.head_ns[line] + tables.host_ns[0].step)
    for layer in range(24):
        layer_step = last * 24 + layer
        tokens = steps.layer_step_tokens[steps.layer_step_start[layer_step] : steps.layer_step_start[layer_step + 1]]
        total += int(sizes[int(layer >= 15)][tokens].sum()) + int(tables.grouped_ns[0])
    total += 24 * int(tables.host_ns[0].layer) + (24 * 2 + 1) * int(tables.host_ns[0].kernel)
    assert int(outcome.step_end[-1] - outcome.step_end[-2]) == total


def test_layers_on_the_slower_card_cost_time() -> None:
    ends = [int(simulation((24 - slow, slow)).run(simulation((24 - slow, slow)).resolve(load_preset("resident"))).step_end[-1])
            for slow in (4, 12, 20)]  # fmt: skip
    assert np.all(np.diff(ends) > 0)
    with pytest.raises(Exception, match="several cards"):
        Simulation(model=MODEL, profile=BOX, trace=TRACE).predict(load_preset("resident"))
