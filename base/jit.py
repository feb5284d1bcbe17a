"""The one place that knows numba: compile a function, keep the machine code, never serve a stale one.

Modelled: `@jit` compiles with numba where it is installed and returns the plain Python function where it is not, so that
every decision stays callable on a machine that only measures. The on-disk cache of a module lives in a folder named after a
hash of that module and of everything it imports from the package: numba itself watches only the file a function stands in,
so an edited policy called from an unedited simulator would otherwise leave machine code of the old
policy in use. Ignored: parallel compilation, GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

try:
    import numba
    from numba.core import config as _numba_config
except ImportError:  # the measuring half runs where numba is absent
    numba = None
    _numba_config = None

F = TypeVar("F", bound=Callable[..., Any])

_log = logging.getLogger(__name__)
_PACKAGE = Path(__file__).resolve().parents[1]
# An import at the left margin of a module: its dots, its path, its names (perhaps in parentheses, over several lines).
_IMPORT = re.compile(r"^from (\.+)([\w.]*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)


# The compiled offload simulator's two halves and all decisions, measured on one quiet core (docs/design-notes.md).
_COMPILE_S = 25
# Lean: no counting of references, no checks of divisors, nothing for C callers. Inner: no way in from Python either.
_LEAN = {"_nrt": False, "error_model": "numpy", "no_cfunc_wrapper": True}
_INNER = _LEAN | {"no_cpython_wrapper": True}


def compiled() -> bool:
    """Return whether functions marked `@jit` really are compiled on this machine."""
    return numba is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")


@functools.cache
def imported_sources(path: Path) -> tuple[Path, ...]:
    """Return the package's files that the module at `path` imports when it is loaded, itself first, then theirs.

    Imports that are only for type checkers, or inside functions, bring nothing into compiled code and are left out.
    """
    found = [path]
    for module in found:
        for dots, dotted, names in _IMPORT.findall(module.read_text(encoding="utf-8")):
            origin = (
                module.parents[len(dots) - 1].joinpath(*dotted.split(".")) if dotted else module.parents[len(dots) - 1]
            )
            inside = [origin / name.split(" as ")[0].strip() for name in names.strip("()").split("#")[0].split(",")]
            for candidate in (origin, *inside):
                file = candidate.parent / f"{candidate.name}.py"
                if file.is_file() and file not in found:
                    found.append(file)
    return tuple(found)


@functools.cache
def source_digest(path: Path) -> str:
    """Return a hex digest over every source that can reach the machine code of the module at `path`, and numba's version."""
    digest = hashlib.sha256()
    for source in sorted({_PACKAGE / "base/jit.py", *imported_sources(path)}):
        digest.update(os.path.relpath(source, _PACKAGE).encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update((numba.__version__ if numba is not None else "none").encode())
    return digest.hexdigest()[:20]


def cache_folder(path: Path) -> Path:
    """Return the folder of the machine code of the module at `path`, its sources being as they are (it need not exist yet)."""
    base = os.environ.get("MOEPLAN_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "moeplan"
    )
    return Path(base) / f"compiled-{source_digest(path)}"


def jit(function: F) -> F:
    """Return `function` compiled in numba's nopython mode, with the machine code cached by source digest."""
    return _compile(function, {})


def jit_lean(function: F) -> F:
    """Return `function` compiled without reference counting: many times faster where many arrays are passed around.

    Such a function may neither allocate nor return arrays, and may call only lean functions. (Counting the references
    of twenty arrays at every call of a small function costs more than the function.) All its whole numbers have 64 bits.
    """
    return _lean(_compile(function, _LEAN), 0)


def jit_inner(function: F) -> F:
    """Return a lean `function` that only compiled code calls; Python gets the plain function.

    The way in from Python, which takes apart every array of every argument, is often most of what there is to compile.
    """
    return _lean(_compile(function, _INNER), 1)


def jit_inline(function: F) -> F:
    """Return an inner `function` that is put in place of every call of it: for small ones in the innermost loops."""
    return _lean(_compile(function, _INNER | {"forceinline": True}), 1)


def jit_numeric(function: F) -> F:
    """Return a lean `function` whose sums of floating-point numbers may be added up in any order: for products, not for decisions."""
    return _compile(function, _LEAN | {"fastmath": True})


def _lean(function: F, kind: int) -> F:
    if hasattr(function, "py_func"):  # not where numba is absent or switched off
        cast(Any, function).__class__ = _dispatchers()[kind]
    return function


@functools.cache
def _dispatchers() -> tuple[type, type]:
    """Return what lean and inner functions are to numba.

    numba compiles `f(0)` apart from `f(step)`, and both apart from `f(tokens[at])` where that has 16 bits: with eight
    arguments twenty times the same machine code, and everything such a function calls as often again. So other compiled
    code calls a lean function with one signature only.
    """
    from numba.core import event
    from numba.core import types as numba_types
    from numba.core.registry import CPUDispatcher

    types: Any = numba_types

    def plain(kind: Any) -> Any:
        kind = types.unliteral(kind)
        if isinstance(kind, types.BaseTuple) and not isinstance(kind, types.BaseNamedTuple):
            return types.BaseTuple.from_types(tuple(map(plain, kind)))
        whole = isinstance(kind, types.Boolean) or (
            isinstance(kind, types.Integer) and (kind.signed or kind.bitwidth < types.int64.bitwidth)
        )
        return types.int64 if whole else kind

    class Lean(CPUDispatcher):  # type: ignore[misc]
        def get_call_template(self, args: Any, kws: Any) -> Any:
            return super().get_call_template(tuple(map(plain, args)), {name: plain(kind) for name, kind in kws.items()})

    class Inner(Lean):
        def __call__(self, *args: Any, **kws: Any) -> Any:  # its machine code has no way in from here
            return self.py_func(*args, **kws)

    class Notice(event.Listener):  # type: ignore[misc]
        told = False

        def on_start(self, event: Any) -> None:
            if not self.told and isinstance(event.data["dispatcher"], Lean):
                self.told = True
                from .code_cache import was_damaged

                if was_damaged():
                    return  # that compiling takes a while has been said
                _log.info(
                    "compiling the simulator, %s (up to about %d s)", _how_often(event.data["dispatcher"]), _COMPILE_S
                )

        def on_end(self, event: Any) -> None:
            pass

    event.register("numba:compile", Notice())
    return Lean, Inner


def _how_often(dispatcher: Any) -> str:
    folder = cache_folder(Path(inspect.getfile(dispatcher.py_func)).resolve())
    return "once" if _writable(folder) else f"as every command will while {folder.parent} cannot be written"


def plain_jit(function: F) -> F:
    """Return `function` compiled as anybody's code is: what is wrong raises. Nothing is kept on disk."""
    return cast(F, numba.njit(function))


def jit_options() -> dict[str, Any]:
    """Return numba's options for what lean functions call."""
    return dict(_LEAN)


@contextlib.contextmanager
def cached_in(function: Callable[..., Any], key: str) -> Iterator[None]:
    """Return a context in which numba keeps machine code in the folder of the sources of `function` and of what `key` names."""
    before = _numba_config.CACHE_DIR
    folder = cache_folder(Path(inspect.getfile(function)).resolve())
    _numba_config.CACHE_DIR = str(folder / key)
    try:
        yield
    finally:
        _numba_config.CACHE_DIR = before


def _compile(function: F, options: dict[str, Any]) -> F:
    """Compile with the cache folder of the present sources.

    numba resolves the cache location while decorating, so its setting is changed only for that moment and put back:
    other users of numba in this process keep theirs.
    """
    if numba is None:
        return function
    before = _numba_config.CACHE_DIR
    folder = cache_folder(Path(inspect.getfile(function)).resolve())
    _numba_config.CACHE_DIR = str(folder)
    kept = _writable(folder)
    try:
        made = numba.njit(cache=kept, nogil=True, **options)(function)
    finally:
        _numba_config.CACHE_DIR = before
    if kept:
        from .code_cache import guard

        guard(made, _COMPILE_S)
    return cast(F, made)


@functools.cache
def _writable(folder: Path) -> bool:
    """Return whether machine code can be kept in `folder`; where it cannot, each process compiles anew.

    numba must not find that out for itself: it would keep the code beside the sources, where it watches one file only.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
