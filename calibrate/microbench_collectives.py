"""All-to-all measured through torch.distributed: gloo between processes of this machine, NCCL where it has several
GPUs.

Modelled: each rank sends to every other one, the same amount (balanced) or half of everything to rank 0 (skewed); a
repetition takes as long as its slowest rank, from a common barrier; optionally every rank computes meanwhile. Bytes
are what the busiest rank sends or receives, its own part apart. Ignored: machines connected by a network.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..units import KIB, MIB, NS_PER_S
from .samples import Sample

BACKENDS = ("gloo", "nccl")
PATTERNS = ("balanced", "skewed")
COMPANIONS = ("none", "compute")
SIZES = (KIB, 16 * KIB, 256 * KIB, 4 * MIB, 64 * MIB)
_JOIN_S = 240.0
_WARM_UP = 3
_SIDE = 256


def traffic(ranks: int, num_bytes: int, pattern: str) -> np.ndarray[Any, Any]:
    """Return int64 [ranks, ranks]: bytes from each rank to each, its own part included; a rank sends about `num_bytes`."""
    if pattern == "skewed" and ranks > 1:
        matrix = np.full((ranks, ranks), num_bytes // (2 * (ranks - 1)), np.int64)
        matrix[:, 0] = num_bytes // 2
        return matrix
    return np.full((ranks, ranks), num_bytes // ranks, np.int64)


def busiest_bytes(matrix: np.ndarray[Any, Any]) -> int:
    """Return the larger of what the busiest rank sends to and receives from others."""
    others = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    return int(max(others.sum(0).max(), others.sum(1).max()))


def measure_all_to_all(
    ranks: int,
    *,
    backend: str = "gloo",
    sizes: Sequence[int] = SIZES,
    patterns: Sequence[str] = PATTERNS,
    companions: Sequence[str] = COMPANIONS,
    repetitions: int = 10,
    limit_s: float = _JOIN_S,
) -> list[Sample]:
    """Return samples of all-to-alls among `ranks` processes.

    Raises InputError for an unknown backend, fewer than two ranks, or NCCL with fewer GPUs than ranks.
    """
    if backend not in BACKENDS:
        raise InputError("backend", backend, f"one of {', '.join(BACKENDS)}", "choose one of these")
    if ranks < 2:
        raise InputError("ranks", ranks, "an exchange needs two", "give at least 2")
    if backend == "nccl" and torch.cuda.device_count() < ranks:
        raise InputError(
            "ranks", ranks, f"this machine has {torch.cuda.device_count()} GPUs", "give fewer, or use gloo"
        )
    cases = [(size, pattern, companion) for size in sizes for pattern in patterns for companion in companions]
    with tempfile.TemporaryDirectory(prefix="moeplan-ranks-") as folder:
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=_rank, args=(rank, ranks, backend, folder, cases, repetitions), daemon=True)
            for rank in range(ranks)
        ]
        for worker in workers:
            worker.start()
        try:
            until = time.monotonic() + limit_s
            for worker in workers:
                worker.join(max(0.0, until - time.monotonic()))
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.terminate()
                    worker.join()
        result = Path(folder, "seconds.json")
        if not result.exists():
            raise InputError(
                "all-to-all",
                backend,
                f"its {ranks} processes did not finish in {limit_s:.0f} s",
                "use fewer or smaller sizes",
            )
        seconds = json.loads(result.read_text())
    return [
        Sample(
            kind="all_to_all",
            labels={"backend": backend, "pattern": pattern, "companion": companion},
            arguments={"ranks": ranks, "bytes": busiest_bytes(traffic(ranks, size, pattern))},
            seconds=tuple(taken),
        )
        for (size, pattern, companion), taken in zip(cases, seconds, strict=True)
    ]


def _rank(
    rank: int, ranks: int, backend: str, folder: str, cases: list[tuple[int, str, str]], repetitions: int
) -> None:
    """Measure every case as one rank; rank 0 writes what the slowest rank took."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    place = torch.device("cpu")
    if backend == "nccl":
        place = torch.device("cuda", rank)
        torch.cuda.set_device(place)
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    found = []
    for size, pattern, companion in cases:
        matrix = traffic(ranks, size, pattern)
        sent, received = matrix[rank].tolist(), matrix[:, rank].tolist()
        source = torch.zeros(sum(sent), dtype=torch.uint8, device=place)
        target = torch.zeros(sum(received), dtype=torch.uint8, device=place)
        with _computing(place) if companion == "compute" else contextlib.nullcontext():
            taken = []
            for repetition in range(_WARM_UP + repetitions):
                dist.barrier()
                began = time.perf_counter_ns()
                dist.all_to_all_single(target, source, received, sent)
                if backend == "nccl":
                    torch.cuda.synchronize(place)
                slowest = torch.tensor([(time.perf_counter_ns() - began) / NS_PER_S], dtype=torch.float64, device=place)
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
                if repetition >= _WARM_UP:
                    taken.append(float(slowest))
        found.append(taken)
    if rank == 0:
        aside = Path(folder, "seconds.tmp")
        aside.write_text(json.dumps(found))
        aside.rename(Path(folder, "seconds.json"))
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def _computing(place: torch.device) -> Any:
    """Multiply matrices in a thread while the context is open."""
    stop = threading.Event()
    left = torch.randn(_SIDE, _SIDE, device=place)

    def loop() -> None:
        while not stop.is_set():
            torch.mm(left, left)
            if place.type == "cuda":
                torch.cuda.synchronize(place)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
