"""How long a part of a stage is going to take, by the very profile that it is there to check.

Modelled: the warm-up and every repetition at its predicted length, and making the experts: each of their bytes is written three times
at the rate of a copy through memory that is not page-locked, and once to disk where the schedule reads it from there.
Ignored: compiling kernels and computing figures; `results` corrects by what the parts before took beyond this.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from moeplan.base.errors import MoeplanError
from moeplan.base.jit import compiled
from moeplan.base.units import NS_PER_S
from moeplan.devices.stores.slot_sizes import expert_layout
from moeplan.executor.validation.validate import costs_of
from moeplan.sim.offload.forecast import forecast, second_format, stored_format
from moeplan.sim.offload.run_input import RunInput
from moeplan.specs.machines.profile import Profile
from moeplan.specs.models import ModelSpec

# Zeroed, filled, locked page by page.
_PASSES = 3


def expected_s(
    runs: Sequence[tuple[RunInput, ModelSpec]], profile: Profile, kind: str, *, rounds: int, deadline_s: float
) -> float | None:
    """Return the seconds that these runs take `rounds` times; None where that cannot be told, or takes long to tell.

    deadline_s: when there is no time left for anything, on the clock of `time.monotonic`.
    """
    if not compiled():
        return None
    total, made = 0.0, set()
    for given, model in runs:
        if time.monotonic() > deadline_s:
            return None
        fmt, low = stored_format(given.schedule, model), second_format(given.schedule)
        try:
            costs = costs_of(profile, model, kind)
            found = forecast(given, model, costs)
        except MoeplanError:  # the part itself says what is missing
            return None
        total += rounds * found.outcome.makespan_ns / NS_PER_S
        on_disk = given.schedule.copy.host_experts is not None
        made |= {(model, one.name, on_disk) for one in (fmt, low) if one is not None}
    return total + sum(_making_s(profile, *one) for one in made)


def _making_s(profile: Profile, model: ModelSpec, bits: str, on_disk: bool) -> float:
    """Return the seconds that making all experts of a model in one format takes."""
    num_bytes = model.num_moe_layers * model.num_experts * expert_layout(model, bits).slot_bytes
    if on_disk and profile.disk is not None:
        return num_bytes / profile.disk.read_bytes_per_s.value
    return _PASSES * num_bytes / profile.host_to_device.pageable_bytes_per_s.value
