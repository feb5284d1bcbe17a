"""The machine's samples and profile: what stage 2 measures for stages 3 and 4, part by part.

    calibrate: SHAPE     every microbenchmark of `calibrate` on the device with one model's shapes
    cores: SHAPE         experts on the host's cores: alone, beside copies, and copies beside them
    disk                 whole experts read from a file in the temporary folder, in any order, past the page cache

Modelled: a part that is done never changes, so whoever asks for a profile names the parts it is made from, and gets the same
profile however much was measured since. Ignored: what the profile is used for.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moeplan.base.errors import InputError, MoeplanError
from moeplan.base.text_files import write_atomic
from moeplan.base.units import KIB
from moeplan.calibrate.fitting.overlap_fit import overlap_curves
from moeplan.calibrate.microbenchmarks.copies import CopyPool, copy_benches, disk_benches
from moeplan.calibrate.microbenchmarks.cores import core_benches, host_device, measure_cores
from moeplan.calibrate.microbenchmarks.experts import ExpertArena, expert_benches
from moeplan.calibrate.microbenchmarks.harness import Harness
from moeplan.calibrate.microbenchmarks.measure import FULL, Extent, measure_device
from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.calibrate.samples import SampleSet, merge, once_each, sample_from_dict, samples_from_json, samples_to_json
from moeplan.devices.device import COMPUTE, TO_DEVICE, open_device
from moeplan.executor.calibration.calibrate import write_calibration
from moeplan.executor.calibration.host_overheads import measure_host
from moeplan.specs.machines.profile import Profile
from moeplan.specs.models import ModelSpec

from .models import mixtral, switch_large
from .results import Part

PROFILE, SAMPLES = "profile.json", "profile.samples.json"
OVERLAP_SAMPLES = "overlap.samples.json"
DISK = "disk"
# Tokens of an expert for which companions are measured, as in any calibration.
_WHILE_TOKENS = (1, 8)
_CORE_ROUNDS, _DISK_ROUNDS, _REPETITIONS = 2, 6, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model to calibrate with, in which weight formats, and how much of it."""

    model: ModelSpec
    bits: tuple[str, ...]
    extent: Extent

    @property
    def part(self) -> str:
        """Name of its part."""
        return f"calibrate: {self.model.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """A model whose experts run on the host's cores, with so many tokens each."""

    model: ModelSpec
    bits: tuple[str, ...]
    tokens: tuple[int, ...]

    @property
    def part(self) -> str:
        """Name of its part."""
        return f"cores: {self.model.name}"


def shapes(*, dry: bool) -> list[Shape]:
    """Return what is calibrated for stage 3: two real shapes, and one between them for what lies between."""
    extent = _extent(dry=dry)
    if dry:
        return [
            Shape(model=mixtral(2, dry=True), bits=("16", "4", "3", "2"), extent=extent),
            Shape(model=_small(), bits=("16", "4", "2"), extent=extent),
        ]
    return [
        Shape(model=mixtral(2, dry=False), bits=("16", "4", "3", "2"), extent=extent),
        Shape(model=_fine(), bits=("16", "4", "2"), extent=extent),
        Shape(model=_between(), bits=("16", "4", "2"), extent=extent),
    ]


def plain_shapes(*, dry: bool) -> list[Shape]:
    """Return what stage 4 needs besides: Switch-Large's plain experts."""
    return [Shape(model=switch_large(2, dry=dry), bits=("32", "16"), extent=_extent(dry=dry))]


def cores(*, dry: bool) -> list[Cores]:
    """Return what is measured on the host's cores: a shape below those that stage 3 runs there, and one above."""
    if dry:
        return [
            Cores(model=mixtral(2, dry=True), bits=("16", "4"), tokens=(1, 8, 128)),
            Cores(model=_small(), bits=("16", "4"), tokens=(1, 8, 128)),
        ]
    return [
        Cores(model=_fine(), bits=("16", "4"), tokens=(1, 2, 4, 8, 16, 48, 128)),
        Cores(model=_between(), bits=("16", "4"), tokens=(1, 4, 16, 128)),
    ]


