"""Serving engines fill a share of a card where nobody says how much."""

import dataclasses

import pytest

import moeplan
from moeplan.api.parallel import simulate_parallel
from moeplan.api.subject import open_subject, rank_budget
from moeplan.base.errors import DoesNotFit
from moeplan.specs.machines.engines import SERVED_SHARE, engines
from moeplan.specs.machines.serving import load_server

BOX = "2 x rtx-3090 + ryzen-9-7950x + ddr5-6000x2:96GiB"


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tensorrt-llm", "llama.cpp"])
def test_a_card_is_filled_as_its_engine_fills_it(engine: str) -> None:
    asked = {"model": "gpt-oss-20b", "engine": engine, "prompt_tokens": 16, "reply_tokens": 2}
    share = engines()[engine].memory_share
    one = open_subject(hardware=BOX.removeprefix("2 x "), **asked)  # type: ignore[arg-type]
    assert one.simulation.budget_bytes == int(share * 24 * 2**30)
    assert any("of the card, as" in note for note in one.notes) == (share < 1)
    two = open_subject(hardware=BOX, **asked).simulation  # type: ignore[arg-type]
    assert two.card_budgets == (int(share * 24 * 2**30),) * 2
    told = open_subject(hardware=BOX.removeprefix("2 x "), memory="23GiB", **asked)  # type: ignore[arg-type]
    assert told.simulation.budget_bytes == 23 * 2**30 and not any("of the card, as" in note for note in told.notes)


def test_what_fits_a_card_whole_may_not_fit_what_is_filled_of_it() -> None:
    request = moeplan.ParallelRequest(num_nodes=1, ranks_per_node=8, concurrency=8, context_tokens=600)
    settings = {"parallel.attention": "tensor"}
    with pytest.raises(DoesNotFit):
        simulate_parallel("deepseek-v3", "h100-sxm", request=request, schedule="tensor-parallel", settings=settings)
    whole = dataclasses.replace(request, memory_bytes=load_server("h100-sxm").memory_bytes)
    found = simulate_parallel("deepseek-v3", "h100-sxm", request=whole, schedule="tensor-parallel", settings=settings)
    assert not any("fill of themselves" in note for note in found.to_dict()["assumptions"])


def test_ranks_on_cores_have_all_of_the_memory() -> None:
    gpu = load_server("h100-sxm")
    assert rank_budget(None, None, None, gpu) == int(SERVED_SHARE * gpu.memory_bytes)
    cores = dataclasses.replace(gpu, device=dataclasses.replace(gpu.device, kind="cpu"))
    assert rank_budget(None, None, None, cores) is None
