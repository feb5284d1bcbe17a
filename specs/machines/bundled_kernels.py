"""The bundled kernels of datacentre cards, by machine and engine.

Modelled: one file a card, with each engine's kernels and the exchanges that all of them share. Ignored: how the constants came
about (`python -m benchmarks.fits.kernels`, `moeplan calibrate --from aiconfigurator`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from ...base.errors import InputError
from ..catalog import KERNELS_FOLDER
from .gpu_kernels import (
    DecodeAttention,
    ExchangeKernel,
    ExpertKernel,
    GpuKernels,
    LatentDecode,
    LatentLayer,
    ProductKernel,
    PromptAttention,
)
from .profile import SET_BY_USER, Constant, Profile

USUAL_ENGINE = "tensorrt-llm"
"""Whose kernels are taken where no engine is named: its tables cover most formats and operations."""
_KINDS: Mapping[str, Any] = MappingProxyType(
    {
        "experts": ExpertKernel, "dispatched_experts": ExpertKernel, "products": ProductKernel, "decode_attention": DecodeAttention,
        "prompt_attention": PromptAttention, "latent_decode": LatentDecode, "latent_prompt": PromptAttention,
        "latent_layer": LatentLayer, "exchanges": ExchangeKernel,
    }
)  # fmt: skip


def kernel_machines() -> dict[str, tuple[str, ...]]:
    """Return the bundled machines whose kernels are known, with the engines that they are known of."""
    return {path.stem: tuple(_entry(path.stem)["engines"]) for path in sorted(KERNELS_FOLDER.glob("*.json"))}


def measured_as(card: str) -> str | None:
    """Return the bundled machine with kernels whose card the part `card` is; None where there is none."""
    return next((name for name in kernel_machines() if card == name or card in _entry(name)["parts"]), None)


@cache
def bundled_kernels(machine: str, engine: str, version: str = "") -> GpuKernels | None:
    """Return the kernels of `engine` on a bundled machine or on a part that is the same card; None where they are not known.

    version: an earlier one, whose experts are taken where they are known; all else is the current version's.
    """
    name = measured_as(machine)
    if name is None or engine not in _entry(name)["engines"]:
        return None
    entry = _entry(name)
    mine = entry["engines"][engine]
    groups = {
        part: {key: kind(**values) for key, values in mine.get(part, {}).items()} for part, kind in _KINDS.items()
    }
    older = entry["older_experts"].get(engine, {}).get(version, {})
    groups["experts"] |= {key: ExpertKernel(**values) for key, values in older.items()}
    groups["exchanges"] |= {key: ExchangeKernel(**values) for key, values in entry["exchanges"].items()}
    return GpuKernels(
        engine=engine, version=mine["version"], source=entry["source"],
        citation=f"{mine['citation']}; {entry['exchanges_citation']}", num_units=entry["num_units"], **groups,
    )  # fmt: skip


_NOT_OF_THE_CARD = ("memory_bytes", "runtime_bytes")


def as_measured(profile: Profile) -> Profile:
    """Return a machine without its kernels where someone has set what they were measured on: the card's rates, or links between cards.

    What a card of another speed would take is a question to the roofline; measured kernels would not answer it.
    """
    parts = {"device": profile.device, "node": profile.node}
    changed = any(
        isinstance(value, Constant) and value.source == SET_BY_USER
        for part in parts.values() if part is not None
        for name, value in _constants_of(part) if name not in _NOT_OF_THE_CARD
    )  # fmt: skip
    return dataclasses.replace(profile, kernels=None) if changed else profile


def _constants_of(part: Any) -> list[tuple[str, Any]]:
    """Return the named values of a part, those of its tables too."""
    found: list[tuple[str, Any]] = []
    for each in dataclasses.fields(part):
        value = getattr(part, each.name)
        found += [(each.name, one) for one in value.values()] if isinstance(value, Mapping) else [(each.name, value)]
    return found


def with_kernels(profile: Profile, engine: str | None = None) -> Profile:
    """Return a bundled machine with the kernels of `engine` (the usual one where None); a machine without known kernels as it is.

    Raises InputError where an engine is named whose kernels on this machine are not known, or not those that the machine has.
    """
    own = profile.kernels
    if own is not None and engine not in (None, own.engine):
        raise InputError("--engine", engine, f"{profile.name} has the kernels of {own.engine}", "leave it out")
    known = () if profile.curves else kernel_machines().get(profile.name, ())
    if own is None and engine is not None and engine not in known:
        remedy = f"choose {', '.join(known)}" if known else f"leave it out, or choose {', '.join(kernel_machines())}"
        raise InputError("--engine", engine, f"its kernels on {profile.name} are not known", remedy)
    if own is not None or not known:
        return profile
    measured = as_measured(dataclasses.replace(profile, kernels=bundled_kernels(profile.name, engine or USUAL_ENGINE)))
    if measured.kernels is None and engine is not None:
        rule = "its kernels were measured on the card as it is, and the card's rates or links are set otherwise"
        raise InputError("--engine", engine, rule, "leave it out")
    return measured


@cache
def _entry(machine: str) -> Mapping[str, Any]:
    found: dict[str, Any] = json.loads((KERNELS_FOLDER / f"{machine}.json").read_text(encoding="utf-8"))
    return found
