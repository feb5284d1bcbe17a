"""Options that several commands share, and the nouns they name.

Modelled: one declaration per option, so that it reads alike everywhere, and opening what it names. Ignored: what a command
does with them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..units import GIB, MIB
from .bounds import PASSES, between
from .settings import Settings

MAX_PLAN_BYTES = 256 * MIB

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def complete_model(incomplete: str) -> list[str]:
    """Return the names of bundled models that begin so, for the shell."""
    from ..specs_io import list_models

    return [name for name in list_models() if name.startswith(incomplete)]


def complete_hardware(incomplete: str) -> list[str]:
    """Return the names of bundled machines that begin so, for the shell."""
    from ..specs_io import list_hardware

    return [name for name in list_hardware() if name.startswith(incomplete)]


def complete_schedule(incomplete: str) -> list[str]:
    """Return the names of presets that begin so, for the shell."""
    from ..presets import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help="Bundled model name, or a Hugging Face config.json or its folder.",
        autocompletion=complete_model,
    ),
]
HardwareOption = Annotated[
    str,
    typer.Option(
        "--hardware",
        help="Bundled machine name (moeplan hardware list), or a profile.json.",
        autocompletion=complete_hardware,
    ),
]
TraceOption = Annotated[
    str, typer.Option("--trace", help="Recording (.safetensors), or 'bundled' for the project's own.")
]
MemoryOption = Annotated[
    str | None,
    typer.Option("--memory", help="Whole device budget in bytes, e.g. 6GiB or 6GB; default: the device's memory."),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--window",
        help="Replay only the first so many forward passes; default: all.",
        callback=between(1, PASSES, "forward passes"),
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change one thing, key=value: an option of the schedule (cache.policy=lfu), or, with a prefix and in its own units, of "
        "the machine (machine.host.memory_bytes=96GiB), the model (model.top_k=4) or the request (request.concurrency=8). Repeatable.",
    ),
]
DenseBitsOption = Annotated[
    str,
    typer.Option(
        "--dense-bits",
        help="Weight format of everything but routed experts: 32, 16, 8, 4, mxfp4, 3 or 2; native: as the checkpoint stores attention.",
    ),
]


def model_file(name_or_path: str) -> str:
    """Return the file that a --model stands for: a folder's is its config.json."""
    return os.path.join(name_or_path, "config.json") if os.path.isdir(name_or_path) else name_or_path


def bundled_trace_path() -> Path:
    """Return the path of the recording that the package carries."""
    return Path(__file__).resolve().parent.parent / "traces" / "bundled" / "tiny-moe.safetensors"


def open_trace(path: str) -> Any:
    """Return the recording at `path`; 'bundled' names the one that the package carries."""
    from ..traces.format import load_trace

    return load_trace(bundled_trace_path() if path == "bundled" else path)


def rehearse(
    model: str,
    hardware: str,
    trace: str,
    memory: str | None,
    window: int | None,
    dense_bits: str,
    settings: Settings | None = None,
) -> Any:
    """Return the rehearsal of a model on a machine over a recording, all named as on the command line.

    settings: what is changed of model and machine.
    """
    from ..sim.simulate import Rehearsal
    from ..specs import weight_format
    from ..specs_io import load_hardware, load_model
    from ..units import parse_bytes

    spec, profile = load_model(model), load_hardware(hardware)
    if settings is not None:
        spec, profile = settings.changed_model(spec), settings.changed_machine(profile)
    budget = None if memory is None else parse_bytes(memory, "--memory")
    if budget is not None and budget > profile.memory_bytes:
        most = profile.memory_bytes
        raise InputError("--memory", memory, f"{profile.name} has {most} bytes ({most / GIB:.2f} GiB)",
                         "give at most that, or another machine")  # fmt: skip
    return Rehearsal(
        model=spec, profile=profile, trace=open_trace(trace), window_steps=window, memory_bytes=budget,
        dense_format=weight_format(spec.native_dense_bits if dense_bits == "native" else dense_bits),
    )  # fmt: skip


def plan_section(document: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the table called `name` of a plan document; raises InputError where it is missing."""
    part = document.get(name)
    if not isinstance(part, dict):
        raise InputError(f"plan.{name}", part, "missing from the plan", "give a plan.json written by moeplan plan")
    return part
