"""A study goes on where it was stopped, repeats nothing, and its answers depend on nothing but its inputs."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

import moeplan
from moeplan.base.errors import InputError
from moeplan.studies import local, work
from moeplan.studies.store import Store
from moeplan.studies.table import write_parquet
from moeplan.studies.work import Answer, Asked

making = importlib.import_module("moeplan.studies.sweep")
STUDY: dict[str, Any] = {
    "study": "small",
    "base": {"model": "tiny-moe", "hardware": "t4", "trace": "bundled", "window": 2},
    "grid": {
        "memory": ["300MiB", "450MiB"], "cache.experts_per_layer": [2, 3],
        "link": {"slow": {"machine.host_to_device.pinned_bytes_per_s": "6GB/s"}, "fast": {}},
    },
}  # fmt: skip


def parquet_of(result: moeplan.StudyResult, path: Path) -> bytes:
    write_parquet(result.to_frame(), path)
    return path.read_bytes()


def keys_in(store: Path) -> list[str]:
    with sqlite3.connect(store) as database:
        return [row[0] for row in database.execute("SELECT run_key FROM runs")]


def test_the_answers_are_those_of_simulate_and_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    alone = moeplan.sweep(STUDY, store=tmp_path / "1.sqlite", jobs=1)
    assert alone.to_dict() == {
        "study": "small", "num_runs": 8, "num_done": 8, "num_new": 8, "store": str(tmp_path / "1.sqlite"),
        "states": {"done": 4, "does not fit": 4, "refused": 0, "failed": 0}, "reasons": dict(alone.reasons),
    }  # fmt: skip
    together = moeplan.sweep(STUDY, store=tmp_path / "2.sqlite", jobs=2)
    assert parquet_of(alone, tmp_path / "1.parquet") == parquet_of(together, tmp_path / "2.parquet")

    table = alone.to_frame()
    assert list(table["run"]) == list(range(8))
    asked = {"cache.experts_per_layer": 3, "machine.host_to_device.pinned_bytes_per_s": "6GB/s"}
    told = moeplan.simulate("tiny-moe", "t4", trace="bundled", window=2, memory="450MiB", settings=asked)
    row = table[
        (table["memory"] == "450MiB") & (table["cache.experts_per_layer"] == 3) & (table["link"] == "slow")
    ].iloc[0]
    assert row["decode_tokens_per_s"] == told.metrics.decode_tokens_per_s
    assert (
        row["decode_tokens_per_s_low"],
        row["decode_tokens_per_s_high"],
    ) == told.metrics.decode_tokens_per_s_interval
    assert row["device_bytes"] == told.memory.device_bytes
    assert "bytes are missing" in table["reason"][0] and table["missing_bytes"][0] > 0


def test_a_study_goes_on_and_a_larger_one_reuses_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, made = tmp_path / "s.sqlite", []
    answered = work.answer
    monkeypatch.setattr(making, "answer", lambda predict, run: made.append(run.key) or answered(predict, run))
    monkeypatch.setattr(local, "answer", lambda predict, run: made.append(run.key) or answered(predict, run))

    def stop(done: int, total: int, note: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moeplan.sweep(STUDY, store=store, jobs=1, progress=stop)
    assert len(keys_in(store)) == 3
    assert moeplan.sweep(STUDY, store=store, jobs=1).num_new == 5
    assert moeplan.sweep(STUDY, store=store, jobs=1).num_new == 0
    larger = STUDY | {"study": "larger", "grid": STUDY["grid"] | {"memory": ["300MiB", "450MiB", "460MiB"]}}
    found = moeplan.sweep(larger, store=store, jobs=1)
    assert (found.num_runs, found.num_done, found.num_new) == (12, 12, 4)
    assert len(made) == len(set(made)) == 12
    with Store(store, must_exist=True) as database:
        assert [one.name for one in database.studies()] == ["small", "larger"]


def test_a_study_killed_halfway_ends_with_exactly_its_runs(tmp_path: Path) -> None:
    study, store = tmp_path / "study.yaml", tmp_path / "s.sqlite"
    grid = {"memory": [f"{450 + at}MiB" for at in range(30)], "cache.experts_per_layer": [2, 3]}
    study.write_text(json.dumps(STUDY | {"base": STUDY["base"] | {"window": 40}, "grid": grid}))
    command = [sys.executable, "-m", "moeplan", "sweep", str(study), "--store", str(store), "--jobs", "2", "--json"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (store.exists() and store.stat().st_size and len(_patiently(store)) >= 5):
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = set(keys_in(store))
    assert 5 <= len(kept) < 60
    found = moeplan.sweep(study, store=store, jobs=1)
    assert (found.num_runs, found.num_done, found.num_new) == (60, 60, 60 - len(kept))
    assert kept < set(keys_in(store)) and len(keys_in(store)) == 60


def _patiently(store: Path) -> list[str]:
    try:
        return keys_in(store)
    except sqlite3.OperationalError:  # its tables are not there yet
        return []


def test_a_process_that_dies_takes_only_the_run_that_kills_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, deaths = os.getpid(), tmp_path / "deaths"
    deaths.mkdir()

    def answered(predict: str, run: Asked) -> Answer:
        if os.getpid() != parent:
            if run.fields["cache.experts_per_layer"] == "3" and len(os.listdir(deaths)) < 2:
                (deaths / str(os.getpid())).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if run.fields["memory"] == "460MiB":
                os.kill(os.getpid(), signal.SIGKILL)
        return Answer(run.key, work.DONE, None, "{}")

    monkeypatch.setattr(work, "answer", answered)
    grid = {"memory": [f"{450 + at}MiB" for at in range(12)], "cache.experts_per_layer": [2, 3]}
    found = moeplan.sweep(STUDY | {"grid": grid}, store=tmp_path / "s.sqlite", jobs=2)
    assert found.states == {"done": 22, "does not fit": 0, "refused": 0, "failed": 2}
    assert "the process that made it died, 3 times" in found.reasons["failed"]
    assert len(os.listdir(deaths)) == 2

    monkeypatch.setattr(work, "answer", lambda predict, run: Answer(run.key, work.DONE, None, "{}"))
    assert moeplan.sweep(STUDY | {"grid": grid}, store=tmp_path / "s.sqlite", jobs=2).num_new == 0
    again = moeplan.sweep(STUDY | {"grid": grid}, store=tmp_path / "s.sqlite", jobs=2, retry=True)
    assert (again.num_new, again.states["done"]) == (2, 24)


@pytest.mark.parametrize("broken_at", [0, 1, 3])
def test_a_run_is_not_lost_where_the_pool_is_found_broken_on_handing_it_over(
    broken_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may die between two batches: then it is the handing over that fails, and no run of it was under way."""
    submitted = itertools.count()

    class Pool:
        def submit(self, made: Any, predict: str, runs: Sequence[Asked], rules: str) -> Future[list[Answer]]:
            if next(submitted) == broken_at:
                raise BrokenProcessPool
            future: Future[list[Answer]] = Future()
            future.set_result([Answer(run.key, work.DONE, None, "{}") for run in runs])
            return future

    monkeypatch.setattr(local, "worker_pool", lambda jobs: contextlib.nullcontext(Pool()))
    batches = local.Batches([Asked(str(at), {}) for at in range(9)], lambda keys: set())
    found = [answer.key for some in local.answers_here("simulate", batches, 2) for answer in some]
    assert sorted(found) == [str(at) for at in range(9)]


