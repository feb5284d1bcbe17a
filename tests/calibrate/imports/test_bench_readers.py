"""Readers of llama-bench's and vllm's output, on files as the tools write them, and on what is left of such files."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench_writers import FORMATS, as_csv, as_json, as_jsonl, as_markdown, entry, latency, latency_records, serve
from long_runs import examples
from moeplan.base.errors import InputError
from moeplan.calibrate.imports.bench_line import BenchLine
from moeplan.calibrate.imports.llama_bench import read_llama_bench
from moeplan.calibrate.imports.vllm_bench import Lengths, read_vllm_bench

TESTS = (
    {"prompt": 512, "speed": 5200.0}, {"gen": 128, "speed": 190.0}, {"prompt": 2048, "depth": 8192, "speed": 4100.25},
    {"gen": 32, "depth": 4096, "speed": 160.5}, {"prompt": 512, "gen": 128, "speed": 815.0},
)  # fmt: skip
_LOG = "ggml_cuda_init: found 1 CUDA devices:\n  Device 0: NVIDIA GeForce RTX 4090, compute capability 8.9, VMM: yes\n"


def told(line: BenchLine) -> tuple[object, ...]:
    return line.test, line.prompt_tokens, line.generated_tokens, line.depth_tokens, line.tokens_per_s


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("before", ["", _LOG])
def test_every_format_says_the_same(form: str, before: str) -> None:
    entries = [entry(**test) for test in TESTS]
    entries += [entry(gen=128, speed=55.5, n_cpu_moe=12, model_type="gpt-oss 120B MXFP4 MoE", model_n_params=116829156672,
                      model_size=63387346464, build_commit="deadbeef")]  # fmt: skip
    extra = {"extra": ["n_cpu_moe", "n_ubatch"]} if form == "md" else {}
    lines = read_llama_bench(before + FORMATS[form](entries, **extra))
    assert [told(line) for line in lines[:-1]] == [
        (line.test, test.get("prompt", 0), test.get("gen", 0), test.get("depth", 0), test["speed"])
        for line, test in zip(lines, TESTS, strict=False)
    ]
    assert [line.test for line in lines] == ["pp512", "tg128", "pp2048 @ d8192", "tg32 @ d4096", "pp512+tg128", "tg128"]
    first, last = lines[0], lines[-1]
    assert (first.architecture, first.quant, first.backend, first.gpu_layers) == ("qwen3moe", "Q4_K_M", "cuda", 99)
    assert (last.architecture, last.quant, last.cpu_moe_layers) == ("gpt-oss", "MXFP4_MOE", 12)
    assert first.relative_deviation == pytest.approx(0.005)
    assert first.model_bytes == pytest.approx(18556688384, rel=1e-3)
    assert first.gpus == (() if form == "md" else ("NVIDIA GeForce RTX 4090",))


def test_two_outputs_in_one_file_are_both_read() -> None:
    one, other = [entry(prompt=512, speed=5000.0)], [entry(gen=128, speed=100.0)]
    for form in (as_csv, as_jsonl, as_markdown):
        assert [line.test for line in read_llama_bench(form(one) + form(other))] == ["pp512", "tg128"]


def test_ik_llama_cpp_and_old_columns() -> None:
    after = entry(prompt=4096, gen=64, speed=21.0, fused_moe=1, mla_attn=3, test="tg64@pp4096")
    after["avg_ns"] = str(int(1e9 * 64 / 21))
    (line,) = read_llama_bench(as_json([after]))
    assert told(line) == ("tg64 @ d4096", 0, 64, 4096, 21.0)
    assert line.engine == "ik_llama.cpp"
    old = {name: value for name, value in entry(gen=128, speed=30.0).items()
           if name not in ("backends", "n_depth", "n_cpu_moe", "devices", "n_ubatch", "type_k", "type_v")}  # fmt: skip
    (line,) = read_llama_bench(as_csv([old | {"cuda": "1", "vulkan": "0", "metal": "0", "blas": "1"}]))
    assert (line.backend, line.depth_tokens, line.cpu_moe_layers, line.kv_types) == ("cuda", 0, 0, ("f16", "f16"))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"backends": "CUDA,RPC"}, "RPC"), ({"backends": "SYCL"}, "back end"), ({"fit_target": 1024}, "-fitt"),
        ({"no_kv_offload": 1}, "-nkvo"), ({"gpu_info": "NVIDIA GeForce RTX 4090, NVIDIA GeForce RTX 4090"}, "several cards"),
    ],
)  # fmt: skip
def test_what_is_not_predicted_is_kept_with_its_reason(values: dict[str, object], reason: str) -> None:
    (line,) = read_llama_bench(as_json([entry(gen=128, **values)]))
    assert line.reason is not None
    assert reason in line.reason


def test_one_of_several_cards_can_have_been_chosen() -> None:
    two = "NVIDIA GeForce RTX 4090, NVIDIA GeForce RTX 3090"
    (line,) = read_llama_bench(as_json([entry(gen=128, gpu_info=two, devices="CUDA1")]))
    assert (line.reason, line.gpus) == (None, ("NVIDIA GeForce RTX 3090",))


_NO_RUNS = (
    {"avg_ts": "0.000000"}, {"avg_ts": "-12.000000"}, {"avg_ts": "nan"}, {"avg_ts": "inf"}, {"n_gen": "999999999999"},
    {"n_depth": str(1 << 40), "n_gen": "128"}, {"model_size": "1" + "0" * 18}, {"stddev_ts": "nan"}, {"n_gen": "0"},
)  # fmt: skip
_NO_RUNS_BUT_IN_TABLES = ({"avg_ts": "1e300"}, {"n_gen": "-128"})


@pytest.mark.parametrize(
    ("form", "values"),
    [(form, values) for form in FORMATS for values in _NO_RUNS + (() if form == "md" else _NO_RUNS_BUT_IN_TABLES)],
)
def test_figures_of_no_run_are_refused(form: str, values: dict[str, str]) -> None:
    damaged = entry(gen=128, speed=100.0) | values
    with pytest.raises(InputError) as error:
        read_llama_bench(FORMATS[form]([entry(prompt=512, speed=5000.0), damaged]))
    assert "\n" not in str(error.value)


def test_times_and_speeds_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InputError, match="another speed"):
        read_llama_bench(as_json([entry(gen=128, speed=100.0) | {"avg_ts": "400.0"}]))


@pytest.mark.parametrize("name", ["model_type", "n_prompt", "n_gen", "avg_ts"])
def test_a_missing_column_is_named(name: str) -> None:
    rows = [{key: value for key, value in entry(gen=128).items() if key != name}]
    with pytest.raises(InputError, match=name):
        read_llama_bench(as_csv(rows))


@pytest.mark.parametrize(
    "text", ["", "\n \n", "[]", "{}", "hello", "[1, 2]", '{"a": 1}', "|", "| model |\n", "build_commit,avg_ts\n"]
)
def test_files_of_something_else_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        read_llama_bench(text)
    with pytest.raises(InputError):
        read_vllm_bench(text)


@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 3000), st.integers(0, 40))
@settings(max_examples=examples(60))
def test_a_truncated_file_is_refused_or_is_a_shorter_one(form: str, end: int, dropped: int) -> None:
    whole = FORMATS[form]([entry(**test) for test in TESTS])
    text = whole[:end] + whole[end + dropped :]
    try:
        lines = read_llama_bench(text)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert len(lines) <= len(TESTS)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)),
       st.sampled_from(sorted(entry())), st.sampled_from(sorted(serve())))  # fmt: skip
@settings(max_examples=examples(60))
def test_any_value_in_any_field_is_read_or_refused(value: object, name: str, other: str) -> None:
    one = json.loads(as_json([entry(gen=128)]))[0]
    for read, document in ((read_llama_bench, [one | {name: value}]), (read_vllm_bench, serve() | {other: value})):
        try:
            read(json.dumps(document))
        except InputError as error:
            assert "\n" not in str(error)


# --- vllm ----------------------------------------------------------------------------------------------------------------


def test_a_busy_server_gives_its_rate_and_that_of_decoding() -> None:
    whole, between = read_vllm_bench(
        json.dumps(serve(prompt=1000, reply=200, concurrency=16, itl_ms=20.0, rate=8000.0))
    )
    assert (whole.requests, whole.prompt_tokens, whole.generated_tokens) == (16, 16000, 16 * 199)
    assert whole.tokens_per_s == pytest.approx(8000 * 1199 / 1200)
    assert (between.generated_tokens, between.depth_tokens, between.tokens_per_s) == (16 * 199, 1000, 16 * 1000 / 20)
    assert (whole.engine, whole.model) == ("vllm", "Qwen/Qwen3-30B-A3B")


def test_one_request_at_a_time_gives_prompt_and_decoding_apart() -> None:
    prompt, decode = read_vllm_bench(json.dumps(serve(concurrency=1, prompt=1024, ttft_ms=64.0, itl_ms=8.0)))
    assert (prompt.prompt_tokens, prompt.generated_tokens, prompt.tokens_per_s) == (1024, 0, 16000.0)
    assert (decode.prompt_tokens, decode.depth_tokens, decode.tokens_per_s) == (0, 1024, 125.0)


def test_appended_results_and_formats_in_names() -> None:
    text = json.dumps(serve()) + "\n" + json.dumps(serve(model="Qwen/Qwen3-30B-A3B-FP8"))
    lines = read_vllm_bench(text)
    assert [line.quant for line in lines] == [None, None, "FP8", "FP8"]


def test_latency_takes_lengths_from_the_command_line_or_the_records() -> None:
    seconds = [2.0, 2.1, 1.9]
    given_lengths = Lengths(prompt_tokens=32, reply_tokens=128, requests=8)
    (plain,) = read_vllm_bench(latency(seconds), given_lengths)
    (stated,) = read_vllm_bench(latency_records(seconds))
    assert told(plain) == told(stated)
    assert plain.tokens_per_s == pytest.approx(8 * (32 + 127) / 2.0)
    with pytest.raises(InputError, match="--prompt-tokens"):
        read_vllm_bench(latency(seconds))
    with pytest.raises(InputError, match="the file says 32"):
        read_vllm_bench(latency_records(seconds), Lengths(prompt_tokens=64))
    (cards,) = read_vllm_bench(latency_records(seconds, tensor_parallel_size=2))
    assert cards.reason == "several cards took part"


@pytest.mark.parametrize(
    "values",
    [
        {"total_token_throughput": 0.0}, {"total_token_throughput": -1.0}, {"duration": float("nan")}, {"completed": 0}, {"failed": 3},
        {"total_output_tokens": None}, {"total_token_throughput": 1e6}, {"total_input_tokens": 10**14},
        {"max_concurrency": None, "completed": 5000},
    ],
)  # fmt: skip
def test_results_of_no_run_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(InputError):
        read_vllm_bench(json.dumps(serve() | values))


def test_arriving_requests_are_kept_with_the_reason() -> None:
    (line,) = read_vllm_bench(json.dumps(serve(request_rate=4.0)))
    assert line.reason is not None
