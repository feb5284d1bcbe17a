"""Which constants of a machine a few measured speeds may move, and the machine with them moved.

Modelled: every constant of the serving engine and the shares of the machine that it reaches, one factor for each, or one for
several that stand for the same thing. A factor is of slowness: above one, times grow and rates and shares shrink. Ignored: what
data sheets say (memory, peaks): shares of it move instead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ...specs.machines.gpu_kernels import GpuKernels
from ...specs.machines.profile import Constant, Profile
from ...specs.machines.ranges import constant_range

FACTOR_OF_INTERVAL = 1.645
"""An uncertainty is half an interval that nine in ten true values lie in: so many standard deviations."""
_LINKS = tuple(
    f"{side}.{kind}"
    for side in ("host_to_device", "device_to_host")
    for kind in ("pinned_bytes_per_s", "pageable_bytes_per_s")
)
# What stands for one thing under several names.
_TOGETHER: tuple[tuple[str, ...], ...] = (
    ("device.memory_efficiency",), ("device.compute_efficiency", "engine.dense_efficiency"), ("device.launch_s",),
    ("host.per_step_s",), ("host.per_layer_s",), ("host.per_kernel_s",), ("host.per_transfer_s",),
    ("host.cpu.memory_bytes_per_s",), ("host.cpu.flops_per_s",), ("host.cpu.launch_s",), _LINKS,
    ("disk.read_bytes_per_s",),
)  # fmt: skip
# The same where the cores are the device: its rates are theirs.
_CORES_ALONE: tuple[tuple[str, ...], ...] = (
    ("host.cpu.memory_bytes_per_s", "device.memory_bytes_per_s", *_LINKS),
    ("host.cpu.flops_per_s", "device.peak_flops_per_s.float16", "device.peak_flops_per_s.float32"),
)
_RATES = ("_per_s", "_efficiency", "_share")
_KERNELS = "kernels."
"""Before the name of a family of measured kernels (`kernels.experts`): its factor is of their time."""
FARTHEST = 5.0
"""No constant moves by more of its deviations than that: what would need more has another cause."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Movable:
    """A factor that measured speeds may move."""

    name: str
    """The first of its constants, dotted."""
    constants: tuple[str, ...]
    deviation: float
    """Standard deviation of its logarithm before anything is measured."""
    least: float
    most: float
    """Logarithms of slowness that keep every one of its constants in range."""


def movable(profile: Profile) -> list[Movable]:
    """Return what may be moved of `profile`, in declaration order."""
    known = dict(profile.constants())
    sets = [names for names in _TOGETHER if not (profile.device.kind == "cpu" and names in _overridden())]
    if profile.device.kind == "cpu":
        sets += list(_CORES_ALONE)
    named = {name for names in sets for name in names}
    sets += [(name,) for name in known if name.startswith("engine.") and name not in named]
    found = []
    for names in sets:
        there = tuple(name for name in names if name in known and known[name].value > 0)
        if not there:
            continue
        wide = max(known[name].relative_uncertainty for name in there)
        if wide <= 0:
            continue
        ends = [_room(name, known[name]) for name in there]
        found.append(
            Movable(
                name=there[0], constants=there, deviation=(deviation := math.log1p(wide) / FACTOR_OF_INTERVAL),
                least=max(-FARTHEST * deviation, *(end[0] for end in ends)), most=min(FARTHEST * deviation, *(end[1] for end in ends)),
            )
        )  # fmt: skip
    return found + _movable_kernels(profile.kernels)


def _movable_kernels(kernels: GpuKernels | None) -> list[Movable]:
    """Return a factor of time for each family of measured kernels."""
    found = []
    for family, wide in ({} if kernels is None else _families(kernels)).items():
        deviation = math.log1p(wide) / FACTOR_OF_INTERVAL
        if deviation > 0:
            found.append(
                Movable(name=f"{_KERNELS}{family}", constants=(f"{_KERNELS}{family}",), deviation=deviation,
                        least=-FARTHEST * deviation, most=FARTHEST * deviation)
            )  # fmt: skip
    return found


