"""Write a plan as an engine's own configuration: the function behind `moeplan emit`.

Modelled: plans just made, documents and files of plans. Ignored: the engines' files (`planner/emit/`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..planner.emit.choices import Emission
from ..planner.emit.targets import render, write
from ..planner.offload.plan import OffloadPlan
from ..planner.parallel.plan import ParallelPlan
from ..specs.plans.document import read_plan
from ..specs.provenance import model_of

PlanLike: TypeAlias = OffloadPlan | ParallelPlan | Mapping[str, Any] | str | os.PathLike[str]
"""A plan just made, its document, or the path of a plan.json."""


def as_document(given: PlanLike) -> dict[str, Any]:
    """Return the document of a plan, as its file holds it; raises InputError for a file that cannot be read."""
    if isinstance(given, (str, os.PathLike)):
        return read_plan(given)
    document = dict(given) if isinstance(given, Mapping) else given.to_dict()
    plain: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))  # tuples become lists, as in the file
    return plain


def emit(plan: PlanLike, target: str, *, output: str | os.PathLike[str] = "emitted") -> list[Path]:
    """Return the files written for an engine: its configuration, then NOTES.txt, which says what the engine cannot express.

    target: an engine by name (`docs/engines.md`); another one raises UnknownName, which lists them. output: a folder, made where it
    is absent. Nothing is written unless all of it passed the engine's own rules. Raises InputError for a plan of a kind that the
    engine does not take, one that was changed by hand, and a file that cannot be written.
    """
    keep = {"the plan": Path(plan)} if isinstance(plan, (str, os.PathLike)) else None
    return emit_document(as_document(plan), target, output=output, keep=keep)[1]


def emit_document(
    document: Mapping[str, Any],
    target: str,
    *,
    output: str | os.PathLike[str],
    keep: Mapping[str, str | Path] | None = None,
) -> tuple[Emission, list[Path]]:
    """Return what an engine is given for a plan's document, and the files that say it; raises as `emit` does."""
    model = model_of(document)
    emission = render(document, target, model)
    return emission, write(emission, document, target, model, Path(output), keep=keep)
