"""Starts the ranks of a job as processes of this machine, watches them, and reads what they found.

Modelled: a rank that dies ends all of them; one that is stopped, or whose link is cut, makes the others' exchanges time out, and
the message names the rank and the operation. Nothing outlives the call: processes end with their parent, whatever ends it.
Nodes are network namespaces (`network`) or, without them, all ranks meet on the loopback interface. Ignored: other machines.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...base.errors import InputError, Internal
from ...sim.parallel.timeline import EP_END, EP_START
from ...sim.policies.state import Array
from ..running.execute import Progress, silent
from ..running.failures import ExecutionFailed
from .job import ROUNDS, Job, write_job
from .network import Nodes

_POLL_S, _END_S = 0.05, 3.0
# A rank that has noticed a failure waits for nobody; one that waits in an exchange gets as long as that may take, and this.
_GRACE_S = 10.0
_SETUP_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankRun:
    """What one rank found, by step."""

    spans: Sequence[Array]
    """int64 [repeats + 1, 2]: when each run of the step began and ended, the first to warm up."""
    rows: Sequence[Sequence[Array]]
    """Of each run of each step: timeline rows, int64 [rows, EP_FIELDS], on the machine's clock."""
    payload: Sequence[Array]
    """int64 [exchanges, ranks]: payload bytes sent to each rank in the last run."""
    other: Sequence[Array]
    """The same of headers and sizes."""
    busy: Sequence[Sequence[Array]]
    """Of each run of each step: int64 [exchanges, 2], nanoseconds that the rank kept cores during each stage of each exchange."""
    tokens: Sequence[Array]
    states: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]
    reduced: Array
    """int64 [all-reduces of the job, repeats + 1, 2]: when each began and ended."""
    exchanges_first: bool = False
    """Whether threads that exchange go before those that compute."""
    moved: Moved | None = None
    """Of a job with a move, what came of it."""
    clock: tuple[int, int] = (0, 0)
    """How far this rank's clock is before the first one's, and what that is known to, in nanoseconds; times are on the first one's."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moved:
    """One rank's part of a move."""

    usable: Array
    """int64 [(repeats + 1) · steps]: layers under the new placement, step after step as they ran."""
    spans: Array
    """int64 [pieces, 3]: layers there afterwards, when the piece began and ended."""
    states: Sequence[Sequence[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]]
    """Of each run of each step: the states that its tokens ended in."""


def run_job(job: Job, nodes: Nodes | None = None) -> list[RankRun]:
    """Return what every rank found of one job; raises as `run_jobs` does."""
    return run_jobs([job], nodes)[0]


def run_jobs(
    jobs: Sequence[Job], nodes: Nodes | None = None, *, seconds: float = 600.0, progress: Progress = silent
) -> list[list[RankRun]]:
    """Return what every rank found of every job; ranks run all jobs once to warm up, then in turns.

    nodes: where ranks run. seconds: longest that all may take. progress: told of every round. Raises ExecutionFailed where a
    rank died, hung or refused; InputError for jobs of different numbers of ranks.
    """
    shapes = {(job.topology.num_ranks, job.topology.num_nodes) for job in jobs}
    if len(shapes) != 1:
        raise InputError("jobs", sorted(shapes), "not all of as many ranks and nodes", "run them one after the other")
    with tempfile.TemporaryDirectory(prefix="moeplan-ranks-") as name:
        folder = Path(name)
        places = [write_numbered(folder, number, job) for number, job in enumerate(jobs)]
        with started(folder, jobs[0], nodes) as ranks:
            watch(folder, jobs[0], ranks, seconds, progress)
        return [
            [_read(place, rank, job) for rank in range(job.topology.num_ranks)]
            for place, job in zip(places, jobs, strict=True)
        ]


def write_numbered(folder: Path, number: int, job: Job) -> Path:
    """Return where a job was written, in a folder of its own."""
    place = folder / f"job-{number:04d}"
    place.mkdir()
    write_job(place, job)
    return place


