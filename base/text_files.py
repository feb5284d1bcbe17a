"""Files, in and out: read whole up to a limit or refused in one line, written whole or not at all.

Modelled: every way in which a file cannot be read (absent, not readable, too large, not UTF-8) or written. What is written stands
aside until it is complete, as a part that its writer locks: a part without a writer was left by a run that was killed, and the
next run that writes into the folder removes it. Links are followed; devices and pipes are written to and never replaced.
Places are tried before any work begins (`check_outputs`). Plain code, because a machine that only measures has nothing else.
Ignored: what files hold (`json_files`, `calibrate.samples`, grids); what a folder above may become while the work goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

from .errors import InputError

AnyPath: TypeAlias = str | os.PathLike[str]

# Names of what is not complete yet: the target's, the writer's process and a number.
_PART_SUFFIX = ".moeplan-part"
_PART = re.compile(r"\..*\.[0-9]+-[0-9]+" + re.escape(_PART_SUFFIX) + r"\Z", re.DOTALL)
# A file's name may have 255 bytes; a part's name adds a few to its target's.
_KEPT_NAME_BYTES = 100
_COPY_BYTES = 1 << 20
_REMEDY = "choose a writable place"
# So much tells text from anything else.
_FIRST_BYTES = 1 << 16
_MIB = 1 << 20


def read_text(path: str | os.PathLike[str], what: str, max_bytes: int) -> str:
    """Return the text of the file at `path`.

    what: what the file is supposed to be, for messages. Raises InputError for a file that is absent, not readable, larger
    than `max_bytes` or not UTF-8.
    """
    name = os.fspath(path)
    try:
        refuse_devices(path)
        with open(path, "rb") as file:
            raw = file.read(min(_FIRST_BYTES, max_bytes + 1))
            if b"\0" in raw:  # no text: a file of zeros, for instance, however large it is
                raise InputError(what, name, "not text", "check that it is the right file")
            raw += file.read(max_bytes + 1 - len(raw))
    except FileNotFoundError:
        raise InputError(what, name, "no such file", "check the path") from None
    except MemoryError:
        raise InputError(what, name, "larger than the memory that is free", "check that it is the right file") from None
    except (OSError, ValueError) as error:  # ValueError: a device, a path with a zero byte
        raise InputError(what, name, f"cannot be read ({_reason(error)})", "check the path") from None
    if len(raw) > max_bytes:
        rule = f"larger than {max_bytes // _MIB} MiB" if max_bytes >= _MIB else f"larger than {max_bytes} bytes"
        raise InputError(what, name, rule, "check that it is the right file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(what, name, "not UTF-8 text", "check that it is the right file") from None


def refuse_devices(path: AnyPath, *, pipes: bool = True) -> None:
    """Return nothing; raises ValueError where `path` has no end that could be seen: a device, or a pipe unless `pipes` are read.

    What is absent is nothing yet, and whoever opens it says so.
    """
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISREG(kind) or (pipes and (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind))):
        return
    raise ValueError("a folder, not a file" if stat.S_ISDIR(kind) else "a device or pipe, not a file")


# --- where output goes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where the bytes of an output end up."""

    path: Path
    """The file that takes them, links followed; for a device or pipe, the path as given."""
    through: bool
    """What stands there takes bytes and is not replaced: a device, a pipe, the file that a stream of this process goes to."""
    mode: int | None
    """Permissions of the file that is replaced; None where there is none."""

    @property
    def parts_folder(self) -> Path:
        """Folder of what is not complete yet: beside the target, so that it can take the target's name."""
        return Path(tempfile.gettempdir()) if self.through else self.path.parent


