"""Passes of many tokens may fetch what steps of few compute on the cores."""

from __future__ import annotations

import pytest

from moeplan.base.errors import InputError
from moeplan.sim.offload.simulate import Prediction, Simulation
from moeplan.specs.machines.compose import compose_text
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.specs.schedules.presets import load_preset
from moeplan.traces.lengths import RequestLengths
from moeplan.traces.synthesis.prior import prior_recording


def predicted(schedule: OffloadSchedule, prompt: int = 48, reply: int = 4) -> Prediction:
    model = load_model("tiny-moe")
    trace = prior_recording(model, RequestLengths.alike(prompt_tokens=prompt, reply_tokens=reply))
    return Simulation(model=model, profile=compose_text("rtx-3060"), trace=trace).predict(schedule, engine="both")


@pytest.mark.parametrize("name", ["cpu-moe", "n-cpu-moe=4", "kt-uniform"])
def test_large_passes_fetch_and_small_ones_do_not(name: str) -> None:
    base = load_preset(name)
    if name == "kt-uniform":
        base = base.with_options(cache__experts_per_layer=4)
    never, always = predicted(base), predicted(base.with_options(kernel__upload_tokens=1))
    from_32 = predicted(base.with_options(kernel__upload_tokens=32))
    assert never.metrics.bytes_copied == 0 and never.metrics.cpu_runs > 0
    assert always.metrics.cpu_runs == 0 and always.metrics.bytes_copied > from_32.metrics.bytes_copied > 0
    assert from_32.metrics.decode_tokens_per_s == never.metrics.decode_tokens_per_s
    assert from_32.metrics.ttft_s == always.metrics.ttft_s
    beyond = predicted(base.with_options(kernel__upload_tokens=49))
    assert beyond.outcome.makespan_ns == never.outcome.makespan_ns


def test_a_schedule_that_fetches_anyway_has_no_threshold() -> None:
    with pytest.raises(InputError, match="upload_tokens"):
        load_preset("on-demand").with_options(kernel__upload_tokens=32)
    with pytest.raises(InputError, match="upload_tokens"):
        load_preset("cpu-moe").with_options(kernel__upload_tokens=0)


def test_without_a_recording_requests_have_the_lengths_asked_for() -> None:
    model = load_model("gpt-oss-20b")
    lengths = RequestLengths.alike(prompt_tokens=105, reply_tokens=3, requests=2, cached_tokens=100)
    trace = prior_recording(model, lengths)
    assert trace.num_tokens == 16 and trace.num_layers == model.num_moe_layers and trace.top_k == model.top_k
    assert trace.position.tolist() == [*range(100, 108)] * 2
    assert trace.phase.tolist() == [0] * 5 + [1] * 3 + [0] * 5 + [1] * 3
    assert "no recording" in trace.source
    again = prior_recording(model, lengths)
    assert (again.experts == trace.experts).all()
