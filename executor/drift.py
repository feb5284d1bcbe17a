"""How fast the machine is now against what its profile says: a few of the calibrated operations again, between the rounds of a
validation.

Modelled: one expert with one token in every weight format that is validated, at the calibrated shape nearest to the validated ones,
and one copy of a calibrated size; each reading is the median of a dozen repetitions over the profile's own figure. A validation whose
machine has become slower since it was calibrated says so, and by how much, beside errors that are then partly the machine's.
Ignored: why, and what changes within a reading; predictions are not corrected by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..calibrate.device import COMPUTE, TO_DEVICE, open_device
from ..calibrate.harness import Bench, Harness
from ..calibrate.microbench_copies import CopyPool, copy_benches
from ..calibrate.microbench_experts import ExpertArena, expert_benches
from ..calibrate.samples import Sample
from ..calibrate.standard_shapes import made_up_model
from ..hardware import Curve, Profile
from ..specs import ModelSpec
from ..units import KIB

_ROUNDS, _REPETITIONS = 3, 4
_COPIES = "copy.h2d.pinned"
_PAGE_BYTES = 4 * KIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Measured over calibrated time, less one, at each reading; a list is empty where the profile holds nothing to compare with."""

    compute: tuple[float, ...]
    copy: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the middle of the readings and all of them."""
        by_round = {"compute": list(self.compute), "copy": list(self.copy)}
        return {name: float(np.median(found)) if found else None for name, found in by_round.items()} | {
            "by_round": by_round
        }

    def sentences(self) -> tuple[str, ...]:
        """Return the drift in words; none where nothing was compared."""
        parts = [
            f"{what} took {np.median(found):+.0%} ({min(found):+.0%} to {max(found):+.0%})"
            for what, found in (("experts", self.compute), ("copies", self.copy))
            if found
        ]
        if not parts:
            return ()
        return (f"calibrated operations, repeated between the runs, against the profile: {' and '.join(parts)}",)


class Gauge:
    """The operations that are repeated; `read` repeats them once, `against` compares all readings with a profile."""

    def __init__(self, device: str, profile: Profile, models: Sequence[ModelSpec], bits: Sequence[str]) -> None:
        self._device = open_device(device)
        self._arenas: list[ExpertArena] = []
        self._benches: list[Bench] = []
        self._pool: CopyPool | None = None
        self._copies: list[Bench] = []
        self._readings: list[dict[str, float]] = []
        dtype = torch.bfloat16 if self._device.kind == "cuda" else torch.float32
        try:
            with self._device.enter(COMPUTE), torch.inference_mode():
                for kind in bits:
                    shape = _nearest_shape(profile.curves.get(f"expert.{kind}"), models)
                    if shape is not None:
                        self._arenas.append(ExpertArena(self._device, shape, kind))
                        self._benches += expert_benches(self._arenas[-1], (1,), dtype=dtype)
            copies = profile.curves.get(_COPIES)
            if copies is not None:
                sizes = np.array(copies.arguments["bytes"])
                size = int(sizes[np.argsort(sizes)[len(sizes) // 2]])
                self._pool = CopyPool(self._device, pinned=True, pool_bytes=max(4 * size, 2**26))
                self._copies = copy_benches(self._pool, TO_DEVICE, (size,))
        except BaseException:
            self.close()
            raise

    def read(self) -> None:
        """Repeat the operations, and keep their median times."""
        found: dict[str, float] = {}
        self._touch()
        for benches in (self._benches, self._copies):
            if benches:
                harness = Harness(self._device)
                taken: list[Sample] = harness.measure(benches, rounds=_ROUNDS, repetitions=_REPETITIONS)
                found |= {sample.labels.get("bits", _COPIES): sample.median_s for sample in taken}
        self._readings.append(found)

    def _touch(self) -> None:
        """Read a byte of every page: a system may have put aside what nobody used during a round, and that is no drift."""
        memory = [arena.memory for arena in self._arenas]
        memory += [self._pool.host, self._pool.there] if self._pool is not None else []
        for held in memory:
            held[::_PAGE_BYTES].sum().item()

    def against(self, profile: Profile) -> Drift:
        """Return all readings over a profile's own points."""
        expected: dict[str, float] = {}
        for bench in self._benches:
            expected[bench.labels["bits"]] = _point(profile.curves[f"expert.{bench.labels['bits']}"], bench.arguments)
        for bench in self._copies:
            pause = profile.curves.get("host.piece")
            expected[_COPIES] = _point(profile.curves[_COPIES], bench.arguments) - (pause.seconds[0] if pause else 0.0)
        compute, copy = [], []
        for reading in self._readings:
            ratios = [math.log(reading[name] / expected[name]) for name in reading if name != _COPIES]
            if ratios:
                compute.append(math.exp(sum(ratios) / len(ratios)) - 1)
            if _COPIES in reading:
                copy.append(reading[_COPIES] / expected[_COPIES] - 1)
        return Drift(compute=tuple(compute), copy=tuple(copy))

    def close(self) -> None:
        """Give all memory back."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        for arena in self._arenas:
            arena.close()
        self._arenas.clear()
        self._device.close()


def _nearest_shape(curve: Curve | None, models: Sequence[ModelSpec]) -> ModelSpec | None:
    """Return a model of the calibrated shape whose experts are nearest in size to those of `models`; None without such a table."""
    if curve is None:
        return None
    wanted = float(np.mean([math.log(model.hidden_size * model.expert_intermediate_size) for model in models]))
    one_token = [
        at for at, tokens in enumerate(curve.arguments["tokens"]) if tokens == 1 and curve.arguments["gated"][at]
    ]
    if not one_token:
        return None
    hidden, inner = curve.arguments["hidden"], curve.arguments["intermediate"]
    best = min(one_token, key=lambda at: abs(math.log(hidden[at] * inner[at]) - wanted))
    return made_up_model("a calibrated shape", hidden=int(hidden[best]), intermediate=int(inner[best]))


def _point(curve: Curve, arguments: Mapping[str, float]) -> float:
    """Return a table's own time at a point that it was measured at."""
    columns = {axis: np.array(values) for axis, values in curve.arguments.items() if axis in arguments}
    distance = sum(np.abs(np.log(np.maximum(columns[axis], 1) / max(arguments[axis], 1))) for axis in columns)
    return float(curve.seconds[int(np.argmin(distance))])
