"""Real clusters of two workers give the table that this machine gives, to the byte, and lose nothing when a worker dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moeplan
from house import ROOT
from long_runs import LONG
from moeplan.base.errors import InputError
from moeplan.studies import cluster
from moeplan.studies.keys import Keys
from moeplan.studies.local import Batches
from moeplan.studies.study import open_study
from moeplan.studies.table import write_parquet
from moeplan.studies.work import Answer, Asked

STUDY: dict[str, Any] = {
    "study": "small",
    "base": {"model": "tiny-moe", "hardware": "t4", "trace": "bundled", "window": 2},
    "grid": {
        "memory": ["300MiB", "450MiB", "460MiB"], "cache.experts_per_layer": [2, 3],
        "link": {"slow": {"machine.host_to_device.pinned_bytes_per_s": "6GB/s"}, "fast": {}},
    },
}  # fmt: skip
# Both libraries warn of their own affairs, and leave sockets to the collector.
QUIET = pytest.mark.filterwarnings("ignore")
REAL = pytest.mark.skipif(not LONG, reason="starting a cluster takes its time: MOEPLAN_LONG=1, as .ci/run does")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("here")
    return _table(moeplan.sweep(STUDY, store=folder / "s.sqlite", jobs=1), folder)


def _table(found: moeplan.StudyResult, folder: Path) -> bytes:
    write_parquet(found.to_frame(), folder / "t.parquet")
    return (folder / "t.parquet").read_bytes()


def _environment() -> dict[str, str]:
    """Return an environment in which workers find this moeplan."""
    there = [str(Path(moeplan.__file__).parents[1]), *([str(ROOT / ".typing")] if (ROOT / ".typing").exists() else [])]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*there, os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="module")
def dask_address() -> Iterator[str]:
    """Yield the address of a real scheduler with two workers, each a process."""
    pytest.importorskip("distributed", reason="Dask is not installed: pip install 'moeplan[studies]'")
    code = (
        "from distributed import LocalCluster\nimport sys\n"
        "if __name__ == '__main__':\n"
        "    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:\n"
        "        print(cluster.scheduler_address, flush=True)\n        sys.stdin.read()\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          env=_environment()) as running:  # fmt: skip
        assert running.stdout is not None and running.stdin is not None
        yield running.stdout.readline().strip()
        running.stdin.close()
        running.wait(60)


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """Yield the address of a real Ray cluster with two workers."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'moeplan[studies]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = dict(os.environ)
        os.environ.update(_environment(), RAY_DISABLE_IMPORT_WARNING="1")
        started = ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _node_ip_address="127.0.0.1",
        )
        yield started.address_info["address"]
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)


@REAL
@QUIET
def test_dask_gives_the_same_table(dask_address: str, expected: bytes, tmp_path: Path) -> None:
    found = moeplan.sweep(STUDY, store=tmp_path / "s.sqlite", backend="dask", address=dask_address)
    assert found.num_new == 12
    assert _table(found, tmp_path) == expected
    assert moeplan.sweep(STUDY, store=tmp_path / "s.sqlite", backend="dask", address=dask_address).num_new == 0


