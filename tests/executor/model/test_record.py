"""Recording a real model, and lookahead gates: what is recorded is what the model chose, and trained gates guess better."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from moeplan.base.errors import InputError
from moeplan.executor.model.align import Settings as Training
from moeplan.executor.model.align import mean_recall, recalls, train
from moeplan.executor.model.gates import load_gates, save_gates
from moeplan.executor.model.guesses import Gate, GateRow, ranked_by
from moeplan.executor.model.record import Asked, Settings, record, requests_of
from moeplan.executor.model.session import Loaded, open_model, run_model, silent
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.traces.format import load_trace
from moeplan.traces.recording import DECODE, PREFILL

pytest.importorskip("transformers")
from tiny_models import build, save

TEXT = bytes(np.random.default_rng(0).integers(32, 127, 4000, dtype=np.uint8).tobytes())


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    with open_model(save(build("mixtral"), tmp_path_factory.mktemp("mixtral"))) as found:
        yield found


@pytest.fixture(scope="module", params=["deepseek_v2", "deepseek_v3"])
def grouped(request, tmp_path_factory):
    with open_model(save(build(request.param), tmp_path_factory.mktemp(request.param))) as found:
        yield found


def true_choices(loaded: Loaded, ids: list[int]) -> list[np.ndarray]:
    """What plain routers chose for a text, each row sorted, by column."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(loaded.assembled.folder, dtype=torch.float32)
    found: list[np.ndarray] = []
    for module in model.modules():
        if type(module).__name__.endswith(("TopkRouter", "TopKRouter")):
            module.register_forward_hook(lambda _, __, out: found.append(np.sort(out[2].numpy(), axis=1)))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    return found


def test_the_true_selection_is_recorded_also_where_routers_have_groups_and_biases(grouped, tmp_path):
    ids = list(TEXT[:20])
    out = tmp_path / "r.safetensors"
    settings = Settings(new_tokens=0)
    facts = record(
        grouped, [Asked(prompt=tuple(ids), rest=(), name="text")], out, settings, source="test", progress=silent
    )
    trace = load_trace(out)
    assert (facts["prefill_tokens"], facts["decode_tokens"]) == (20, 0)
    for column, chosen in enumerate(true_choices(grouped, ids)):
        assert np.array_equal(np.sort(trace.experts[:, column], axis=1), chosen)
    assert (
        np.diff(np.asarray(trace.weights, np.float32), axis=2) <= 0
    ).all()  # best first, whatever order the router left


def test_padding_is_never_a_token_and_batches_record_what_requests_alone_do(loaded, tmp_path):
    lengths = (5, 11, 8)
    asked = [
        Asked(prompt=tuple(TEXT[at : at + n]), rest=tuple(TEXT[100:104]), name=f"{n}.txt")
        for at, n in enumerate(lengths)
    ]
    found = []
    for batch in (1, 2, 3):
        out = tmp_path / f"{batch}.safetensors"
        settings = Settings(new_tokens=4, follow=True, batch=batch, distance=2, width=3)
        record(loaded, asked, out, settings, source="test", progress=silent)
        found.append(load_trace(out))
    alone = found[0]
    assert np.bincount(alone.request).tolist() == [n + 4 for n in lengths]
    assert [int((alone.phase[alone.request == r] == DECODE).sum()) for r in range(3)] == [4, 4, 4]
    for other in found[1:]:
        for name in ("experts", "request", "position", "phase", "predicted"):
            assert np.array_equal(getattr(alone, name), getattr(other, name)), name
        assert np.allclose(alone.weights, other.weights, atol=1e-3)


def test_a_run_records_what_the_recorder_records(loaded, tmp_path):
    """The same tokens under a schedule that moves experts, and with all of them in place: one routing, and one set of guesses."""
    prompt = list(TEXT[:12])
    schedule = OffloadSchedule(name="test").with_options(
        cache__policy="lru", cache__experts_per_layer=3, experts__bits="32", predictor__kind="next-gate", predictor__depth=2,
        predictor__width=3,
    )  # fmt: skip
    run = run_model(loaded, schedule, [prompt], max_new_tokens=5).recording
    out = tmp_path / "r.safetensors"
    record(loaded, [Asked(prompt=tuple(prompt), rest=(), name="text")], out, Settings(new_tokens=4, distance=2, width=3),
           source="test", progress=silent)  # fmt: skip
    trace = load_trace(out)
    for name in ("experts", "request", "position", "phase", "predicted"):
        assert np.array_equal(getattr(run, name), getattr(trace, name)), name
    assert (trace.phase[:12] == PREFILL).all()