def test_what_is_no_number_and_what_is_no_answer_is_kept_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [{"hit_rate": float("nan")}, ZeroDivisionError("by\nnothing"), {"ttft_s": float("inf")}, {"hit_rate": 0.5}]
    given = iter(wrong)

    def figures(predict: str, fields: Any) -> Any:
        found = next(given)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(work, "_figures", figures)
    grid = {"memory": ["450MiB", "460MiB"], "cache.experts_per_layer": [2, 3]}
    table = moeplan.sweep(STUDY | {"grid": grid}, store=tmp_path / "s.sqlite", jobs=1).to_frame()
    assert list(table["state"]) == ["failed", "failed", "failed", "done"]
    assert list(table["reason"][:3]) == [
        "hit_rate is nan, no number", "ZeroDivisionError: by nothing", "ttft_s is inf, no number",
    ]  # fmt: skip


def test_the_time_left_counts_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], []
    monkeypatch.setattr(making.time, "monotonic", lambda: now[0])
    meter = making._Meter(lambda done, total, note: said.append(note), 0, 101)
    now[0] = 60.0  # a minute of compiling
    meter.done(1)
    meter.start()
    now[0] = 60.5
    meter.done(1)
    now[0] = 62.0
    meter.done(19)
    assert said == ["runs", "runs", "runs, 8 s left"]


def test_seeds_are_of_routing_that_is_made_up(tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "schedule": "mixtral-offloading-code",
        "prompt_tokens": 4,
        "reply_tokens": 8,
        "memory": "450MiB",
    }
    base = {"model": "tiny-moe", "hardware": "t4", **asked}
    found = moeplan.sweep({"base": base, "repeats": 2}, store=tmp_path / "s.sqlite", jobs=1)
    table = found.to_frame()
    assert table["hits"][0] != table["hits"][1]
    told = moeplan.simulate("tiny-moe", "t4", **asked)
    assert table["window_s"][0] == told.metrics.window_s
    refused = moeplan.sweep({"base": STUDY["base"], "seeds": [1]}, store=tmp_path / "s.sqlite", jobs=1)
    assert refused.states["refused"] == 1 and "recording is replayed" in refused.reasons["refused"]


def test_plans_can_be_swept(tmp_path: Path) -> None:
    base = {"model": "tiny-moe", "hardware": "t4", "trace": "bundled", "window": 4, "request.objective": "least_memory",
            "request.floor_tokens_per_s": 3}  # fmt: skip
    found = moeplan.sweep(
        {"predict": "plan", "base": base, "grid": {"memory": ["436MiB", "440MiB"]}}, store=tmp_path / "s.sqlite", jobs=1
    )
    assert found.states["done"] == 2, found.reasons
    assert found.to_frame()["num_candidates"].min() > 0


@pytest.mark.parametrize("arguments", [{"jobs": 0}, {"backend": "locl"}])
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        moeplan.sweep(STUDY, store=tmp_path / "s.sqlite", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_small_batch_is_taken_first_and_a_batch_takes_a_quarter_of_a_second() -> None:
    asked: Sequence[Asked] = [Asked(str(at), {}) for at in range(1000)]
    batches = local.Batches(asked, lambda keys: {key for key in keys if key == "1"})
    assert [run.key for run in batches.take()] == ["0"]
    assert [run.key for run in batches.take()] == ["2"] and batches.passed_over == 1
    for _ in range(20):
        batches.took(1, 0.025)
    assert len(batches.take()) == 10
