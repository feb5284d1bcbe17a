"""Plans without a recording: requests of given lengths, limits, objectives of a request, and the spread of what routing may be."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.api.plan import plan
from moeplan.api.subject import open_subject, planned_simulation
from moeplan.base.errors import InputError
from moeplan.cli import main
from moeplan.planner.offload import baselines, space
from moeplan.planner.offload.objective import RANKED_BY
from moeplan.planner.offload.plan import OffloadRequest, base_schedule, planned_schedule
from moeplan.sim.offload.simulate import Simulation
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.presets import load_preset
from moeplan.traces.lengths import RequestLengths
from moeplan.traces.recording import RoutingTrace
from moeplan.traces.synthesis.prior import prior_recording, spread_recordings


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Call the command line and return its status and what it wrote."""
    before, sys.argv = sys.argv, ["moeplan", *arguments]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = before
    done = capsys.readouterr()
    return int(stop.value.code or 0), done.out, done.err


REQUEST = (
    "--model",
    "tiny-moe",
    "--hardware",
    "rtx-3060",
    "--memory",
    "530MiB",
    "--prompt-tokens",
    "30",
    "--reply-tokens",
    "12",
)
RECORDED = Path(__file__).resolve().parents[4] / "shared" / "data" / "traces" / "gpt-oss-20b_decode.npz"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder of a search that looks at one amount of memory and few guesses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(space, "LEVEL_SHARES", (1.0,))
    monkeypatch.setattr(space, "_REACHES", ((1, 1.0),))
    return tmp_path


