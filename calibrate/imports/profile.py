"""Another tool's measurements of links, put into the profile of a machine that has them.

Modelled: nvbandwidth's copies replace what the profile says of its host link, page-locked, in both directions, and how much
the two directions slow each other down; nccl-tests' all-to-alls replace the link between the devices of a server. Uncertainty
comes from leaving sizes out where there are enough of them, and stays the profile's where there is one size. Ignored:
everything these tools do not measure, which stays what it was.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...base.errors import InputError, UnknownName
from ...base.text_files import write_atomic
from ...specs.machines.profile import Constant, Profile, profile_to_json
from ..costs.all_to_all_table import measured_ranks
from ..costs.forms import copy_form
from ..costs.surface import cross_validate, fit_surface, nine_in_ten
from ..samples import Sample, SampleSet, samples_to_json
from .nccl_tests import read_nccl_tests
from .nvbandwidth import read_nvbandwidth

TOOLS = ("nvbandwidth", "nccl-tests")
_LINKS = {"h2d": "host_to_device", "d2h": "device_to_host"}


def import_profile(
    tool: str,
    text: str,
    base: Profile,
    out: str | os.PathLike[str],
    samples_out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Return what `moeplan calibrate --json` prints, with the profile written to `out` and the tool's times beside it.

    Raises UnknownName for another tool, InputError for output that is none of its, or a machine without such a link.
    """
    if tool not in TOOLS:
        raise UnknownName("--from", tool, TOOLS)
    samples = read_nvbandwidth(text) if tool == "nvbandwidth" else read_nccl_tests(text)
    made = with_host_link(base, samples) if tool == "nvbandwidth" else with_device_link(base, samples)
    target = Path(out)
    beside = Path(samples_out) if samples_out is not None else target.with_suffix(".samples.json")
    profile = dataclasses.replace(made, name=target.stem, samples=beside.name)
    kept = SampleSet(device={"name": base.name, "kind": "cuda"}, conditions={"tool": tool}, samples=tuple(samples))
    written = profile_to_json(profile)  # before anything is on disk
    write_atomic(beside, samples_to_json(kept))
    write_atomic(target, written)
    return {
        "profile": os.fspath(out),
        "device": {"name": base.name},
        "num_samples": sum(len(sample.seconds) for sample in samples),
        "num_measurements": len(samples),
        "fit": {},  # nothing was: the tool's figures are taken as they are
        "changed": _changed(base, profile),
        "warnings": [],
    }


def with_host_link(base: Profile, samples: list[Sample]) -> Profile:
    """Return `base` with the host link of nvbandwidth's samples; raises InputError for a profile without a link."""
    changes: dict[str, Any] = {}
    rates = {}
    for sample in samples:
        rate = sample.arguments["bytes"] / sample.median_s
        if sample.kind == "copy":
            rates[sample.labels["direction"]] = rate
            field = _LINKS[sample.labels["direction"]]
            link = getattr(base, field)
            wrong = link.pinned_bytes_per_s.relative_uncertainty
            changes[field] = dataclasses.replace(link, pinned_bytes_per_s=_measured(rate, "nvbandwidth", wrong))
    contention = dict(base.contention)
    for sample in samples:
        direction = sample.labels["direction"]
        if sample.kind == "copy_while" and direction in rates:
            together = sample.arguments["bytes"] / sample.median_s / rates[direction]
            pair = f"{direction}/{sample.labels['companion']}"
            contention[pair] = _measured(min(1.0, together), "nvbandwidth, both directions at once", 0.1)
    return dataclasses.replace(base, contention=contention, **changes)


def with_device_link(base: Profile, samples: list[Sample]) -> Profile:
    """Return `base` with latency and bandwidth of nccl-tests' all-to-alls; raises InputError where it has no such devices."""
    node, ranks = base.node, int(samples[0].arguments["ranks"])
    if node is None or ranks > node.num_gpus:
        has = "no server of several devices" if node is None else f"a server of {node.num_gpus} devices"
        raise InputError("--hardware", base.name, f"it describes {has}, {ranks} took part", "name another machine")
    columns = {"bytes": np.array([sample.arguments["bytes"] for sample in samples], float)}
    seconds = np.array([sample.median_s for sample in samples])
    form = copy_form()
    surface = fit_surface("all_to_all", form, columns, seconds)
    wrong = nine_in_ten(cross_validate("all_to_all", form, columns, seconds))
    changed = dataclasses.replace(
        node,
        gpu_link_bytes_per_s=_measured(surface.parameter("bandwidth"), "nccl-tests alltoall_perf", wrong),
        gpu_link_latency_s=_measured(surface.parameter("latency_s"), "nccl-tests alltoall_perf", wrong),
    )
    # Tables of another measurement would speak louder than the constants that replace them.
    curves = {name: curve for name, curve in base.curves.items() if name not in measured_ranks(base.curves).values()}
    return dataclasses.replace(base, node=changed, curves=curves)


def _measured(value: float, what: str, uncertainty: float) -> Constant:
    return Constant(value=float(value), source="measured", citation=what, relative_uncertainty=float(uncertainty))


def _changed(base: Profile, profile: Profile) -> dict[str, Any]:
    """Return the constants that differ, before and after."""
    before = dict(base.constants())
    return {
        name: {"before": before[name].value if name in before else None, "after": constant.value}
        for name, constant in profile.constants()
        if before.get(name) != constant
    }
