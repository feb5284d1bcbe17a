"""Machine code on disk that is either whole or not there: every file of numba's cache carries a digest of its own bytes.

Modelled: files that are empty, cut short, overwritten or not readable count as absent, are named in one line and compiled anew;
a disk that is full means that the code is not kept, which is one line too. Without the digest a flipped bit of machine code
would run. Ignored: which code is stale (`jit` names folders after sources), and files that someone forges on purpose.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle  # noqa: TID251 (numba pickles what it keeps; a digest is checked first)
from typing import Any

from numba.core.caching import IndexDataCacheFile

_log = logging.getLogger(__name__)
_DIGEST_BYTES = hashlib.sha256().digest_size
# What this process has said already: every function has files of its own, and one line is enough for all.
_SAID: set[str] = set()


def guard(dispatcher: Any, seconds: int) -> None:
    """Let the compiled function `dispatcher` keep its machine code in files that are checked; `seconds`: what compiling takes."""
    kept = getattr(dispatcher, "_cache", None)
    plain = getattr(kept, "_cache_file", None)
    if kept is not None and isinstance(plain, IndexDataCacheFile):
        kept._cache_file = _CheckedFiles(plain, seconds)  # noqa: SLF001 (numba has no public way)


def was_damaged() -> bool:
    """Return whether this process has met damaged files, and said so."""
    return "damaged" in _SAID


class _CheckedFiles(IndexDataCacheFile):  # type: ignore[misc]
    """numba's index and data files of one function, each with its digest in front."""

    def __init__(self, plain: Any, seconds: int) -> None:
        self.__dict__.update(plain.__dict__)
        self._seconds = seconds

    def load(self, key: Any) -> Any:
        """Return what was kept for `key`, None where there is nothing whole."""
        name = self._load_index().get(key)
        return None if name is None else self._load_data(name)

    def save(self, key: Any, data: Any) -> None:
        """Keep `data`, or say in one line why that is not possible."""
        try:
            super().save(key, data)
        except OSError as error:
            reason = (error.strerror or "failed").lower()
            _say("unkept", f"machine code cannot be kept in {self._cache_path} ({reason}): each command compiles anew")

    def _load_index(self) -> Any:
        found = self._whole(self._index_path)
        if found is None or found[0] != self._version or found[1] != self._source_stamp:
            return {}
        return found[2]

    def _save_index(self, overloads: Any) -> None:
        self._write(self._index_path, (self._version, self._source_stamp, overloads))

    def _load_data(self, name: str) -> Any:
        return self._whole(self._data_path(name))

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), data)

    def _write(self, path: str, value: Any) -> None:
        raw = self._dump(value)
        with self._open_for_write(path) as file:
            file.write(hashlib.sha256(raw).digest() + raw)

    def _whole(self, path: str) -> Any:
        """Return what the file at `path` holds, None where it is absent or damaged; a damaged one is removed."""
        try:
            with open(path, "rb") as file:
                digest, raw = file.read(_DIGEST_BYTES), file.read()
        except FileNotFoundError:
            return None
        except OSError:
            digest, raw = b"", b""
        if hashlib.sha256(raw).digest() == digest:
            return pickle.loads(raw)  # noqa: S301 - the digest says that it is what this program wrote
        _say(
            "damaged",
            f"compiling the simulator (up to about {self._seconds} s): machine code in {self._cache_path} is damaged",
        )
        with contextlib.suppress(OSError):
            os.unlink(path)
        return None


def _say(what: str, line: str) -> None:
    if what not in _SAID:
        _SAID.add(what)
        _log.info(line)
