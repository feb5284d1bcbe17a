"""What is taken where nothing is said has one place: every way to ask takes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplan
from long_runs import examples
from moeplan.base.errors import DoesNotFit
from moeplan.calibrate.imports.bench_line import BenchLine
from moeplan.diagnosis.calls.read import read_command
from moeplan.diagnosis.origin import Asked, case_of_call
from moeplan.papers.field.rows import Report
from moeplan.papers.field.setup import set_up
from moeplan.planner.parallel.case import ParallelRequest
from moeplan.planner.parallel.latency import chunk_of
from moeplan.specs.machines.engines import LARGE_CARD_BYTES, load_engine, prompt_chunk_on
from moeplan.specs.machines.serving import serving_machine
from moeplan.specs.schedules.parallel import load_ep_preset

REST = "epyc-9654 + ddr5-4800x12:768GiB"
COMMANDS = {
    "vllm": "vllm serve Qwen/Qwen3-30B-A3B", "sglang": "python -m sglang.launch_server --model-path Qwen/Qwen3-30B-A3B",
    "llama.cpp": "llama-server -m qwen3-30b-a3b-Q4_K_M.gguf -ngl 99",
    "ktransformers": "python -m sglang.launch_server --model Qwen/Qwen3-30B-A3B --kt-num-gpu-experts 128",
}  # fmt: skip


@given(
    st.sampled_from(sorted(COMMANDS)),
    st.sampled_from(("rtx-5090", "l40s", "h100-sxm5-80gb", "b200-sxm", "a100-pcie-40gb")),
)
@settings(max_examples=examples(6), deadline=None)
def test_prompts_are_cut_alike_whoever_asks(engine: str, card: str) -> None:
    hardware = f"{card} + {REST}"
    machine = moeplan.load_machine(hardware, engine=engine)
    large = machine.device.memory_bytes.value >= LARGE_CARD_BYTES
    wanted = load_engine(engine).prompt_chunks[int(large)]
    assert prompt_chunk_on(machine) == wanted
    quant = "Q4_K_M" if load_engine(engine).gguf else "FP8"
    try:
        told = moeplan.simulate("qwen3-30b-a3b", hardware, engine=engine, quant=quant, prompt_tokens=64, reply_tokens=2)
    except DoesNotFit:
        return
    assert told.schedule.workload.prefill_chunk_tokens == wanted
    assert (
        case_of_call(read_command(COMMANDS[engine]), Asked(model="qwen3-30b-a3b", hardware=hardware)).ubatch == wanted
    )
    row = {
        "id": "x", "model": "qwen3-30b-a3b", "quant": {"experts": quant, "dense": quant},
        "gpus": [{"name": card, "count": 1}], "host": {}, "engine": {"name": engine, "backend": "cuda"}, "placement": {"kind": "gpu"},
        "workload": {"prompt_tokens": 3 * wanted, "context_tokens": 3 * wanted, "batch": 1}, "metric": "prefill_tokens_per_s", "value": 1.0,
    }  # fmt: skip
    assert set_up(Report(id="x", row=row, folder=Path())).trace.num_tokens == wanted


def test_lines_that_do_not_say_how_prompts_are_cut_leave_it_to_the_engine() -> None:
    assert (
        BenchLine(where="x", test="pp512", prompt_tokens=512, generated_tokens=0, tokens_per_s=1.0).ubatch_tokens
        is None
    )


def test_servers_that_mix_prompts_in_cut_them_as_their_engine_does() -> None:
    machine = serving_machine(moeplan.load_machine("h200-sxm"), "vllm")
    assert chunk_of(machine, load_ep_preset("ep"), 8) == load_engine("vllm").prompt_chunks[1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("CUDA_VISIBLE_DEVICES=1,0 llama-server -m a.gguf", "CUDA_VISIBLE_DEVICES=1,0 llama-server -m a.gguf"),
        ("sudo env OLLAMA_CONTEXT_LENGTH=8192 ollama run qwen3:30b", "OLLAMA_CONTEXT_LENGTH=8192 ollama run qwen3:30b"),
        ("HF_TOKEN=abc NAME='a b' vllm serve m", "NAME='a b' vllm serve m"),
        ("numactl -N 0 llama-cli -m a.gguf", "llama-cli -m a.gguf"),
    ],
)
def test_a_command_is_shown_with_the_variables_before_it(text: str, shown: str) -> None:
    assert read_command(text).text == shown


@given(st.integers(4096, 131072), st.booleans())
@settings(max_examples=examples(4), deadline=None)
def test_the_usual_batch_gives_way_and_an_asked_one_does_not(context: int, prefill: bool) -> None:
    def ask(**options: int) -> moeplan.ParallelResult:
        request = ParallelRequest(context_tokens=context, prefill=prefill, **options)
        return moeplan.simulate_parallel("deepseek-v3", "h200-sxm", request=request)

    found = ask()
    usual, taken = found.answer.request.usual_tokens, found.answer.request.tokens_per_rank
    if taken is None:
        assert found.answer.largest_tokens_per_rank >= usual
        return
    assert taken == found.answer.largest_tokens_per_rank < usual
    assert any(f"{taken:,} are taken" in note for note in found.answer.notes)
    with pytest.raises(DoesNotFit):
        ask(tokens_per_rank=usual)
