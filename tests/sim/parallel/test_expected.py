"""Steps known from counts alone: active experts and their chances, smooth and never falling in the tokens of a step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.planner.parallel.candidates import NEEDS_TOKENS
from moeplan.planner.parallel.case import ParallelRequest, plain_schedule
from moeplan.planner.parallel.simulate import simulate_ep
from moeplan.sim.parallel.active_experts import active_chance, most_over_mean, number_active
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import EP_PRESETS, load_ep_preset
from moeplan.traces.recording import LoadProfile

MODEL, MACHINE = load_model("deepseek-v2-lite"), load_hardware("h800-sxm")


def loads(counts: np.ndarray) -> LoadProfile:
    return LoadProfile(
        counts=counts, model="", layer_ids=tuple(MODEL.moe_layers), source="made up", licence="", top_k=6
    )


UNIFORM = loads(np.full((26, 64), 100, np.int64))


def predict(recording: LoadProfile, tokens: int, name: str = "ep", nodes: int = 1, bits: str = "16", **more: object):  # type: ignore[no-untyped-def]
    request = ParallelRequest(
        num_nodes=nodes, ranks_per_node=4 // nodes, prefill=False, context_tokens=512, tokens_per_rank=tokens, **more
    )  # type: ignore[arg-type]
    schedule = plain_schedule(bits) if name == "ep" else load_ep_preset(name)
    copies = 8 if schedule.placement.num_redundant else 0
    return simulate_ep(MODEL, MACHINE, recording, request, schedule.with_options(placement__num_redundant=copies))


def test_the_slowest_rank_has_as_many_active_experts_as_in_drawn_steps() -> None:
    rng = np.random.default_rng(0)
    for tokens in (1, 4, 16):
        chance = active_chance(np.full((1, 1, 64), 6 / 64), np.array([float(tokens)]))
        active = chance.reshape(1, 4, 16)
        chosen = np.argsort(rng.random((4000, tokens, 64)), axis=2)[:, :, :6]
        drawn = np.zeros((4000, 64))
        np.put_along_axis(drawn, chosen.reshape(4000, -1), 1.0, axis=1)
        assert active.sum() == pytest.approx(drawn.sum() / 4000, rel=0.01)
        most = drawn.reshape(4000, 4, 16).sum(axis=2).max(axis=1).mean()
        # A token's choices differ, which evens ranks out a little.
        assert active.sum(-1).max() * most_over_mean(active)[0] == pytest.approx(most, rel=0.06)


def test_the_distribution_is_that_of_coin_tosses() -> None:
    assert number_active(np.array([0.5, 0.5])) == pytest.approx([0.25, 0.5, 0.25])
    assert number_active(np.array([1.0, 0.0, 0.25])) == pytest.approx([0.0, 0.75, 0.25, 0.0])
    assert most_over_mean(np.ones((2, 3))) == 1.0
    assert most_over_mean(np.array([[0.5], [0.5]])) == pytest.approx(
        1.5
    )  # one of two coins shows heads in 3 of 4 tosses


def test_few_tokens_read_the_weights_of_the_experts_they_activate() -> None:
    """One token on each of four ranks activates 64 (1 - (58/64)^4) = 20.8 of 64 experts, 5.2 a rank."""
    found = predict(UNIFORM, 1)
    item = 8.65e6 * 2 / (MACHINE.device.memory_bytes_per_s.value)
    assert found.expert_s > 26 * 5.2 * item
    assert found.expert_s < 26 * 16 * item * 2


@pytest.mark.parametrize(
    "name", [name for name in EP_PRESETS if load_ep_preset(name).placement.policy not in NEEDS_TOKENS]
)
def test_more_tokens_never_take_less_time_and_nothing_jumps(name: str) -> None:
    times = [predict(UNIFORM, tokens, name).expert_s for tokens in range(1, 13)]
    for before, after in itertools.pairwise(times):
        assert before <= after * (1 + 1e-6)
        assert after <= 2.0 * before


@settings(max_examples=examples(8))
@given(
    st.integers(0, 10**6),
    st.floats(0.0, 0.3),
    st.sampled_from([1, 2]),
    st.sampled_from(["ep", "eplb", "tensor-parallel", "ppmoe", "parm"]),
)
def test_drawn_loads_take_no_less_time_with_more_tokens(seed: int, skew: float, nodes: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    counts = np.round(1e5 * np.exp(-skew * rng.permuted(np.tile(np.arange(64.0), (26, 1)), axis=1))).astype(np.int64)
    times = [predict(loads(counts), tokens, name, nodes) for tokens in (1, 2, 3, 5, 9, 40, 200)]
    for before, after in itertools.pairwise(times):
        assert before.step_s <= after.step_s * (1 + 1e-6)
        assert before.expert_s <= after.expert_s * (1 + 1e-6)


def test_dense_bits_count() -> None:
    whole, packed = (predict(UNIFORM, 1, dense_bits=bits) for bits in ("32", "16"))
    assert whole.compute_s - whole.expert_s > 1.2 * (packed.compute_s - packed.expert_s)
    assert whole.expert_s == packed.expert_s