@contextlib.contextmanager
def started(
    folder: Path, job: Job, nodes: Nodes | None, folders: Mapping[int, Path] | None = None
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Return a context in which the ranks run; none is left after it. folders: of ranks that read another job than `folder`'s."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(part for part in sys.path if part), "MOEPLAN_MEETING": str(folder / "meeting"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if nodes is not None:
        environment["GLOO_SOCKET_IFNAME"] = nodes.interface
    elif loopback is not None:
        environment["GLOO_SOCKET_IFNAME"] = loopback  # nothing leaves the machine
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(job.topology.num_ranks):
            enter = [] if nodes is None else nodes.enter(rank // job.topology.ranks_per_node)
            place = (folders or {}).get(rank, folder)
            command = [*enter, sys.executable, "-m", "moeplan.executor.parallel.rank", str(place), str(rank)]
            with open(folder / f"rank-{rank}.said", "wb") as said:
                ranks.append(
                    subprocess.Popen(  # noqa: S603 - this very program
                        command, stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT, env=environment
                    )
                )
        yield ranks
    finally:
        end(ranks)


def watch(
    folder: Path, job: Job, ranks: Sequence[subprocess.Popen[bytes]], seconds: float, progress: Progress = silent
) -> None:
    """Return once all ranks have ended well; raises ExecutionFailed, naming the rank that did not and what the others waited for."""
    until, done = time.monotonic() + seconds + _SETUP_S, -1
    while any(rank.poll() is None for rank in ranks):
        with contextlib.suppress(OSError, ValueError):
            now = int((folder / ROUNDS).read_text())
            if now > done:
                done = now
                progress(done, job.repeats + 1, f"rounds of {job.topology.num_ranks} ranks")
        if any(rank.poll() for rank in ranks):
            _fail(folder, ranks, min(job.timeout_s, seconds) + _GRACE_S)
        if time.monotonic() > until:
            _fail(folder, ranks, 0.0)
        time.sleep(_POLL_S)
    if any(rank.returncode for rank in ranks):
        _fail(folder, ranks, 0.0)


def _fail(folder: Path, ranks: Sequence[subprocess.Popen[bytes]], wait_s: float) -> None:
    """Raise ExecutionFailed with what the ranks have said, once all have, or after `wait_s`."""
    stopped = [number for number, rank in enumerate(ranks) if _is_stopped(rank)]
    until = time.monotonic() + wait_s
    while time.monotonic() < until and any(
        rank.poll() is None for number, rank in enumerate(ranks) if number not in stopped
    ):
        time.sleep(_POLL_S)
    said = {number: last_words(folder, number) for number in range(len(ranks))}
    reasons = [f"rank {number} was stopped" for number in stopped]
    for number, rank in enumerate(ranks):
        if rank.returncode is not None and rank.returncode < 0:
            reasons.append(f"rank {number} was killed by signal {-rank.returncode}")
        elif rank.poll() is None and number not in stopped:
            reasons.append(f"rank {number} did not end in time")
    refused = [words for words in said.values() if "refused:" in words]
    others = refused[:1] or [words for words in said.values() if words]
    raise ExecutionFailed("; ".join([*reasons, *others]) or "a rank ended without a word",
                          "see that nothing ends or stops its processes or cuts their links, and run again")  # fmt: skip


def _is_stopped(rank: subprocess.Popen[bytes]) -> bool:
    """Return whether a process was stopped by a signal, where the system tells."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False


def end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the ranks that still run, and wait for all of them."""
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()  # a stopped one hears nothing else
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(_END_S)
        if rank.stdin is not None:
            with contextlib.suppress(OSError):
                rank.stdin.close()


def last_words(folder: Path, rank: int) -> str:
    """Return the last line a rank has said, "" for none."""
    with contextlib.suppress(OSError):
        lines = (folder / f"rank-{rank}.said").read_text(errors="replace").strip().splitlines()
        mine = [line for line in lines if line.startswith("rank ")] or lines
        return mine[-1].strip() if mine else ""
    return ""


def _read(folder: Path, rank: int, job: Job) -> RankRun:
    """Return what a rank wrote; raises Internal where it wrote nothing."""
    path = folder / f"rank-{rank}.npz"
    if not path.exists():
        raise Internal(f"rank {rank} ended well without a result")
    steps = range(len(job.steps))
    with np.load(path, allow_pickle=False) as found:
        before, known_to = (int(each) for each in found["clock"])
        shift = before if abs(before) > known_to else 0  # less cannot be told from none
        rows = [[found[f"rows{n}.{repeat}"] for repeat in range(job.repeats + 1)] for n in steps]
        for each in (one for of_step in rows for one in of_step):
            each[:, [EP_START, EP_END]] -= shift
        moved = None
        if job.move is not None:
            pieces = found["moves"]
            pieces[:, 1:] -= shift
            states = [[found[f"states{n}.{repeat}"] for repeat in range(job.repeats + 1)] for n in steps]
            moved = Moved(usable=found["usable"], spans=pieces, states=states)
        return RankRun(
            moved=moved, reduced=found["reduced"] - shift, exchanges_first=bool(found["first"]),
            spans=[found[f"spans{n}"] - shift for n in steps], rows=rows, clock=(before, known_to),
            payload=[found[f"payload{n}"] for n in steps], other=[found[f"other{n}"] for n in steps],
            busy=[[found[f"busy{n}.{repeat}"] for repeat in range(job.repeats + 1)] for n in steps],
            tokens=[found[f"tokens{n}"] for n in steps], states=[found[f"states{n}"] for n in steps],
        )  # fmt: skip
