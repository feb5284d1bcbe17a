"""Servers of cards that nobody measured: their links, and the kernels of the measured card that they are made like.

Modelled: rates at which a sibling's kernels move bytes in proportion to the bandwidth of memory; those at which they multiply in
proportion to its peak, or to its units where its peak leaves room for that (a kernel that is not held up by matrix units does not
slow down with them); waves over its own units, exchanges no faster than its own links; what an operation takes however small it
is stays. Ignored: clocks, caches, and everything else that sets two cards of one generation apart, which widens intervals instead.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ...base.units import GIGA, US_PER_S
from ..catalog import PARTS_FOLDER
from .bundled_kernels import bundled_kernels
from .catalogue import known_gpu
from .gpu_kernels import BETWEEN, ExchangeKernel, GpuKernels
from .profile import Constant, DeviceConstants, NodeConstants, Profile
from .profile_file import load_hardware

OTHER_CARD = 0.1
"""What is added to a kernel's uncertainty where it is a sibling's."""
_LINK_LATENCY_S, _NIC_LATENCY_S = 2 / US_PER_S, 5 / US_PER_S
_MEMORY_RATES = ("bytes_per_s", "activation_bytes_per_s", "head_bytes_per_s", "quantised_values_per_s")
OF_PEAK = 0.8
"""Of its peak, what kernels reach at most where matrix units hold them up: dense products on Hopper (`gpu_kernels`)."""


@cache
def servers() -> Mapping[str, Mapping[str, Any]]:
    """Return the servers of cards without kernels of their own, by card."""
    found: dict[str, Any] = json.loads((PARTS_FOLDER / "servers.json").read_text(encoding="utf-8"))
    return found


def as_server(profile: Profile, card: str, engine: str) -> Profile:
    """Return a machine with the links between its cards and, where a card of its make was measured, with kernels of `engine`.

    What the profile itself has stays. A card that is in no table comes back as it is.
    """
    row = servers().get(card)
    if row is None:
        return profile
    if profile.node is None:
        profile = dataclasses.replace(profile, node=_node(row))
    if profile.kernels is None and "as" in row and not profile.curves:
        profile = dataclasses.replace(profile, kernels=sibling_kernels(profile.device, row, engine))
    return profile


def kernels_of_card(card: str, device: DeviceConstants, engine: str) -> GpuKernels | None:
    """Return the kernels of `engine` on a card: as measured, else those of the card that it is made like; None without either."""
    own, row = bundled_kernels(card, engine), servers().get(card)
    if own is not None or row is None or "as" not in row:
        return own
    return sibling_kernels(device, row, engine)


def sibling_kernels(device: DeviceConstants, row: Mapping[str, Any], engine: str) -> GpuKernels | None:
    """Return the kernels of the measured card that `row` names, as they would be on the card that `device` describes."""
    measured, kernels = load_hardware(row["as"]), bundled_kernels(row["as"], engine)
    if kernels is None:
        return None
    memory = device.memory_bytes_per_s.value / _bandwidth(measured)
    own, other = (
        {
            number: each.peak_flops_per_s[number].value
            for number in ("float16", "float8")
            if number in each.peak_flops_per_s
        }
        for each in (device, measured.device)
    )
    compute = _Compute(own["float16"] / other["float16"], row["units"] / kernels.num_units, own)
    links = {True: row["nic_gb_per_s"] * GIGA, False: row["link_gb_per_s"] * GIGA}
    changes: dict[str, Any] = {}
    for part in dataclasses.fields(kernels):
        group = getattr(kernels, part.name)
        if not isinstance(group, Mapping):
            continue
        if part.name == "exchanges":
            changes[part.name] = {key: _linked(kernel, links[f"/{BETWEEN}-" in key]) for key, kernel in group.items()}
        else:
            changes[part.name] = {key: _scaled(key, kernel, memory, compute) for key, kernel in group.items()}
    citation = f"{kernels.citation}; scaled from {measured.name} by bandwidth and peak ({row['source']})"
    return dataclasses.replace(kernels, num_units=row["units"], source="assumed", citation=citation, **changes)


def _bandwidth(measured: Profile) -> float:
    """Return the bandwidth of a measured card, by the data sheet that parts are taken from: servers' own sheets may round it otherwise."""
    part = known_gpu(measured.name)
    return measured.device.memory_bytes_per_s.value if part is None else part.bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True)
class _Compute:
    """How fast a card multiplies beside the measured one."""

    peaks: float
    units: float
    own: Mapping[str, float]
    """Its peaks by number format."""

    def rate(self, key: str, flops_per_s: float) -> float:
        """Return the rate of a kernel whose rate on the measured card is `flops_per_s`; key: its name in its group."""
        peak = self.own.get("float8" if "fp8" in key else "float16", self.own["float16"])
        return max(flops_per_s * self.peaks, min(flops_per_s * self.units, peak * OF_PEAK))


def _scaled(key: str, kernel: Any, memory: float, compute: _Compute) -> Any:
    values: dict[str, Any] = {"relative_uncertainty": round(kernel.relative_uncertainty + OTHER_CARD, 3)}
    for name in _MEMORY_RATES:
        if getattr(kernel, name, None) is not None:
            values[name] = getattr(kernel, name) * memory
    if getattr(kernel, "refill_bytes_per_s", None) is not None:  # each unit has its own
        values["refill_bytes_per_s"] = kernel.refill_bytes_per_s * compute.units
    if getattr(kernel, "flops_per_s", None) is not None:
        values["flops_per_s"] = compute.rate(key, kernel.flops_per_s)
    return dataclasses.replace(kernel, **values)


def _linked(kernel: ExchangeKernel, most: float) -> ExchangeKernel:
    return dataclasses.replace(kernel, bytes_per_s=min(kernel.bytes_per_s, most),
                               relative_uncertainty=round(kernel.relative_uncertainty + OTHER_CARD, 3))  # fmt: skip


def _node(row: Mapping[str, Any]) -> NodeConstants:
    def constant(value: float, source: str, uncertainty: float) -> Constant:
        return Constant(value=value, source=source, citation=row["source"], relative_uncertainty=uncertainty)

    return NodeConstants(
        num_gpus=row["gpus"], gpu_link_bytes_per_s=constant(row["link_gb_per_s"] * GIGA, "datasheet", 0.2),
        gpu_link_latency_s=constant(_LINK_LATENCY_S, "assumed", 0.6),
        nic_bytes_per_s=constant(row["nic_gb_per_s"] * GIGA, "datasheet", 0.15), nic_latency_s=constant(_NIC_LATENCY_S, "assumed", 0.6),
    )  # fmt: skip