@REAL
@QUIET
def test_ray_gives_the_same_table(
    ray_address: str, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = moeplan.sweep(STUDY, store=tmp_path / "s.sqlite", backend="ray", address=ray_address)
    assert found.num_new == 12
    assert _table(found, tmp_path) == expected
    with pytest.raises(InputError, match="is connected to the Ray cluster at"):
        moeplan.sweep(STUDY, store=tmp_path / "t.sqlite", backend="ray", address="127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # this process has connected itself: that comes first
    for address in (None, "auto"):
        assert moeplan.sweep(STUDY, store=tmp_path / "s.sqlite", backend="ray", address=address).num_new == 0
    assert moeplan.sweep(STUDY, store=tmp_path / "u.sqlite", backend="ray").num_new == 12


def _killing(pids: list[int]) -> Any:
    """Return a progress function that kills these processes at the first answer."""

    def kill(done: int, total: int, note: str) -> None:
        while pids:
            os.kill(pids.pop(), signal.SIGKILL)

    return kill


@REAL
@QUIET
def test_a_killed_worker_of_dask_loses_nothing(dask_address: str, expected: bytes, tmp_path: Path) -> None:
    from distributed import Client

    with Client(dask_address, set_as_default=False) as client:
        pids = list(client.run(os.getpid).values())
    assert len(pids) == 2
    found = moeplan.sweep(
        STUDY, store=tmp_path / "s.sqlite", backend="dask", address=dask_address, progress=_killing(pids)
    )
    assert not pids and found.num_new == 12
    assert _table(found, tmp_path) == expected


@REAL
@QUIET
def test_a_killed_worker_of_ray_loses_nothing(ray_address: str, expected: bytes, tmp_path: Path) -> None:
    import ray

    def own_pid() -> int:
        time.sleep(0.5)  # so that both workers answer
        return os.getpid()

    asked = ray.remote(own_pid)
    pids = list(set(ray.get([asked.remote() for _ in range(2)])))
    found = moeplan.sweep(
        STUDY, store=tmp_path / "s.sqlite", backend="ray", address=ray_address, progress=_killing(pids)
    )
    assert not pids and found.num_new == 12
    assert _table(found, tmp_path) == expected


@QUIET
@pytest.mark.parametrize("address", [None, "auto"])
def test_a_note_of_a_ray_cluster_that_is_gone_is_one_line(
    address: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'moeplan[studies]'")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would wait for minutes"))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    with pytest.raises(InputError, match=r"ray_current_cluster names 127\.0\.0\.1:1") as refusal:
        moeplan.sweep(STUDY, store=tmp_path / "s.sqlite", backend="ray", address=address)
    assert "\n" not in str(refusal.value)


@QUIET
@pytest.mark.parametrize(
    ("backend", "address"),
    [
        ("dask", "tcp://127.0.0.1:1"),
        ("dask", None),
        ("ray", "127.0.0.1:1"),
        ("ray", "ray://127.0.0.1:1"),
        ("ray", "127.0.0.1:port"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(
    backend: str, address: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed", reason="dask is not installed")
    monkeypatch.setattr(cluster, "_CONNECT_S", 1)
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    with pytest.raises(InputError, match="--address") as refusal:
        moeplan.sweep(STUDY, store=tmp_path / "s.sqlite", backend=backend, address=address)
    assert "\n" not in str(refusal.value)


class Pretended:
    """A cluster whose workers die over some runs."""

    workers = 2

    def __init__(self, deadly: dict[str, int]) -> None:
        self.deadly, self.tried = deadly, dict[str, int]()
        self.closed = False

    def submit(self, predict: str, runs: Any, rules: str) -> Any:
        return tuple(runs)

    def wait(self, waiting: Any) -> Any:
        return waiting[-1]

    def result(self, finished: Any) -> list[Answer]:
        for run in finished:
            self.tried[run.key] = self.tried.get(run.key, 0) + 1
            if self.tried[run.key] <= self.deadly.get(run.key, 0):
                raise cluster._Lost
        return [Answer(run.key, "done", None, "{}") for run in finished]

    def close(self) -> None:
        self.closed = True


class Asking(dict[str, Any]):
    """Fields that can stand in a set."""

    def __hash__(self) -> int:  # type: ignore[override]
        return 0


def test_a_worker_that_dies_takes_only_the_run_that_kills_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = Pretended({"3": 99, "5": 1})
    monkeypatch.setattr(cluster, "_Dask", lambda address: pretended)
    batches = Batches([Asked(str(at), Asking()) for at in range(20)], lambda keys: set())
    found = [one for some in cluster.answers_there("simulate", batches, "dask", "tcp://x") for one in some]
    assert sorted(one.key for one in found) == sorted(str(at) for at in range(20))
    assert [one.key for one in found if one.state == "failed"] == ["3"]
    assert pretended.closed


def test_a_worker_with_other_sources_or_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (fields,) = open_study({"base": STUDY["base"]}).asked()
    key = Keys("simulate").key(fields)
    with pytest.raises(InputError, match="another moeplan"):
        cluster.answer_there("simulate", [(key, fields)], "other rules")
    with pytest.raises(InputError, match="other content"):
        cluster.answer_there("simulate", [("f" * 64, fields)], cluster.rules_sha256())


def test_a_cluster_that_goes_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = Pretended({})
    monkeypatch.setattr(pretended, "wait", lambda waiting: (_ for _ in ()).throw(RuntimeError("lost\nconnection")))
    monkeypatch.setattr(cluster, "_Ray", lambda address: pretended)
    with pytest.raises(InputError, match="the cluster is gone"):
        list(cluster.answers_there("simulate", Batches([Asked("1", Asking())], lambda keys: set()), "ray", None))
    assert pretended.closed
