"""What a schedule takes of the host's memory, and a disk below it where that is too much.

Modelled: experts in one or two formats, those that never leave the device; what the engine keeps there besides (token embedding, tables);
the share that is the system's; where card and cores share one memory, all that the card holds of it. Ignored: buffers of the host's own
(a hundred megabytes), layers and caches that an engine would leave off the card: nothing that is simulated does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ....base.errors import DoesNotFit, InputError
from ....base.units import format_bytes
from ....specs.machines.profile import Profile
from ....specs.memory import MemoryBreakdown, host_dense_bytes
from ....specs.models import ModelSpec, WeightFormat, weight_format
from ....specs.schedules.offload import OffloadSchedule
from ....traces.format import RoutingTrace
from ..forecast import second_format, stored_format

HOST_SHARE = 0.88
"""Share of the host's memory that a model may take where a schedule leaves it to the machine; the rest is the system's.
Public reports: experts that filled 83 % of 96 GiB and 80 % of 256 GiB ran at full speed, at 91 % of 16 GiB a machine paged."""


class HostMemory:
    """The half of a `Simulation` that knows what the host holds."""

    __slots__ = ()
    model: ModelSpec
    profile: Profile
    trace: RoutingTrace
    dense_format: WeightFormat | None
    if TYPE_CHECKING:

        @property
        def _layout(self) -> str:
            """How the serving engine lays memory out."""

        def memory_breakdown(self, schedule: OffloadSchedule, *, cached_experts: int) -> MemoryBreakdown:
            """Return the itemised memory of a schedule whose cache holds `cached_experts` over all layers."""

    def expert_format(self, schedule: OffloadSchedule) -> WeightFormat:
        """Return how the schedule stores experts."""
        return stored_format(schedule, self.model)

    def low_format(self, schedule: OffloadSchedule) -> WeightFormat | None:
        """Return the schedule's second format; raises InputError unless it is smaller than the first."""
        low = second_format(schedule)
        if low is None:
            return None
        if self.model.expert_bytes(low) >= self.expert_bytes(schedule):
            raise InputError(
                "experts.low_bits", low.name, f"not smaller than {self.expert_format(schedule).name}", "give fewer bits"
            )
        return low

    def expert_bytes(self, schedule: OffloadSchedule) -> int:
        """Return the bytes of one expert under the schedule."""
        return self.model.expert_bytes(self.expert_format(schedule))

    @property
    def num_experts(self) -> int:
        """Experts over all layers."""
        return self.trace.num_layers * self.trace.num_experts

    def host_room(self, schedule: OffloadSchedule, cached_experts: int = 0) -> int:
        """Return how many of the schedule's experts the machine's own memory has room for, beside a card's of `cached_experts`."""
        return max(0, self.host_bytes_left(schedule, cached_experts)) // self.host_expert_bytes(schedule)

    def host_bytes_left(self, schedule: OffloadSchedule, cached_experts: int) -> int:
        """Return what the host's memory has for experts beside everything else in it; below zero where that alone is too much.

        The one place that says what else there is: the system, what the engine keeps there, and a card's share of a common memory.
        """
        whole = int(self.profile.host.memory_bytes.value * HOST_SHARE)
        dense = self.dense_format or weight_format("16")
        left = whole - host_dense_bytes(self.model, dense, self._layout)
        if self.profile.device.unified_memory:
            left += max(0, self.profile.memory_bytes - whole)
            left -= self.memory_breakdown(schedule, cached_experts=cached_experts).device_bytes
        return left

    def host_expert_bytes(self, schedule: OffloadSchedule) -> int:
        """Return what one expert takes in the host's memory: both formats where a miss may be fetched in either."""
        low = self.low_format(schedule) if schedule.experts.low_rank is not None else None
        return self.expert_bytes(schedule) + (0 if low is None else self.model.expert_bytes(low))

    def _held_by_host(self, schedule: OffloadSchedule, cached_experts: int) -> int:
        """Return how many experts the host holds: all, or as many as the schedule says, but none that stay on the device for good."""
        if cached_experts >= self.num_experts:
            return 0
        away = self.num_experts - (cached_experts if schedule.cache.policy == "static" else 0)
        return away if schedule.copy.host_experts is None else min(schedule.copy.host_experts or away, away)

    def within_host(self, schedule: OffloadSchedule, *, cached_experts: int) -> OffloadSchedule:
        """Return the schedule, with a disk below the host where its memory cannot hold the experts that must lie there.

        Raises DoesNotFit, with the bytes that the host lacks, where the machine has no disk or the schedule cannot read from one.
        """
        held, room = self._held_by_host(schedule, cached_experts), self.host_room(schedule, cached_experts)
        if held <= room:
            return schedule
        options = schedule.copy
        reason = (
            "and the user asked for that many" if options.host_experts is not None
            else "and this machine's profile has no disk to read the rest from (+ disk:7GB/s)" if self.profile.disk is None
            else "and a schedule on one stream reads nothing from a disk" if not options.overlap
            else "and experts that are written back do not live on a disk" if options.write_back
            else "" if room else "not enough for one"
        )  # fmt: skip
        if not reason:
            return schedule.with_options(copy__host_experts=room)
        needed = held * self.host_expert_bytes(schedule)
        have = int(self.profile.host.memory_bytes.value)
        beside = int(have * HOST_SHARE) - self.host_bytes_left(schedule, cached_experts)
        lacking = max(0, math.ceil((needed + beside) / HOST_SHARE) - have)
        while int((have + lacking) * HOST_SHARE) < needed + beside:  # as the share is rounded above
            lacking += 1
        also = f" beside {format_bytes(beside)} of other things" if beside else ""
        what = (
            f"{schedule.name} keeps {held} experts of together {format_bytes(needed)} in the host's memory{also}, where a model may take "
            f"{HOST_SHARE:.0%} of {format_bytes(have)}, {reason}"
        )
        raise DoesNotFit(what, lacking, place="host")
