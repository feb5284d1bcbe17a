"""One prediction by two doors: several cards of one box (`simulate`) and ranks of one server (`simulate --mode ep`), same configuration."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplan
from long_runs import examples
from moeplan.planner.parallel.case import ParallelRequest

REST = "2 x epyc-9654 + ddr5-4800x24:1536GiB"
CARDS = {"h100-sxm": "h100-sxm5-80gb", "h200-sxm": "h200-sxm", "b200-sxm": "b200-sxm", "a100-80gb-sxm": "a100-sxm4-80gb",
         "h20-141gb": "h20-141gb", "mi300x": "mi300x"}  # fmt: skip
"""Servers by their names, and the card of each."""
APART = 0.1
"""Of two predictions of one step: experts are asked for one by one behind one door and all at once behind the other, where waves are not
full (3 % at most in steps of one request); tokens of a batch are drawn here and expected there, where more experts are chosen (up to 9 %
of a batch of 24). Forty drawn by hand: 2 % in the middle."""


@st.composite
def configurations(draw: st.DrawFn) -> tuple[str, str, int, str, int, int]:
    """Return (model, server, cards, engine, requests, prompt tokens) that fit."""
    model = draw(st.sampled_from(("qwen3-30b-a3b", "gpt-oss-120b", "glm-4.5-air", "qwen3-235b-a22b", "deepseek-v3")))
    servers = sorted(CARDS) if model != "deepseek-v3" else ["b200-sxm", "h20-141gb", "h200-sxm"]
    server = draw(st.sampled_from(servers))
    few = {"qwen3-30b-a3b": (2, 4), "deepseek-v3": (8,), "qwen3-235b-a22b": (8,)}.get(model, (4, 8))
    engine = draw(st.sampled_from(("vllm", "sglang", *(("tensorrt-llm",) if server != "mi300x" else ()))))
    return (
        model,
        server,
        draw(st.sampled_from(few)),
        engine,
        draw(st.sampled_from((1, 2, 8, 24))),
        draw(st.sampled_from((256, 2048))),
    )


@given(configurations())
@settings(max_examples=examples(6), deadline=None)
def test_both_doors_say_the_same(asked: tuple[str, str, int, str, int, int]) -> None:
    model, server, count, engine, requests, prompt = asked
    box = moeplan.simulate(model, f"{count} x {CARDS[server]} + {REST}", engine=engine, prompt_tokens=prompt, reply_tokens=16,
                           concurrency=requests, split="tensor")  # fmt: skip
    request = ParallelRequest(
        ranks_per_node=count, attention_ranks=count, concurrency=requests, context_tokens=prompt + 8
    )
    ranks = moeplan.simulate_parallel(
        model, server, engine=engine, request=request, settings={"parallel.experts": "tensor"}
    )
    both = box.metrics.decode_tokens_per_s, ranks.answer.latency.tokens_per_s
    assert both[0] == pytest.approx(both[1], rel=APART)
    low, high = ranks.answer.interval_s
    assert low <= requests / both[0] <= high
