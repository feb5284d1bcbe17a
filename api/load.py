"""The nouns of a question by name or as they are: a recording, a model, a machine.

Modelled: names, files and parts as on the command line; a noun that was loaded before is taken as it is. Ignored: what is asked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..base.errors import InputError
from ..specs.machines import load as machines
from ..specs.machines import serving
from ..specs.machines.compose import DEFAULT_ENGINE
from ..specs.machines.notation import is_parts
from ..specs.machines.profile import Profile
from ..specs.machines.profile_file import list_hardware
from ..specs.models import ModelSpec
from ..specs.models import load as models
from ..traces.content import check_recording, planned_source
from ..traces.format import load_recording
from ..traces.readers import import_trace
from ..traces.recording import LoadProfile, RoutingTrace
from ..traces.synthesis.loads import prior_load

Recording: TypeAlias = RoutingTrace | LoadProfile
"""Routing of single tokens, or expert loads alone."""
_BUNDLED = "bundled"


def bundled_trace_path() -> Path:
    """Return the path of the recording that the package carries."""
    return Path(__file__).resolve().parents[1] / "traces" / "bundled" / "tiny-moe.safetensors"


def load_trace(path: str | os.PathLike[str]) -> Recording:
    """Return the recording in a .safetensors file, arrays over the mapped file; "bundled" names the one in the package.

    Files of other tools become such files with `moeplan trace import`; loads as SGLang writes them in JSON (`logical_count`) are read as
    they are. `RoutingTrace.experts` is [num_tokens, num_layers, top_k];
    sources that only counted give a `LoadProfile`, whose `counts` are [num_layers, num_experts]. Raises InputError for a file that is
    missing, damaged or breaks a rule.
    """
    if Path(path).suffix.lower() == ".json":
        return import_trace("sglang-stat", path)
    return load_recording(bundled_trace_path() if path == _BUNDLED else path)


def load_model(name_or_path: str | os.PathLike[str]) -> ModelSpec:
    """Return a model: bundled by name (`moeplan model list`), or from a `config.json`, a checkpoint's folder or a .gguf file.

    Sizes are counts of weights; `expert_bytes` and `kv_bytes` are bytes. Raises UnknownName (with the nearest name) or InputError for a
    file that is not such a configuration.
    """
    return models.load_model(name_or_path)


def load_machine(text: str, *, engine: str | None = None) -> Profile:
    """Return a machine: bundled by name (`moeplan hardware list`), from a profile.json, or of parts joined by "+".

    engine: the serving engine that runs a machine made of parts (`moeplan engine list`); None: llama.cpp. Every constant carries
    its unit in its name, its source and its relative uncertainty. Raises UnknownName or InputError.
    """
    return machines.load_machine(text, engine)


def engine_meant(hardware: object, engine: str | None, *, own_rules: bool) -> str | None:
    """Return the engine that a question is about; None: what the machine's constants were taken from.

    Who names a bundled card and says no more ("how fast is this model on an rtx-4090?") means the engine that people run there, as for
    a machine made of parts. own_rules: a recording, a schedule or rules were given, which are studied on the machine as it is published.
    """
    if engine is not None or own_rules or not isinstance(hardware, str):
        return engine
    return DEFAULT_ENGINE if hardware in list_hardware() and is_parts(hardware) else None


def own_trace(model: str | os.PathLike[str] | ModelSpec) -> str | None:
    """Return the name of the recording that the package carries where it is of this model, None where it is of another."""
    return _BUNDLED if as_model(model).name == as_recording(_BUNDLED).model else None


def rank_recording(trace: str | os.PathLike[str] | Recording | None, model: ModelSpec, *, prefill: bool) -> Recording:
    """Return what a model's experts are chosen by on many devices: a recording or loads as given; None: the bundled recording where it
    is of this model, else loads as unevenly popular as published ones.
    """
    given = own_trace(model) if trace is None else trace
    return prior_load(model, prefill=prefill) if given is None else as_recording(given)


def planned_rank_recording(
    document: Mapping[str, Any], trace: str | os.PathLike[str] | Recording | None, model: ModelSpec
) -> Recording:
    """Return the recording or loads that a plan for many devices was made from; None: where they come with the package or were made up.

    Raises InputError where they were not, or where another recording is given.
    """
    if trace is not None:
        recording, given = as_recording(trace), trace.source if isinstance(trace, Recording) else os.fspath(trace)
    else:
        request = document.get("request")
        recording = rank_recording(None, model, prefill=bool(isinstance(request, Mapping) and request.get("prefill")))
        given = "(absent)"
        if recording.source != planned_source(document):
            raise InputError("--trace", given, "the plan was made from a recording", "give that recording")
    check_recording(document, recording, given)
    return recording


def as_model(model: str | os.PathLike[str] | ModelSpec) -> ModelSpec:
    """Return a model as it is, or loaded by name."""
    return model if isinstance(model, ModelSpec) else load_model(model)


def as_machine(hardware: str | Profile, engine: str | None = None) -> Profile:
    """Return a machine as it is, or loaded by name; raises InputError for an engine beside a machine that has been loaded."""
    if not isinstance(hardware, Profile):
        return load_machine(hardware, engine=engine)
    if engine is not None:
        raise InputError("--engine", engine, f"{hardware.name} was loaded with its engine", "give it to load_machine")
    return hardware


def as_cluster_machine(hardware: str | Profile) -> Profile:
    """Return a machine of a cluster as it is, or loaded by name: a card alone is the server that it was measured in."""
    return hardware if isinstance(hardware, Profile) else serving.load_server(hardware)


def as_recording(trace: str | os.PathLike[str] | Recording) -> Recording:
    """Return a recording as it is, or loaded from its file."""
    return trace if isinstance(trace, (RoutingTrace, LoadProfile)) else load_trace(trace)


def as_routing(trace: str | os.PathLike[str] | Recording) -> RoutingTrace:
    """Return a recording of single tokens; raises InputError for one that holds loads only."""
    recording = as_recording(trace)
    if not isinstance(recording, RoutingTrace):
        name = recording.source if isinstance(trace, RoutingTrace | LoadProfile) else os.fspath(trace)
        raise InputError("path", name, "holds expert loads only, no routing", "give a recording with token routing")
    return recording
