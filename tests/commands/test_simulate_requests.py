"""`moeplan simulate` without a recording: machines of parts, engines, requests of given lengths."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from moeplan.api.subject import open_subject
from moeplan.cli import main
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import list_models, load_model

MACHINE = "rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    before, sys.argv = sys.argv, ["moeplan", *arguments]
    try:
        main()
    except SystemExit as stop:
        done = capsys.readouterr()
        return int(stop.code or 0), done.out, done.err
    finally:
        sys.argv = before
    raise AssertionError("main always exits")


def simulated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status, out, err = run(capsys, "simulate", "--json", *arguments)
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


BASE = ("--model", "qwen3-30b-a3b", "--quant", "Q4_K_M", "--hardware", MACHINE, "--engine", "llama.cpp", "--prompt-tokens", "600",
        "--reply-tokens", "8")  # fmt: skip


def test_everything_on_the_card_is_faster_than_experts_on_the_cores(capsys: pytest.CaptureFixture[str]) -> None:
    card, cores = simulated(capsys, *BASE), simulated(capsys, *BASE, "--schedule", "cpu-moe")
    assert card["name"] == "resident" and card["bytes_copied"] == 0
    assert card["decode_tokens_per_s"] > 2 * cores["decode_tokens_per_s"]
    # Two passes of a prompt copy every expert that is used; decoding copies none.
    assert cores["bytes_copied"] > 0.9 * 2 * 128 * 48 * 2.85e6 * 0.8 and cores["cpu_runs"] == 8 * 48 * 8
    for found in (card, cores):
        for name in ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "request_s"):
            low, high = found[f"{name}_interval"]
            assert low < found[name] < high
        assert found["engine"]["name"] == "llama.cpp" and "no recording" in found["routing"]


def test_decoding_is_no_faster_than_its_bytes_allow(capsys: pytest.CaptureFixture[str]) -> None:
    # 3.3 billion active parameters of about 4.8 bits cannot cross 1,008 GB/s faster than this.
    assert simulated(capsys, *BASE)["decode_tokens_per_s"] < 1008e9 / (3.0e9 * 4.5 / 8)


def test_context_is_in_memory_and_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    short, long = simulated(capsys, *BASE), simulated(capsys, *BASE, "--context", "32768")
    quarter = simulated(capsys, *BASE, "--context", "32768", "--kv-type", "q4_0")
    kv = [
        next(item["bytes"] for item in each["memory_breakdown"]["items"] if item["name"] == "kv cache")
        for each in (short, long, quarter)
    ]
    assert kv[0] < kv[2] < kv[1] and kv[1] / kv[2] == pytest.approx(32 / 9, rel=0.01)


def test_a_model_that_does_not_fit_runs_as_the_engine_would(capsys: pytest.CaptureFixture[str]) -> None:
    found = simulated(capsys, "--model", "gpt-oss-120b", "--quant", "MXFP4_MOE", "--hardware", MACHINE.replace("64GiB", "96GiB"),
                      "--prompt-tokens", "64", "--reply-tokens", "4")  # fmt: skip
    assert found["name"] == "n-cpu-moe" and 0 < found["hit_rate"] < 1


def test_what_a_card_cannot_hold_does_not_fit_an_engine_that_must_hold_it(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "simulate", "--model", "gpt-oss-120b", "--hardware", MACHINE, "--engine", "vllm")
    assert status == 3 and "missing" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--engine", "twin"), "--simulator compiled"), (("--engine", "lama.cpp"), "llama.cpp"), (("--quant", "Q4_K_X"), "--quant"),
        (("--kv-type", "q9"), "--kv-type"), (("--quant", "Q4_K_M", "--dense-bits", "8"), "--dense-bits"),
        (("--trace", "bundled", "--prompt-tokens", "99999999"), "--prompt-tokens"),
        (("--prompt-tokens", "0", "--reply-tokens", "0"), "token"),
        (("--context", "3"), "context"), (("--prompt-tokens", "40", "--cached-tokens", "40"), "--cached-tokens"),
        (("--requests", "60000", "--reply-tokens", "1000000"), "fewer or shorter"),
        (("--prompt-tokens", "510", "--reply-tokens", "3"), "512 tokens of context"), (("--context", "513"), "512 tokens of context"),
        (("--lengths", "absent.csv"), "absent.csv"), (("--length-spread", "2", "--lengths", "absent.csv"), "--length-spread"),
    ],
)  # fmt: skip
def test_contradictions_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    status, out, err = run(capsys, "simulate", "--model", "tiny-moe", "--hardware", "rtx-3060", *arguments)
    assert (status, out) == (2, "") and words in err and err.count("\n") == 1


def test_whole_machines_have_their_own_software(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "simulate", "--model", "tiny-moe", "--hardware", "t4.json", "--engine", "vllm")
    assert status == 2
    status, _, err = run(
        capsys, "simulate", "--model", "tiny-moe", "--hardware", "h800-sxm", "--trace", "bundled", "--engine", "vllm"
    )
    assert status in (0, 2) and "Traceback" not in err


def test_machine_and_engine_commands(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(
        capsys, "machine", "--gpu", "rtx-3090", "--cpu", "2 x epyc-9135", "--ram", "ddr5-6400x24:768GiB", "--json"
    )
    assert status == 0 and json.loads(out)["parts"] == "rtx-3090 + 2 x epyc-9135 + ddr5-6400x24:768GiB"
    assert "llama.cpp" in run(capsys, "engine", "list")[1]
    status, out, _ = run(capsys, "engine", "show", "ik_llama.cpp", "--json")
    constants = json.loads(out)["constants"]
    assert status == 0 and all(one["citation"] and one["value"] > 0 for one in constants)
    assert len(json.loads(run(capsys, "machine", "--list", "gpus", "--json")[1])["gpus"]) >= 40


@pytest.mark.parametrize("name", sorted(list_models()))
def test_everything_but_experts_is_as_the_checkpoint_stores_it(name: str) -> None:
    """Where nobody says, attention stored in 8 bits counts 8; a checkpoint of 32 bits is served in 16."""
    spec = load_model(name)
    expected = "16" if spec.native_dense_bits == "32" else spec.native_dense_bits
    found = open_subject(model=name, hardware="h100", engine="generic", prompt_tokens=1, reply_tokens=0)
    assert found.simulation.dense_format == weight_format(expected)
    wide = open_subject(
        model=name,
        hardware="h100",
        trace=None,
        prompt_tokens=1,
        reply_tokens=0,
        dense_bits="32",
    )
    assert wide.simulation.dense_format == weight_format("32")


SHORT = ("--model", "tiny-moe", "--hardware", "rtx-3060")


def test_a_cached_prefix_is_in_memory_but_not_computed(capsys: pytest.CaptureFixture[str]) -> None:
    whole = simulated(capsys, *SHORT, "--prompt-tokens", "400", "--reply-tokens", "4")
    cached = simulated(capsys, *SHORT, "--prompt-tokens", "400", "--reply-tokens", "4", "--cached-tokens", "300")
    assert (whole["num_tokens"], cached["num_tokens"]) == (404, 104)
    assert cached["ttft_s"] < whole["ttft_s"] and cached["decode_tokens_per_s"] == whole["decode_tokens_per_s"]
    assert cached["memory_breakdown"]["device_bytes"] <= whole["memory_breakdown"]["device_bytes"]


def test_requests_of_different_lengths_are_replayed_together(capsys: pytest.CaptureFixture[str]) -> None:
    found = simulated(
        capsys, *SHORT, "--prompt-tokens", "40", "--reply-tokens", "8", "--length-spread", "2", "--concurrency", "4"
    )
    assert "32 requests, prompts of" in found["routing"]
    assert found["requests_per_s"] == pytest.approx(32 / found["window_s"])
    low, high = found["requests_per_s_interval"]
    assert low < found["requests_per_s"] < high


def test_requests_are_put_together_from_a_recording(capsys: pytest.CaptureFixture[str]) -> None:
    found = simulated(
        capsys, *SHORT, "--trace", "bundled", "--prompt-tokens", "50", "--reply-tokens", "6", "--requests", "2"
    )
    assert found["num_tokens"] == 112 and "put together from segments" in found["routing"]
