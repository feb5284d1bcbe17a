"""Runs on a cluster that is there already: Ray's or Dask's.

Modelled: batches handed out two for each worker, answers taken as they come; a worker that dies takes nothing with it but the runs it was
about; one whose moeplan or files are others than the study's is refused, so that every answer is the one that this machine would give.
Ignored: how a cluster is started, and how moeplan and the study's files get to it (they must be there, under the same names).
"""

from __future__ import annotations

import importlib
import os
import socket
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..base.errors import InputError, MoeplanError, one_line
from .keys import Keys, rules_sha256
from .local import STRIKES, Batches
from .work import Answer, Asked, answer, failed

RAY, DASK = "ray", "dask"
CLUSTERS = (RAY, DASK)
ADDRESS_OF: Mapping[str, str] = {RAY: "RAY_ADDRESS", DASK: "DASK_SCHEDULER_ADDRESS"}
"""The variable of the environment that names the cluster, as its own tools read it."""
_AHEAD = 2
_CONNECT_S = 10
_FIELD = "--address"
_AUTO = "auto"
"""Ray's word for the cluster that this machine belongs to."""


class _Lost(Exception):
    """The worker that made a batch died."""


class _Cluster(Protocol):
    """What is asked of a cluster."""

    workers: int

    def submit(self, predict: str, runs: Sequence[Asked], rules: str) -> Any:
        """Return what stands for a batch's answers, hashable."""

    def wait(self, waiting: Sequence[Any]) -> Any:
        """Return one that is finished."""

    def result(self, finished: Any) -> list[Answer]:
        """Return its answers; raises _Lost."""

    def close(self) -> None:
        """Leave the cluster as it was."""


def answers_there(predict: str, batches: Batches, backend: str, address: str | None) -> Iterator[list[Answer]]:
    """Yield answers as they come from a cluster; raises InputError where there is none, or it is gone."""
    cluster: _Cluster = _Ray(address) if backend == RAY else _Dask(address)
    strikes: dict[str, int] = {}
    alone: deque[Asked] = deque()
    waiting: dict[Any, list[Asked]] = {}
    rules = rules_sha256()
    try:
        while True:
            while len(waiting) < _AHEAD * cluster.workers and (some := [alone.popleft()] if alone else batches.take()):
                waiting[cluster.submit(predict, some, rules)] = some
            if not waiting:
                return
            finished = cluster.wait(list(waiting))
            some = waiting.pop(finished)
            try:
                found = cluster.result(finished)
            except _Lost:
                for run in some:
                    strikes[run.key] = strikes.get(run.key, 0) + (len(some) == 1)
                    if strikes[run.key] >= STRIKES:
                        yield [
                            failed(run.key, f"the worker that made it died, {STRIKES} times (out of memory, or killed)")
                        ]
                    else:
                        alone.append(run)
                continue
            batches.grow()
            yield found
    except MoeplanError:
        raise
    except Exception as error:  # noqa: BLE001 (a cluster has many ways to go, and each is one line; every answer so far is kept)
        rule = f"the cluster is gone ({type(error).__name__}: {one_line(error, 200)})"
        raise InputError(_FIELD, address or backend, rule, "start it, and give the same command again") from None
    finally:
        cluster.close()


def answer_there(predict: str, runs: Sequence[tuple[str, Mapping[str, Any]]], rules: str) -> list[tuple[Any, ...]]:
    """Return the answers of runs, on a worker; raises InputError where its moeplan or its files are others than the study's."""
    if rules != rules_sha256():
        rule = "a worker has another moeplan than the one that started the study"
        raise InputError("--backend", rules_sha256()[:12], rule, "install the same one everywhere")
    keys, found = Keys(predict), []
    for key, fields in runs:
        if keys.key(fields) != key:
            rule = "a worker finds other content under the names of this run's model, machine or files"
            raise InputError("--backend", str(fields.get("model")), rule, "put the same files everywhere")
        found.append(tuple(answer(predict, Asked(key, fields))))
    return found


