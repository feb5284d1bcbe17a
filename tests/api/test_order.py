"""Answers that physics orders come in that order, by the front door, whatever the engine."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplan
from long_runs import examples
from moeplan.base.errors import DoesNotFit
from moeplan.specs.machines.bundled_kernels import kernel_machines
from moeplan.specs.machines.compose import compose_text
from moeplan.specs.machines.engines import engines
from moeplan.specs.machines.siblings import servers

ENGINES = sorted(name for name, one in engines().items() if "cuda" in one.backends)
REST = "ryzen-9-7950x + ddr5-{ddr}x2:192GiB"


def card(bandwidth: int, flops: int, memory: int, ddr: int) -> str:
    return f"card:memory={memory}GiB,bandwidth={bandwidth}GB/s,fp16={flops}TFLOPS + " + REST.format(ddr=ddr)


def speeds(hardware: str, **asked: Any) -> tuple[float, float]:
    found = moeplan.simulate("olmoe-1b-7b", hardware, **asked).metrics
    low, high = found.decode_tokens_per_s_interval
    assert low <= found.decode_tokens_per_s <= high
    return found.decode_tokens_per_s, found.prefill_tokens_per_s


@given(st.sampled_from(ENGINES), st.tuples(st.sampled_from((300, 1000, 2000)), st.sampled_from((60, 200)), st.sampled_from((4, 24)),
                                           st.sampled_from((4800, 5600))), st.integers(0, 3), st.sampled_from((1, 6)))  # fmt: skip
@settings(max_examples=examples(8), deadline=None)
def test_more_of_a_machine_is_never_slower(
    engine: str, sizes: tuple[int, int, int, int], which: int, requests: int
) -> None:
    quant = "Q6_K" if engines()[engine].gguf else None
    asked = {"engine": engine, "quant": quant, "prompt_tokens": 48, "reply_tokens": 4, "concurrency": requests}
    more = list(sizes)
    more[which] = (sizes[which] * 3 // 2, sizes[which] * 3 // 2, 2 * sizes[which], 6400)[which]
    try:
        before = speeds(card(*sizes), **asked)
    except DoesNotFit:
        return
    after = speeds(card(*more), **asked)
    assert all(b >= a * 0.999 for a, b in zip(before, after, strict=True))
    if quant is not None:
        assert speeds(card(*sizes), **{**asked, "quant": "Q4_K_M"})[0] >= before[0] * 0.999


@given(st.sampled_from([name for name in ENGINES if engines()[name].matvec_tokens == 1 and engines()[name].launches == "graph"]),
       st.sampled_from(("rtx-3060", "rtx-4090", "l40s")), st.sampled_from((1, 2, 4, 8)))  # fmt: skip
@settings(max_examples=examples(6), deadline=None)
def test_more_requests_together_never_lower_what_all_get(engine: str, name: str, requests: int) -> None:
    asked = {"engine": engine, "prompt_tokens": 48, "reply_tokens": 8, "memory": "11GiB", "quant": "FP8"}
    few, many = (
        moeplan.simulate("olmoe-1b-7b", f"{name} + {REST.format(ddr=5600)}", concurrency=count, **asked)
        for count in (requests, 2 * requests)
    )
    assert many.metrics.decode_tokens_per_s >= few.metrics.decode_tokens_per_s * 0.99


@pytest.mark.parametrize("name", sorted(set(servers()) - set(kernel_machines())))
def test_a_card_made_like_another_reads_in_proportion_to_its_data_sheet(name: str) -> None:
    like = servers()[name].get("as")
    if like is None or like not in ("b200-sxm", "h200-sxm"):
        return
    mine, other = (compose_text(f"{one} + epyc-9654", "vllm") for one in (name, like))
    ratio = mine.device.memory_bytes_per_s.value / other.device.memory_bytes_per_s.value
    assert mine.kernels is not None and other.kernels is not None
    for key, kernel in mine.kernels.experts.items():
        assert kernel.bytes_per_s == pytest.approx(other.kernels.experts[key].bytes_per_s * ratio)


def test_layers_off_several_cards_are_answered() -> None:
    box = "2 x card:memory=6GiB,bandwidth=500GB/s,fp16=60TFLOPS + " + REST.format(ddr=5600)
    found = moeplan.simulate("qwen3-30b-a3b", box, engine="ollama", quant="Q4_K_M", prompt_tokens=32, reply_tokens=4)
    assert found.metrics.decode_tokens_per_s > 0
