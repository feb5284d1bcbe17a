"""Runs of a calibrated shape beside the runs that are validated: what the machine has become since its profile was measured.

Modelled: the runs of a calibration (`run_samples`), with the calibrated shape nearest to the validated ones (the validated model
itself where it was calibrated), one weight format at a time and taking turns with what is validated, so that both see the same
machine. Ignored: GPUs, whose profiles hold no runs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...base.errors import DoesNotFit
from ...calibrate.fitting.drift import drift_of
from ...calibrate.microbenchmarks.measure import QUICK
from ...calibrate.microbenchmarks.standard_shapes import made_up_model
from ...calibrate.samples import Sample, once_each
from ...specs.machines.profile import Profile
from ...specs.models import ModelSpec
from .run_samples import measure_runs


@dataclass(slots=True)
class ReferenceRuns:
    """Runs that are made again; `drift` says what came out."""

    profile: Profile
    model: ModelSpec
    bits: tuple[str, ...]
    device: str
    samples: list[Sample] = field(default_factory=list)

    def run(self, place: int) -> None:
        """Make the runs of one weight format, the next at each place."""
        kind = self.bits[place % len(self.bits)]
        # What is validated comes first; without samples there is no drift to be told.
        with contextlib.suppress(DoesNotFit):
            self.samples += measure_runs([self.model], [kind], QUICK, device=self.device)

    def run_beside(self, place: int, total: int) -> None:
        """Make runs after some of `total` others, the one at `place` among them, spread so that each format comes up at least once."""
        every = max(1, total // len(self.bits))
        if place % every == every - 1:
            self.run(place // every)

    def drift(self) -> Mapping[str, float]:
        """Return for every table what its times have become, over those of the profile."""
        return drift_of(self.profile, once_each(self.samples))


def reference_runs(
    profile: Profile, validated: Sequence[ModelSpec], bits: Iterable[str], device: str
) -> ReferenceRuns | None:
    """Return the reference runs for a profile; None where it holds no runs of any shape in one of these formats."""
    shapes = []
    formats = tuple(dict.fromkeys(bits))
    for kind in formats:
        table = profile.curves.get(f"expert.{kind}")
        if table is None or not any(
            name.startswith("run.expert.") and name.endswith(f".{kind}") for name in profile.curves
        ):
            return None
        columns = (table.arguments[axis] for axis in ("hidden", "intermediate", "gated"))
        shapes.append({shape[:2] for shape in zip(*columns, strict=True) if shape[2]})
    known = set.intersection(*shapes) if shapes else set()
    if not known:
        return None
    wanted = [(model.hidden_size, model.expert_intermediate_size) for model in validated]

    def distance(shape: tuple[float, ...]) -> float:
        return sum(abs(math.log(a / b)) for other in wanted for a, b in zip(shape, other, strict=True))

    hidden, inner = min(sorted(known), key=distance)
    model = next((one for one in validated if (one.hidden_size, one.expert_intermediate_size) == (hidden, inner)), None)
    if model is None:
        model = made_up_model(f"calibrated {hidden:g}x{inner:g}", hidden=int(hidden), intermediate=int(inner))
    return ReferenceRuns(profile=profile, model=model, bits=formats, device=device)