def needed(*, dry: bool, with_cores: bool = False, with_disk: bool = False, with_plain: bool = False) -> list[str]:
    """Return the parts of stage 2 that a profile is made from."""
    found = [shape.part for shape in shapes(dry=dry)]
    if with_cores:
        found += [one.part for one in cores(dry=dry)]
    if with_disk:
        found.append(DISK)
    if with_plain:
        found += [shape.part for shape in plain_shapes(dry=dry)]
    return found


def profile_parts(kind: str, *, dry: bool, seconds: float) -> tuple[list[Part], list[Part]]:
    """Return the parts that are needed first, and those that only some of what follows needs.

    seconds: about how long each calibration of a shape may take; `about_s` says how long the others may.
    """
    limits = about_s(dry=dry, seconds=seconds)
    first: list[Part] = [
        (shape.part, partial(_calibrate, kind, shape, seconds, first=at == 0))
        for at, shape in enumerate(shapes(dry=dry))
    ]
    later: list[Part] = [(one.part, partial(_cores, kind, one, limits[one.part])) for one in cores(dry=dry)]
    later.append((DISK, partial(_disk, kind, dry=dry, seconds=limits[DISK])))
    later += [(shape.part, partial(_calibrate, kind, shape, seconds, first=False)) for shape in plain_shapes(dry=dry)]
    return first, later


def about_s(*, dry: bool, seconds: float) -> dict[str, float]:
    """Return about how long each part may take where the calibration of a shape may take `seconds`: cores and disk a third of that."""
    whole = [shape.part for shape in (*shapes(dry=dry), *plain_shapes(dry=dry))]
    return dict.fromkeys(whole, seconds) | dict.fromkeys((*(one.part for one in cores(dry=dry)), DISK), seconds / 3)


def load_profile(out: Path, parts: Sequence[str]) -> Profile:
    """Return the profile that fits the samples of these parts of stage 2; raises InputError for the first that was not measured."""
    path = out / "copies.json"
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    for name in parts:
        if "samples" not in found.get(name, {}):
            raise InputError(
                "OUT", str(out), f"stage 2 has not measured {name!r} yet", "run STAGE=2 until it is complete"
            )
    samples = merge([samples_from_json(found[name]["samples"]) for name in parts])
    return write_calibration(samples, None).fit.profile


def write_profile(out: Path, parts: Mapping[str, Any], *, dry: bool) -> dict[str, Any]:
    """Write the profile of everything that was sampled, and the samples; return how good the fit is, nothing before there can be one."""
    if not all(name in parts for name in needed(dry=dry)):
        return {}
    sampled = [part["samples"] for part in parts.values() if part.get("samples")]
    samples = merge([*(samples_from_json(text) for text in sampled), *_overlap_samples(out)])
    write_atomic(out / SAMPLES, samples_to_json(samples))  # first: whatever a fit may stumble over, they are kept
    try:
        found = write_calibration(samples, out / PROFILE)
    except MoeplanError as error:
        print(f"FAILED the fit: {error}", file=sys.stderr)
        return {"fit": None, "warnings": [str(error)]}
    slowed = {name: constant.value for name, constant in found.fit.profile.contention.items()}
    return {"fit": found.fit.to_dict(), "warnings": list(found.fit.warnings), "speed_beside_each_other": slowed}


