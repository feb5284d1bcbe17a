"""One token's choices and guesses, written by compiled loops, are what many tokens' are, written by whole arrays."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.executor.model.passes import LivePass, note_row
from moeplan.sim.offload.workload import guess_scores
from moeplan.traces.recording import DECODE


def a_pass(tokens: int, experts: int, top_k: int, guesses: tuple[int, int]) -> LivePass:
    return LivePass(
        num_tokens=tokens, num_columns=3, num_experts=experts, top_k=top_k, guesses=guesses, first_layer_step=0, phase=DECODE,
        first=False, reset=False,
    )  # fmt: skip


def test_every_probability_of_half_precision_scores_alike() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    halves = bits.view(np.float16)[None]
    ids, kept, scores = (np.zeros((1, 1, 1, bits.size), kind) for kind in (np.int16, np.uint16, np.int16))
    note_row(ids, kept, scores, 0, 0, np.zeros((1, bits.size), np.int16), bits[None])
    with np.errstate(all="ignore"):  # some of them are signalling NaN
        wanted = guess_scores(halves)
    assert np.array_equal(scores[0, 0], wanted) and np.array_equal(kept[0, 0, 0], bits)


@settings(max_examples=examples(60))
@given(st.data())
def test_a_token_alone_is_noted_as_among_others(data: st.DataObject) -> None:
    experts = data.draw(st.integers(2, 70))
    top_k = data.draw(st.integers(1, min(8, experts)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    one, two = a_pass(1, experts, top_k, (2, 3)), a_pass(2, experts, top_k, (2, 3))
    for column in range(3):
        ids = rng.permutation(experts)[None, :top_k]
        weights = rng.random((1, top_k), np.float32)
        one.know(column, ids, weights)
        two.know(column, ids.repeat(2, 0), weights.repeat(2, 0))
        guessed = rng.integers(0, experts, (1, 3)).astype(np.int16)
        chances = rng.random((1, 3)).astype(np.float16)
        one.guess(column, 2, guessed, chances)
        two.guess(column, 2, guessed.repeat(2, 0), chances.repeat(2, 0))
        assert [2 * row for row in one.offsets(column)] == two.offsets(column)
    for name in ("experts", "weights", "predicted", "probability"):
        assert np.array_equal(getattr(one, name)[0], getattr(two, name)[0]), name
    assert np.array_equal(one.steps.predicted_prob[0], two.steps.predicted_prob[0])
    starts = one.steps.layer_step_start
    assert np.array_equal(starts, two.steps.layer_step_start)
    for column in range(3):
        mine = slice(starts[column], starts[column + 1])
        order = [np.argsort(each.steps.layer_step_expert[mine]) for each in (one, two)]
        for name, times in (("expert", 1), ("tokens", 2), ("rank", 1)):
            alone, among = (
                getattr(each.steps, f"layer_step_{name}")[mine][at] for each, at in zip((one, two), order, strict=True)
            )
            assert np.array_equal(times * alone, among), name