def _families(kernels: GpuKernels) -> dict[str, float]:
    """Return the uncertainty of each family of kernels that one GPU runs, the largest of its kernels'."""
    found: dict[str, float] = {}
    for name, kernel in kernels.kernels():
        family = name.partition(".")[0]
        if family != "exchanges":
            found[family] = max(found.get(family, 0.0), kernel.relative_uncertainty)
    return found


def with_kernels(profile: Profile, factors: Mapping[str, float], uncertainties: Mapping[str, float] | None = None,
                 citation: str | None = None) -> Profile:  # fmt: skip
    """Return `profile` with the times of families of kernels (`kernels.experts`) multiplied, and with what is then believed of them."""
    kernels, changed = profile.kernels, {}
    if kernels is None:
        return profile
    for name in {*factors, *(uncertainties or ())}:
        if not name.startswith(_KERNELS):
            continue
        family, factor = name.removeprefix(_KERNELS), factors.get(name, 1.0)
        changed[family] = {
            key: _slower(kernel, factor, (uncertainties or {}).get(name))
            for key, kernel in getattr(kernels, family).items()
        }
    if not changed:
        return profile
    told = {} if citation is None else {"citation": f"{kernels.citation}; moved by {citation}"}
    more: dict[str, Any] = {**changed, **told}
    return dataclasses.replace(profile, kernels=dataclasses.replace(kernels, **more))


def _slower(kernel: Any, factor: float, uncertainty: float | None) -> Any:
    """Return a kernel that takes `factor` times as long."""
    values: dict[str, Any] = {}
    for each in dataclasses.fields(kernel):
        value = getattr(kernel, each.name)
        if isinstance(value, float) and each.name.endswith("_s"):
            values[each.name] = value / factor if each.name.endswith("_per_s") else value * factor
    if uncertainty is not None:
        values["relative_uncertainty"] = uncertainty
    return dataclasses.replace(kernel, **values)


def moved(profile: Profile, factors: Mapping[str, float]) -> Profile:
    """Return `profile` with constants times `factors`, by dotted name, as far as their ranges go; of kernels, their times."""
    return with_constants(
        with_kernels(profile, factors),
        {
            name: dataclasses.replace(constant, value=_in_range(name, constant.value * factors[name]))
            for name, constant in profile.constants()
            if name in factors
        },
    )


def with_constants(profile: Profile, constants: Mapping[str, Constant]) -> Profile:
    """Return `profile` with some constants, by dotted name, replaced."""
    found: Profile = _replaced(profile, "", constants)
    return found


def factors_of(choice: Iterable[Movable], slowness: Iterable[float]) -> dict[str, float]:
    """Return the factor of every constant for logarithms of slowness."""
    return {
        name: math.exp(-by if is_rate(name) else by)
        for each, by in zip(choice, slowness, strict=True)
        for name in each.constants
    }


def is_rate(name: str) -> bool:
    """Return whether a larger constant of that name makes things faster."""
    return any(part.endswith(_RATES) for part in name.split("."))


def _in_range(name: str, value: float) -> float:
    least, most = constant_range(name)
    return min(max(value, least), most)


def _overridden() -> set[tuple[str, ...]]:
    return {_LINKS, ("host.cpu.memory_bytes_per_s",), ("host.cpu.flops_per_s",), ("device.memory_efficiency",)}


def _room(name: str, constant: Constant) -> tuple[float, float]:
    """Return the least and the most logarithm of slowness that keeps a constant in its range."""
    least, most = constant_range(name)
    down, up = math.log(max(least, 1e-300) / constant.value), math.log(most / constant.value)
    return (-up, -down) if is_rate(name) else (down, up)


def _replaced(part: Any, prefix: str, constants: Mapping[str, Constant]) -> Any:
    if isinstance(part, Constant):
        return constants.get(prefix, part)
    if isinstance(part, Mapping):
        return {key: _replaced(value, f"{prefix}.{key}", constants) for key, value in part.items()}
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        changed = {
            each.name: _replaced(getattr(part, each.name), f"{prefix}.{each.name}" if prefix else each.name, constants)
            for each in dataclasses.fields(part)
        }
        return dataclasses.replace(part, **changed)
    return part
