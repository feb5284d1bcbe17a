"""What goes wrong in the middle of a run of ranks: every other rank ends in time, one line names rank and operation, nothing is left."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from long_runs import LONG
from moeplan.base.errors import InputError
from moeplan.executor.parallel.job import ROUNDS, Job
from moeplan.executor.parallel.launch import run_jobs, started, watch, write_numbered
from moeplan.executor.parallel.network import Nodes, two_nodes, why_unavailable
from moeplan.executor.parallel.reason import reason
from moeplan.executor.running.failures import ExecutionFailed
from parallel_jobs import prepared, preset32

TIMEOUT_S = 4.0
OPERATION = r"rank \d: (dispatch of|combine of|waiting for all ranks before) "
long = pytest.mark.skipif(not LONG, reason="waits for ranks to time out: MOEPLAN_LONG=1")
Processes = list[subprocess.Popen[bytes]]


def job(ranks: int = 2, nodes: int = 1) -> Job:
    made = prepared(preset32("ep"), ranks=ranks, nodes=nodes).job
    return dataclasses.replace(made, repeats=100_000, timeout_s=TIMEOUT_S)


@contextmanager
def under_way(folder: Path, one: Job, nodes: Nodes | None = None) -> Iterator[Processes]:
    """Return a context in which ranks run and have done some rounds."""
    write_numbered(folder, 0, one)
    with started(folder, one, nodes) as ranks:
        until = time.monotonic() + 120
        while (
            not (folder / ROUNDS).exists() and time.monotonic() < until and all(rank.poll() is None for rank in ranks)
        ):
            time.sleep(0.05)
        assert (folder / ROUNDS).exists()
        yield ranks


def test_a_rank_that_is_killed_ends_all_and_is_named_with_the_operation(tmp_path: Path) -> None:
    one = job()
    with under_way(tmp_path, one) as ranks:
        os.kill(ranks[1].pid, signal.SIGKILL)
        with pytest.raises(ExecutionFailed, match=f"rank 1 was killed by signal 9; .*{OPERATION}"):
            watch(tmp_path, one, ranks, TIMEOUT_S + 60)
    assert all(rank.poll() is not None for rank in ranks)


@long
def test_a_rank_that_is_stopped_is_named_and_ended(tmp_path: Path) -> None:
    one = job()
    with under_way(tmp_path, one) as ranks:
        os.kill(ranks[1].pid, signal.SIGSTOP)
        with pytest.raises(ExecutionFailed, match=f"rank 1 was stopped; .*{OPERATION}"):
            watch(tmp_path, one, ranks, 600)
    assert all(rank.poll() is not None for rank in ranks)


@long
def test_a_link_that_is_cut_ends_all_ranks_and_no_namespace_is_left(tmp_path: Path) -> None:
    if (reason := why_unavailable()) is not None:
        pytest.skip(f"no network namespaces: {reason}")
    one = dataclasses.replace(
        job(4, 2), timeout_s=3 * TIMEOUT_S
    )  # four ranks that load torch on two busy cores do not meet sooner
    with two_nodes(50e6) as nodes, under_way(tmp_path, one, nodes) as ranks:
        nodes.cut(0)
        with pytest.raises(ExecutionFailed, match=OPERATION):
            watch(tmp_path, one, ranks, 600)
    assert all(rank.poll() is not None for rank in ranks)
    assert not any(Path(f"/proc/{holder}").exists() for holder in nodes.holders)


def test_a_rank_with_another_recording_is_refused_at_the_start(tmp_path: Path) -> None:
    one, other = (prepared(preset32("ep"), seed=seed).job for seed in (0, 1))
    (tmp_path / "other").mkdir()
    write_numbered(tmp_path, 0, one)
    write_numbered(tmp_path / "other", 0, other)
    with (
        started(tmp_path, one, None, {1: tmp_path / "other"}) as ranks,
        pytest.raises(ExecutionFailed, match="refused: the plan or recording of rank 1 differs from that of rank 0"),
    ):
        watch(tmp_path, one, ranks, 60)
    assert all(rank.poll() is not None for rank in ranks)
    assert not (tmp_path / ROUNDS).exists()


def test_jobs_of_different_numbers_of_ranks_are_refused() -> None:
    with pytest.raises(InputError, match="not all of as many ranks and nodes"):
        run_jobs([prepared(preset32("ep"), ranks=ranks).job for ranks in (2, 4)])


def test_a_failure_is_said_without_source_lines_and_advice() -> None:
    gloo = "[/a/b/pair.cc:553] Connection closed by peer [10.0.0.1]:268. This is typically caused by a remote worker crashing. GLHF!\nmore"
    assert reason(RuntimeError(gloo)) == "Connection closed by peer [10.0.0.1]:268"
    assert reason(RuntimeError("refused: rank 1 differs")) == "refused: rank 1 differs"
    assert reason(TimeoutError()) == "TimeoutError"
