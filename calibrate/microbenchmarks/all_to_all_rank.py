"""One rank of an all-to-all that is being measured: a process of its own, started by `microbench_collectives`.

    python -m moeplan.calibrate.microbenchmarks.all_to_all_rank FOLDER RANK

reads FOLDER/task.json and writes FOLDER/rank-N.json: for every case and repetition when the rank began and when it was done, on
the machine's own clock, which all ranks share; and, where it computed meanwhile, the seconds of one product.

Modelled: on the CPU the system places threads, because gloo's own thread polls, and on one core with the thread it works for each
waits for the other's time slice; on a GPU exchange and products have a stream each. Cases take turns, round after round. A rank
ends when the process that started it does, whatever became of that. Ignored: what the numbers mean.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...base.units import NS_PER_S

_WARM_UP = 2
# A companion's speed is taken over at least so long, and at most so many exchanges.
_WINDOW_S = 0.05
_MOST_IN_WINDOW = 256
# A folder that another thread writes into is removed again, at most so often.
_REMOVALS, _BETWEEN_REMOVALS_S = 10, 0.05
_SIDES = {"cpu": 256, "cuda": 4096}
_CLOCK = time.perf_counter_ns  # CLOCK_MONOTONIC: the same for all processes of a machine


class Products:
    """Multiplies matrices in a thread, and notes when each product was done."""

    def __init__(self, place: torch.device) -> None:
        self._place = place
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
        side = _SIDES[place.type]
        self._left, self._right = (torch.randn(side, side, device=place).to(dtype) for _ in range(2))
        self.done_ns: list[int] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Return a context in which products are made; it opens when the first ones are done."""
        stop, ready = threading.Event(), threading.Event()
        self.done_ns = []

        def loop() -> None:
            torch.set_num_threads(1)  # every thread has a number of its own
            stream = torch.cuda.Stream(self._place) if self._place.type == "cuda" else None
            with torch.inference_mode(), torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                while not stop.is_set():
                    torch.mm(self._left, self._right)
                    if stream is not None:
                        stream.synchronize()
                    self.done_ns.append(_CLOCK())
                    if len(self.done_ns) > _WARM_UP:
                        ready.set()

        thread = threading.Thread(target=loop, name="moeplan products", daemon=True)
        thread.start()
        try:
            ready.wait(_WINDOW_S * 100)
            yield
        finally:
            stop.set()
            thread.join()

    def seconds(self, begin_ns: int, end_ns: int) -> float | None:
        """Return the mean seconds of a product made between two times; None where there were too few to tell."""
        inside = [at for at in self.done_ns if begin_ns <= at <= end_ns]
        return None if len(inside) < 2 else (inside[-1] - inside[0]) / (len(inside) - 1) / NS_PER_S


