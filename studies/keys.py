"""What a run is known by: a hash of everything that goes into its answer, so that a run is repeated if and only if its answer may differ.

Modelled: the content of model, machine, recording and files, not their names; every option and setting; every source and constant of this
product that a prediction can read. Ignored: Python, libraries and the processor, on which no figure depends.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..api.load import engine_meant, load_machine, load_model, load_trace
from ..api.settings import PREFIXES
from ..base.errors import InputError
from ..base.version import __version__
from ..specs.machines.profile import Profile
from ..specs.models import ModelSpec
from ..specs.provenance import content_sha256, machine_sha256
from ..traces.content import recording_sha256
from ..traces.recording import LoadProfile, RoutingTrace

FORMAT = 1
_ROOMS = ("api", "base", "calibrate", "planner", "sim", "specs", "traces")
_KINDS = (".py", ".json")
_ROOT = Path(__file__).resolve().parents[1]

_OWN_RULES = ("trace", "schedule", "policy")


@functools.cache
def rules_sha256() -> str:
    """Return the hash of every source and constant of this product that a prediction can read, and of its version."""
    found = hashlib.sha256(__version__.encode())
    for room in _ROOMS:
        for path in sorted((_ROOT / room).rglob("*")):
            if path.suffix in _KINDS:
                found.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


@functools.lru_cache(maxsize=256)
def model_of(name: str) -> ModelSpec:
    """Return a model, loaded once a process."""
    return load_model(name)


@functools.lru_cache(maxsize=256)
def machine_of(name: str, engine: str | None) -> Profile:
    """Return a machine, loaded once a process."""
    return load_machine(name, engine=engine)


def engine_of(asked: Mapping[str, Any]) -> str | None:
    """Return the engine that a run is about, as `simulate` and `plan` take it."""
    own_rules = any(name in _OWN_RULES or ("." in name and name.split(".")[0] not in PREFIXES) for name in asked)
    return engine_meant(asked["hardware"], asked.get("engine"), own_rules=own_rules)


@functools.lru_cache(maxsize=16)
def recording_of(path: str) -> RoutingTrace | LoadProfile:
    """Return a recording, loaded once a process."""
    return load_trace(path)


class Keys:
    """Hashes of runs; nouns and files are read once each."""

    def __init__(self, predict: str) -> None:
        self._common = {"format": FORMAT, "predict": predict, "rules": rules_sha256()}
        self._known: dict[tuple[Any, ...], str] = {}

    def key(self, asked: Mapping[str, Any]) -> str:
        """Return the hash of a run's fields; raises InputError for a model, machine, recording or file that cannot be read."""
        content = {**asked, **self._common}
        content["model"] = self._once(("model", asked["model"]), _model_sha256)
        content["hardware"] = self._once(("hardware", asked["hardware"], engine_of(asked)), _machine_sha256)
        for name, hashed in (("trace", _recording_sha256), ("lengths", _file_sha256), ("policy", _file_sha256)):
            if name in asked:
                content[name] = self._once((name, asked[name]), hashed)
        # All are plain numbers and texts, whose `repr` is exact, and quicker than JSON: a study may have 100,000 runs.
        return hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest()

    def _once(self, what: tuple[Any, ...], hashed: Callable[..., str]) -> str:
        found = self._known.get(what)
        if found is None:
            found = self._known[what] = hashed(*what[1:])
        return found


def as_text(values: Mapping[str, Any]) -> str:
    """Return plain values as JSON text, the same for the same values whatever their order."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def _model_sha256(name: str) -> str:
    return content_sha256(dataclasses.asdict(model_of(name)))


def _machine_sha256(name: str, engine: str | None) -> str:
    return machine_sha256(machine_of(name, engine))


def _recording_sha256(path: str) -> str:
    return recording_sha256(recording_of(path))


def _file_sha256(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(
            "study", path, f"cannot be read ({(error.strerror or 'failed').lower()})", "check it"
        ) from None
