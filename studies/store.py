"""Where runs are kept: one table of answers by their key, and which keys make up which study, in any database that SQLAlchemy knows.

Modelled: SQLite in a file by default; answers written in one transaction, each key once whoever writes it; a store of a newer version, or a
database that is no store, is refused; a database that is full, locked or gone is one clear line. Ignored: what an answer means.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from ..base.errors import InputError, one_line
from ..base.text_files import note_written
from .keys import as_text
from .study import Study
from .work import Answer

STORE_VERSION = 1
_FIELD = "--store"
_WAIT_S = 60
# One number for all stores of this product: databases with locks by number let one process at a time lay the tables out.
_LOCK = 0x6D6F6570
_MANY = 500
_METADATA = sa.MetaData()
_ABOUT = sa.Table(
    "moeplan_store", _METADATA,
    sa.Column("name", sa.String(40), primary_key=True), sa.Column("value", sa.String(200), nullable=False),
)  # fmt: skip
_RUNS = sa.Table(
    "runs", _METADATA,
    sa.Column("run_key", sa.String(64), primary_key=True), sa.Column("state", sa.String(20), nullable=False), sa.Column("reason", sa.Text),
    sa.Column("asked", sa.Text, nullable=False), sa.Column("figures", sa.Text, nullable=False),
)  # fmt: skip
_STUDIES = sa.Table(
    "studies", _METADATA,
    sa.Column("study", sa.String(64), primary_key=True), sa.Column("number", sa.Integer, nullable=False),
    sa.Column("name", sa.String(80), nullable=False), sa.Column("predict", sa.String(20), nullable=False),
    sa.Column("num_runs", sa.Integer, nullable=False), sa.Column("axes", sa.Text, nullable=False),
    sa.Column("base", sa.Text, nullable=False),
)  # fmt: skip
_STUDY_RUNS = sa.Table(
    "study_runs", _METADATA,
    sa.Column("study", sa.String(64), primary_key=True), sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("run_key", sa.String(64), nullable=False),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptStudy:
    """A study as a store knows it."""

    study: str
    """The hash of its name, its axes and its runs' keys."""
    name: str
    predict: str
    num_runs: int
    axes: Mapping[str, Sequence[Any]]
    """Labels of every axis's levels; a run's number counts through them, the last axis fastest."""
    base: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRun:
    """A run of a study that has an answer."""

    number: int
    state: str
    reason: str | None
    figures: Mapping[str, Any]


