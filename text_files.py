"""Files of text, in and out: read whole up to a limit or refused in one line, written whole or not at all.

Modelled: every way in which a file cannot be read (absent, not readable, too large, not UTF-8) or written. Plain code, because
a machine that only measures has nothing else. Ignored: what files hold (`specs_io`, `calibrate.samples`, grids).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .errors import InputError


def read_text(path: str | os.PathLike[str], what: str, max_bytes: int) -> str:
    """Return the text of the file at `path`.

    what: what the file is supposed to be, for messages. Raises InputError for a file that is absent, not readable, larger
    than `max_bytes` or not UTF-8.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise InputError(what, name, "no such file", "check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(what, name, f"cannot be read ({reason.lower()})", "check the path") from None
    if len(raw) > max_bytes:
        raise InputError(what, name, f"larger than {max_bytes} bytes", "check that it is the right file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(what, name, "not UTF-8 text", "check that it is the right file") from None


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, whatever happens in between.

    The bytes go to a file beside the target, reach the disk, and take the target's name. Raises InputError where the
    folder does not exist or cannot be written; then nothing is left behind.
    """
    target = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        rule = f"cannot be written ({reason.lower()})"
        raise InputError("output", os.fspath(path), rule, "choose a writable place") from None
