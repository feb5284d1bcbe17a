"""Plan documents in: read, brought up to today's names, and checked, so that a damaged plan.json is one clear complaint.

Modelled: the kind and version of a plan, names of the version before (each is answered once with the new one), presence and type of
the keys that are read (`offload`, `parallel`). Ignored: whether figures make sense, and whether a placement fits its matrices.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeAlias

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from ...base.errors import InputError, UnknownName
from ...base.json_files import read_json
from ...base.units import MIB
from .offload import OffloadPlan
from .parallel import ParallelPlan

Document: TypeAlias = Mapping[str, Any]

MAX_PLAN_BYTES = 256 * MIB
"""Largest plan document that is read; maps of hundreds of ranks take most of it."""
OFFLOAD, EXPERT_PARALLEL = "offload", "expert-parallel"
SCHEMA_VERSION = 1
"""The version of plan documents that is written and read."""
_KINDS: Mapping[str, type] = {EXPERT_PARALLEL: ParallelPlan, OFFLOAD: OffloadPlan}
# Keys by the names of the version before, and what they are called now.
_OLD_NAMES = {"ledger": "memory_breakdown", "num_outrun": "num_raced_out", "ageing": "staleness"}
_log = logging.getLogger(__name__)


def read_plan(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the plan document in the file at `path` under today's names, not yet checked; raises InputError."""
    return brought_up_to_date(read_json(path, "plan", max_bytes=MAX_PLAN_BYTES))


def brought_up_to_date(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with keys of the version before under their new names, and say so once for each."""
    met = set()
    for part in _parts(document):
        for old in [name for name in _OLD_NAMES if name in part and _OLD_NAMES[name] not in part]:
            part[_OLD_NAMES[old]] = part.pop(old)
            met.add(old)
    for old in sorted(met):
        _log.warning("plan: %r is now called %r; plans written anew have it so", old, _OLD_NAMES[old])
    return document


def plan_kind(document: Document) -> str:
    """Return the kind of a plan document; raises UnknownName or InputError for one that this version cannot read."""
    kind = document.get("kind")
    if kind not in _KINDS:
        raise UnknownName("plan: kind", kind, _KINDS)
    version = document.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise InputError("plan: schema_version", version, f"this version reads {SCHEMA_VERSION}", "plan again")
    return str(kind)


def check_plan(document: Document, kind: str) -> None:
    """Return nothing; raises InputError naming the first key of a plan of `kind` that is absent or of the wrong type."""
    again = "make the plan again with moeplan plan" + (" --mode ep" if kind == EXPERT_PARALLEL else "")
    for key, wanted in (("kind", kind), ("schema_version", SCHEMA_VERSION)):
        if document.get(key) != wanted:
            raise InputError(f"plan: {key}", document.get(key), f"this report reads {wanted!r}", again)
    try:
        _adapter(kind).validate_json(json.dumps(document))  # as JSON: lists stand for tuples
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        missing = first["type"] in ("missing", "missing_keyword_only_argument")
        rule = "a field is absent" if missing else first["msg"].lower()
        raise InputError(f"plan: {where}", "(absent)" if missing else first.get("input"), rule, again) from None


def _parts(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the tables of a document in which keys were renamed: itself, and each of its predictions."""
    yield document
    for name in ("best", "baselines", "baselines_that_need_more", "references"):
        part = document.get(name)
        listed = [part] if name == "best" else list(part.values()) if isinstance(part, dict) else part
        yield from (one for one in listed or () if isinstance(one, dict)) if isinstance(listed, list) else ()


@cache
def _adapter(kind: str) -> TypeAdapter[Any]:
    """Return the validator: only what is declared is looked at, further keys are left alone."""
    return TypeAdapter(with_config(ConfigDict(extra="ignore", strict=True))(_KINDS[kind]))
