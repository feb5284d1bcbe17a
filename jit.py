"""The one place that knows numba: compile a function, keep the machine code, never serve a stale one.

Modelled: `@jit` compiles with numba where it is installed and returns the plain Python function where it is not, so that
every decision stays callable on a machine that only measures. The on-disk cache lives in a folder named after a hash of
*all* compiled sources of the package: numba itself watches only the file a function stands in, so an edited policy called
from an unedited twin would otherwise leave machine code of the old policy in use. Ignored: parallel compilation, GPUs.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

try:
    import numba
    from numba.core import config as _numba_config
except ImportError:  # the measuring half runs where numba is absent
    numba = None
    _numba_config = None

F = TypeVar("F", bound=Callable[..., Any])

_PACKAGE = Path(__file__).resolve().parent
# Rooms that hold compiled functions; every .py file below them enters the hash.
_COMPILED_ROOMS = ("jit.py", "sim", "planner", "traces")


def compiled() -> bool:
    """Return whether functions marked `@jit` really are compiled on this machine."""
    return numba is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")


@functools.cache
def source_digest() -> str:
    """Return a hex digest over every source that can reach compiled code, and over numba's own version."""
    digest = hashlib.sha256()
    for room in _COMPILED_ROOMS:
        root = _PACKAGE / room
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update((numba.__version__ if numba is not None else "none").encode())
    return digest.hexdigest()[:20]


def cache_folder() -> Path:
    """Return the folder of machine code for the sources as they are now (it need not exist yet)."""
    base = os.environ.get("MOEPLAN_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "moeplan"
    )
    return Path(base) / f"compiled-{source_digest()}"


def jit(function: F) -> F:
    """Return `function` compiled in numba's nopython mode, with the machine code cached by source digest."""
    return _compile(function, {})


def jit_lean(function: F) -> F:
    """Return `function` compiled without reference counting: many times faster where many arrays are passed around.

    Such a function may neither allocate nor return arrays, and may call only lean functions. (Counting the references
    of twenty arrays at every call of a small function costs more than the function.)
    """
    return _compile(function, {"_nrt": False})


def _compile(function: F, options: dict[str, Any]) -> F:
    """Compile with the cache folder of the present sources.

    numba resolves the cache location while decorating, so its setting is changed only for that moment and put back:
    other users of numba in this process keep theirs.
    """
    if numba is None:
        return function
    before = _numba_config.CACHE_DIR
    _numba_config.CACHE_DIR = str(cache_folder())
    try:
        return cast(F, numba.njit(cache=True, nogil=True, **options)(function))
    except RuntimeError:  # no writable cache folder: compile anew in each process rather than fail
        return cast(F, numba.njit(cache=False, nogil=True, **options)(function))
    finally:
        _numba_config.CACHE_DIR = before
