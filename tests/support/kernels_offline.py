"""Compile the kernels for a GPU on a machine without one: real wrappers, real launch configurations, no launch.

Triton needs a driver only to learn the target and to launch; a stand-in answers the first question and the launch is left out.
What comes back is the machine code's own account: shared memory, registers, spills, which instructions were chosen.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Shared memory one program may use, by compute capability (CUDA C++ Programming Guide, table of technical specifications)."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    name: str
    shared_bytes: int
    ptx: str
    registers: int
    spilled: int
    sass: Counter[str]


class _StandInDriver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {}


class _NotLaunched:
    """Stands for a kernel: subscripting and calling it compiles it for the arguments and keeps the result."""

    def __init__(self, kernel: Any, compiled: list[Any]) -> None:
        self._kernel, self._compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_for(*arguments: Any, **options: Any) -> None:
            self._compiled.append(self._kernel.warmup(*arguments, grid=grid, **options))

        return compile_for


@contextlib.contextmanager
def compiled_for(capability: int, *modules: ModuleType) -> Iterator[list[Any]]:
    """Yield a list that fills with the compiled kernels of every call made inside; nothing is launched."""
    compiled: list[Any] = []
    replaced: list[tuple[ModuleType, str, Any]] = []
    driver.set_active(_StandInDriver(capability))
    try:
        for module in modules:
            for name, value in list(vars(module).items()):
                if type(value).__name__ == "JITFunction" and name.endswith("_kernel"):
                    replaced.append((module, name, value))
                    value.device_caches.clear()  # they remember the last target
                    setattr(module, name, _NotLaunched(value, compiled))
        yield compiled
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)
        driver._active = None  # the real one, if any, is looked for again when next needed


def account(kernel: Any) -> Compiled:
    """Return shared memory, registers, spills and instruction counts of one compiled kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output([str(tools), "-res-usage", file.name])
        listing = _output([str(tools), "-sass", file.name])
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)", listing, re.M)
    counts = Counter(instructions)
    registers = re.search(r"REG:(\d+)", usage)
    return Compiled(
        name=kernel.metadata.name,
        shared_bytes=kernel.metadata.shared,
        ptx=kernel.asm["ptx"],
        registers=int(registers[1]) if registers else 0,
        spilled=counts["STL"],
        sass=counts,
    )


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
