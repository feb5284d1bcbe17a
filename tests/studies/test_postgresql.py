"""A real PostgreSQL server keeps the same table as a file, for several writers, and loses nothing when it is killed."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moeplan
from long_runs import LONG
from moeplan.base.errors import InputError
from moeplan.studies.store import Store
from moeplan.studies.study import open_study
from moeplan.studies.table import write_parquet
from moeplan.studies.work import DONE, Answer

pytestmark = pytest.mark.skipif(not LONG, reason="starting a server takes its time: MOEPLAN_LONG=1, as .ci/run does")
LONG_WAIT_S, STEP_S = 60.0, 0.2
STUDY: dict[str, Any] = {
    "study": "small",
    "base": {"model": "tiny-moe", "hardware": "t4", "trace": "bundled", "window": 2},
    "grid": {"memory": ["300MiB", "450MiB"], "cache.experts_per_layer": [2, 3]},
}


def _programs() -> Path | None:
    """Return the folder of the newest server's programs."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *map(Path, filter(None, [shutil.which("initdb")]))]
    return max(found).parent if found else None


class Server:
    """A server in a folder of its own, which runs as another user than root."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs, self.folder = programs, folder
        self._user: dict[str, Any] = {}
        if os.getuid() == 0:
            try:
                own = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("a server must not run as root, and there is no user postgres")
            os.chown(folder, own.pw_uid, own.pw_gid)
            self._user = {"user": own.pw_uid, "group": own.pw_gid, "extra_groups": []}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            str(programs / "initdb"),
            "-D",
            str(folder / "data"),
            "-U",
            "moeplan",
            "-A",
            "trust",
            "--no-sync",
            "-E",
            "UTF8",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, **self._user)
        self.url = f"postgresql+psycopg://moeplan@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        command = [str(self.programs / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port), "-h", "127.0.0.1",
                   "-k", str(self.folder)]  # fmt: skip
        with open(self.folder / "log", "ab") as log:
            self.running = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self._user)
        for _ in range(int(LONG_WAIT_S / STEP_S)):
            try:
                Store(self.url).close()
                return
            except InputError:
                time.sleep(STEP_S)
        raise AssertionError((self.folder / "log").read_text())

    def kill(self) -> None:
        """End the server with -9, and wait until its other processes have seen it."""
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.running.pid)], capture_output=True, text=True, check=False
        )
        self.running.send_signal(signal.SIGKILL)
        self.running.wait()
        for pid in map(int, children.stdout.split()):
            for _ in range(int(LONG_WAIT_S / STEP_S)):
                if not Path(f"/proc/{pid}").exists():
                    break
                time.sleep(STEP_S)

    def stop(self) -> None:
        self.running.send_signal(signal.SIGINT)
        self.running.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'moeplan[studies]'")
    programs = _programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed (initdb)")
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        found = Server(programs, Path(folder))
        found.start()
        yield found
        found.stop()


def _table(found: moeplan.StudyResult, path: Path) -> bytes:
    write_parquet(found.to_frame(), path)
    return path.read_bytes()


def test_a_server_keeps_the_same_table_as_a_file(server: Server, tmp_path: Path) -> None:
    there = moeplan.sweep(STUDY, store=server.url, jobs=2)
    here = moeplan.sweep(STUDY, store=tmp_path / "s.sqlite", jobs=1)
    assert (there.num_new, there.num_done) == (4, 4)
    assert _table(there, tmp_path / "1.parquet") == _table(here, tmp_path / "2.parquet")
    assert moeplan.sweep(STUDY, store=server.url).num_new == 0


def test_writers_at_the_same_time_double_nothing(server: Server) -> None:
    study = open_study(STUDY | {"study": "several"})
    keys = [f"key {at}" for at in range(60)]

    def write(mine: list[str]) -> None:
        with Store(server.url) as store:
            store.enter(study, keys)
            for key in mine:
                store.write([Answer(key, DONE, None, "{}")], {key: {}})

    writers = [threading.Thread(target=write, args=(mine,)) for mine in (keys[:40], keys[20:], keys[::-1])]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    with Store(server.url) as store:
        (kept,) = [one for one in store.studies() if one.name == "several"]
        assert sorted(store.done(kept.study)) == sorted(keys)


def test_a_server_that_is_killed_is_one_line_and_loses_nothing(server: Server) -> None:
    study = STUDY | {"study": "killed", "grid": {"memory": [f"{450 + at}MiB" for at in range(8)]}}

    def kill(done: int, total: int, note: str) -> None:
        if done == 3:
            server.kill()

    with pytest.raises(InputError, match="the database says") as refusal:
        moeplan.sweep(study, store=server.url, jobs=1, progress=kill)
    assert "\n" not in str(refusal.value)
    with pytest.raises(InputError, match="the database says"):
        Store(server.url)
    server.start()
    found = moeplan.sweep(study, store=server.url, jobs=1)
    assert (found.num_done, found.num_new) == (8, 5)