def test_requests_are_cut_in_turns_and_too_short_a_text_is_refused():
    settings = Settings(prompt_tokens=3, new_tokens=2, follow=True)
    found = requests_of([("a", list(range(10))), ("b", list(range(5)))], settings, 3)
    assert [(one.name, one.prompt, one.rest) for one in found] == [
        ("a", (0, 1, 2), (3, 4)), ("b", (0, 1, 2), (3, 4)), ("a", (5, 6, 7), (8, 9)),
    ]  # fmt: skip
    with pytest.raises(InputError, match="room for 3 requests"):
        requests_of([("a", list(range(10))), ("b", list(range(5)))], settings, 4)


@pytest.mark.parametrize("hidden", [0, 16])
def test_trained_gates_guess_better_and_come_back_from_their_file(hidden, loaded, tmp_path):
    settings = Training(distance=2, steps=20, windows=4, length=32, epochs=6, hidden=hidden, learning_rate=1e-2)
    gates, facts = train(loaded, [list(TEXT[:3000])], settings, progress=silent)
    assert set(gates) == {(1, 1), (2, 1), (2, 2)} and facts["divergence_last"] < facts["divergence_first"]
    path = tmp_path / "g.safetensors"
    save_gates(path, gates, loaded.spec, {"steps": "40"})
    again = load_gates(path, loaded.spec)
    for key, gate in gates.items():
        assert (gate.inner is None) == (hidden == 0)
        assert all(one is other or torch.equal(one, other) for one, other in zip(again[key], gate, strict=True))

    def recall(used, distance):
        lines = recalls(loaded, [list(TEXT[3000:])], distance=2, widths=[2], length=32, gates=used, progress=silent)
        return mean_recall(lines, distance, 2)

    assert recall(again, 1) > recall(None, 1) and recall(again, 2) > recall(None, 2)
    # Training takes nothing from what runs: a run guesses with the gates it was given and computes the same.
    schedule = OffloadSchedule(name="test").with_options(
        cache__policy="lru",
        cache__experts_per_layer=3,
        experts__bits="32",
        predictor__kind="next-gate",
        predictor__depth=2,
    )
    plain = run_model(loaded, schedule, [list(TEXT[:12])], max_new_tokens=4)
    loaded.gates = again
    try:
        guided = run_model(loaded, schedule, [list(TEXT[:12])], max_new_tokens=4)
    finally:
        loaded.gates = None
    assert guided.tokens == plain.tokens and not np.array_equal(guided.recording.predicted, plain.recording.predicted)


@pytest.mark.parametrize(
    "damage",
    ["cut", "another model", "a foreign file", "numbers that are none", "a layer in part", "units that differ"],
)
def test_gates_that_cannot_be_used_are_one_line(damage, loaded, tmp_path):
    spec, path = loaded.spec, tmp_path / "g.safetensors"
    weight = torch.full((8, 64), torch.nan if damage == "numbers that are none" else 0.5)
    gate = Gate(weight, torch.zeros(8))
    if damage == "a layer in part":
        gate = gate._replace(inner=torch.ones(4, 64))
    elif damage == "units that differ":
        gate = gate._replace(inner=torch.ones(4, 64), inner_bias=torch.ones(4), outer=torch.ones(8, 5))
    save_gates(path, {(1, 1): gate}, spec, {})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "a foreign file":
        path.write_bytes(b"nothing of the kind")
    elif damage == "another model":
        spec = dataclasses.replace(spec, num_experts=16)
    with pytest.raises(InputError, match="--gates"):
        load_gates(path, spec)


@pytest.mark.parametrize("units", [0, 1, 37])
@pytest.mark.parametrize("scale", [0.01, 1.0, 40.0])
def test_one_token_is_guessed_for_as_by_torch(units: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(units)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, experts, width = 48, 11, 4
    inside = (drawn(units, hidden), drawn(units), drawn(experts, units)) if units else ()
    gate = Gate(drawn(experts, hidden), drawn(experts), *inside)
    row = GateRow(gate)
    for _ in range(20):
        x = scale * drawn(1, hidden)
        chances = gate.logits(x).softmax(dim=-1)[0]
        ids, best = row.ranked(x[0].numpy(), width)
        expected, by_torch = ranked_by(gate, x, width)
        assert ids.shape == best.shape == (1, width) and len(set(ids[0])) == width
        assert np.allclose(best.astype(np.float32), by_torch.numpy(), atol=1e-3)
        assert np.allclose(
            chances[ids[0].astype(int)], chances[expected[0]], atol=1e-5
        )  # ties may be told apart the other way
