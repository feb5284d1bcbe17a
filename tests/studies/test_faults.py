"""Faults that really happen: two commands write one store at the same time, a disk is full. Nothing is lost, nothing doubled."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import moeplan
from long_runs import LONG

BASE = {"model": "tiny-moe", "hardware": "t4", "trace": "bundled", "window": 2}


def _command(study: Path, store: Path) -> list[str]:
    return [sys.executable, "-m", "moeplan", "sweep", str(study), "--store", str(store), "--jobs", "2", "--json"]


def _written(folder: Path, name: str, memory: range) -> Path:
    grid = {"memory": [f"{450 + at}MiB" for at in memory], "cache.experts_per_layer": [2, 3]}
    study = folder / f"{name}.yaml"
    study.write_text(json.dumps({"study": name, "base": BASE, "grid": grid}))
    return study


def _keys(store: Path) -> list[str]:
    with closing(sqlite3.connect(store)) as database:
        return [row[0] for row in database.execute("SELECT run_key FROM runs")]


@pytest.mark.skipif(not LONG, reason="two commands that simulate: MOEPLAN_LONG=1, as .ci/run does")
def test_two_studies_at_the_same_time_share_a_store(tmp_path: Path) -> None:
    studies = [_written(tmp_path, "low", range(12)), _written(tmp_path, "high", range(6, 18))]
    store = tmp_path / "s.sqlite"
    running = [
        subprocess.Popen(_command(one, store), stdout=subprocess.PIPE, stderr=subprocess.PIPE) for one in studies
    ]
    said = [one.communicate() for one in running]
    assert [one.returncode for one in running] == [0, 0], said
    answers = [json.loads(out) for out, _ in said]
    assert [(one["num_runs"], one["num_done"]) for one in answers] == [(24, 24), (24, 24)]
    found = _keys(store)
    assert len(found) == len(set(found)) == 36


@contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a file system of so many bytes; skip where this process may not."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(not LONG, reason="a command that fills a disk: MOEPLAN_LONG=1, as .ci/run does")
def test_a_study_whose_disk_is_full_goes_on_when_there_is_room(tmp_path: Path) -> None:
    disk, study = tmp_path / "disk", _written(tmp_path, "many", range(40))
    disk.mkdir()
    with _small_disk(disk, "400k"):
        full = subprocess.run(_command(study, disk / "s.sqlite"), capture_output=True, text=True, check=False)
        assert full.returncode == 2, full.stderr
        (line,) = [one for one in full.stderr.splitlines() if "the disk is full" in one]
        assert "every run that was finished is kept" in line and "Traceback" not in full.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        kept = set(_keys(disk / "s.sqlite"))
        assert 0 < len(kept) < 80
        found = moeplan.sweep(study, store=disk / "s.sqlite", jobs=1)
        assert (found.num_done, found.num_new) == (80, 80 - len(kept))
        assert kept < set(_keys(disk / "s.sqlite"))
