"""`moeplan calibrate --from aiconfigurator`: a bundled machine with its kernels fitted anew to the installed wheel's tables.

Modelled: the machine's own constants stay what they are; kernels of one engine are fitted; DeepEP's exchanges, whose tables are kept to
judge by, stay the bundled ones. Ignored: versions of tables other than the wheel calls current.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ....base.errors import InputError, UnknownName
from ....base.text_files import write_atomic
from ....specs.machines.bundled_kernels import USUAL_ENGINE, bundled_kernels
from ....specs.machines.profile import profile_to_json
from ....specs.machines.profile_file import load_hardware
from .kernels import fit_engine
from .tables import FRAMEWORKS, MACHINES, open_tables

TOOL = "aiconfigurator"


def import_kernels(
    system: str | None, out: str | os.PathLike[str], *, engine: str | None = None, folder: Path | None = None,
    version: str | None = None, progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return what `moeplan calibrate --json` prints, with the profile written to `out` when all of it is fitted.

    folder, version: of the wheel's tables; the installed ones where None. Raises InputError or UnknownName for a system or an engine
    without tables of experts, and for tables in another form than is known.
    """
    if system is None:
        raise InputError(
            "--system", "(absent)", "the wheel has tables of several systems", f"name one: {', '.join(MACHINES)}"
        )
    wanted = engine or USUAL_ENGINE
    if wanted not in FRAMEWORKS:
        raise UnknownName("--engine", wanted, FRAMEWORKS)
    tables = open_tables(system, folder, version)
    if wanted not in tables.engines:
        raise InputError(
            "--engine",
            wanted,
            f"the wheel has no table of its experts on {system}",
            f"choose {', '.join(tables.engines)}",
        )
    base = load_hardware(MACHINES[system])
    kernels, errors = fit_engine(tables, wanted, base.device.memory_bytes_per_s.value, progress)
    bundled = bundled_kernels(base.name, wanted)
    kept = (
        {}
        if bundled is None
        else {key: each for key, each in bundled.exchanges.items() if key not in kernels.exchanges}
    )
    kernels = dataclasses.replace(kernels, exchanges=dict(kernels.exchanges) | kept)
    target = Path(out)
    profile = dataclasses.replace(
        base,
        name=target.stem,
        kernels=kernels,
        description=f"{base.description} Kernels of {wanted} {kernels.version} fitted to tables.",
    )
    write_atomic(target, profile_to_json(profile))
    return {
        "profile": os.fspath(out),
        "device": {"name": base.name},
        "engine": {"name": wanted, "version": kernels.version},
        "num_samples": sum(each.rows for each in errors.values()),
        "num_measurements": sum(each.rows for each in errors.values()),
        "fit": {
            name: {"num_points": each.rows, "median_error": each.median, "p90_error": each.nine_in_ten}
            for name, each in errors.items()
        },
        "kept": sorted(kept),
        "changed": {},
        "warnings": [],
    }
