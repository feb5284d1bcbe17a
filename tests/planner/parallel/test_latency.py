"""What users of a cluster wait for: prompts beside decoding, limits, and the largest batch that keeps them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moeplan.base.errors import OutOfReach
from moeplan.planner.parallel.case import ParallelRequest, plain_schedule
from moeplan.planner.parallel.latency import CHUNK_TOKENS
from moeplan.planner.parallel.plan import make_ep_plan
from moeplan.planner.parallel.simulate import ParallelAnswer, answer_ep
from moeplan.specs.machines.serving import load_server, serving_machine
from moeplan.specs.models.load import load_model
from moeplan.traces.recording import LoadProfile

MODEL = load_model("deepseek-v2-lite")
MACHINE = serving_machine(load_server("h200"), "sglang")
LOADS = LoadProfile(
    counts=np.random.default_rng(3).integers(50, 900, (26, 64)), model="", source="made up", layer_ids=tuple(range(1, 27)), licence="",
    top_k=6,
)  # fmt: skip
ASKED = ParallelRequest(ranks_per_node=4, tokens_per_rank=32, context_tokens=2048)


def answer(**changes: object) -> ParallelAnswer:
    return answer_ep(MODEL, MACHINE, LOADS, dataclasses.replace(ASKED, **changes), plain_schedule("16"))  # type: ignore[arg-type]


def test_prompts_beside_decoding_take_their_time() -> None:
    plain, mixed = answer(), answer(prefill_share=0.8, prompt_tokens=2000)
    assert plain.latency.tpot_s == plain.prediction.step_s and plain.latency.ttft_s is None
    # Four prompt tokens come in with every generated one: 32 x 4 x 4 of a step of 8192 on each of four ranks.
    steps = 32 * 4 * 4 / (CHUNK_TOKENS * 4)
    assert mixed.latency.prompt_step_s is not None
    whole = mixed.prediction.step_s + steps * mixed.latency.prompt_step_s
    assert mixed.latency.tpot_s == pytest.approx(whole)
    assert mixed.latency.tokens_per_s == pytest.approx(32 * 4 / whole)
    assert mixed.latency.ttft_s == pytest.approx(mixed.latency.prompt_step_s + mixed.prediction.step_s)
    alone = answer(prefill=True, tokens_per_rank=CHUNK_TOKENS, context_tokens=2000)
    assert mixed.latency.prompt_step_s == pytest.approx(alone.prediction.step_s)


def test_a_long_prompt_takes_several_passes_to_its_first_token() -> None:
    long = answer(prefill=True, tokens_per_rank=1024, context_tokens=4096)
    assert long.latency.ttft_s == pytest.approx(4 * long.prediction.step_s)


def test_the_largest_batch_within_a_limit_keeps_it_and_a_larger_one_does_not() -> None:
    limit = 1.3 * answer().prediction.step_s
    most = answer(tpot_s=limit).latency.largest_within
    assert most is not None and most > 32
    assert answer(tokens_per_rank=most).prediction.step_s <= limit
    assert answer(tokens_per_rank=most + max(2, most // 32)).prediction.step_s > limit
    assert answer(tpot_s=1e-6).latency.largest_within == 0
    assert "--tpot" in answer(tpot_s=1e-6).latency.misses(dataclasses.replace(ASKED, tpot_s=1e-6))


def test_a_plan_takes_the_batch_that_a_limit_leaves_or_says_that_none_keeps_it() -> None:
    asked = dataclasses.replace(ASKED, num_redundant=0)
    limit = 1.2 * answer().prediction.step_s
    found = make_ep_plan(MODEL, MACHINE, LOADS, dataclasses.replace(asked, tokens_per_rank=None, tpot_s=limit))
    assert found.latency.tpot_s is not None and found.latency.tpot_s <= limit
    assert found.request.tokens_per_rank is not None and found.request.tokens_per_rank > 32
    with pytest.raises(OutOfReach, match="no schedule found keeps the limits"):
        make_ep_plan(MODEL, MACHINE, LOADS, dataclasses.replace(asked, tpot_s=1e-4))