def _imported(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError("--backend", name, "is not installed", "pip install 'moeplan[studies]'") from None


def _knock(where: str) -> None:
    """Return nothing; raises OSError where an address with a port takes no connection, ValueError where its port is none."""
    host, colon, port = where.rpartition("://")[2].rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()


def _ray_note() -> Path:
    """Return the file in which Ray notes the cluster that this machine's head or worker joined last."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return Path(folder) / "ray" / "ray_current_cluster"


def _noted_by_ray() -> str:
    """Return the address in Ray's note, which outlives a cluster that was killed; empty where there is none."""
    try:
        return _ray_note().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _answers(found: Any) -> list[Answer]:
    return [Answer(*one) for one in found]


class _Ray:
    """An existing Ray cluster."""

    def __init__(self, address: str | None) -> None:
        self._ray = _imported(RAY, "ray")
        self._mine = not self._ray.is_initialized()
        if self._mine:
            named = os.environ.get(ADDRESS_OF[RAY]) if address in (None, _AUTO) else address
            self._connect(named or _AUTO)
        else:  # what this process has connected itself to comes before what its environment names
            self._check_connected(address)
        self.workers = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        self._make = self._ray.remote(max_retries=0)(answer_there)

    def _connect(self, where: str) -> None:
        try:
            _knock(
                _noted_by_ray() if where == _AUTO else where
            )  # Ray itself would wait for minutes where nothing answers
            self._ray.init(address=where, log_to_driver=False, logging_level="error", configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError, OSError) as error:
            rule = f"no Ray cluster answers there ({one_line(error, 200)})"
            if where == _AUTO and _noted_by_ray():
                rule += f"; Ray's own note in {_ray_note()} names {_noted_by_ray()}"
            raise InputError(_FIELD, where, rule, "start one with ray start, as its head") from None

    def _check_connected(self, address: str | None) -> None:
        """Return nothing; raises InputError where this process is on another cluster than the one asked for."""
        connected = self._ray.get_runtime_context().gcs_address
        if address not in (None, _AUTO, connected):
            rule = f"this process is connected to the Ray cluster at {connected} already"
            raise InputError(_FIELD, address, rule, "leave the address out, or call ray.shutdown() first")

    def submit(self, predict: str, runs: Sequence[Asked], rules: str) -> Any:
        return self._make.remote(predict, [tuple(run) for run in runs], rules)

    def wait(self, waiting: Sequence[Any]) -> Any:
        return self._ray.wait(list(waiting), num_returns=1)[0][0]

    def result(self, finished: Any) -> list[Answer]:
        errors = self._ray.exceptions
        try:
            return _answers(self._ray.get(finished))
        except errors.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, MoeplanError) else error) from None
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError):
            raise _Lost from None

    def close(self) -> None:
        if self._mine:
            self._ray.shutdown()


class _Dask:
    """An existing Dask cluster."""

    def __init__(self, address: str | None) -> None:
        self._dask = _imported(DASK, "distributed")
        where = address or os.environ.get(ADDRESS_OF[DASK])
        if where is None:
            rule = f"neither --address nor {ADDRESS_OF[DASK]} names a scheduler"
            raise InputError(_FIELD, "(absent)", rule, "dask scheduler starts one; write tcp://host:8786")
        try:
            self._client = self._dask.Client(where, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            rule = f"no Dask scheduler answers there ({one_line(error, 200)})"
            raise InputError(_FIELD, where, rule, "dask scheduler starts one") from None
        threads = sum(each["nthreads"] for each in self._client.scheduler_info(n_workers=-1)["workers"].values())
        if not threads:
            self.close()
            raise InputError(_FIELD, where, "the scheduler has no worker", "dask worker starts one")
        self.workers = threads

    def submit(self, predict: str, runs: Sequence[Asked], rules: str) -> Any:
        return self._client.submit(answer_there, predict, [tuple(run) for run in runs], rules, pure=False)

    def wait(self, waiting: Sequence[Any]) -> Any:
        with self._client.as_current():
            return self._dask.wait(list(waiting), return_when="FIRST_COMPLETED").done.pop()

    def result(self, finished: Any) -> list[Answer]:
        try:
            return _answers(finished.result())
        except self._dask.KilledWorker:
            raise _Lost from None

    def close(self) -> None:
        self._client.close()
