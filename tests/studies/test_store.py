"""A store keeps every run once, whoever writes it, and says in one line why it cannot."""

from __future__ import annotations

import resource
import sqlite3
import threading
from pathlib import Path

import pytest

from moeplan.base.errors import InputError
from moeplan.studies import store as stores
from moeplan.studies.store import Store
from moeplan.studies.study import open_study
from moeplan.studies.work import DONE, Answer

STUDY = open_study({"base": {"model": "tiny-moe", "hardware": "t4"}, "grid": {"memory": ["450MiB", "460MiB"]}})


def test_a_key_that_has_an_answer_keeps_it(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite") as store:
        kept = store.enter(STUDY, ["a", "b"])
        store.write([Answer("a", DONE, None, '{"x":1}')], {"a": {"memory": "450MiB"}})
        store.write([Answer("a", DONE, None, '{"x":2}')], {"a": {"memory": "450MiB"}})
        assert [run.figures for run in store.runs(kept.study)] == [{"x": 1}]
        assert store.done(kept.study) == {"a": DONE}
        assert store.known(["a", "b"]) == {"a"}
        assert store.enter(STUDY, ["a", "b"]) == kept == store.studies()[0]
        store.forget(["a"])
        assert store.done(kept.study) == {}


def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    Store(tmp_path / "s.sqlite").close()
    with sqlite3.connect(tmp_path / "s.sqlite") as database:
        database.execute("UPDATE moeplan_store SET value = '2'")
    with pytest.raises(InputError, match="written by a newer moeplan"):
        Store(tmp_path / "s.sqlite")


def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database" * 100)
    with sqlite3.connect(tmp_path / "other.sqlite") as database:
        database.execute("CREATE TABLE guests (name TEXT)")
    with sqlite3.connect(tmp_path / "runs.sqlite") as database:
        database.execute("CREATE TABLE runs (name TEXT)")
    before = (tmp_path / "text").read_bytes()
    for name, rule in (("text", "no whole SQLite database"), ("other.sqlite", "another program"), ("runs.sqlite", "another program"),
                       ("absent/s.sqlite", "no such folder"), (".", "is a folder"), ("nothing://x", "not a database that is known"),
                       ("postgresql+nonesuch://x/y", "not a database that is known")):  # fmt: skip
        with pytest.raises(InputError, match=rule) as refusal:
            Store(name if "://" in name else tmp_path / name)
        assert "\n" not in str(refusal.value)
    with pytest.raises(InputError, match="no such store"):
        Store(tmp_path / "none.sqlite", must_exist=True)
    assert (tmp_path / "text").read_bytes() == before


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        Store("postgresql+psycopg://me:secret@localhost:1/none")
    assert "secret" not in str(refusal.value)


def test_two_writers_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    keys = [f"{at}" for at in range(60)]

    def write(mine: list[str]) -> None:
        with Store(tmp_path / "s.sqlite") as store:
            store.enter(STUDY, keys)
            for key in mine:
                store.write([Answer(key, DONE, None, "{}")], {key: {}})

    writers = [threading.Thread(target=write, args=(mine,)) for mine in (keys[:40], keys[20:], list(reversed(keys)))]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    with Store(tmp_path / "s.sqlite") as store:
        (kept,) = store.studies()
        assert sorted(store.done(kept.study)) == sorted(keys)


def test_a_store_that_someone_holds_is_waited_for_and_then_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_WAIT_S", 0.05)
    with Store(tmp_path / "s.sqlite") as store:
        holder = sqlite3.connect(tmp_path / "s.sqlite", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(InputError, match="another program has held it"):
            store.write([Answer("a", DONE, None, "{}")], {"a": {}})
        holder.close()
        store.write([Answer("a", DONE, None, "{}")], {"a": {}})


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    """The most that a file of this process may have stands for the end of a disk."""
    with Store(tmp_path / "s.sqlite") as store:
        kept = store.enter(STUDY, [str(at) for at in range(2000)])
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = (tmp_path / "s.sqlite-wal").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 200_000, before[1]))
        written = 0
        try:
            refusal = None
            while refusal is None:
                try:
                    store.write([Answer(str(written), DONE, None, '"' + 500 * "x" + '"')], {str(written): {}})
                    written += 1
                except InputError as error:
                    refusal = error
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert written > 10 and "\n" not in str(refusal)
        assert len(store.done(kept.study)) == written
