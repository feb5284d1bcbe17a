"""A cost model made of measurements: tables where there are some, constants for the rest, and no guess where neither
reaches.

Modelled: `CostModel`'s interface. Kernels, layers and copies are read from the profile's tables (`tables`). A kernel that runs beside a
copy is slowed by what was measured for its own weight format and number of tokens. Ignored: how the tables came about (`fit`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import numpy as np

from ....base.errors import InputError
from ....devices.stores.slot_sizes import expert_layout
from ....specs.models import WeightFormat
from ....specs.models.pass_shape import PassShape, dense_arguments, head_arguments
from ..cost_model import CostModel
from ..estimate import Estimate, Times, times_of
from ..forms import dense_form, head_form
from ..run_kind import RunKind
from ..steadiness import COMPUTE_PASSES
from .tables import FittedTables, estimate_of


@dataclass(frozen=True, slots=True)
class FittedCostModel(FittedTables):
    """Durations of everything a run does, from a measured profile."""

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

    def grouped_base(self, fmt: WeightFormat | None = None) -> Estimate:
        """Return what a grouped launch costs besides its experts."""
        names = [f"grouped_base.{self.bits}"] if self.bits is not None else []
        names += sorted(name for name in self.profile.curves if name.startswith("grouped_base."))
        for name in names:
            curve = self.profile.curves.get(name)
            if curve is not None:
                alone = estimate_of(curve, curve.seconds[0], curve.relative_uncertainty, "launch")
                factors, wrong = self._grouped_inside((self.typical_tokens,), name.rpartition(".")[2])
                return dataclasses.replace(
                    alone,
                    seconds=alone.seconds * float(factors[0]),
                    relative_uncertainty=max(alone.relative_uncertainty, wrong),
                    launch_s=alone.seconds * float(factors[0]),
                )
        return self._plain.grouped_base(fmt)

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

    def transfer_wait_s(self) -> float:
        """Return a transfer's share of what a layer step that fetches waits for besides its copies: their start, and its kernel's."""
        if self.run is None or not self.run.overlapped:
            return 0.0
        return (self._handover("start") + self._handover("wake")) * self.run.fetches_per_transfer

    def host_per_guess(self) -> Estimate | None:
        """Return what a gate run early takes, where a model's gates were."""
        curve = self.profile.curves.get("host.guess")
        return None if curve is None else estimate_of(curve, curve.seconds[0], curve.relative_uncertainty, "host")
