"""The engines a plan can be written for, and the way from a plan document to files in a folder.

Modelled: one entry for each engine and kind of plan; every rendering passes the engine's validator before a byte is written; a
NOTES file beside the configuration says how to use it and what was left out. Ignored: reading plan.json (the front door's job).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...base.errors import InputError, Internal, UnknownName
from ...base.text_files import check_outputs, output_folder, write_atomic
from ...base.version import __version__
from ...specs.models import ModelSpec
from ...specs.plans.document import EXPERT_PARALLEL, OFFLOAD, plan_kind
from .choices import (
    Emission,
    Placement,
    read_ep_choice,
    read_offload_choice,
)
from .drafting import asks_for_drafts, told_apart
from .names import ENGINES
from .prediction import prediction_lines
from .target import OffloadTarget, ParallelTarget, Target

NOTES_FILE = "NOTES.txt"
TARGETS: Mapping[str, Target] = {
    name: importlib.import_module(f"{__package__}.engines.{name.replace('-', '_')}").TARGET for name in ENGINES
}
PARALLEL_TARGETS: Mapping[str, ParallelTarget] = {name: one.parallel for name, one in TARGETS.items() if one.parallel}
OFFLOAD_TARGETS: Mapping[str, OffloadTarget] = {name: one.offload for name, one in TARGETS.items() if one.offload}
# Engines whose files hold node counts too, so that a placement read back is the one that was written.
READABLE_TARGETS = tuple(name for name, one in TARGETS.items() if one.readable)


def list_targets(kind: str | None = None) -> list[str]:
    """Return the names of the engines that take plans of a kind, or of any."""
    names = {
        EXPERT_PARALLEL: set(PARALLEL_TARGETS),
        OFFLOAD: set(OFFLOAD_TARGETS),
        None: {*PARALLEL_TARGETS, *OFFLOAD_TARGETS},
    }
    return sorted(names[kind])


def render(plan_document: Mapping[str, Any], target: str, model: ModelSpec) -> Emission:
    """Return what `target` is given for a plan of `model`, checked by the engine's rules.

    Raises UnknownName for a target that does not exist, InputError for a plan of the wrong kind, of another model or with parts
    missing.
    """
    if target not in list_targets():
        raise UnknownName("--target", target, list_targets())
    kind = plan_kind(plan_document)
    if target not in list_targets(kind):
        raise InputError("--target", target, f"takes no {kind} plans", f"use one of: {', '.join(list_targets(kind))}")
    if kind == EXPERT_PARALLEL:
        parallel = read_ep_choice(plan_document, model)
        emission, draft = PARALLEL_TARGETS[target].render(parallel, model), parallel.draft
    else:
        offload = read_offload_choice(plan_document, model)
        emission, draft = OFFLOAD_TARGETS[target].render(offload, model), offload.draft
    if draft is not None and not asks_for_drafts(emission.files):
        emission = replace(emission, usage=(*emission.usage, told_apart(target, draft)))
    places = TARGETS[target].table.places
    if kind == EXPERT_PARALLEL and places is not None and model.family not in places:
        others = [name for name in PARALLEL_TARGETS if model.family in (TARGETS[name].table.places or (model.family,))]
        line = f"{target} takes no placement for {model.name}: to serve it as planned, emit for {' or '.join(others)}"
        emission = replace(emission, usage=(*emission.usage, line))
    try:
        validate(target, kind, emission.files, model)
    except InputError as reason:
        raise Internal(f"files for {target} break the engine's rules: {reason}") from reason
    return emission


def emit(
    plan_document: Mapping[str, Any],
    target: str,
    model: ModelSpec,
    out_dir: str | Path,
    *,
    keep: Mapping[str, str | Path] | None = None,
) -> list[Path]:
    """Return the files written to `out_dir` (made if absent) for `target`: its configuration and NOTES.txt, in this order.

    keep: files that must not be overwritten, by what they are. Nothing is written unless everything was rendered and checked; each
    file appears whole or not at all. Raises as `render` does, and InputError where a file cannot be written.
    """
    return write(render(plan_document, target, model), plan_document, target, model, out_dir, keep=keep)


def write(
    emission: Emission,
    plan_document: Mapping[str, Any],
    target: str,
    model: ModelSpec,
    out_dir: str | Path,
    *,
    keep: Mapping[str, str | Path] | None = None,
) -> list[Path]:
    """Return the files of what `render` made of a plan, written to `out_dir`; raises InputError where one cannot be."""
    folder = output_folder(out_dir)
    notes = notes_text(emission, model, plan_document, TARGETS[target])
    files = {folder / name: text for name, text in {**emission.files, NOTES_FILE: notes}.items()}
    check_outputs({f"output {path.name}": path for path in files}, keep)
    for path, text in files.items():
        write_atomic(path, text)
    return list(files)


def notes_text(emission: Emission, model: ModelSpec, plan_document: Mapping[str, Any], target: Target) -> str:
    """Return the NOTES file: how to use the files, what the engine does with them, what was predicted, what it cannot express."""
    parts = [f"Configuration of {emission.engine} for {model.name}, written by moeplan {__version__} from a plan."]
    table = target.table
    sections: dict[str, Sequence[str]] = {
        "Use:": emission.usage,
        f"What {emission.engine} does with these files for {model.name}:": emission.facts,
        "Predicted:": emission.predicted or prediction_lines(emission, plan_document),
        "What would settle it:": emission.measure,
        "Checked:": (f"{table.checked}: {table.how}", f"read from {table.source}"),
        "What the plan says and these files cannot:": emission.notes or ("nothing: the files say all the plan says",),
    }
    for title, lines in sections.items():
        if lines:
            parts += ["", title, *(f"- {line}" for line in lines)]
    return "\n".join(parts) + "\n"


def validate(target: str, kind: str, files: Mapping[str, str], model: ModelSpec) -> Placement | None:
    """Return the placement the engine would load, None where the files hold none; raises InputError where it would refuse them."""
    if kind == EXPERT_PARALLEL:
        if target not in PARALLEL_TARGETS:
            raise UnknownName("--target", target, PARALLEL_TARGETS)
        return PARALLEL_TARGETS[target].check(files, model)
    if target not in OFFLOAD_TARGETS:
        raise UnknownName("--target", target, OFFLOAD_TARGETS)
    OFFLOAD_TARGETS[target].check(files, model)
    return None


def read_back(target: str, files: Mapping[str, str], model: ModelSpec) -> Placement:
    """Return the placement that emitted files hold, nodes included; raises UnknownName where an engine's files lack them."""
    if target not in READABLE_TARGETS:
        raise UnknownName("--target", target, READABLE_TARGETS)
    placement = PARALLEL_TARGETS[target].check(files, model)
    if placement is None:
        raise Internal(f"{target}: a placement was checked but not read")
    return placement