def keep_overlap(out: Path, device: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Write stage 5's samples, and the profile with them where stage 2 has measured what a profile needs; return the curves' ratios."""
    rows = [sample_from_dict(row, name) for name, part in parts.items() for row in part.get("samples", [])]
    if not rows:
        return {"curves": {}}
    samples = SampleSet(device=dict(device), conditions={}, samples=once_each(rows))
    write_atomic(out / OVERLAP_SAMPLES, samples_to_json(samples))
    found = {
        name: {"arguments": {axis: list(values) for axis, values in curve.arguments.items()}, "ratios": list(curve.seconds)}
        for name, curve in overlap_curves(samples, "stage 5").items()
    }  # fmt: skip
    path = out / "copies.json"
    measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"parts": {}, "dry": False}
    wrote = write_profile(out, measured["parts"], dry=measured["dry"])
    if wrote.get("fit") is None:
        waits = "no profile to go into yet: run STAGE=2, which takes these samples in"
        return {"curves": found, "warnings": [*wrote.get("warnings", []), waits]}
    return {"curves": found}


def _overlap_samples(out: Path) -> list[SampleSet]:
    """Return what stage 5 has measured in this folder."""
    path = out / OVERLAP_SAMPLES
    return [samples_from_json(path.read_text(encoding="utf-8"), str(path))] if path.exists() else []


# --- parts --------------------------------------------------------------------------------------------------------------


def _calibrate(kind: str, shape: Shape, seconds: float, *, first: bool) -> dict[str, Any]:
    device = open_device(kind)
    try:
        found = measure_device(
            device,
            [shape.model],
            shape.bits,
            extent=shape.extent,
            dtype=_dtype(kind),
            host=(lambda: measure_host(shape.model, device=kind)) if first else None,
            seconds=seconds,
        )
    finally:
        device.close()
    return _sampled(found)


def _cores(kind: str, one: Cores, seconds: float) -> dict[str, Any]:
    device = open_device(kind)
    share = seconds / (4 * len(one.bits))
    try:
        harness = Harness(device)
        for bits in one.bits:
            with device.enter(COMPUTE), torch.inference_mode():
                arena = ExpertArena(device, one.model, bits)
                kernels = expert_benches(arena, _WHILE_TOKENS, dtype=_dtype(kind))
            pool = CopyPool(device, pinned=True)
            size = min(arena.slot_bytes, pool.pool_bytes // 4)
            # The same copies alone: what the cores cost them is told by both.
            harness.measure(
                copy_benches(pool, TO_DEVICE, (size,)), rounds=_CORE_ROUNDS, repetitions=_REPETITIONS, seconds=share
            )
            measure_cores(
                harness,
                pool,
                core_benches(one.model, bits, one.tokens, host_device(device)),
                kernels,
                copy_bytes=size,
                rounds=_CORE_ROUNDS,
                repetitions=_REPETITIONS,
                seconds=share,
                while_tokens=_WHILE_TOKENS,
            )
            pool.close()
            arena.close()
        found = harness.finish(model=one.model.name, quick=False)
    finally:
        device.close()
    return _sampled(found)


def _disk(kind: str, *, dry: bool, seconds: float) -> dict[str, Any]:
    """Measure reads of the smallest expert of a shape below those that stage 3 reads, and of the largest of one above."""
    above = made_up_model("shape 2048x1792", hidden=2048, intermediate=1792, num_layers=2)
    models = [_small(), mixtral(2, dry=True)] if dry else [_fine(), above]
    device = open_device(kind)
    try:
        harness = Harness(device)
        benches, close = disk_benches(device, models, ("16", "4"))
        try:
            harness.measure(benches, rounds=_DISK_ROUNDS, repetitions=_REPETITIONS, seconds=seconds, what=DISK)
        finally:
            close()
        found = harness.finish(model=" and ".join(model.name for model in models), quick=False)
    finally:
        device.close()
    return _sampled(found)


def _sampled(found: SampleSet) -> dict[str, Any]:
    return {"num_measurements": len(found.samples), "samples": samples_to_json(found)}


def _dtype(kind: str) -> torch.dtype:
    return torch.bfloat16 if kind == "cuda" else torch.float32


def _extent(*, dry: bool) -> Extent:
    """Return how much of a shape is measured; cores and disk are parts of their own."""
    if dry:
        return Extent(
            expert_tokens=(1, 8, 128),
            group_tokens=(1, 128),
            group_experts=(2, 4),
            pass_tokens=(1, 8, 128),
            contexts=(16, 256),
            copy_bytes=(16 * KIB, 256 * KIB),
            rounds=1,
            repetitions=2,
            disk=False,
            host_cores=False,
        )
    return dataclasses.replace(FULL, passes=3, rounds=2, repetitions=_REPETITIONS, disk=False, host_cores=False)


def _fine() -> ModelSpec:
    return made_up_model(
        "shapes of Qwen3-30B-A3B", hidden=2048, intermediate=768, num_layers=2, num_experts=128, top_k=8, vocab=151_936
    )


def _between() -> ModelSpec:
    return made_up_model("shape 3072x4608", hidden=3072, intermediate=4608, num_layers=2, vocab=64_000)


def _small() -> ModelSpec:
    return made_up_model("small", hidden=256, intermediate=128, num_layers=2, vocab=512)