class Store:
    """A database of runs, open."""

    def __init__(self, where: str | os.PathLike[str], *, must_exist: bool = False) -> None:
        """Open the store at `where`, a file for SQLite or any SQLAlchemy URL, and lay its tables out where they are not there yet.

        must_exist: the file is read, not made. Raises InputError where it cannot be, or holds something else.
        """
        text = os.fspath(where)
        self.path = None if "://" in text else Path(text)
        if self.path is not None:
            _check_file(self.path, must_exist)
        self.name = (
            text if self.path is not None else f"{text.partition('://')[0]}://…"
        )  # until what is a password is known
        try:
            url = sa.make_url(text) if self.path is None else sa.URL.create("sqlite", database=str(self.path))
            self.name = text if self.path is not None else url.render_as_string(hide_password=True)
            waits = {"timeout": _WAIT_S} if url.get_backend_name() == "sqlite" else {}
            self._engine = sa.create_engine(url, connect_args=waits)
        except (ArgumentError, NoSuchModuleError) as error:
            rule = (
                f"not a database that is known ({one_line(error, 200)})"
                if isinstance(error, NoSuchModuleError)
                else "not a database's URL"
            )
            raise InputError(_FIELD, self.name, rule, "give a file, or a URL such as postgresql+psycopg://…") from None
        except ImportError as error:
            rule = f"its driver is not installed ({error.name or error})"
            raise InputError(_FIELD, self.name, rule, "pip install 'moeplan[studies]', or that driver") from None
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
            sa.event.listen(self._engine, "begin", _begin_at_once)
        try:
            self._lay_out()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close what is open."""
        self._engine.dispose()

    def __enter__(self) -> Store:
        """Return the store."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    # --- studies -----------------------------------------------------------------------------------------------------

    def enter(self, study: Study, keys: Sequence[str]) -> KeptStudy:
        """Return the study as it is kept, entered where it is new."""
        axes, base = json.dumps(study.labels(), ensure_ascii=False), as_text(study.base)
        digest = hashlib.sha256("\n".join((study.name, study.predict, axes, base, *keys)).encode()).hexdigest()
        with self._begun() as database:
            if database.scalar(sa.select(_STUDIES.c.num_runs).where(_STUDIES.c.study == digest)) is None:
                number = (database.scalar(sa.select(sa.func.max(_STUDIES.c.number))) or 0) + 1
                row = {"study": digest, "number": number, "name": study.name, "predict": study.predict, "num_runs": len(keys), "axes": axes,
                       "base": base}  # fmt: skip
                self._put(database, _STUDIES, [row])
                rows = [{"study": digest, "number": number, "run_key": key} for number, key in enumerate(keys)]
                self._put(database, _STUDY_RUNS, rows)
        return KeptStudy(
            study=digest,
            name=study.name,
            predict=study.predict,
            num_runs=len(keys),
            axes=study.labels(),
            base=study.base,
        )

    def studies(self) -> list[KeptStudy]:
        """Return the studies, in the order in which they were entered."""
        with self._begun() as database:
            found = database.execute(sa.select(_STUDIES).order_by(_STUDIES.c.number, _STUDIES.c.study)).all()
        return [
            KeptStudy(study=one.study, name=one.name, predict=one.predict, num_runs=one.num_runs, axes=json.loads(one.axes),
                      base=json.loads(one.base))
            for one in found
        ]  # fmt: skip

    # --- runs --------------------------------------------------------------------------------------------------------

    def done(self, study: str) -> dict[str, str]:
        """Return state by key of the study's runs that have an answer."""
        which = sa.select(_RUNS.c.run_key, _RUNS.c.state).join(_STUDY_RUNS, _STUDY_RUNS.c.run_key == _RUNS.c.run_key)
        with self._begun() as database:
            return {one[0]: one[1] for one in database.execute(which.where(_STUDY_RUNS.c.study == study))}

    def reasons(self, study: str, states: Sequence[str]) -> dict[str, str]:
        """Return the reason of the first run of a study in each of some states."""
        found = {}
        joined = sa.select(_RUNS.c.reason).join(_STUDY_RUNS, _STUDY_RUNS.c.run_key == _RUNS.c.run_key)
        with self._begun() as database:
            for state in states:
                which = joined.where(_STUDY_RUNS.c.study == study, _RUNS.c.state == state)
                found[state] = str(database.scalar(which.order_by(_STUDY_RUNS.c.number).limit(1)))
        return found

    def known(self, keys: Sequence[str]) -> set[str]:
        """Return which of a few keys have an answer, whoever wrote it."""
        with self._begun() as database:
            return set(database.scalars(sa.select(_RUNS.c.run_key).where(_RUNS.c.run_key.in_(keys))))

    def runs(self, study: str) -> Iterator[KeptRun]:
        """Yield the runs of a study that have an answer, by number."""
        columns = (_STUDY_RUNS.c.number, _RUNS.c.state, _RUNS.c.reason, _RUNS.c.figures)
        which = sa.select(*columns).join(_RUNS, _STUDY_RUNS.c.run_key == _RUNS.c.run_key)
        with self._begun() as database:
            for one in database.execute(which.where(_STUDY_RUNS.c.study == study).order_by(_STUDY_RUNS.c.number)):
                yield KeptRun(number=one[0], state=one[1], reason=one[2], figures=json.loads(one[3]))

    def write(self, answers: Sequence[Answer], asked: Mapping[str, Mapping[str, Any]]) -> None:
        """Write answers in one transaction; a key that has one keeps it. asked: each key's fields."""
        rows = [
            {"run_key": one.key, "state": one.state, "reason": one.reason, "asked": as_text(asked[one.key]), "figures": one.figures}
            for one in answers
        ]  # fmt: skip
        with self._begun() as database:
            self._put(database, _RUNS, rows)

    def forget(self, keys: Iterable[str]) -> None:
        """Remove answers, so that their runs are made again."""
        found = list(keys)
        with self._begun() as database:
            for start in range(0, len(found), _MANY):
                database.execute(sa.delete(_RUNS).where(_RUNS.c.run_key.in_(found[start : start + _MANY])))

    # --- the database ------------------------------------------------------------------------------------------------

    def _put(self, database: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert rows, leaving alone those whose key is there already."""
        if not rows:
            return
        dialect = self._engine.dialect.name
        if dialect == "sqlite":
            database.execute(sqlite.insert(table).on_conflict_do_nothing(), list(rows))
        elif dialect == "postgresql":
            database.execute(postgresql.insert(table).on_conflict_do_nothing(), list(rows))
        else:
            first = next(iter(table.primary_key.columns)) if table is not _STUDY_RUNS else table.c.number
            name = first.name
            for start in range(0, len(rows), _MANY):
                some = rows[start : start + _MANY]
                there = sa.select(first).where(first.in_([row[name] for row in some]))
                if table is _STUDY_RUNS:
                    there = there.where(table.c.study == some[0]["study"])
                taken = set(database.scalars(there))
                new = [dict(row) for row in some if row[name] not in taken]
                if new:
                    database.execute(sa.insert(table), new)

    def _lay_out(self) -> None:
        with self._begun() as database:
            if self._engine.dialect.name == "postgresql":
                database.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            names = set(sa.inspect(database).get_table_names())
            if _ABOUT.name in names:
                self._check_version(database)
            elif names & set(_METADATA.tables):
                rule = f"holds tables of another program ({', '.join(sorted(names)[:3])})"
                raise InputError(_FIELD, self.name, rule, "name another store")
            elif self.path is not None and names:
                rule = f"a database of another program (it has {', '.join(sorted(names)[:3])})"
                raise InputError(_FIELD, self.name, rule, "name another store")
            else:
                _METADATA.create_all(database)
                self._put(database, _ABOUT, [{"name": "version", "value": str(STORE_VERSION)}])
        if self.path is not None:
            note_written(self.path, unfinished=True)

    def _check_version(self, database: sa.Connection) -> None:
        found = database.scalar(sa.select(_ABOUT.c.value).where(_ABOUT.c.name == "version"))
        if not str(found).isdecimal() or int(str(found)) > STORE_VERSION:
            rule = f"its version is {found}, written by a newer moeplan; this one knows up to {STORE_VERSION}"
            raise InputError(_FIELD, self.name, rule, "use that version, or another store")

    @contextlib.contextmanager
    def _begun(self) -> Iterator[sa.Connection]:
        """Return a context with one transaction; raises InputError, in one line, for what the database says against it."""
        try:
            with self._engine.begin() as database:
                yield database
        except DBAPIError as error:
            raise InputError(_FIELD, self.name, _words(error.orig or error), "give the same command again") from None
        except SQLAlchemyError as error:
            raise InputError(_FIELD, self.name, one_line(error, 300), "give the same command again") from None


def _words(error: BaseException) -> str:
    """Return what a database's driver says, in the words of this product where it is one of the usual things."""
    said = one_line(error, 300)
    if "full" in said.lower() or "No space left" in said:
        return "the disk is full; every run that was finished is kept"
    if "locked" in said:
        return f"another program has held it for more than {_WAIT_S} s"
    if "not a database" in said or "malformed" in said:
        return f"no whole SQLite database ({said})"
    if "readonly" in said:
        return "cannot be written (read-only)"
    return f"the database says: {said}"


def _check_file(path: Path, must_exist: bool) -> None:
    """Return nothing; raises InputError where no database can be at a path."""
    if path.is_dir():
        raise InputError(_FIELD, str(path), "is a folder", "name a file")
    if must_exist and not path.exists():
        raise InputError(_FIELD, str(path), "no such store", "check the path; moeplan sweep makes one")
    if not path.parent.is_dir():
        raise InputError(_FIELD, str(path), "cannot be written (no such folder)", "choose a writable place")
    if path.exists() and not path.is_file():
        raise InputError(_FIELD, str(path), "a device or pipe, not a file", "name a file")


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    """Set a new connection up: others may read while one writes, and a writer waits for its turn.

    The log is written ahead: a process that is killed loses nothing that was committed.
    """
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.close()


def _begin_at_once(connection: sa.Connection) -> None:
    """Take the right to write when a transaction begins: one that had to wait for it later could deadlock with another."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")
