"""One call that measures a device and writes its profile: microbenchmarks, the engine's own costs, the fit, two files.

Modelled: `out` gets the profile, and `out` with `.samples.json` in place of `.json` (or another file of one's choice) the
raw samples, written whole or not at all; meanwhile what has been measured is kept in `out` with `.unfinished.json`, and a
call with the same settings goes on from there. Ignored: what the front door prints.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...base.errors import InputError
from ...base.text_files import check_outputs, write_atomic
from ...base.version import __version__
from ...calibrate.fitting.fit import Fit, fit_profile
from ...calibrate.microbenchmarks.collectives import FULL_EXCHANGES, QUICK_EXCHANGES
from ...calibrate.microbenchmarks.harness import Progress
from ...calibrate.microbenchmarks.journal import journal_path, open_journal
from ...calibrate.microbenchmarks.measure import FULL, QUICK, Extent, measure_device
from ...calibrate.microbenchmarks.standard_shapes import cpu_models, gpu_models
from ...calibrate.samples import Sample, SampleSet, samples_to_json
from ...devices.device import metadata_of, open_device
from ...specs.machines.profile import profile_to_json
from ...specs.models import ModelSpec, weight_format
from ..running.execute import silent
from .host_overheads import measure_host
from .run_samples import measure_runs

if TYPE_CHECKING:
    from .rank_runs import RankExtent

_QUICK_SECONDS = 20.0
# Of the time a calibration may take, each number of ranks gets so much; starting their processes comes on top.
_EXCHANGE_FRACTION = 0.1
# Ranks are predicted by their own stages alone: one pass over what one device does keeps the profile whole, four more would tell
# them nothing.
_BESIDE_RANKS = dataclasses.replace(FULL, passes=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a calibration found."""

    fit: Fit
    samples: SampleSet

    def to_dict(self, path: str | None = None) -> dict[str, Any]:
        """Return what `moeplan calibrate --json` prints."""
        return {
            "profile": path or self.fit.profile.name,
            "device": dict(self.samples.device),
            "num_samples": sum(len(sample.seconds) for sample in self.samples),
            "num_measurements": len(self.samples.samples),
            "fit": self.fit.to_dict(),
            "warnings": list(self.fit.warnings),
        }


def calibrate_device(
    device: str = "cpu",
    *,
    quick: bool = False,
    models: Sequence[ModelSpec] | None = None,
    bits: Sequence[str] = ("16", "4"),
    out: str | os.PathLike[str] | None = None,
    samples_out: str | os.PathLike[str] | None = None,
    seconds: float | None = None,
    extent: Extent | None = None,
    exchanges: bool = False,
    own: Callable[[], Sequence[Sample]] | None = None,
    own_name: str | None = None,
    ranks: RankExtent | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Return the calibration of a device, written to `out` where that is given.

    models: whose shapes are measured; None takes the standard ones. bits: weight formats of experts. samples_out: file of the raw
    samples. seconds: about how long it may take; 20 for a quick one. extent: how much is measured, instead of the full or the quick
    extent. exchanges: all-to-alls between processes too. own: returns what the engine costs, where that is not measured in
    runs of stand-ins; own_name: what it runs. ranks: whole steps of so
    many ranks instead of all-to-alls; what one device does is then measured in one pass. Raises InputError for an unknown or
    absent device or format or a place that cannot be written, DoesNotFit where the shapes exceed the device's memory.
    """
    chosen = list(models) if models else (gpu_models() if device == "cuda" else cpu_models())
    formats = [weight_format(name).name for name in bits]
    check_names(out, samples_out)
    limit = _QUICK_SECONDS if quick and seconds is None else seconds
    measured = extent or (QUICK if quick else FULL if ranks is None else _BESIDE_RANKS)
    asked = (QUICK_EXCHANGES if quick else FULL_EXCHANGES) if exchanges and ranks is None else None
    if asked is not None and limit is not None:
        asked = dataclasses.replace(asked, seconds=min(asked.seconds, limit * _EXCHANGE_FRACTION))
    opened = open_device(device)
    journal = None
    try:
        if out is not None:
            settings = {
                "device": {key: metadata_of(opened)[key] for key in ("kind", "name", "torch")},
                "version": __version__,
                "shapes": [(m.hidden_size, m.expert_intermediate_size, m.num_experts, m.num_layers) for m in chosen],
                "bits": formats,
                "extent": dataclasses.asdict(measured),
                "seconds": limit,
                "exchanges": None if asked is None else dataclasses.asdict(asked),
                "own": own_name,
            }
            journal = open_journal(journal_path(Path(out)), settings)
            if journal.resumed:
                progress(0, 1, f"going on after {journal.resumed} parts that are done")
        found = measure_device(
            opened,
            chosen,
            formats,
            extent=measured,
            seconds=limit,
            progress=progress,
            journal=journal,
            exchanges=asked,
            dtype=torch.bfloat16 if opened.kind == "cuda" else torch.float32,
            host=own or partial(own_costs, chosen, formats, measured, device, progress),
        )
    finally:
        opened.close()
    if ranks is not None:
        from .rank_runs import measure_ranks  # simulates, which a machine that only measures may be unable to

        steps, notes = measure_ranks(ranks, formats, models, progress)
        found = dataclasses.replace(found, samples=(*found.samples, *steps), warnings=(*found.warnings, *notes))
    done = write_calibration(found, out, samples_out)
    if journal is not None:
        journal.close()
    return done


def own_costs(
    models: Sequence[ModelSpec], bits: Sequence[str], extent: Extent, device: str, progress: Progress = silent
) -> list[Sample]:
    """Return what the engine costs: inside runs of these shapes on a CPU, whose caches they share; by itself on a GPU."""
    return (
        measure_runs(models, bits, extent, device=device, progress=progress)
        if device == "cpu"
        else measure_host(models[0], device=device)
    )


def check_names(out: str | os.PathLike[str] | None, samples_out: str | os.PathLike[str] | None = None) -> None:
    """Return nothing; raises InputError, before anything is measured, for names or places that will not do."""
    named = {"output": out, "samples": samples_out}
    for what, path in named.items():
        if path is not None and Path(path).suffix != ".json":
            raise InputError(what, os.fspath(path), "not a .json file", "name it for instance cpu.json")
    check_outputs(named)


def write_calibration(
    samples: SampleSet,
    out: str | os.PathLike[str] | None,
    samples_out: str | os.PathLike[str] | None = None,
    *,
    meanwhile: bool = False,
) -> Calibration:
    """Return the fit of samples, with profile and samples written where `out` is given.

    meanwhile: what the profile is to predict ran while the samples were taken.
    """
    beside = None if out is None else Path(samples_out or Path(out).with_suffix(".samples.json"))
    fit = fit_profile(samples, samples_file=beside.name if beside is not None else None, meanwhile=meanwhile)
    if out is not None and beside is not None:
        profile = dataclasses.replace(fit.profile, name=Path(out).stem)
        fit = dataclasses.replace(fit, profile=profile)
        write_atomic(beside, samples_to_json(samples))
        write_atomic(out, profile_to_json(profile))
    return Calibration(fit=fit, samples=samples)
