"""What every search goes by: candidates tried over the cores in batches until time is up, each counted by what became of it.

Modelled: batches of a fixed size, so that an answer does not depend on how many cores there are; a clock that is looked at between
batches, and never before there is an answer. Ignored: which candidates there are, what a trial is, and which is best.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import TypeAlias, TypeVar

T = TypeVar("T")
R = TypeVar("R")
Progress: TypeAlias = Callable[[int, int, str], None]
"""Is told how many candidates are done with, of how many, and which are at hand."""
BATCH = 16
"""Trials between two looks at the clock and at what is best: fixed, so that the answer is that of any number of cores."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What became of candidates."""

    num_evaluated: int = 0
    """Simulated to the end of the window."""
    num_abandoned: int = 0
    """Simulated until they could no longer be the best."""
    num_pruned: int = 0
    """Never simulated: their bound was no better than the best."""
    num_raced_out: int = 0
    """Too far behind after a part of the window."""
    num_skipped: int = 0
    """Not looked at: time was up."""

    @property
    def num_candidates(self) -> int:
        """All of them."""
        return sum(getattr(self, one.name) for one in fields(self))

    def add(self, other: Tally) -> None:
        """Count another search's candidates too."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def to_dict(self) -> dict[str, int]:
        """Return the counts as a plan document has them."""
        return {"num_candidates": self.num_candidates} | {one.name: getattr(self, one.name) for one in fields(self)}


@dataclass(slots=True)
class Trials:
    """A search as it goes; a context that holds its threads.

    total: candidates in all, as far as they are known. until: clock reading (`time.monotonic`) after which no further batch is
    begun, once there is an answer. workers: threads; None: one a core, four at most.
    """

    total: int = 0
    until: float = math.inf
    workers: int | None = None
    progress: Progress | None = None
    tally: Tally = field(default_factory=Tally)
    done: int = 0
    """Candidates done with, one way or another."""
    _pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Trials:
        self._pool = ThreadPoolExecutor(threads() if self.workers is None else self.workers)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def is_time_up(self) -> bool:
        """Return whether the clock is past `until`."""
        return time.monotonic() >= self.until

    def batches(
        self, waiting: Sequence[T], is_answered: Callable[[], bool], size: int = BATCH
    ) -> Iterator[Sequence[T]]:
        """Yield candidates in order, `size` at a time, until time is up; the rest are counted as skipped."""
        begun = 0
        while begun < len(waiting) and not (is_answered() and self.is_time_up()):
            yield waiting[begun : begun + size]
            begun += size
        self.tally.num_skipped += max(0, len(waiting) - begun)

    def each(self, trial: Callable[[T], R], batch: Sequence[T]) -> Iterator[R]:
        """Return what comes of each trial of a batch, in order, made over all threads."""
        return map(trial, batch) if self._pool is None else self._pool.map(trial, batch)

    def tell(self, more: int, words: str) -> None:
        """Report so many further candidates as done with."""
        self.done += more
        if self.progress is not None:
            total = max(self.total, 1)
            self.progress(min(self.done, total), total, words)


def threads() -> int:
    """Return how many threads try candidates: one a core, four at most."""
    return max(1, min(4, os.cpu_count() or 1))


def deadline(seconds: float | None) -> float:
    """Return the clock reading so many seconds from now; None: never."""
    return math.inf if seconds is None else time.monotonic() + seconds