def _place(path: AnyPath, field: str) -> _Place:
    """Return where an output called `path` ends up; raises InputError for a folder, or a file that may not be written."""
    path = path or os.curdir
    try:
        found = os.stat(path)
    except FileNotFoundError:
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            raise _refused(field, path, "no such folder") from None
        return _Place(path=target, through=False, mode=None)
    except (OSError, ValueError) as error:
        raise _refused(field, path, _reason(error)) from None
    if stat.S_ISDIR(found.st_mode):
        raise InputError(field, os.fspath(path), "cannot be written (is a folder)", "name a file")
    if not os.access(path, os.W_OK):
        raise _refused(field, path, "permission denied")
    if not stat.S_ISREG(found.st_mode) or _stream_of(found) is not None:
        return _Place(path=Path(path), through=True, mode=None)
    return _Place(path=Path(os.path.realpath(path)), through=False, mode=stat.S_IMODE(found.st_mode))


def _stream_of(found: os.stat_result) -> int | None:
    """Return the descriptor of the standard stream that goes to the regular file `found`, None where none does."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(found.st_mode) and os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
    return None


def _reason(error: OSError | ValueError) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return reason.lower()


def _refused(field: str, path: AnyPath, reason: str) -> InputError:
    return InputError(field, os.fspath(path), f"cannot be written ({reason})", _REMEDY)


def check_outputs(outputs: Mapping[str, AnyPath | None], inputs: Mapping[str, AnyPath | None] | None = None) -> None:
    """Return nothing when every output can be written; raises InputError, before any work, for the first that cannot.

    outputs, inputs: option → path, or None where it is not given. Refused are folders, places where no file can be made, and an
    output that is the same file as another output or as an input, by whatever name. Inputs that are no files are ignored.
    """
    given = {field: path for field, path in outputs.items() if path is not None}
    places = {field: _place(path, field) for field, path in given.items()}
    for field, place in places.items():
        if not place.through:
            with _open_part(place, given[field], field):
                pass
    read = {field: Path(path) for field, path in (inputs or {}).items() if path is not None and os.path.isfile(path)}
    seen: dict[str, Path] = {}
    for field, place in places.items():
        if place.through:
            continue
        for other, path in seen.items():
            if _same(place.path, path):
                raise InputError(field, os.fspath(given[field]), f"is the same file as {other}", "name another file")
        for other, path in read.items():
            if _same(place.path, path):
                raise InputError(field, os.fspath(given[field]), f"would overwrite {other}", "name another file")
        seen[field] = place.path


def _same(one: Path, other: Path) -> bool:
    """Return whether two paths are one file, which need not exist."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def output_folder(path: AnyPath, field: str = "output") -> Path:
    """Return the folder at `path`, made where it is absent; raises InputError where it cannot be, or takes no files."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        there = "a file stands there" if isinstance(error, (FileExistsError, NotADirectoryError)) else _reason(error)
        raise InputError(field, os.fspath(path), f"no folder can be made there ({there})", _REMEDY) from None
    check_outputs({field: folder / "any"})
    return folder


# --- parts ---------------------------------------------------------------------------------------------------------------


def _open_part_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _open_part_folder(path: Path) -> int:
    os.mkdir(path)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


@contextlib.contextmanager
def _open_part(place: _Place, path: AnyPath, field: str, *, folder: bool = False) -> Iterator[tuple[int, Path]]:
    """Return a context with a new, locked part (descriptor, path); what still has its name at the end is removed.

    Raises InputError where it cannot be made.
    """
    where = place.parts_folder
    _sweep(where)
    kept = os.fsdecode(os.fsencode(place.path.name)[:_KEPT_NAME_BYTES])
    for number in itertools.count():
        part = where / f".{kept}.{os.getpid()}-{number}{_PART_SUFFIX}"
        try:
            descriptor = _open_part_folder(part) if folder else _open_part_file(part)
        except FileExistsError:
            continue
        except (OSError, ValueError) as error:
            raise _refused(field, path, _reason(error)) from None
        try:
            is_held = _lock(descriptor) and _is_at(descriptor, part)
        except BaseException:  # a Ctrl-C: without its lock, the next run removes it
            os.close(descriptor)
            raise
        if is_held:
            break
        os.close(descriptor)  # another run took it, in the instant before it was locked, for one without a writer
    try:
        yield descriptor, part
    finally:
        try:
            _remove(part)
        finally:  # a Ctrl-C while it is removed leaves it to the next run, which must not find it locked
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Return whether this process holds the lock now; a file system without locks counts as held."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def _sweep(folder: Path) -> None:
    """Remove parts in `folder` that no process writes any more: those of runs that were killed."""
    try:
        with os.scandir(folder) as entries:
            parts = [Path(entry.path) for entry in entries if _PART.match(entry.name) and not entry.is_symlink()]
    except OSError:
        return
    for part in parts:
        with contextlib.suppress(OSError):
            descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, part):
                    _remove(part)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def part_folder(path: AnyPath, field: str = "output") -> Iterator[Path]:
    """Return a context with a folder for pieces of the output `path`, gone at the end; raises InputError where none can be made."""
    place = _place(path, field)
    with _open_part(place, path, field, folder=True) as (_, part):
        yield part


# --- writing -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_aside(path: AnyPath, field: str = "output", *, unfinished: bool = False) -> Iterator[IO[bytes]]:
    """Return a context whose file takes the name `path` when the block ends well, and vanishes when it does not.

    A reader sees the old file or the whole new one. `.name` of the file is where it stands meanwhile. Where `path` is a device or a
    pipe, it is sent there at the end. unfinished: the file is no result, but where a command that is stopped goes on. Raises
    InputError where `path` cannot be written.
    """
    place = _place(path, field)
    # The part's own descriptor stays open beside the file's, and with it the lock.
    with _open_part(place, path, field) as (descriptor, part), open(part, "r+b") as file:
        try:
            yield file
            file.flush()
            if place.through:
                _send(part, place.path)
                note_written(path)
                return
            if place.mode is not None:
                os.fchmod(descriptor, place.mode)
            os.fsync(file.fileno())
            # Before it is true: a Ctrl-C may come right after it is. What is not at its place then is not counted.
            note_written(path, unfinished=unfinished, identity=os.fstat(descriptor))
            os.replace(part, place.path)
        except OSError as error:
            raise _refused(field, path, _reason(error)) from None


def _send(part: Path, target: Path) -> None:
    """Copy a complete part to a device or pipe, or after what a standard stream has written to the file it goes to."""
    stream = _stream_of(os.stat(target))
    if stream is None:
        descriptor = os.open(target, os.O_WRONLY | os.O_NOCTTY)
    else:
        (sys.stdout if stream == 1 else sys.stderr).flush()
        descriptor = os.dup(stream)
    with open(part, "rb") as source, os.fdopen(descriptor, "wb") as out:
        shutil.copyfileobj(source, out, _COPY_BYTES)


def write_atomic(path: AnyPath, data: bytes | str, *, unfinished: bool = False) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, whatever happens in between.

    The bytes go to a part beside the target, reach the disk, and take the target's name. unfinished: see `written_aside`. Raises
    InputError where the folder does not exist or cannot be written; then nothing is left behind.
    """
    with written_aside(path, unfinished=unfinished) as file:
        file.write(data.encode() if isinstance(data, str) else data)


# --- what was written ----------------------------------------------------------------------------------------------------

# Of this process: path as it was given → (whether it is where a stopped command goes on, the file that is to be there).
_WRITTEN: dict[str, tuple[bool, os.stat_result | None]] = {}


def note_written(path: AnyPath, *, unfinished: bool = False, identity: os.stat_result | None = None) -> None:
    """Remember that `path` is complete, or will be once the file `identity` stands there, for the case that the command is stopped."""
    _WRITTEN[os.fspath(path)] = unfinished, identity


def forget_written() -> None:
    """Remember nothing of what was written: a command begins."""
    _WRITTEN.clear()


def written_files() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what the command has written: (results, files from which the same command goes on); what is gone again is left out."""
    there: tuple[list[str], list[str]] = ([], [])
    for path, (unfinished, identity) in _WRITTEN.items():
        with contextlib.suppress(OSError, ValueError):
            found = os.stat(path)
            if identity is None or os.path.samestat(found, identity):
                there[unfinished].append(path)
    return tuple(there[0]), tuple(there[1])
