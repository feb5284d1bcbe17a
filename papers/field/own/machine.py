"""The machine that speeds were measured on, as the command line names it, held against what the file says.

Modelled: engine, back end, card and processor: one contradiction, and nothing is predicted. Ignored: what a file does not state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ....base.errors import InputError
from ....calibrate.imports.bench_line import BenchLine
from ....specs.machines.catalogue import find_cpu, find_gpu
from ....specs.machines.load import load_machine
from ....specs.machines.notation import describe_parts, is_parts, parse_parts
from ....specs.machines.parts import Parts
from ....specs.machines.profile import Profile
from ..machine import UNLIMITED_BYTES

_TOOL_ENGINES = {"llama-bench": ("llama.cpp", "ik_llama.cpp"), "vllm-bench": ("vllm",)}
"""Engines that a tool can be of; the first is taken where nothing says which."""
_ITSELF = "name the machine that it was measured on"


def engine_of(tool: str, lines: Sequence[BenchLine], hardware: str, asked: str | None) -> str | None:
    """Return the engine to take; None: a profile's own."""
    stated = sorted({line.engine for line in lines if line.engine is not None})
    if len(stated) > 1:
        raise InputError(tool, ", ".join(stated), "lines of several engines", "give those of one")
    possible = tuple(stated) or _TOOL_ENGINES[tool]
    if asked is not None and asked.lower() not in possible and asked.lower() != "generic":
        raise InputError("--engine", asked, f"the file is of {' or '.join(possible)}", "leave it out")
    if not is_parts(hardware):
        own = load_machine(hardware).engine
        if own is not None and own.name not in possible and own.name != "generic":
            raise InputError("--hardware", hardware, f"a machine under {own.name}, the file is of {' or '.join(possible)}",
                             "name the machine by its parts")  # fmt: skip
        return asked
    return asked or possible[0]


def backend_of(lines: Sequence[BenchLine], hardware: str) -> str | None:
    """Return the back end to take; None: the machine's own."""
    stated = sorted({line.backend for line in lines if line.backend is not None})
    if len(stated) > 1:
        raise InputError("back ends", ", ".join(stated), "one profile is of one of them", "give the lines of one")
    if not stated:
        return None
    if not is_parts(hardware):
        own = load_machine(hardware).engine
        if own is not None and own.backend != stated[0]:
            raise InputError("--hardware", hardware, f"a machine with {own.backend}, the file is of {stated[0]}",
                             "name the machine by its parts")  # fmt: skip
        return None
    card = parse_parts(hardware).gpu
    if (card is None) != (stated[0] == "cpu"):
        has = "no card" if card is None else f"the card {card.name}"
        raise InputError("--hardware", hardware, f"{has}, the file is of {stated[0]}", _ITSELF)
    return stated[0]


def check_machine(lines: Sequence[BenchLine], profile: Profile, parts: Parts | None) -> None:
    """Return nothing; raises InputError where a line names another card or processor than the machine has."""
    if parts is None:  # of a profile, what it was made of stands in its description
        words = profile.description.partition(", run by ")[0]
        try:
            parts = parse_parts(words) if profile.engine is not None else None
        except InputError:
            parts = None
    if parts is None:
        return
    if parts.more:
        raise InputError(
            "--hardware",
            describe_parts(parts),
            "lines of several cards are not predicted",
            "name the card that was used",
        )
    for line in lines:
        for name in line.gpus:
            card = _found(find_gpu, name)
            if card is not None and parts.gpu is not None and card.name != parts.gpu.name:
                raise InputError(
                    "--hardware",
                    parts.gpu.name,
                    f"{line.where} was measured on {name}",
                    _ITSELF,
                )
        processor = None if line.cpu is None else _found(find_cpu, line.cpu)
        if processor is not None and parts.cpu is not None and processor.name != parts.cpu.name:
            raise InputError(
                "--hardware",
                parts.cpu.name,
                f"{line.where} was measured on {line.cpu}",
                _ITSELF,
            )


def _found(find: Any, name: str) -> Any:
    try:
        return find(name)
    except InputError:
        return None


def with_room(profile: Profile, parts: Parts | None) -> Profile:
    """Return the machine with room for whatever ran on it: a host's memory that is not stated was large enough."""
    if profile.device.unified_memory or (
        parts is not None and parts.memory is not None and parts.memory.capacity_bytes is not None
    ):
        return profile
    if parts is None:
        return profile
    room = dataclasses.replace(profile.host.memory_bytes, value=UNLIMITED_BYTES)
    device = dataclasses.replace(profile.device, memory_bytes=room) if profile.device.kind == "cpu" else profile.device
    return dataclasses.replace(profile, host=dataclasses.replace(profile.host, memory_bytes=room), device=device)
