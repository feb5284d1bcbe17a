"""Runs on this machine's cores: forked processes, each with the machine code and the nouns that this one has loaded already.

Modelled: batches that grow until they take a fraction of a second, so that handing them out costs little and a kill loses little; a process
that dies takes nothing with it but the runs it was about, which are made again one at a time, and the run that kills its process over
and over is said to. Ignored: other machines (`cluster`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool

from ..base.workers import worker_pool
from .keys import rules_sha256
from .work import Answer, Asked, answer, answer_all, failed

BATCH_S = 0.25
_MOST_RUNS, _MOST_THERE = 64, 8
_AHEAD = 2
"""Batches that wait for each process."""
STRIKES = 3

Wanted = Callable[[Sequence[str]], set[str]]
"""Which of a few keys have an answer by now."""


class Batches:
    """Deals runs out in batches, each of which takes about `BATCH_S`."""

    def __init__(self, runs: Sequence[Asked], known: Wanted) -> None:
        self._runs, self._known = deque(runs), known
        self._size = 1.0
        self.passed_over = 0
        """Runs that someone else answered meanwhile."""

    def take(self) -> list[Asked]:
        """Return the next runs that nobody has answered; none at the end."""
        while self._runs:
            some = [self._runs.popleft() for _ in range(min(int(self._size), len(self._runs)))]
            there = self._known([run.key for run in some])
            self.passed_over += len(there)
            left = [run for run in some if run.key not in there]
            if left:
                return left
        return []

    def took(self, num_runs: int, seconds: float) -> None:
        """Learn from a batch that is finished how large the next ones should be."""
        self._size = max(1.0, min(2 * self._size, _MOST_RUNS, BATCH_S * num_runs / max(seconds, 1e-9)))

    def grow(self) -> None:
        """Make batches larger where nobody says how long one took: a cluster's take longer to get there than here."""
        self._size = min(2 * self._size, _MOST_THERE)


def answers_here(predict: str, batches: Batches, jobs: int) -> Iterator[list[Answer]]:
    """Yield answers as they come, from `jobs` processes; one: from this one."""
    if jobs <= 1:
        while some := batches.take():
            began = time.monotonic()
            for run in some:
                yield [answer(predict, run)]
            batches.took(len(some), time.monotonic() - began)
        return
    strikes: dict[str, int] = {}
    suspects: list[Asked] = []
    while True:
        lost = yield from _until_broken(predict, batches, suspects, jobs)
        if not lost:
            return
        if len(lost) == 1:
            run = lost[0]
            strikes[run.key] = strikes.get(run.key, 0) + 1
            if strikes[run.key] >= STRIKES:
                yield [failed(run.key, f"the process that made it died, {STRIKES} times (out of memory, or killed)")]
        suspects = [*lost, *(run for run in suspects if run.key not in {each.key for each in lost})]
        suspects = [run for run in suspects if strikes.get(run.key, 0) < STRIKES]


def _until_broken(
    predict: str, batches: Batches, suspects: list[Asked], jobs: int
) -> Generator[list[Answer], None, list[Asked]]:
    """Yield answers; return the runs that were under way when a process died, none at the end."""
    waiting: dict[Future[list[Answer]], tuple[list[Asked], float]] = {}
    taken: list[Asked] = []  # not handed over yet: a pool that is broken by then takes nothing
    rules = rules_sha256()
    try:
        with worker_pool(jobs) as pool:
            while suspects:  # one at a time: if its process dies again, it was this one
                only = taken = [suspects[0]]
                future = pool.submit(answer_all, predict, only, rules)
                waiting, taken = {future: (only, 0.0)}, []
                found = future.result()
                waiting = {}
                suspects.pop(0)
                yield found
            while True:
                while len(waiting) < _AHEAD * jobs and (taken := batches.take()):
                    waiting[pool.submit(answer_all, predict, taken, rules)] = taken, time.monotonic()
                    taken = []
                if not waiting:
                    return []
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    found = future.result()
                    some, began = waiting.pop(future)
                    batches.took(len(some), (time.monotonic() - began) / _AHEAD)
                    yield found
    except BrokenProcessPool:
        return [*(run for some, _ in waiting.values() for run in some), *taken]