def planned(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    status, out, err = run(capsys, "plan", *REQUEST, "--json", *more)
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_plan_needs_no_recording_and_is_read_again(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    plan = planned(capsys, "--context", "500", "--kv-type", "q8_0", "--report", "p.html")
    best, model = plan["best"], load_model("tiny-moe")
    assert plan["ranked_by"] == "request_s" and plan["asked"]["prior"]["requests"] == 1
    kept = {item["name"]: item["bytes"] for item in best["memory_breakdown"]["items"]}
    assert kept["kv cache"] == model.kv_bytes(
        512, 34 / 32
    )  # a card by its name is asked about under llama.cpp, which keeps 256 at a time
    assert all(best["request_s"] <= one["request_s"] for one in plan["baselines"])
    again = planned_simulation(plan, None).predict(planned_schedule(plan))
    assert again.metrics.request_s == best["request_s"]
    assert list(again.metrics.request_s_interval or ()) == best["request_s_interval"]
    status, _, err = run(capsys, "report", "plan.json", "-o", "again.html")
    assert status == 0, err
    assert "--prompt-tokens 30 --reply-tokens 12" in (folder / "again.html").read_text(encoding="utf-8")


def test_objectives_of_a_request_choose_by_their_own_figure(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    found = {
        objective: planned(capsys, "--objective", objective)["best"]
        for objective in ("request_s", "ttft_s", "decode_tokens_per_s")
    }
    for objective, best in found.items():
        others = [one[RANKED_BY[objective]] for one in found.values()]
        assert best[RANKED_BY[objective]] == (max if objective == "decode_tokens_per_s" else min)(others)


def test_limits_are_kept_or_the_nearest_is_named(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    free = planned(capsys)["best"]
    limit = free["ttft_s"] * 1.5
    assert planned(capsys, "--objective", "decode_tokens_per_s", "--ttft", f"{limit}s")["best"]["ttft_s"] <= limit
    status, _, err = run(capsys, "plan", *REQUEST, "--ttft", "1us", "-o", "none.json")
    said = err.splitlines()[-1]
    assert (
        status == 3 and said.startswith("moeplan: out of reach: no schedule keeps --ttft") and "comes nearest" in said
    )
    assert not (folder / "none.json").exists()


def cached(trace: RoutingTrace, likewise: tuple[RoutingTrace, ...]) -> Simulation:
    """Return gpt-oss-20b on a small card whose cache holds a quarter of the experts, over one recording and others like it."""
    subject = open_subject(model="gpt-oss-20b", hardware="rtx-3060 + ryzen-7-7700x + ddr5-5600x2:64GiB", trace=None, prompt_tokens=1,
                           reply_tokens=1)  # fmt: skip
    return subject.simulation.over(trace, likewise=likewise)


LRU = load_preset("mixtral-offloading").with_options(predictor__kind="none", predictor__width=None, predictor__staging=0,
                                                     cache__experts_per_layer=8)  # fmt: skip


def test_the_spread_of_the_prior_is_in_the_interval() -> None:
    model, lengths = load_model("gpt-oss-20b"), RequestLengths.alike(prompt_tokens=20, reply_tokens=60)
    prior, spread = prior_recording(model, lengths), spread_recordings(model, lengths)
    narrow, wide = (cached(prior, others).predict(LRU).metrics for others in ((), spread))
    assert narrow.request_s == wide.request_s
    for name in ("request_s_interval", "decode_tokens_per_s_interval", "step_s_interval", "window_s_interval"):
        (least, most), (low, high) = getattr(narrow, name), getattr(wide, name)
        assert low <= least and most <= high and (low, high) != (least, most), name
    for trace in spread:
        low, high = wide.decode_tokens_per_s_interval or (0, 0)
        assert low <= (cached(trace, ()).predict(LRU).metrics.decode_tokens_per_s or 0) <= high


@pytest.mark.skipif(not RECORDED.exists(), reason="the recordings at hand are not part of the project")
def test_recorded_routing_of_the_family_lies_between_the_ends_of_its_prior() -> None:
    """Hit rates of real answers, most of which a prior alone would miss on one side or the other."""
    with np.load(RECORDED) as file:
        experts, answer = file["experts"], file["seq"]
    model, lengths = load_model("gpt-oss-20b"), RequestLengths.alike(prompt_tokens=0, reply_tokens=250)
    ends = [cached(trace, ()).predict(LRU).metrics.hit_rate for trace in spread_recordings(model, lengths)]
    prior = prior_recording(model, lengths)
    long = [one for one in np.unique(answer) if np.count_nonzero(answer == one) >= 250][::4]
    rates = []
    for one in long:
        trace = cached(prior, ()).trace
        rows = np.ascontiguousarray(experts[answer == one][:250])
        rates.append(cached(dataclasses.replace(trace, experts=rows), ()).predict(LRU).metrics.hit_rate)
    held = np.mean([min(ends) <= rate <= max(ends) for rate in rates])
    assert len(rates) >= 6 and held >= 0.8


def test_large_pools_are_scanned_only_where_everything_is_asked_for() -> None:
    """Looking through thousands of experts for each victim would be most of a search's time."""
    subject = open_subject(model="qwen3-30b-a3b", hardware="rtx-3060 + ryzen-7-7700x + ddr5-5600x2:64GiB", trace=None, prompt_tokens=4,
                           reply_tokens=2)  # fmt: skip
    this = subject.simulation
    base = base_schedule(OffloadRequest(objective="request_s"), this.model.native_bits)
    few, every = (
        {one.schedule for one in space.candidates(this, base, 400, exhaustive=asked)} for asked in (False, True)
    )
    assert this.num_experts > space.MOST_SCANNED and few < every
    assert {one.cache.policy for one in every - few} == {"lfu", "least-stale", "affinity", "activation"}
    assert {one.cache.policy for one in few} >= {"lfu", "affinity", "activation", "lru", "static", "none"}


def test_what_ran_before_changes_nothing() -> None:
    """Engines that decide layer by layer what to fetch pay for it; a fixed cache's tables are not those of a changing one."""
    hardware = "rtx-3060 + ryzen-7-7700x + ddr5-5600x2:64GiB"
    fixed = load_preset("fiddler").with_options(cache__pooled_experts=300)
    changing = fixed.with_options(cache__policy="lru", cache__pooled_experts=300)
    alone, after = (
        open_subject(model="gpt-oss-20b", hardware=hardware, trace=None, prompt_tokens=4, reply_tokens=4).simulation
        for _ in range(2)
    )
    after.run(after.resolve(changing))
    assert list(after.run(after.resolve(fixed)).step_end) == list(alone.run(alone.resolve(fixed)).step_end)


@pytest.mark.parametrize(("engine", "objective"), [("llama.cpp", "request_s"), ("ktransformers", "ttft_s")])
def test_a_plan_for_no_engine_is_never_worse_than_one_for_the_machines_engine_and_chooses_the_micro_batch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, engine: str, objective: str
) -> None:
    monkeypatch.setattr(baselines, "CHECKED_STEPS", 3)
    monkeypatch.setattr(space, "_special", lambda *_: iter(()))
    monkeypatch.setattr(baselines, "PRESETS", ("n-cpu-moe",))
    asked: dict[str, Any] = {"prompt_tokens": 3000, "reply_tokens": 6, "request": OffloadRequest(objective=objective)}
    machine = "rtx-3060 + ryzen-7-7700x + ddr5-5600x2:64GiB"
    whole, told = (plan("gpt-oss-20b", machine, **asked, **{name: engine}) for name in ("engine", "target"))
    assert getattr(whole.best.metrics, objective) <= getattr(told.best.metrics, objective)
    # Every micro-batch copies the experts anew: larger ones are the gain, and the plan's document says which was chosen.
    chosen = whole.best.schedule.workload.prefill_chunk_tokens
    assert chosen is not None and chosen > 512 and whole.to_dict()["request"]["prefill_chunk_tokens"] == chosen
    assert any(note.startswith(f"micro-batch: {chosen} tokens, of ") for note in whole.notes)
    assert (
        whole.tally.num_raced_out > 0
        and whole.lower_bound_step_s * whole.best.metrics.num_steps <= whole.best.metrics.window_s
    )


def test_keys_and_values_take_a_later_type_only_where_it_gains_something(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "CHECKED_STEPS", 3)
    monkeypatch.setattr(space, "_special", lambda *_: iter(()))
    monkeypatch.setattr(baselines, "PRESETS", ("n-cpu-moe",))
    rest = "ryzen-7-7700x + ddr5-5600x2:64GiB"
    for card, context, target, best in (
        ("rtx-5090", None, None, "f16"),
        ("rtx-3060", 120_000, None, "q8_0"),
        ("rtx-3060", 120_000, "llama.cpp", "q8_0"),
    ):
        found = plan(
            "gpt-oss-20b", f"{card} + {rest}", prompt_tokens=30, reply_tokens=60, context=context, kv_type="f16,q8_0", target=target
        )  # fmt: skip
        assert (
            found.asked["kv_type"] == best
            and found.provenance["kv_bytes_per_value"] == {"f16": 2, "q8_0": 34 / 32}[best]
        )
    with pytest.raises(InputError, match="named twice"):
        plan(
            "gpt-oss-20b",
            "rtx-3060 + ryzen-7-7700x + ddr5-5600x2:64GiB",
            prompt_tokens=30,
            reply_tokens=6,
            kv_type="f16,f16",
        )
