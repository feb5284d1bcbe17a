"""What settings (`--set key=value`) change before a prediction: the machine's constants, the model, the request, or the schedule.

    machine.host.memory_bytes=96GiB     any constant of the machine, in its own units
    model.top_k=4                       any plain field of the model
    request.concurrency=8               any field of the plan's request
    cache.policy=lfu                    without a prefix: an option of the schedule

Modelled: values typed by their field, units included; what was changed is listed, with what it was, for the document that is
written. A changed constant is taken as exact: it asks "what if", and says so in its citation. Ignored: what a change does.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..base.errors import InputError, UnknownName
from ..base.units import parse_quantity, unit_of
from ..specs.machines.bundled_kernels import as_measured
from ..specs.machines.profile import DTYPES, LANES, SET_BY_USER, Constant, Profile
from ..specs.models import WEIGHT_FORMATS, ModelSpec

PREFIXES = ("machine", "model", "request")
# Largest count that a field of a model or request may have; every one in use is far below.
_MOST = 2**31
_MOST_LAYERS = 4096
_OF_A_CARD = ("device", "host_to_device", "device_to_host", "engine", "kernels", "cards")
"""Parts of a machine that each of several cards has for itself."""
# Where a measured profile has tables of these names, they stand in place of these constants.
_REPLACED = (
    ("host_to_device.", ("copy.h2d.",)),
    ("device_to_host.", ("copy.d2h.",)),
    ("host.cpu.", ("cpu_expert.",)),
    ("device.memory_bytes_per_s", ("expert.", "dense")), ("device.memory_efficiency", ("expert.", "dense")),
    ("device.peak_flops_per_s.", ("expert.", "dense")), ("device.compute_efficiency", ("expert.", "dense")),
    ("device.launch_s", ("expert.", "dense")), ("device.dequantise_efficiency.", ("expert.",)),
)  # fmt: skip


@dataclass(slots=True)
class Settings:
    """The changes that are asked for, by what they change, and those that have been made."""

    machine: dict[str, str] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)
    request: dict[str, str] = field(default_factory=dict)
    schedule: list[str] = field(default_factory=list)
    """`key=value` texts without a prefix."""
    made: list[dict[str, Any]] = field(default_factory=list)
    """For the document: what was set, its value, what it was, and "set by the user"."""

    def changed_machine(self, profile: Profile) -> Profile:
        """Return the machine with its constants as set; raises InputError for a key or value that it cannot have."""
        changed = profile
        of_cards = [key for key in self.machine if profile.cards and key.partition(".")[0] in _OF_A_CARD]
        if of_cards:
            raise InputError("--set", f"machine.{of_cards[0]}", "it is a single card's, and this machine has several",
                             "write the card's own figures: name:memory=24GiB,bandwidth=936GB/s,fp16=71TFLOPS")  # fmt: skip
        for part, keys in _by_part(self.machine).items():
            changed = _with_constants(changed, part, {key: self._constant(profile, key) for key in keys})
        return as_measured(changed)

    def changed_model(self, model: ModelSpec) -> ModelSpec:
        """Return the model with its fields as set; raises InputError for a key or value that it cannot have."""
        changed: ModelSpec = self._changed_fields("model", model, self.model)
        if changed.native_bits != model.native_bits and changed.native_bits not in WEIGHT_FORMATS:
            raise UnknownName("model.native_bits", changed.native_bits, WEIGHT_FORMATS)
        return changed

    def changed_request(self, request: Any, options: Mapping[str, str] | None = None) -> Any:
        """Return a request, a dataclass, with its fields as set; raises InputError.

        options: field → option that was given on the command line; setting such a field too is refused.
        """
        self.refuse_repeated(options or {})
        return self._changed_fields("request", request, self.request)

    def refuse_repeated(self, options: Mapping[str, str]) -> None:
        """Return nothing; raises InputError where a field of the request is set that an option of its own gives: field → option."""
        for key in self.request:
            if key in options:
                rule = f"{options[key]} says it already"
                raise InputError("--set", f"request.{key}", rule, "give one of the two")

    def refuse(self, prefix: str, why: str) -> None:
        """Return nothing; raises InputError where something of `prefix` ("schedule": without one) is set: here it cannot count."""
        given = getattr(self, prefix)
        if given:
            key = next(iter(given))
            raise InputError("--set", key if prefix == "schedule" else f"{prefix}.{key}", why, "leave it out")

    def _constant(self, profile: Profile, key: str) -> Constant | int | bool:
        valid = machine_keys(profile)
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.4)
            rule = f"{profile.name} has no such constant" + (f"; did you mean 'machine.{near[0]}'?" if near else "")
            raise InputError("--set", f"machine.{key}", rule, "moeplan hardware show lists them")
        for start, tables in _REPLACED:
            names = [name for name in profile.curves if name.startswith(tables)]
            if key.startswith(start) and names:
                rule = f"{profile.name} was measured: its table {names[0]} stands in place of this constant"
                raise InputError(
                    "--set", f"machine.{key}", rule, "set it on a machine of constants, or measure another one"
                )
        text, was = self.machine[key], valid[key]
        if was is None or isinstance(was, Constant):
            value = parse_quantity(text, unit_of(key), f"machine.{key}")
            before = "absent" if was is None else f"{was.value:g}, {was.source}: {was.citation}"
            self._note("machine", key, text, value, None if was is None else was.value)
            citation = f"--set machine.{key}={text} (was {before})"
            return Constant(value=value, source=SET_BY_USER, citation=citation, relative_uncertainty=0.0)
        kind = was if isinstance(was, type) else type(was)
        converted: int | bool = _converted(kind, text, f"machine.{key}")
        self._note("machine", key, text, converted, None if isinstance(was, type) else was)
        return converted

    def _changed_fields(self, prefix: str, noun: Any, given: Mapping[str, str]) -> Any:
        """Return a dataclass with (dotted) fields replaced by the values of their texts."""
        valid = _plain_fields(noun)
        nested: dict[str, dict[str, Any]] = {}
        for key, text in given.items():
            name = f"{prefix}.{key}"
            if key not in valid:
                raise UnknownName("--set", name, [f"{prefix}.{each}" for each in valid])
            kind, was = valid[key]
            value = _converted(kind, text, name)
            self._note(prefix, key, text, value, was)
            part, _, last = key.rpartition(".")
            nested.setdefault(part, {})[last] = value
        try:
            top = nested.pop("", {})
            top |= {part: dataclasses.replace(getattr(noun, part), **values) for part, values in nested.items()}
            return dataclasses.replace(noun, **top) if top else noun
        except InputError as error:
            raise InputError(f"{prefix}.{error.field}", error.value, error.rule, "set another value") from None

    def _note(self, prefix: str, key: str, text: str, value: Any, was: Any) -> None:
        self.made.append({"setting": f"{prefix}.{key}={text}", "key": f"{prefix}.{key}", "value": value, "was": was,
                          "source": SET_BY_USER})  # fmt: skip


SettingsLike: TypeAlias = Settings | Mapping[str, object] | Iterable[str] | None
"""Settings as people write them: `{"cache.policy": "lfu"}`, or `key=value` texts as after `--set`."""


def open_settings(given: SettingsLike) -> Settings:
    """Return settings by what they change; raises InputError for a wrong form or a key given twice."""
    if isinstance(given, Settings):
        return given
    if isinstance(given, str):
        raise InputError("settings", given, "one text where a table or a list belongs", "write {key: value} or [text]")
    if isinstance(given, Mapping):
        return split_settings(f"{key}={value}" for key, value in given.items())
    return split_settings(given)


def split_settings(texts: Iterable[str] | None) -> Settings:
    """Return the settings of `key=value` texts by what they change; raises InputError for a wrong form or a key given twice."""
    found, seen = Settings(), set()
    for text in texts or ():
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key:
            raise InputError("--set", text, "not of the form key=value", "write for instance --set cache.policy=lru")
        if key in seen:
            raise InputError("--set", key, "is given twice", "give it once")
        seen.add(key)
        prefix, _, rest = key.partition(".")
        if prefix in PREFIXES:
            getattr(found, prefix)[rest] = value
        else:
            found.schedule.append(f"{key}={value}")
    return found


# --- the machine -------------------------------------------------------------------------------------------------------


def machine_keys(profile: Profile) -> dict[str, Constant | int | bool | type | None]:
    """Return every key of a machine that can be set, with what it is now; None, or a count's type, where this machine lacks it."""
    found: dict[str, Constant | int | bool | type | None] = {}
    _walk("", type(profile), profile, found)
    for dtype in DTYPES:
        found.setdefault(f"device.peak_flops_per_s.{dtype}", None)
    for name, stored in WEIGHT_FORMATS.items():
        if stored.quantised:
            found.setdefault(f"device.dequantise_efficiency.{name}", None)
    for lane in LANES:
        for companion in LANES:
            if lane != companion:
                found.setdefault(f"contention.{lane}/{companion}", None)
    return found


