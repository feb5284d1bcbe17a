"""One expert-parallel configuration through the command line: what is printed, every preset and option, every kind of bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from moeplan.cli import main
from moeplan.specs.schedules.parallel import EP_PRESETS, PLACEMENTS
from moeplan.traces.format import save_profile
from moeplan.traces.recording import LoadProfile

ASKED = [
    "simulate",
    "--mode",
    "ep",
    "--model",
    "deepseek-v2-lite",
    "--hardware",
    "h800-sxm",
    "--nodes",
    "2",
    "--gpus-per-node",
    "4",
]
NEEDS_TOKENS = {"grace", "occult", "metro"}


@pytest.fixture
def moeplan(tmp_path, monkeypatch, capsys):
    """Return a call of the command line in a folder with loads, as an engine writes them and as a recording."""
    monkeypatch.chdir(tmp_path)
    popular = np.round(1e5 * np.exp(-0.05 * np.arange(64))).astype(np.int64)
    counts = np.stack([np.roll(popular, 7 * layer) for layer in range(26)])
    dense = np.zeros((1, 64), np.int64)
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": np.concatenate([dense, counts]).tolist()}))
    layers = tuple(range(1, 27))
    profile = LoadProfile(counts=counts, model="", layer_ids=layers, source="made up", licence="", top_k=6)
    save_profile(profile, tmp_path / "loads.safetensors")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeplan", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return call


def document(moeplan, *arguments: str) -> dict:
    status, out, err = moeplan(*ASKED, "--trace", "loads.json", "--json", *arguments)
    assert status == 0, err
    return json.loads(out)


def test_a_step_is_shown_with_its_parts_its_speeds_and_its_memory(moeplan) -> None:
    one = document(moeplan, "--schedule", "eplb", "--set", "placement.num_redundant=8")
    assert sum(one["parts_s"].values()) == pytest.approx(one["step_s"], rel=1e-12)
    assert one["step_tokens"] == 128 * 8
    assert one["tokens_per_s"] == pytest.approx(one["step_tokens"] / one["step_s"])
    assert one["tokens_per_s_per_gpu"] == pytest.approx(one["tokens_per_s"] / 8)
    assert one["tokens_per_s_per_user"] == pytest.approx(1 / one["step_s"])
    low, high = one["step_s_interval"]
    assert low < one["step_s"] < high
    assert one["memory"]["device_bytes"] == sum(item["bytes"] for item in one["memory"]["items"])
    assert one["largest_tokens_per_rank"] > 128
    status, out, _ = moeplan(
        *ASKED, "--trace", "loads.safetensors", "--schedule", "eplb", "--set", "placement.num_redundant=8"
    )
    assert status == 0
    for words in (
        "step",
        "speed",
        "routed experts",
        "dispatch",
        "balance",
        "expert weights",
        "kv cache",
        "batch",
        "assumed",
    ):
        assert words in out, words


@pytest.mark.parametrize("name", EP_PRESETS)
def test_every_preset_is_predicted_or_says_what_it_needs(moeplan, name: str) -> None:
    settings = ["--set", "placement.num_redundant=8"] if "redundant" in str(EP_PRESETS[name]().placement) else []
    if EP_PRESETS[name]().parallel.experts in ("tensor", "node"):
        settings = []
    status, out, err = moeplan(*ASKED, "--trace", "loads.json", "--json", "--schedule", name, *settings)
    if name in NEEDS_TOKENS:
        assert status == 2 and "routing of single tokens" in err
    else:
        assert status == 0, err
        assert json.loads(out)["name"] == name


@pytest.mark.parametrize("setting", [
    "placement.policy=eplb", "placement.policy=round-robin", "all_to_all.kind=hierarchical", "all_to_all.kind=all-choices",
    "all_to_all.dispatch_bytes_per_value=1", "all_to_all.combine_bytes_per_value=1", "pipeline.micro_batches=2", "kernel.choice=dense",
    "kernel.bits=8", "parallel.attention=tensor", "pipeline.shortcut=true",
])  # fmt: skip
def test_options_change_the_step(moeplan, setting: str) -> None:
    assert document(moeplan, "--set", setting)["step_s"] != document(moeplan)["step_s"]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_that_share_attention_are_an_option(moeplan, ranks: int) -> None:
    few = ("--tokens-per-rank", "16")
    settings = ("--set", "parallel.attention=tensor", "--set", f"parallel.attention_ranks={ranks}")
    one, other = document(moeplan, *few, "--attention-tp", str(ranks)), document(moeplan, *few, *settings)
    assert one["step_s"] == other["step_s"] != document(moeplan, *few)["step_s"]
    assert one["schedule"] == other["schedule"]
    assert document(moeplan, *few, "--set", f"request.attention_ranks={ranks}")["step_s"] == one["step_s"]


def test_attention_that_is_not_shared_is_every_rank_for_itself(moeplan) -> None:
    assert document(moeplan, "--attention-tp", "1")["step_s"] == document(moeplan)["step_s"]


def test_lengths_say_what_is_timed_and_what_is_kept(moeplan) -> None:
    one = document(moeplan, "--prompt-tokens", "2000", "--reply-tokens", "1000")
    assert (one["request"]["context_tokens"], one["request"]["kept_context_tokens"]) == (2500, 3000)
    cache = next(item for item in one["memory"]["items"] if item["name"] == "kv cache")
    assert "128 requests of 3000 tokens" in cache["note"]
    half = document(moeplan, "--prompt-tokens", "2000", "--reply-tokens", "1000", "--kv-type", "fp8")
    assert next(item for item in half["memory"]["items"] if item["name"] == "kv cache")["bytes"] * 2 == cache["bytes"]
    few = document(moeplan, "--concurrency", "80")
    assert few["step_tokens"] == 80


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--schedule", "nonsense"], 2, "not one of"),
        (["--set", "placement.policy=nonsense"], 2, ", ".join(sorted(PLACEMENTS))[:20]),
        (["--set", "placement.num_redundant=3"], 2, "use 8"),
        (["--set", "cache.policy=lru"], 2, "not one of"),
        (
            ["--schedule", "tensor-parallel", "--set", "pipeline.split=expert"],
            2,
            "neither exchanged, grouped nor copied",
        ),
        (["--model", "deepseek-v3"], 2, "58"),
        (["--memory", "6GiB"], 3, "bytes are missing"),
        (["--tokens-per-rank", "100000"], 3, "bytes are missing"),
        (["--context", "10", "--prompt-tokens", "20"], 2, "a request has 20 tokens"),
        (["--concurrency", "8", "--tokens-per-rank", "8"], 2, "give one of the two"),
        (["--quant", "Q4_K_M"], 2, "counts for one device only"),
        (["--attention-tp", "3"], 2, "groups of 3"),
        (["--attention-tp", "2", "--set", "parallel.attention=data"], 2, "--attention-tp says it already"),
        (["--attention-tp", "2", "--set", "request.attention_ranks=4"], 2, "--attention-tp says it already"),
        (["--context", "9", "--set", "request.context_tokens=7"], 2, "--context says it already"),
    ],
)
def test_bad_input_is_one_line(moeplan, arguments: list[str], status: int, said: str) -> None:
    found, out, err = moeplan(*ASKED, "--trace", "loads.json", *arguments)
    assert found == status and out == "", err
    assert said in err and len(err.splitlines()) == 1


def test_loads_of_another_kind_of_file_are_refused(moeplan, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    status, _, err = moeplan(*ASKED, "--trace", "other.json")
    assert status == 2 and "logical_count" in err and len(err.splitlines()) == 1


def test_without_a_recording_loads_are_like_published_ones(moeplan) -> None:
    status, out, err = moeplan(*ASKED, "--json")
    assert status == 0, err
    shown = json.loads(out)
    assert shown["trace"].startswith("no recording") and any("no recording" in note for note in shown["assumptions"])
    prompts = json.loads(moeplan(*ASKED, "--json", "--phase", "prefill")[1])
    assert "prefill" in prompts["trace"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--evaluate-on", "loads.json"], "--trace = '(absent)': --evaluate-on is served by what was placed for it"),
        (["--period", "loads.json"], "--trace = '(absent)': --period is served by what was placed for it"),
        (["--search-moves", "100"], "--search-moves = 100: no placement is searched from counts alone"),
    ],
)
def test_what_needs_a_recording_says_so(moeplan, more: list[str], said: str) -> None:
    status, out, err = moeplan("plan", *ASKED[1:], *more, "-o", "ep.json")
    assert status == 2 and said in err and not out and not Path("ep.json").exists()


def test_a_plan_without_a_recording_is_reported_and_emitted_for_its_engine(moeplan, tmp_path: Path) -> None:
    status, _, err = moeplan("plan", *ASKED[1:], "--for", "vllm", "-o", "ep.json")
    assert status == 0, err
    assert (
        moeplan("report", "ep.json", "-o", "ep.html")[0] == 0 and "no recording" in (tmp_path / "ep.html").read_text()
    )
    status, out, err = moeplan("emit", "ep.json", "-o", "emitted", "--json")
    assert status == 0 and json.loads(out)["target"] == "vllm", err
    assert moeplan("plan", *ASKED[1:], "--trace", "loads.json", "-o", "ep.json")[0] == 0
    for command, option in (("report", "--trace"), ("emit", "--for")):
        status, _, err = moeplan(command, "ep.json", "-o", "other")
        assert status == 2 and f"{option} = '(absent)'" in err and not (tmp_path / "other").exists()
    status, _, err = moeplan("report", "ep.json", "--trace", "loads.safetensors", "-o", "other")
    assert status == 2 and "another recording" in err