class Rank:
    """One rank: its buffers, its stream and what it has noted."""

    def __init__(self, task: dict[str, Any], rank: int, place: torch.device) -> None:
        self.rank, self.ranks, self.place = rank, int(task["ranks"]), place
        self.cases: list[dict[str, Any]] = task["cases"]
        largest = max([1, *(max(self._bytes(case)) for case in self.cases)])
        self.source = torch.randint(0, 256, (largest,), dtype=torch.uint8).to(place)
        self.target = torch.zeros(largest, dtype=torch.uint8, device=place)
        self.stream = torch.cuda.Stream(place) if place.type == "cuda" else None
        self.products = Products(place)
        self.spans: list[list[tuple[int, int]]] = [[] for _ in self.cases]
        self.made: list[list[float]] = [[] for _ in self.cases]

    def _bytes(self, case: dict[str, Any]) -> tuple[int, int]:
        """Return what this rank sends and receives in all, its own part included."""
        matrix = case["matrix"]
        return (sum(matrix[self.rank]), sum(row[self.rank] for row in matrix)) if matrix else (0, 0)

    def run(self, case: int) -> None:
        """Do one round of a case."""
        told = self.cases[case]
        if not told["matrix"]:
            self._products_only(case, everywhere=told["everywhere"])
        elif told["companion"] == "compute":
            self._together(case)
        else:
            for number in range(_WARM_UP + told["repetitions"]):
                span = self._exchange(case, told["inner"])
                if number >= _WARM_UP:
                    self.spans[case].append(span)

    def _exchange(self, case: int, inner: int) -> tuple[int, int]:
        """Return when this rank began `inner` exchanges and when they were done."""
        matrix = self.cases[case]["matrix"]
        sent, received = matrix[self.rank], [row[self.rank] for row in matrix]
        source, target = self.source[: sum(sent)], self.target[: sum(received)]
        dist.barrier()
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            if self.stream is not None:
                self.stream.synchronize()
            begin = _CLOCK()
            for _ in range(inner):
                dist.all_to_all_single(target, source, received, sent)
            if self.stream is not None:
                self.stream.synchronize()
            return begin, _CLOCK()

    def _together(self, case: int) -> None:
        """Exchange and compute at once, for long enough to tell the speed of both."""
        inner = self.cases[case]["inner"]
        begin, end = self._exchange(case, inner)
        number = self._agreed(min(_MOST_IN_WINDOW, max(2, round(_WINDOW_S * NS_PER_S / max(1, end - begin)))))
        with self.products.running():
            self._exchange(case, inner)
            spans = [self._exchange(case, inner) for _ in range(number)]
        self.spans[case] += spans
        made = self.products.seconds(spans[0][0], spans[-1][1])
        self.made[case] += [] if made is None else [made]

    def _products_only(self, case: int, *, everywhere: bool) -> None:
        """Compute on all ranks, or on the first one alone, while nothing is exchanged."""
        dist.barrier()
        if everywhere or self.rank == 0:
            with self.products.running():
                begin = _CLOCK()
                time.sleep(2 * _WINDOW_S)
                end = _CLOCK()
            made = self.products.seconds(begin, end)
            self.made[case] += [] if made is None else [made]
        dist.barrier()

    def _agreed(self, number: int) -> int:
        """Return rank 0's number on all ranks."""
        told = torch.tensor([number], dtype=torch.int64, device=self.place)
        dist.broadcast(told, 0)
        return int(told.item())

    def all(self, rounds: int, seconds: float, note: Callable[[int], None]) -> None:
        """Do every case, round after round, until `seconds` are over; the first round is always whole."""
        began = time.monotonic()
        for number in range(rounds):
            for case in range(len(self.cases)):
                self.run(case)
            note(number + 1)
            if self._agreed(int(time.monotonic() - began > seconds)):
                break


def main(folder: Path, rank: int) -> None:
    """Measure as one rank."""
    task = json.loads((folder / "task.json").read_text())
    torch.set_num_threads(1)
    place = torch.device("cpu")
    if task["backend"] == "nccl":
        place = torch.device("cuda", rank)
        torch.cuda.set_device(place)
    limit = dt.timedelta(seconds=task["limit_s"])
    dist.init_process_group(
        task["backend"], init_method=f"file://{folder}/meeting", rank=rank, world_size=task["ranks"], timeout=limit
    )
    found = Rank(task, rank, place)

    def note(number: int) -> None:
        if rank == 0:
            (folder / "rounds").write_text(str(number))

    found.all(task["rounds"], task["seconds"], note)
    aside = folder / f"rank-{rank}.tmp"
    aside.write_text(json.dumps({"spans": found.spans, "made": found.made}))
    aside.rename(folder / f"rank-{rank}.json")
    dist.barrier()  # nobody closes its connections while another one still talks
    dist.destroy_process_group()


def _end_with_parent(folder: Path) -> None:
    """End this process at once when the one that started it is gone (then the pipe from it is closed), and remove what it left."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(sys.stdin.fileno(), 1)  # past Python's buffer, whose lock would be in the way at the end
        for _ in range(_REMOVALS):  # the other thread may be writing there just now
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(_BETWEEN_REMOVALS_S)
        os._exit(1)

    threading.Thread(target=wait, name="moeplan parent", daemon=True).start()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its ranks
    _end_with_parent(Path(sys.argv[1]))
    main(Path(sys.argv[1]), int(sys.argv[2]))