def _walk(prefix: str, kind: Any, part: Any, found: dict[str, Constant | int | bool | type | None]) -> None:
    """Add the keys below a dataclass of type `kind`; `part` is None where the machine has no such part."""
    hints = typing.get_type_hints(kind)
    for each in dataclasses.fields(kind):
        key = f"{prefix}{each.name}"
        declared = _without_none(hints[each.name])
        value = None if part is None else getattr(part, each.name)
        if declared is Constant:
            found[key] = value
        elif dataclasses.is_dataclass(declared):
            _walk(f"{key}.", declared, value, found)
        elif isinstance(value, Mapping):
            found |= {f"{key}.{name}": one for name, one in value.items() if isinstance(one, Constant)}
        elif declared in (int, bool) and each.name != "schema_version":
            found[key] = value if value is not None else declared


def _by_part(given: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the keys that are set by the part of the machine they belong to; a part that is absent needs all of its keys at once."""
    found: dict[str, list[str]] = {}
    for key in given:
        found.setdefault(key.rpartition(".")[0], []).append(key)
    return found


def _with_constants(profile: Profile, path: str, values: Mapping[str, Any]) -> Profile:
    """Return the machine with the constants of one part replaced; a part that is absent is made of them."""
    own = {key.rpartition(".")[2]: value for key, value in values.items()}

    def replaced(kind: type, part: Any, names: list[str], where: str) -> Any:
        if names:
            declared = _without_none(typing.get_type_hints(kind)[names[0]])
            if part is None:
                raise InputError(
                    "--set", f"machine.{path}", f"this machine has no {where}", f"set machine.{where} first"
                )
            inner = getattr(part, names[0])
            if isinstance(inner, Mapping):
                return dataclasses.replace(part, **{names[0]: {**inner, **own}})
            below = replaced(declared, inner, names[1:], f"{where}.{names[0]}".lstrip("."))
            return dataclasses.replace(part, **{names[0]: below})
        if part is not None:
            return dataclasses.replace(part, **own)
        needed = [each.name for each in dataclasses.fields(kind) if each.default is dataclasses.MISSING]
        absent = [f"machine.{where}.{name}" for name in needed if name not in own]
        if absent:
            raise InputError(
                "--set",
                f"machine.{next(iter(values))}",
                f"{profile.name} has no {where}",
                f"set {' and '.join(absent)} too",
            )
        return kind(**own)

    try:
        found: Profile = replaced(Profile, profile, path.split(".") if path else [], "")
    except InputError as error:
        name = (
            error.field
            if error.field.startswith(("machine", "--set"))
            else f"machine.{error.field.removesuffix('.value')}"
        )
        raise InputError(
            name, error.value, error.rule, error.remedy if error.field == "--set" else "set another value"
        ) from None
    return found


# --- plain fields ------------------------------------------------------------------------------------------------------


def plain_keys(noun: Any) -> list[str]:
    """Return the (dotted) names of a dataclass's fields that a setting can give."""
    return list(_plain_fields(noun))


def _plain_fields(noun: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return (declared type, value) by dotted name of every field of a dataclass that one value of a command line can give."""
    found: dict[str, tuple[Any, Any]] = {}
    hints = typing.get_type_hints(type(noun))
    for each in dataclasses.fields(noun):
        value, declared = getattr(noun, each.name), hints[each.name]
        if each.name == "name" or each.name.startswith("_"):
            continue
        if dataclasses.is_dataclass(value):
            found |= _plain_fields(value, f"{prefix}{each.name}.")
        elif _reader(declared) is not None:
            found[f"{prefix}{each.name}"] = (declared, value)
    return found


def _without_none(declared: Any) -> Any:
    """Return a declared type without the None it may allow."""
    if isinstance(declared, types.UnionType) or typing.get_origin(declared) is typing.Union:
        kinds = [kind for kind in typing.get_args(declared) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else declared
    return declared


def _reader(declared: Any) -> Callable[[str, str], Any] | None:
    """Return what reads a value of a declared type from (text, key); None for a type that no single value gives."""
    kind = _without_none(declared)
    if kind is bool:
        return _truth
    if kind is int:
        return lambda text, key: (
            int(parse_quantity(text, "bytes", key)) if unit_of(key) == "bytes" else _whole(text, key)
        )
    if kind is float:
        return lambda text, key: parse_quantity(text, unit_of(key), key)
    if kind is str:
        return lambda text, key: text
    if typing.get_origin(kind) is tuple and len(typing.get_args(kind)) == 2 and typing.get_args(kind)[1] is Ellipsis:
        each = _reader(typing.get_args(kind)[0])
        if each is not None:
            return lambda text, key: tuple(
                each(one.strip(), key) for one in text.strip("[]() ").split(",") if one.strip()
            )
    return None


def _converted(declared: Any, text: str, key: str) -> Any:
    """Return the value that `text` gives a field of the declared type; raises InputError."""
    if text.lower() == "none" and _without_none(declared) is not declared:
        return None
    read = _reader(declared)
    if read is None:
        raise InputError(key, text, "cannot be given on a command line", "change the file")
    return read(text, key)


def _truth(text: str, key: str) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise InputError(key, text, "not true or false", "write true or false")
    return known[text.lower()]


def _whole(text: str, key: str) -> int:
    most = _MOST_LAYERS if key.endswith("layers") else _MOST
    digits = text.replace("_", "")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 12 or int(digits) > most:
        raise InputError(key, text, f"not a whole number from 0 to {most}", "give a count")
    return int(digits)
