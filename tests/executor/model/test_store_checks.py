"""What a file of experts notices: any wrong word, pages that have changed places; and what a single token's layer step is."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.executor.model.loading.store import checksum
from moeplan.executor.model.passes import NO_GUESSES, LivePass
from moeplan.sim.offload.layer_steps import gather_layer_steps

_PAGE = 4096


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(1, 40_000), st.data())
def test_one_wrong_byte_is_noticed_wherever_it_is(size: int, data: st.DataObject) -> None:
    right = torch.from_numpy(np.random.default_rng(size).integers(0, 256, size, np.uint8))
    wrong = right.clone()
    wrong[data.draw(st.integers(0, size - 1))] ^= data.draw(st.integers(1, 255))
    assert checksum(right) == checksum(right.clone())
    assert checksum(right) != checksum(wrong)


@settings(max_examples=examples(20), deadline=None)
@given(st.integers(2, 40), st.data())
def test_pages_that_have_changed_places_are_noticed(pages: int, data: st.DataObject) -> None:
    right = np.random.default_rng(pages).integers(0, 256, (pages, _PAGE), np.uint8)
    one, other = data.draw(st.lists(st.integers(0, pages - 1), min_size=2, max_size=2, unique=True))
    wrong = right.copy()
    wrong[[one, other]] = right[[other, one]]
    assert checksum(torch.from_numpy(right.ravel())) != checksum(torch.from_numpy(wrong.ravel()))


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(2, 300), st.data())
def test_a_single_token_s_layer_step_is_what_the_general_way_finds(experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, min(8, experts)))
    ids = np.array([data.draw(st.lists(st.integers(0, experts - 1), min_size=top_k, max_size=top_k, unique=True))])
    live = LivePass(
        num_tokens=1, num_columns=2, num_experts=experts, top_k=top_k, guesses=NO_GUESSES, first_layer_step=0, phase=1, first=True,
        reset=False,
    )  # fmt: skip
    for column in range(2):
        live.know(column, ids, np.ones((1, top_k)))
    start, expert, tokens, touch, rank = gather_layer_steps(
        live.experts, live.steps.step_start, live.steps.step_token, experts
    )
    assert live.steps.layer_step_start.tolist() == start.tolist()
    for mine, general in (
        (live.steps.layer_step_expert, expert), (live.steps.layer_step_tokens, tokens), (live.steps.layer_step_touch, touch),
        (live.steps.layer_step_rank, rank),
    ):  # fmt: skip
        assert mine[: start[-1]].tolist() == general.tolist()
