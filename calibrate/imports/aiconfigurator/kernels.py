"""All kernels of an engine fitted to its tables, with their errors on shapes left out.

Modelled: of alternatives (which rows activations touch, waves or none) the simplest within a twentieth of the best. Ignored: exchanges of
DeepEP, whose tables belong to those that judge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ....specs.machines.gpu_kernels import ExpertKernel, GpuKernels
from .expert_problems import expert_problems
from .fits import Errors, fit
from .named import Named, within
from .problems import engine_problems
from .tables import Tables

UNITS = {"h100_sxm": 132, "h200_sxm": 132, "b200_sxm": 148, "a100_sxm": 108}
"""Streaming multiprocessors, from NVIDIA's data sheets."""
_MUCH_BETTER = 0.95
_MANY_EXPERTS = 256
_DIGITS = 4


def fit_engine(tables: Tables, engine: str, peak_bytes_per_s: float,
               progress: Callable[[int, int, str], None] | None = None) -> tuple[GpuKernels, dict[str, Errors]]:  # fmt: skip
    """Return the kernels of an engine and, by dotted name, their errors.

    peak_bytes_per_s: of the device's memory. progress: told of each kernel that is fitted.
    """
    units = UNITS[tables.system]
    groups: dict[str, dict[str, Any]] = {}
    errors: dict[str, Errors] = {}
    problems = list(engine_problems(tables, engine, units, peak_bytes_per_s))
    for done, named in enumerate(problems):
        kernel, found = best(named)
        if progress is not None:
            progress(done + 1, len(problems), f"{named.part} {named.key}")
        groups.setdefault(named.part, {})[named.key] = kernel
        errors[f"{named.part}.{named.key}"] = found
    version = tables.versions.get(engine, "unknown")
    kernels = GpuKernels(
        engine=engine, version=version, source="published", num_units=units,
        citation=f"AIConfigurator's measured tables (aiconfigurator-core {tables.version}, {tables.system}, {engine} {version}), "
        "forms fitted to them", **groups,
    )  # fmt: skip
    return kernels, errors


def fit_older_experts(
    tables: Tables, engine: str, version: str, number: str, peak_bytes_per_s: float
) -> ExpertKernel | None:
    """Return the experts of an engine's earlier version in one number format; None where its tables have none.

    Of models with so many experts as are spread over nodes only: earlier tables of smaller ones are older still.
    """
    older = dataclasses.replace(tables, versions={**tables.versions, engine: version})
    for named in expert_problems(older, engine, UNITS[tables.system], least_experts=_MANY_EXPERTS):
        if named.key == number:
            kernel: ExpertKernel = best(within(named, peak_bytes_per_s))[0]
            return kernel
    return None


def best(named: Named) -> tuple[Any, Errors]:
    """Return the kernel of the best alternative, its constants rounded, with nine in ten of its errors as uncertainty."""
    chosen: tuple[Any, Errors] | None = None
    for problem in named.problems:
        kernel, errors = fit(problem)
        if chosen is None or errors.median < chosen[1].median * _MUCH_BETTER:
            chosen = kernel, errors
    assert chosen is not None  # noqa: S101
    kernel, errors = chosen
    values = {
        each.name: _rounded(getattr(kernel, each.name))
        for each in dataclasses.fields(kernel)
        if isinstance(getattr(kernel, each.name), float)
    }
    return dataclasses.replace(kernel, **values | {"relative_uncertainty": round(errors.nine_in_ten, 3)}), errors


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
