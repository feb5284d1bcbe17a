"""Plans for llama.cpp: its own defaults among the rivals, never worse than doing nothing, flags that exist, and what can be promised."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.api.subject import open_subject
from moeplan.base.errors import InputError, UnknownName
from moeplan.base.terminal import print_plan
from moeplan.cli import main
from moeplan.planner.emit.engines.llamacpp_commands import BENCH, SERVER, check_served
from moeplan.planner.emit.targets import render
from moeplan.planner.offload import baselines
from moeplan.planner.served.difference import difference
from moeplan.planner.served.llamacpp import FIT_MARGIN_BYTES, LLAMA_CPP, setting
from moeplan.planner.served.setting import device_bytes
from moeplan.sim.offload.simulate import Simulation
from moeplan.specs.provenance import model_of

MACHINE = "rtx-3060 + ryzen-7-7700x + ddr5-5600x2:64GiB"
CASE = ("--model", "qwen3-30b-a3b", "--quant", "Q4_K_M", "--hardware", MACHINE)


def simulation(prompt: int = 600, reply: int = 8, memory: str | None = None, hardware: str = MACHINE) -> Simulation:
    return open_subject(
        model="qwen3-30b-a3b", quant="Q4_K_M", hardware=hardware, trace=None, prompt_tokens=prompt, reply_tokens=reply, memory=memory,
    ).simulation  # fmt: skip


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    before, sys.argv = sys.argv, ["moeplan", *arguments]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = before
    done = capsys.readouterr()
    return int(stop.value.code or 0), done.out, done.err


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a call that plans for llama.cpp in a folder of its own and returns the plan."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(baselines, "CHECKED_STEPS", 3)

    def plan(*more: str) -> dict[str, Any]:
        status, out, err = call(capsys, "plan", *CASE, "--for", "llama.cpp", "--json", *more)
        assert status == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    return plan


@given(memory=st.integers(3 * 2**30, 26 * 2**30))
@settings(max_examples=examples(12), deadline=None)
def test_fit_fills_whole_layers_from_the_front_and_leaves_its_margin(memory: int) -> None:
    this = simulation(hardware="rtx-5090 + ryzen-7-7700x + ddr5-5600x2:64GiB", memory=f"{memory}B")
    layers, each = this.trace.num_layers, this.trace.num_experts
    left_out: dict[str, str] = {}
    found = LLAMA_CPP.defaults(this, 1, None, left_out)
    if any("--fit" in name for name in left_out):
        assert device_bytes(this, setting(this, layers, 1, 512)) > memory - FIT_MARGIN_BYTES
        return
    fit = found[0]
    assert fit.fitted and fit.ubatch == 512 and device_bytes(this, fit) <= memory - FIT_MARGIN_BYTES
    if fit.host_layers == 0:
        assert fit.schedule.cache.experts_per_layer == each
        return
    more = setting(this, fit.host_layers - 1, 1, 512, front=True)
    assert device_bytes(this, more) > memory - FIT_MARGIN_BYTES
    room = memory - FIT_MARGIN_BYTES - device_bytes(this, fit)
    thirds = math.floor(3 * room / (each * this.expert_bytes(fit.schedule)))
    assert fit.part_of_layer == pytest.approx(min(thirds, 2) / 3)
    if fit.host_layers < layers:
        assert fit.schedule.cache.placement == "front"


@pytest.mark.parametrize("lengths", [("4000", "16"), ("20", "200")])
def test_a_plan_is_never_slower_than_doing_nothing_and_says_when_it_promises_nothing(
    planned: Any, lengths: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned("--prompt-tokens", lengths[0], "--reply-tokens", lengths[1])
    fit = next(one for one in plan["baselines"] if one["name"].startswith("--fit"))
    assert plan["best"]["request_s"] <= fit["request_s"]
    assert any(one["name"].startswith("--cpu-moe") for one in plan["baselines"])
    assert set(plan["baselines_that_do_not_fit"]) == {"-ngl 999 -ub 512"}
    assert all(plan["best"]["request_s"] <= one["request_s"] for one in plan["for"]["tried"])
    found = plan["for"]["difference"]
    if found is None:
        assert "nothing to set" in plan["verdict"]
    else:
        assert found["low"] < found["ratio"] < found["high"] and found["promised"] == (found["low"] > 1)
        assert ("no difference that this prediction can promise" in plan["verdict"]) == (not found["promised"])
        print_plan(plan, "plan.json")
        line = next(each for each in capsys.readouterr().out.splitlines() if each.lstrip().startswith("--fit"))
        # The table compares as the verdict does.
        assert (
            line.endswith(f"the best is {found['ratio']:5.2f} x as fast")
            and f"{found['ratio']:.2f} times" in plan["verdict"]
        )
    if lengths[0] == "4000":  # every micro-batch copies the experts anew: larger ones are the gain
        assert plan["for"]["setting"]["ubatch"] > 512 and found["promised"] and found["ratio"] > 1.3


def test_every_flag_is_in_its_program_and_the_speed_is_that_of_what_is_emitted(
    planned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned("--prompt-tokens", "1500", "--reply-tokens", "8", "--kv-type", "q8_0", "--context", "9000")
    status, out, err = call(capsys, "emit", "plan.json", "-o", "out", "--json")
    assert status == 0, err
    document = json.loads(out)
    chosen = plan["for"]["setting"]
    server = document["commands"]["llama-server.sh"].split()
    assert server[server.index("--n-cpu-moe") + 1] == str(chosen["host_layers"])
    assert server[server.index("--ubatch-size") + 1] == str(chosen["ubatch"])
    assert server[server.index("--ctx-size") + 1] == "9216" and server[server.index("--cache-type-v") + 1] == "q8_0"
    for name, text in document["commands"].items():
        table = SERVER if name == "llama-server.sh" else BENCH
        assert {word for word in text.split()[1:] if word.startswith("-")} <= set(table.flags)
    assert any(f"{plan['best']['request_s']:.3g}" in line for line in document["predicted"])
    assert any(line.startswith("--fit") for line in document["predicted"]) and 2 <= len(document["measure"]) <= 3
    schedule = plan["best"]["schedule"]
    host = 48 - schedule["cache"]["pooled_experts"] // 128
    assert (host, schedule["workload"]["prefill_chunk_tokens"]) == (chosen["host_layers"], chosen["ubatch"])
    files = dict(render(plan, "llamacpp", model_of(plan)).files)
    for old, new, error in (
        ("--ubatch-size", "--ubatchsize", UnknownName), ("--n-cpu-moe ", "--n-cpu-moe 1", InputError),
        ("llama-server", "lama-server", InputError), ("--cache-type-k q8_0", "--cache-type-k q8", UnknownName),
    ):  # fmt: skip
        with pytest.raises(error):
            check_served(files | {"llama-server.sh": files["llama-server.sh"].replace(old, new)})


def test_shared_errors_cancel_and_nothing_is_promised_of_equals() -> None:
    this = simulation(prompt=2000, reply=32)
    one, other = (setting(this, 30, 1, ubatch).schedule for ubatch in (2048, 512))
    same = difference(this, one, one, "request_s")
    assert same.ratio == 1 and not same.promised and not same.shares
    found = difference(this, one, other, "request_s")
    apart = [this.predict(each).metrics.request_s_interval for each in (one, other)]
    (low, high), (least, most) = ((ends or (0.0, 0.0)) for ends in apart)
    assert found.high / found.low < (most / low) / (least / high)
    assert found.promised and next(iter(found.shares)) == "the link"


def test_limits_and_least_memory_choose_among_settings(planned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ("--prompt-tokens", "600", "--reply-tokens", "8")
    free = planned(*lengths)["best"]
    small = planned(*lengths, "--objective", "least_memory", "--floor", "2")["best"]
    assert small["memory_breakdown"]["device_bytes"] < free["memory_breakdown"]["device_bytes"]
    status, _, err = call(capsys, "plan", *CASE, *lengths, "--for", "llama.cpp", "--tpot", "1us", "-o", "none.json")
    assert status == 3 and "comes nearest" in err.splitlines()[-1] and not Path("none.json").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--for", "llama.cpp", "--engine", "vllm"), "--engine = 'vllm': --for llama.cpp plans for llama.cpp"),
        (("--for", "lama.cpp"), "did you mean 'llama.cpp'?"),
        (("--for", "llama.cpp", "--bits", "4"), "use --quant"),
        (("--for", "llama.cpp", "--exhaustive"), "leave it out"),
        (("--for", "llama.cpp", "--memory", "1GiB"), "does not fit"),
    ],
)
def test_contradictions_are_one_line(
    more: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, "plan", *CASE, "--prompt-tokens", "64", "--reply-tokens", "4", *more)
    assert status == (3 if said == "does not fit" else 2) and said in err.splitlines()[-1]


def test_layers_are_counted_as_the_engine_counts_them(planned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The first layers of some models have no experts, and count all the same."""
    plan = planned("--model", "deepseek-v2-lite", "--memory", "6GiB",
                   "--prompt-tokens", "64", "--reply-tokens", "4")  # fmt: skip
    chosen = plan["for"]["setting"]
    assert chosen["host_layers"] and chosen["told_layers"] == chosen["host_layers"] + 1
    assert f"--n-cpu-moe {chosen['told_layers']} " in chosen["name"]
    _, out, _ = call(capsys, "emit", "plan.json", "-o", "out", "--json")
    assert f"--n-cpu-moe {chosen['told_layers']} " in json.loads(out)["commands"]["llama-server.sh"] + " "


def test_cores_alone_place_nothing(planned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned("--hardware", "ryzen-9-7950x + ddr5-6000x2:64GiB", "--prompt-tokens", "64", "--reply-tokens", "4")
    assert {one["host_layers"] for one in plan["for"]["tried"]} == {0}
    _, out, _ = call(capsys, "emit", "plan.json", "-o", "out", "--json")
    assert not any(flag in out for flag in ("--n-gpu-layers", "--n-cpu-moe"))


def test_a_host_too_small_is_said_with_what_it_lacks() -> None:
    refused: list[Any] = []
    found = LLAMA_CPP.settings(simulation(hardware="rtx-3060 + ryzen-7-7700x + ddr5-5600x2:4GiB"), 1, None, refused)
    assert not found and all(one.place == "host" and one.missing_bytes > 0 for one in refused)


def test_a_cache_type_that_the_engine_lacks_is_refused_before_any_search(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (("plan", *CASE, "--for", "llama.cpp"), ("fit", "--hardware", MACHINE)):
        status, _, said = call(capsys, *command, "--kv-type", "fp8_e5m2")
        assert status == 2 and len(said.splitlines()) == 1
        assert "--kv-type = 'fp8_e5m2': llama.cpp has f32, f16," in said
