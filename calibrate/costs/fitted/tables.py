"""Tables of a measured profile: read between their points, inside the run that asks, at some time.

Modelled: surfaces fitted to the profile's tables, within the measured range; outside it an error names the nearest measured point, unless
the roofline of the same machine's constants may fill the gap. Ignored: which operation a table is of (`model`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from ....base.errors import MissingCalibration
from ....specs.machines.profile import Curve
from ....specs.models import WeightFormat
from ..cost_model import CostModel
from ..estimate import Estimate, merge_sources
from ..forms import copy_form, expert_form, expert_weight_bytes
from ..run_kind import AHEAD, FRESH, RESIDENT, RunKind, factor
from ..steadiness import COMPUTE_PASSES, COPY_PASSES
from ..surface import Array, Form, surface_of

_FILLED = "datasheet"
# Tables whose operations begin with launches of their own; an item of a grouped launch does not.
_LAUNCHED = ("expert", "dense", "head")
# Lanes whose companions runs tell apart: kernels beside copies to the device, and these beside kernels.
_TOGETHER = (("compute", "h2d"), ("h2d", "compute"))


@dataclass(frozen=True, slots=True)
class FittedTables(CostModel):
    """A measured profile's tables, read for one kind of run."""

    allow_datasheet: bool = field(default=False, kw_only=True)
    """Fill what was not measured with the roofline of the profile's constants, and say so."""
    bits: str | None = field(default=None, kw_only=True)
    """Weight format of the experts that run beside copies; None takes the profile's overall slow-down."""
    typical_tokens: float = field(default=1.0, kw_only=True)
    """Tokens of an expert that runs beside copies."""
    run: RunKind | None = field(default=None, kw_only=True)
    """What the run is like; None: operations cost what they cost alone."""

    def _alike(self, **changes: Any) -> Self:
        """Return the same costs in another run, with their memory: what was read of tables is the same in every run."""
        found = dataclasses.replace(self, **changes)
        object.__setattr__(found, "_known", self._known)
        return found

    # --- inside runs ----------------------------------------------------------------------------------------------------

    def _handover(self, what: str) -> float:
        curve = self.profile.curves.get(f"host.{what}")
        return curve.seconds[0] if curve is not None else 0.0

    def _inside(self, alone: Estimate, what: str, pause_s: float = 0.0, **sizes: float | None) -> Estimate:
        """Return an operation's time inside the run; `pause_s` of it does not change."""
        curve = None if self.run is None else self.profile.curves.get(f"run.{what}.{self.run.mode}")
        passes = COPY_PASSES if what.startswith("copy") else COMPUTE_PASSES
        if curve is None:
            return self._at_some_time(alone, passes)
        seconds = (alone.seconds - pause_s) * factor(curve, **sizes) + pause_s
        wrong = max(alone.relative_uncertainty, curve.relative_uncertainty)
        launch_s = alone.launch_s * seconds / alone.seconds if alone.seconds > 0 else 0.0
        inside = dataclasses.replace(alone, seconds=seconds, relative_uncertainty=wrong, launch_s=launch_s)
        return self._at_some_time(inside, passes)

    def _at_some_time(self, estimate: Estimate, passes: str) -> Estimate:
        """Return an estimate for a run at any time, when the machine may be faster or slower than on average."""
        curve = self.profile.curves.get(passes)
        if curve is None:
            return estimate
        wrong = math.hypot(estimate.relative_uncertainty, curve.relative_uncertainty)
        return dataclasses.replace(estimate, relative_uncertainty=wrong)

    def _expert_inside(self, tokens: range, fmt: WeightFormat) -> tuple[Array, float]:
        """Return (factors of an expert inside the run, how wrong): some have just arrived, some a while ago, others were there."""
        if self.run is None:
            return np.ones(len(tokens)), 0.0
        share = {FRESH: self.run.fresh_fraction, AHEAD: self.run.ahead_fraction}
        share[RESIDENT] = max(0.0, 1.0 - sum(share.values()))
        curves = {state: self._expert_factors(state, fmt.name) for state in share if share[state] > 0}
        if AHEAD in curves and curves[AHEAD] is None:  # runs with guesses were not measured
            curves[AHEAD] = self._expert_factors(FRESH, fmt.name)
        found = [(share[state], curve) for state, curve in curves.items() if curve is not None]
        if not found or len(found) < len(curves):
            return np.ones(len(tokens)), 0.0
        times: Array = sum(part * self._factors(curve, tokens, fmt.name) for part, curve in found)  # type: ignore[assignment]
        return times, max(curve.relative_uncertainty for _, curve in found)

    def _grouped_inside(self, tokens: Sequence[float], bits: str) -> tuple[Array, float]:
        """Return (factors of a part of a grouped launch inside the run, how wrong), given its experts' own factors."""
        curve = None if self.run is None else self._of_own_mode("run.grouped.", bits)
        if curve is None:
            return np.ones(len(tokens)), 0.0
        return self._factors(curve, tokens, bits), curve.relative_uncertainty

    def _factors(self, curve: Curve, tokens: Sequence[float], bits: str) -> Array:
        """Return a curve's factor for each number of tokens, at the run's experts a layer step."""
        experts = 1.0 if self.run is None else self.run.experts_per_layer_step
        sizes = {"weight_bytes": float(self._weights(bits)), "experts": experts}
        key = ("factors", id(curve), tuple(tokens) if not isinstance(tokens, range) else tokens, *sizes.values())
        return self.remembered(key, lambda: np.array([factor(curve, tokens=float(one), **sizes) for one in tokens]))

    def _expert_factors(self, state: str, bits: str) -> Curve | None:
        """Return the factors of experts in a state."""
        return self._of_own_mode(f"run.expert.{state}.", bits)

    def _of_own_mode(self, start: str, bits: str) -> Curve | None:
        """Return the factors of the run's own mode; where they were never measured, those of another mode."""
        if self.run is None:
            return None
        end = f".{bits}"
        own = self.profile.curves.get(f"{start}{self.run.mode}{end}")
        others = sorted(name for name in self.profile.curves if name.startswith(start) and name.endswith(end))
        return own if own is not None or not others else self.profile.curves[others[0]]

    def _slowdown_curve(self, lane: str, companion: str) -> tuple[Curve | None, bool]:
        """Return (the measured slow-down of `lane` beside `companion`, whether it was seen in runs); None where none was."""
        if self.bits is None:
            return None, False
        if self.run is not None and (lane, companion) in _TOGETHER:
            curve = self.profile.curves.get(f"run.slowdown.{lane}.{self.run.mode}.{self.bits}")
            if curve is not None:
                return curve, True
        return self.profile.curves.get(f"slowdown.{lane}/{companion}.{self.bits}"), False

    def _slower(self, lane: str, companion: str) -> float | None:
        """Return how much longer `lane` takes beside `companion`, for this schedule's experts; None where only the mean is known."""
        curve, in_runs = self._slowdown_curve(lane, companion)
        if curve is None or self.bits is None:
            return None
        if not in_runs or self.run is None:
            return self._slowdown(curve)
        sizes: dict[str, float | None]
        sizes = {"weight_bytes": float(self._weights(self.bits)), "tokens": self.typical_tokens}
        sizes = sizes if lane == "compute" else {"bytes": sizes["weight_bytes"]}
        sizes["experts"] = self.run.experts_per_layer_step
        key = ("slower", id(curve), *sizes.values())
        return self.remembered(key, lambda: max(1.0, factor(curve, **sizes)))

    # --- tables -------------------------------------------------------------------------------------------------------

    @property
    def _plain(self) -> CostModel:
        """The roofline of the same constants."""
        return CostModel(
            self.profile,
            self.model,
            dense_format=self.dense_format,
            kv_bytes_per_value=self.kv_bytes_per_value,
            encoder_tokens=self.encoder_tokens,
        )

    @property
    def _many_units(self) -> bool:
        return self.profile.device.kind == "gpu"

    @property
    def _value_bytes(self) -> int:
        """Bytes of a value in the dense part: those it was measured with."""
        curve = self.profile.curves.get("dense")
        return int(curve.arguments["value_bytes"][0]) if curve is not None else max(1, self.dense_format.bits // 8)

    def _slowdown(self, curve: Curve) -> float:
        """Return the slow-down at the typical number of tokens, between the measured ones, at the nearest measured shape."""
        tokens, sizes = np.array(curve.arguments["tokens"]), np.array(curve.arguments["weight_bytes"])
        wanted = self._weights(self.bits or "16")
        size = sizes[np.abs(np.log(sizes / wanted)).argmin()]
        mine = np.flatnonzero(sizes == size)
        order = mine[np.argsort(tokens[mine])]
        return float(np.interp(np.log(self.typical_tokens), np.log(tokens[order]), np.array(curve.seconds)[order]))

    def _weights(self, bits: str) -> int:
        return expert_weight_bytes(
            self.model.expert_hidden, self.model.expert_intermediate_size, self.model.gated, bits
        )

    def _expert(self, table: str, tokens: int, fmt: WeightFormat, fill: Callable[[], Estimate]) -> Estimate:
        name = f"{table}.{fmt.name}"
        curve = self.profile.curves.get(name)
        if curve is None:
            return self._fill(name, f"measured for {self._measured_formats(table)}", fill)
        arguments = {
            "tokens": tokens,
            "hidden": self.model.expert_hidden,
            "intermediate": self.model.expert_intermediate_size,
            "gated": int(self.model.gated),
            "units": curve.arguments["units"][0],
            "weight_bytes": self._weights(fmt.name),
        }
        many = self._many_units and table != "cpu_expert"
        return self._read(name, expert_form(many_units=many), arguments, ("tokens", "weight_bytes"), "memory", fill)

    def _copy(self, direction: str, num_bytes: int, pinned: bool, fill: Callable[[], Estimate]) -> Estimate:
        if num_bytes <= 0:
            return fill()
        name = f"copy.{direction}.{'pinned' if pinned else 'pageable'}"
        if name not in self.profile.curves and not self._many_units:
            name = f"copy.{direction}.pinned"  # page-locking means nothing where there is no DMA engine
        alone = self._read(name, copy_form(), {"bytes": num_bytes}, ("bytes",), "link", fill)
        experts = 1.0 if self.run is None else self.run.experts_per_layer_step
        return self._inside(alone, f"copy.{direction}", self._handover("piece"), bytes=num_bytes, experts=experts)

    def _read(
        self,
        name: str,
        form: Form,
        arguments: Mapping[str, float],
        ranged: tuple[str, ...],
        bound: str,
        fill: Callable[[], Estimate],
    ) -> Estimate:
        """Return a table's estimate, or the roofline's where the table does not reach and that is allowed."""
        curve = self.profile.curves.get(name)
        if curve is None:
            return self._fill(name, "not measured", fill)
        surface = self.remembered(("surface", name), lambda: surface_of(name, form, curve))
        try:
            surface.check_inside(arguments, ranged)
        except MissingCalibration as error:
            if not self.allow_datasheet:
                raise
            return self._fill(name, error.rule, fill)
        seconds, interpolation = surface.predict(arguments)
        found = estimate_of(curve, seconds, max(curve.relative_uncertainty, interpolation), bound)
        if name.partition(".")[0] not in _LAUNCHED:
            return found
        launch_s = min(surface.parameter("start_s"), seconds)  # what the operation takes whatever its size
        return dataclasses.replace(found, launch_s=launch_s, bound="launch" if launch_s > seconds - launch_s else bound)

    def _fill(self, name: str, rule: str, fill: Callable[[], Estimate]) -> Estimate:
        if not self.allow_datasheet:
            raise MissingCalibration(
                f"hardware {self.profile.name}: {name}",
                "(absent)",
                rule,
                "measure it, or allow the datasheet to fill it",
            )
        estimate = fill()
        return dataclasses.replace(estimate, source=merge_sources(_FILLED, estimate.source))

    def _measured_formats(self, table: str) -> str:
        names = [name.rpartition(".")[2] for name in self.profile.curves if name.startswith(f"{table}.")]
        return f"{', '.join(names)} bits only" if names else "no format"


def estimate_of(curve: Curve, seconds: float, uncertainty: float, bound: str) -> Estimate:
    """Return what a table says: seconds, its source, what binds and how wrong it may be."""
    return Estimate(seconds=seconds, source=curve.source, bound=bound, relative_uncertainty=uncertainty)
