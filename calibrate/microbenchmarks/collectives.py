"""All-to-all measured through torch.distributed: gloo between processes of this machine, NCCL where it has several GPUs.

Modelled: every rank is a process (`exchange_rank`). Traffic is balanced or skewed (`exchange_matrices`); a repetition takes
from when the last rank began until the last one was done. Beside that: exchanges while every rank computes, what products
take meanwhile, and what they take on all ranks and on one without any exchange. Gloo meets on the loopback interface only.
A rank that dies, or does not end in time, ends all of them, and so does whatever ends the caller. Ignored: machines
connected by a network.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...base.errors import InputError, MoeplanError, UnknownName
from ...base.units import KIB, MIB, NS_PER_S
from ..all_to_all_matrices import PATTERNS, Matrix, busiest_port, matrix_from_text, matrix_to_text, traffic
from ..samples import Sample

BACKENDS = ("gloo", "nccl")
Said = Callable[[int, int, str], None]
_POLL_S = 0.05
_END_S = 5.0
# Below this, an exchange is mostly its latency.
_SMALL_BYTES = MIB
_LARGE_BYTES = 16 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeExtent:
    """Which all-to-alls are measured, and how often."""

    ranks: tuple[int, ...]
    """Numbers of ranks, one after the other; those beyond two that the machine has no cores or GPUs for are left out."""
    sizes: tuple[int, ...]
    """Bytes that each rank has for all, its own part included, which is not exchanged."""
    while_sizes: tuple[int, ...]
    """Of them, those also exchanged while every rank computes."""
    patterns: tuple[str, ...] = PATTERNS
    rounds: int = 4
    seconds: float = 20.0
    """After so long, for each number of ranks, no further round is begun."""
    limit_s: float = 120.0
    """After so long they are taken to hang."""


FULL_EXCHANGES = ExchangeExtent(
    ranks=(2, 4),
    sizes=tuple(KIB * 4**power for power in range(9)),
    while_sizes=tuple(KIB * 4**power for power in range(2, 9)),
)
QUICK_EXCHANGES = ExchangeExtent(
    ranks=(2,),
    sizes=(KIB, 16 * KIB, 128 * KIB, MIB, 8 * MIB),
    while_sizes=(16 * KIB, MIB, 8 * MIB),
    rounds=3,
    seconds=2.0,
)


def rank_counts(extent: ExchangeExtent, backend: str) -> tuple[tuple[int, ...], str | None]:
    """Return (numbers of ranks that this machine can run, why there are none): one line, None where there are some."""
    if not torch.distributed.is_available():
        return (), "this torch has no torch.distributed: no all-to-all"
    if backend == "gloo":
        # Ranks that share a core wait for each other's time slice, and times of one exchange differ by a factor of ten.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return tuple(ranks for ranks in extent.ranks if ranks <= max(2, cores)), None
    gpus = torch.cuda.device_count()
    if gpus < 2:
        return (), ("one GPU" if gpus else "no GPU") + ": no all-to-all"
    return tuple(sorted({ranks for ranks in (*extent.ranks, gpus) if ranks <= gpus})), None


def measure_all_to_all(
    ranks: int,
    *,
    backend: str = "gloo",
    extent: ExchangeExtent = FULL_EXCHANGES,
    progress: Said = lambda done, total, note: None,
) -> list[Sample]:
    """Return samples of all-to-alls among `ranks` processes, and of products on them.

    Raises UnknownName for an unknown backend, InputError for fewer than two ranks, NCCL with fewer GPUs than ranks, or ranks that
    died or did not end in time; whatever is raised, none of them is left behind.
    """
    _check(ranks, backend)
    return _measured(_cases(ranks, backend, extent), ranks, backend, extent, progress)


def measure_matrices(
    matrices: Sequence[tuple[str, Matrix]],
    *,
    backend: str = "gloo",
    extent: ExchangeExtent = FULL_EXCHANGES,
    progress: Said = lambda done, total, note: None,
) -> list[Sample]:
    """Return samples of all-to-alls with the traffic given: (name, bytes from each rank to each), all between as many ranks.

    extent: its rounds and limits. Raises as `measure_all_to_all` does, and InputError for matrices of different sizes.
    """
    sizes = {matrix.shape for _, matrix in matrices}
    if len(sizes) != 1 or any(len(set(shape)) != 1 for shape in sizes):
        raise InputError("matrices", sorted(sizes), "not square, or not all of one size", "give some of equal size")
    ranks = len(matrices[0][1])
    _check(ranks, backend)
    for _, matrix in matrices:
        matrix_from_text(matrix_to_text(matrix), ranks, "matrices")
    cases = [_case(name, matrix, int(matrix.sum(axis=1).max()), backend) for name, matrix in matrices]
    return _measured(cases, ranks, backend, extent, progress)


def _check(ranks: int, backend: str) -> None:
    """Return nothing; raises for what cannot be measured here."""
    if backend not in BACKENDS:
        raise UnknownName("backend", backend, BACKENDS)
    if ranks < 2:
        raise InputError("ranks", ranks, "an exchange needs two", "give at least 2")
    if backend == "nccl" and torch.cuda.device_count() < ranks:
        rule = f"this machine has {torch.cuda.device_count()} GPUs"
        raise InputError("ranks", ranks, rule, "give fewer, or use gloo")


def _measured(
    cases: list[dict[str, Any]], ranks: int, backend: str, extent: ExchangeExtent, progress: Said
) -> list[Sample]:
    """Return the samples of cases, measured by processes that live as long."""
    task = {
        "ranks": ranks,
        "backend": backend,
        "cases": cases,
        "rounds": extent.rounds,
        "seconds": extent.seconds,
        "limit_s": extent.limit_s,
    }
    with tempfile.TemporaryDirectory(prefix="moeplan-ranks-") as folder:
        found = _run(Path(folder), task, progress)
    return _samples(cases, found, ranks, backend)


def _cases(ranks: int, backend: str, extent: ExchangeExtent) -> list[dict[str, Any]]:
    """Return what is measured, in order; a case without a matrix only computes."""
    cases: list[dict[str, Any]] = []
    for size in extent.sizes:
        for pattern in extent.patterns:
            matrix = traffic(ranks, size, pattern)
            if busiest_port(matrix)[0] == 0:
                continue
            cases.append(_case(pattern, matrix, size, backend))
            if size in extent.while_sizes and pattern == "balanced":
                cases.append(cases[-1] | {"companion": "compute", "repetitions": 1})
    alone: dict[str, Any] = {"matrix": None, "pattern": "none", "size": 0, "inner": 1, "repetitions": 1}
    return cases + [alone | {"companion": "none", "everywhere": everywhere} for everywhere in (True, False)]


def _case(pattern: str, matrix: Matrix, size: int, backend: str) -> dict[str, Any]:
    """Return one kind of traffic to be measured alone."""
    return {
        "matrix": matrix.tolist(),
        "pattern": pattern,
        "size": size,
        "companion": "none",
        "repetitions": 16 if size <= _SMALL_BYTES else 5 if size <= _LARGE_BYTES else 3,
        # On GPUs short exchanges are done back to back, as an engine's captured graph does them.
        "inner": 1 if backend == "gloo" else 20 if size <= _SMALL_BYTES else 8,
    }


# --- the processes ----------------------------------------------------------------------------------------------------


def _run(folder: Path, task: dict[str, Any], progress: Said) -> list[dict[str, Any]]:
    """Return what every rank found; raises InputError where one of them failed or hung."""
    (folder / "task.json").write_text(json.dumps(task))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        environment["GLOO_SOCKET_IFNAME"] = loopback  # nothing leaves the machine
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(task["ranks"]):
            command = [
                sys.executable,
                "-m",
                "moeplan.calibrate.microbenchmarks.all_to_all_rank",
                str(folder),
                str(rank),
            ]
            with open(folder / f"rank-{rank}.said", "wb") as said:
                ranks.append(
                    subprocess.Popen(  # noqa: S603 - this very program
                        command, stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT, env=environment
                    )
                )
        _watch(folder, task, ranks, progress)
    finally:
        _end(ranks)
    try:
        return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(len(ranks))]
    except (OSError, ValueError):
        raise _failed(task, "a rank ended without a result") from None


def _watch(folder: Path, task: dict[str, Any], ranks: list[subprocess.Popen[bytes]], progress: Said) -> None:
    """Return once all ranks have ended well; raises InputError for the first that did not, and when time is up."""
    until = time.monotonic() + task["limit_s"]
    what, done = f"all-to-all between {task['ranks']} ranks", 0
    while any(rank.poll() is None for rank in ranks):
        for number, rank in enumerate(ranks):
            if rank.poll():
                raise _failed(task, f"rank {number} ended with status {rank.returncode}{_last_words(folder, number)}")
        if time.monotonic() > until:
            raise _failed(task, f"its ranks did not end in {task['limit_s']:.0f} s")
        with contextlib.suppress(OSError, ValueError):
            now = int((folder / "rounds").read_text())
            if now > done:
                done = now
                progress(done, task["rounds"], what)
        time.sleep(_POLL_S)
    for number, rank in enumerate(ranks):
        if rank.returncode:
            raise _failed(task, f"rank {number} ended with status {rank.returncode}{_last_words(folder, number)}")


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the ranks that still run, and wait for all of them."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    for rank in ranks:
        try:
            rank.wait(_END_S)
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
        if rank.stdin is not None:
            with contextlib.suppress(OSError):
                rank.stdin.close()


def _failed(task: dict[str, Any], rule: str) -> MoeplanError:
    return InputError(
        "all-to-all", task["backend"], rule, "see that nothing ends or stops its processes, and measure again"
    )


def _last_words(folder: Path, rank: int) -> str:
    """Return the last line a rank has said, in parentheses."""
    with contextlib.suppress(OSError):
        lines = (folder / f"rank-{rank}.said").read_text(errors="replace").strip().splitlines()
        if lines:
            return f" ({lines[-1].strip()})"
    return ""


# --- the samples ------------------------------------------------------------------------------------------------------


def _samples(cases: list[dict[str, Any]], found: list[dict[str, Any]], ranks: int, backend: str) -> list[Sample]:
    """Return the samples of all cases."""
    samples = []
    for at, case in enumerate(cases):
        spans = np.array([rank["spans"][at] for rank in found], np.int64)  # [ranks, repetitions, 2]
        made = [mean for rank in found for mean in rank["made"][at]]
        if case["matrix"]:
            matrix = np.array(case["matrix"], np.int64)
            seconds = np.maximum(1, spans[:, :, 1].max(axis=0) - spans[:, :, 0].max(axis=0)) / NS_PER_S / case["inner"]
            labels = {"backend": backend, "pattern": case["pattern"], "companion": case["companion"]}
            size = {"ranks": ranks, "bytes": busiest_port(matrix)[0], "per_rank_bytes": case["size"]}
            samples.append(
                Sample(kind="all_to_all", labels=labels | {"matrix": matrix_to_text(matrix)}, arguments=size,
                       seconds=tuple(seconds.tolist()))
            )  # fmt: skip
        if made:
            companion = "none" if not case["matrix"] else "all_to_all"
            together = ranks if case["matrix"] or case["everywhere"] else 1
            samples.append(
                Sample(kind="rank_product", labels={"backend": backend, "companion": companion},
                       arguments={"ranks": ranks, "computing": together, "bytes": case["size"]}, seconds=tuple(made))
            )  # fmt: skip
    return samples
