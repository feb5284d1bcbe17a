"""A cost model made of measurements: tables where there are some, constants for the rest, and no guess where neither
reaches.

Modelled: `CostModel`'s interface. Kernels, layers and copies are read from surfaces fitted to the profile's tables,
within the measured range; outside it an error names the nearest measured point, unless the roofline of the same
machine's constants may fill the gap. A kernel that runs beside a copy is slowed by what was measured for its own
weight format and number of tokens. Ignored: how the tables came about (`fit`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ...base.errors import InputError, MissingCalibration
from ...devices.stores.slot_sizes import expert_layout
from ...specs.card_split import CardSplit
from ...specs.machines.profile import Curve, Profile
from ...specs.models import ModelSpec, WeightFormat
from ...specs.models.pass_shape import PassShape, dense_arguments, head_arguments
from .cards import cost_of_cards
from .cost_model import CostModel, Estimate, Times, merge_sources, times_of
from .engine_costs import EngineCosts
from .forms import copy_form, dense_form, expert_form, expert_weight_bytes, head_form
from .gpu.costs import KernelCosts
from .run_kind import AHEAD, FRESH, RESIDENT, RunKind, factor
from .steadiness import COMPUTE_PASSES, COPY_PASSES
from .surface import Array, Form, surface_of

_FILLED = "datasheet"
# Tables whose operations begin with launches of their own; an item of a grouped launch does not.
_LAUNCHED = ("expert", "dense", "head")
# Lanes whose companions runs tell apart: kernels beside copies to the device, and these beside kernels.
_TOGETHER = (("compute", "h2d"), ("h2d", "compute"))


@dataclass(frozen=True, slots=True)
class FittedCostModel(CostModel):
    """Durations of everything a run does, from a measured profile."""

    allow_datasheet: bool = field(default=False, kw_only=True)
    """Fill what was not measured with the roofline of the profile's constants, and say so."""
    bits: str | None = field(default=None, kw_only=True)
    """Weight format of the experts that run beside copies; None takes the profile's overall slow-down."""
    typical_tokens: float = field(default=1.0, kw_only=True)
    """Tokens of an expert that runs beside copies."""
    run: RunKind | None = field(default=None, kw_only=True)
    """What the run is like; None: operations cost what they cost alone."""

    # --- kernels ----------------------------------------------------------------------------------------------------

    def dense_layer(self, layer: int, tokens: int, context_tokens: int, num_requests: int = 1) -> Estimate:
        """Return the time of decoder layer `layer` without its routed experts."""
        if tokens <= 0:
            return self._plain.dense_layer(layer, tokens, context_tokens, num_requests)
        requests = max(1, min(num_requests, tokens))
        shape = PassShape(tokens=tokens, context_tokens=max(context_tokens, tokens), requests=requests)
        arguments = dense_arguments(self.model, [layer], shape, self._value_bytes)
        form = dense_form()
        alone = self._read(
            "dense",
            form,
            arguments,
            ("tokens", "context"),
            "compute",
            lambda: self._plain.dense_layer(layer, tokens, context_tokens, num_requests),
        )
        return self._inside(alone, "dense", tokens=tokens, weight_bytes=arguments["weight_bytes"])

    def head(self, tokens: int) -> Estimate:
        """Return the time of the final norm and the output matrix."""
        if tokens <= 0:
            return self._plain.head(tokens)
        arguments = head_arguments(self.model, tokens, self._value_bytes)
        form = head_form()
        alone = self._read("head", form, arguments, ("tokens",), "memory", lambda: self._plain.head(tokens))
        return self._inside(alone, "head", tokens=tokens, weight_bytes=arguments["weight_bytes"])

    def expert_kernel(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return the time of one routed expert in a launch of its own."""
        if tokens <= 0:
            return self._plain.expert_kernel(tokens, fmt)
        return self._expert_times(range(tokens, tokens + 1), fmt, grouped=False).at(0)

    def grouped_item(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return what one expert with `tokens` tokens adds to a grouped launch."""
        if tokens <= 0:
            return self._plain.grouped_item(tokens, fmt)
        return self._expert_times(range(tokens, tokens + 1), fmt, grouped=True).at(0)

    def expert_times(self, most_tokens: int, fmt: WeightFormat, *, grouped: bool) -> Times:
        """Return what one expert with 1 to `most_tokens` tokens takes: in a launch of its own, or its share of a grouped one."""
        return self._expert_times(range(1, most_tokens + 1), fmt, grouped=grouped)

    def _expert_times(self, tokens: range, fmt: WeightFormat, *, grouped: bool) -> Times:
        """Return an expert's times; what does not depend on the run is read once, since searches ask for many runs."""
        table = "grouped_item" if grouped else "expert"
        fill = self._plain.grouped_item if grouped else self._plain.expert_kernel
        alone = self.remembered(
            (table, tokens, fmt.name),
            lambda: times_of([self._expert(table, one, fmt, partial(fill, one, fmt)) for one in tokens]),
        )
        factors, wrong = self._expert_inside(tokens, fmt)
        if grouped:
            of_launch, launch_wrong = self._grouped_inside(tokens, fmt.name)
            factors, wrong = factors * of_launch, max(wrong, launch_wrong)
        wrongs = np.maximum(alone.relative_uncertainty, wrong)
        passes = self.profile.curves.get(COMPUTE_PASSES)
        if passes is not None:
            wrongs = np.hypot(wrongs, passes.relative_uncertainty)
        return dataclasses.replace(
            alone, seconds=alone.seconds * factors, relative_uncertainty=wrongs, launch_s=alone.launch_s * factors
        )

    def grouped_base(self) -> Estimate:
        """Return what a grouped launch costs besides its experts."""
        names = [f"grouped_base.{self.bits}"] if self.bits is not None else []
        names += sorted(name for name in self.profile.curves if name.startswith("grouped_base."))
        for name in names:
            curve = self.profile.curves.get(name)
            if curve is not None:
                alone = _estimate(curve, curve.seconds[0], curve.relative_uncertainty, "launch")
                factors, wrong = self._grouped_inside((self.typical_tokens,), name.rpartition(".")[2])
                return dataclasses.replace(
                    alone,
                    seconds=alone.seconds * float(factors[0]),
                    relative_uncertainty=max(alone.relative_uncertainty, wrong),
                    launch_s=alone.seconds * float(factors[0]),
                )
        return self._plain.grouped_base()

    def cpu_expert(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return the time of one expert on the host's cores."""
        if tokens <= 0 or f"cpu_expert.{fmt.name}" not in self.profile.curves:
            return self._plain.cpu_expert(tokens, fmt)
        alone = self._expert("cpu_expert", tokens, fmt, lambda: self._plain.cpu_expert(tokens, fmt))
        if not self._many_units:  # the host is the device
            alone = self._at_some_time(alone, COMPUTE_PASSES)
        if self.run is None:
            return alone
        # A layer step's first expert waits until the cores are awake, and the stream until it knows of the last one.
        waits = (self._handover("start") + self._handover("wake")) * self.run.cpu_tasks_per_core_expert
        return dataclasses.replace(alone, seconds=alone.seconds + waits)

    # --- copies -----------------------------------------------------------------------------------------------------

    def host_to_device(self, num_bytes: int, pinned: bool = True) -> Estimate:
        """Return the time of one copy to the device, running alone."""
        return self._copy("h2d", num_bytes, pinned, lambda: self._plain.host_to_device(num_bytes, pinned))

    def moved_bytes(self, fmt: WeightFormat) -> int:
        """Return the bytes of a slot where the kernels have such a format: those that the engine which was measured moves."""

        def make() -> int:
            try:
                return expert_layout(self.model, fmt.name).slot_bytes
            except InputError:
                return self.model.expert_bytes(fmt)

        return self.remembered(("slot", fmt.name), make)

    def device_to_host(self, num_bytes: int, pinned: bool = True) -> Estimate:
        """Return the time of one copy to the host, running alone."""
        return self._copy("d2h", num_bytes, pinned, lambda: self._plain.device_to_host(num_bytes, pinned))

    # --- running together ---------------------------------------------------------------------------------------------

    def rate_fraction(self, lane: str, companions: frozenset[str]) -> float:
        """Return the speed of `lane` relative to running alone while `companions` run."""
        rate = CostModel.rate_fraction(self, lane, companions)
        for companion in companions:
            general = self.profile.contention.get(f"{lane}/{companion}")
            slower = self._slower(lane, companion)
            if slower is not None:
                rate *= 1.0 / ((general.value if general is not None else 1.0) * slower)
        return min(1.0, rate)

    def rate_uncertainty(self, lane: str, companions: frozenset[str]) -> float:
        """Return how wrong `rate_fraction` may be, relative to it; pairs add up."""
        total = 0.0
        for companion in sorted(companions):
            general = self.profile.contention.get(f"{lane}/{companion}")
            curve, _ = self._slowdown_curve(lane, companion)
            if curve is not None:
                total += curve.relative_uncertainty
            elif general is not None:
                total += general.relative_uncertainty
        return total

    @property
    def mode(self) -> str | None:
        """What the costs of everything but experts depend on besides sizes: how experts are kept and copied."""
        return None if self.run is None else self.run.mode

    def with_experts(self, bits: str, typical_tokens: float) -> FittedCostModel:
        """Return the same costs for a schedule that stores experts as `bits` and gives each so many tokens."""
        return self._alike(bits=bits, typical_tokens=max(1.0, typical_tokens))

    def for_run(self, run: RunKind) -> FittedCostModel:
        """Return the same costs inside a run of this kind, where runs were measured."""
        return self._alike(bits=run.bits, typical_tokens=max(1.0, run.typical_tokens), run=run)

    def _alike(self, **changes: Any) -> FittedCostModel:
        """Return the same costs in another run, with their memory: what was read of tables is the same in every run."""
        found = dataclasses.replace(self, **changes)
        object.__setattr__(found, "_known", self._known)
        return found

    def transfer_wait_s(self) -> float:
        """Return a transfer's share of what a layer step that fetches waits for besides its copies: their start, and its kernel's."""
        if self.run is None or not self.run.overlapped:
            return 0.0
        return (self._handover("start") + self._handover("wake")) * self.run.fetches_per_transfer

    def host_per_guess(self) -> Estimate | None:
        """Return what a gate run early takes, where a model's gates were."""
        curve = self.profile.curves.get("host.guess")
        return None if curve is None else _estimate(curve, curve.seconds[0], curve.relative_uncertainty, "host")

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
        found = _estimate(curve, seconds, max(curve.relative_uncertainty, interpolation), bound)
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


def load_costs(
    profile: Profile,
    model: ModelSpec,
    *,
    allow_datasheet: bool = False,
    tables: bool = True,
    split: CardSplit | None = None,
    **options: Any,
) -> CostModel:
    """Return the cost model of a profile: fitted tables where it holds a calibration, measured kernels where it names an engine's, the
    roofline of its constants otherwise.

    tables: False takes the roofline of a calibrated machine's constants (its tables are those of one device at work alone). split: how
    the model lies on a machine's cards; raises InputError for several cards without one.
    """
    if profile.cards:
        if split is None:
            raise InputError(
                "hardware",
                profile.name,
                "it has several cards, and this does not divide a model over them",
                "name one card",
            )
        return cost_of_cards(profile, model, split, load_costs, **options)
    if profile.curves and tables:
        return FittedCostModel(profile, model, allow_datasheet=allow_datasheet, **options)
    if profile.kernels is not None and not profile.curves:
        return KernelCosts(profile, model, **options)
    if profile.engine is not None and not profile.curves:
        return EngineCosts(profile, model, **options)
    return CostModel(profile, model, **options)


def check_profile_matches(profile: Profile, *, kind: str, name: str) -> None:
    """Return nothing; raises InputError where a profile was measured on another device than the one at hand."""
    wanted = "gpu" if kind == "cuda" else "cpu"
    if profile.device.kind != wanted:
        raise InputError(
            "profile",
            profile.name,
            f"it describes a {profile.device.kind}, this device is a {wanted}",
            "calibrate this device",
        )
    if profile.curves and name not in (profile.name, *_cited(profile)):
        raise InputError(
            "profile", profile.name, f"it was measured on another device than this {name}", "calibrate this device"
        )


def _cited(profile: Profile) -> list[str]:
    """Return the device names that the profile's tables were measured on."""
    marks = [curve.citation for curve in profile.curves.values()]
    return [mark.removeprefix("calibration of ").partition(" by moeplan")[0] for mark in dict.fromkeys(marks)]


def _estimate(curve: Curve, seconds: float, uncertainty: float, bound: str) -> Estimate:
    return Estimate(seconds=seconds, source=curve.source, bound=bound, relative_uncertainty=uncertainty)
