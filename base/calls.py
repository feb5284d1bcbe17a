"""Calling a function by its address: how compiled code calls what was compiled later, without being compiled again.

Modelled: `handle_of` compiles a function of arrays and whole numbers and returns its address; `call_at` calls it from compiled code,
and from plain Python by the function that the address was made of. Without numba a handle is a number that stands for the
function. Ignored: what the function does; it may not raise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from .jit import cached_in, compiled, jit_options, plain_jit

try:
    from numba import carray
except ImportError:  # nothing is compiled, so nobody hands over addresses
    carray = None

array_at: Any = carray
"""Returns the array at an address, for shells."""

_FUNCTIONS: dict[int, Callable[..., int]] = {}
"""What each handle stands for in plain Python."""
_KEPT: list[Any] = []
"""Machine code that handles point to: it lives as long as the process."""
_NUMBERS = itertools.count(1)


def call_at(handle: int, arrays: tuple[Any, ...], numbers: tuple[int, ...]) -> int:
    """Return what the function behind `handle` returns for these arrays and numbers."""
    return _FUNCTIONS[int(handle)](*arrays, *numbers)


def with_globals(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """Return a copy of a function that finds `names` among its globals."""
    code = function.__code__
    made = FunctionType(code, {**function.__globals__, **names}, function.__name__)
    made.__module__, made.__qualname__ = function.__module__, function.__qualname__
    return made


def handle_of(
    shell: Callable[..., int], body: Callable[..., int], rule: Callable[..., Any], counts: tuple[int, int], key: str
) -> int:
    """Return the handle of `body`, which calls `rule`.

    shell: `shell(pointer, length, pointer, length, …, numbers…)` hands arrays to `body`. counts: how many arrays and numbers.
    key: names all sources of `rule`, for the machine code kept on disk.
    """
    if not compiled():
        handle = next(_NUMBERS)
        _FUNCTIONS[handle] = with_globals(body, rule=rule)
        return handle
    import numba
    from numba import types

    arrays, numbers = counts
    signature = types.int64(*(types.voidptr, types.int64) * arrays, *(types.int64,) * numbers)
    inner = plain_jit(with_globals(body, rule=plain_jit(rule)))
    with cached_in(shell, key):
        made = numba.cfunc(signature, cache=True)(with_globals(shell, body=inner))
    _KEPT.append(made)
    handle = int(made.address)
    _FUNCTIONS[handle] = with_globals(body, rule=rule)
    return handle


def _teach_numba() -> None:
    """Let compiled code call `call_at`."""
    from numba.core import cgutils, types
    from numba.extending import intrinsic, overload

    @intrinsic  # type: ignore[untyped-decorator]
    def jump(typing_context: Any, handle: Any, arrays: Any, numbers: Any) -> Any:
        signature = types.int64(handle, arrays, numbers)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            ir, word, pointer = cgutils.ir, cgutils.intp_t, cgutils.voidptr_t
            values, kinds = [], []
            for at, kind in enumerate(signature.args[1]):
                array = context.make_array(kind)(context, builder, builder.extract_value(arguments[1], at))
                values += [builder.bitcast(array.data, pointer), array.nitems]
                kinds += [pointer, word]
            for at, _ in enumerate(signature.args[2]):
                values.append(builder.extract_value(arguments[2], at))
                kinds.append(word)
            function = builder.inttoptr(arguments[0], ir.FunctionType(word, kinds).as_pointer())
            return builder.call(function, values)

        return signature, generate

    @overload(call_at, jit_options=jit_options(), inline="always")  # type: ignore[untyped-decorator]
    def call_compiled(handle: Any, arrays: Any, numbers: Any) -> Any:
        def call(handle: Any, arrays: Any, numbers: Any) -> Any:
            return jump(handle, arrays, numbers)

        return call


if compiled():
    _teach_numba()
