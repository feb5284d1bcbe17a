"""Make a study's runs: those that its store has no answer for, each kept as it is finished, whatever happens to this process.

Modelled: the whole of a study from its file to its result; the first runs here, where they compile what all need; time left from what
runs have taken since. Ignored: where runs are made (`local`, `cluster`), how they are kept (`store`).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from ..base.errors import InputError, UnknownName
from ..base.frames import Tabular
from .cluster import CLUSTERS, answers_there
from .keys import Keys
from .local import Batches, answers_here
from .store import KeptStudy, Store
from .study import StudyLike, open_study
from .table import STATE
from .work import DONE, FAILED, STATES, Answer, Asked, answer

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[int, int, str], None]
LOCAL = "local"
BACKENDS = (LOCAL, *CLUSTERS)
_MOST_JOBS = 1024
_SPEEDS = ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s")
_FIRST_RUNS_S = 30.0
_WINDOW_S = 60.0
_SURE_AFTER_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult(Tabular):
    """A study whose runs have their answers, in its store."""

    name: str
    store: str
    """The store's file, or its URL without a password."""
    num_runs: int
    num_done: int
    """Runs that have an answer, be it that they do not fit."""
    num_new: int
    """Runs that were made now; the others had their answers already."""
    states: Mapping[str, int]
    """Runs by what came of them: done, does not fit, refused, failed."""
    reasons: Mapping[str, str]
    """The first reason of each state but done."""
    study: str = field(repr=False)
    """The hash by which the store knows this study."""
    opened: str = field(repr=False)
    """What opens the store."""

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `moeplan sweep --json` prints."""
        return {
            "study": self.name, "num_runs": self.num_runs, "num_done": self.num_done, "num_new": self.num_new, "store": self.store,
            "states": dict(self.states), "reasons": dict(self.reasons),
        }  # fmt: skip

    def to_frame(self) -> pd.DataFrame:
        """Return the runs as a table, one a row in the order of their numbers: labels of axes, state, reason, figures.

        Bytes are bytes, times seconds, speeds tokens per second; a figure that a run has not is NaN or None. Raises InputError where the
        store is gone.
        """
        from .table import table_of

        with Store(self.opened, must_exist=True) as store:
            kept = next(each for each in store.studies() if each.study == self.study)
            return table_of(kept, store.runs(self.study))

    def table_rows(self) -> list[dict[str, Any]]:
        """Return the rows of `to_frame`."""
        return [dict(zip(map(str, row), row.values(), strict=True)) for row in self.to_frame().to_dict("records")]

    def shown_columns(self, columns: list[str]) -> list[str]:
        """Return the axes, the state and the speeds of the frame's columns."""
        return columns[: columns.index(STATE) + 1] + [name for name in _SPEEDS if name in columns]

    def table_title(self) -> str:
        """Return the text that `moeplan sweep` prints."""
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Return the result in a few lines."""
        found = [f"{self.name}: {self.num_done} of {self.num_runs} runs, {self.num_new} of them new, in {self.store}"]
        for state, count in self.states.items():
            if count:
                found.append(f"  {state:13} {count}" + (f"   {self.reasons[state]}" if state in self.reasons else ""))
        return found


def sweep(
    study: StudyLike,
    *,
    store: str | os.PathLike[str] | None = None,
    backend: str = LOCAL,
    address: str | None = None,
    jobs: int | None = None,
    retry: bool = False,
    progress: Progress | None = None,
) -> StudyResult:
    """Return a study's result, having made those of its runs that its store has no answer for.

    study: a file (.yaml), its content as a table, or a `Study`: what all runs share and the axes that are combined. store: a file for
    SQLite, or any SQLAlchemy URL; None: the study's name with `.sqlite`, in this folder. backend: "local", or "ray" or "dask", a cluster
    that is there already; address: the cluster's, None: that of `RAY_ADDRESS` or `DASK_SCHEDULER_ADDRESS`. jobs: processes here; None: one
    a core. retry: make runs that failed again. Each run is kept when it is finished: a study that was stopped, or killed, goes on with
    the same call. The answers depend neither on `jobs` nor on the backend.

    Raises InputError for a study with a key, level or file that cannot be, and for a store that cannot be written or is another program's.
    """
    if backend not in BACKENDS:
        raise UnknownName("--backend", backend, BACKENDS)
    if backend == LOCAL and address is not None:
        raise InputError("--address", address, "only a cluster has one", "leave it out, or use --backend ray or dask")
    if backend != LOCAL and jobs is not None:
        raise InputError("--jobs", jobs, "a cluster has as many workers as it has", "leave it out")
    if jobs is not None and not 0 < jobs <= _MOST_JOBS:
        raise InputError("--jobs", jobs, f"not a whole number from 1 to {_MOST_JOBS}", "give one in between")
    found = open_study(study)
    asked = list(found.asked())
    keys = Keys(found.predict)
    runs = [Asked(keys.key(fields), fields) for fields in asked]
    opened = f"{found.name}.sqlite" if store is None else os.fspath(store)
    with Store(opened) as database:
        kept = database.enter(found, [run.key for run in runs])
        states = database.done(kept.study)
        if retry:
            again = [key for key, state in states.items() if state == FAILED]
            database.forget(again)
            for key in again:
                del states[key]
        num_new = _make(kept, runs, states, database, _Where(backend, address, jobs), progress)
        return _result(kept, runs, states, database, opened, num_new)


class _Where(NamedTuple):
    """Where runs are made."""

    backend: str
    address: str | None
    jobs: int | None


def _make(
    kept: KeptStudy,
    runs: Sequence[Asked],
    states: dict[str, str],
    database: Store,
    where: _Where,
    progress: Progress | None,
) -> int:
    """Return how many runs were made: all that have no answer in `states`, which gets theirs."""
    missing = {run.key: run.fields for run in runs if run.key not in states}
    if not missing:
        return 0
    total = len(missing) + len(states)
    meter = _Meter(progress or (lambda done, total, note: None), len(states), total)
    queue = sorted((Asked(key, fields) for key, fields in missing.items()), key=_shared)
    batches = Batches(queue, database.known)
    num_new = 0
    made = _answers(kept.predict, batches, min(where.jobs or len(os.sched_getaffinity(0)), len(missing)), meter)
    if where.backend != LOCAL:
        meter.start()
        made = answers_there(kept.predict, batches, where.backend, where.address)
    for answers in made:
        database.write(answers, missing)
        num_new += len(answers)
        states.update((one.key, one.state) for one in answers)
        meter.done(len(answers))
    if batches.passed_over:
        states.update(database.done(kept.study))
    return num_new


def _answers(predict: str, batches: Batches, jobs: int, meter: _Meter) -> Iterator[list[Answer]]:
    """Yield answers: the first here, until one ran to its end, so that machine code is compiled once and processes inherit it."""
    began = time.monotonic()
    while time.monotonic() - began < _FIRST_RUNS_S:
        first = batches.take()
        if not first:
            return
        found = [answer(predict, run) for run in first]
        yield found
        if any(one.state == DONE for one in found):
            break
    meter.start()
    yield from answers_here(predict, batches, jobs)


def _shared(run: Asked) -> tuple[str, ...]:
    """Return what runs share that takes long to make: those that share it are made one after the other."""
    fields = run.fields
    names = ("model", "trace", "lengths", "prompt_tokens", "reply_tokens", "seed", "concurrency", "quant", "hardware")
    return tuple(str(fields.get(name, "")) for name in names)


class _Meter:
    """Says how far a study is, and how long the rest takes at the pace of the last minute."""

    def __init__(self, report: Progress, done: int, total: int) -> None:
        self._report, self._done, self._total = report, done, total
        self._marks: deque[tuple[float, int]] = deque()

    def start(self) -> None:
        """Begin to count time: what was compiled before is not part of the pace."""
        self._marks.append((time.monotonic(), self._done))

    def done(self, count: int) -> None:
        """Count runs that are finished."""
        self._done += count
        note = "runs"
        if self._marks:
            now = time.monotonic()
            self._marks.append((now, self._done))
            while len(self._marks) > 2 and now - self._marks[1][0] > _WINDOW_S:
                self._marks.popleft()
            began, before = self._marks[0]
            if now - began >= _SURE_AFTER_S and self._done > before:
                note = f"runs, {_duration((self._total - self._done) * (now - began) / (self._done - before))} left"
        self._report(self._done, self._total, note)


def _duration(seconds: float) -> str:
    minutes = timedelta(seconds=seconds) / timedelta(minutes=1)
    if minutes < 1.5:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{timedelta(minutes=minutes) / timedelta(hours=1):.1f} h"


def _result(
    kept: KeptStudy, runs: Sequence[Asked], states: Mapping[str, str], database: Store, opened: str, num_new: int
) -> StudyResult:
    counts = dict.fromkeys(STATES, 0)
    num_done = 0
    for run in runs:
        state = states.get(run.key)
        if state is not None:
            counts[state] += 1
            num_done += 1
    wanted = [state for state in STATES if state != DONE and counts[state]]
    return StudyResult(
        name=kept.name, store=database.name, num_runs=kept.num_runs, num_done=num_done, num_new=num_new, states=counts,
        reasons=database.reasons(kept.study, wanted), study=kept.study, opened=opened,
    )  # fmt: skip
