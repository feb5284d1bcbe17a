"""What a plan made for one engine says besides its schedule: the setting, the engine's own default, the requests, both predictions.

Modelled: the parts `for`, `asked`, `best` and `baselines` of a plan document, checked. Ignored: any engine's flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...base.errors import InputError
from ...traces.lengths import RequestLengths, lengths_from_dict

Figures = Mapping[str, Any]
_AGAIN = "plan again with --for"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedSetting:
    """How the engine is started."""

    name: str
    told_layers: int
    """Layers, from the first, whose experts are kept in host memory; 0: none."""
    card: bool
    ubatch: int
    op_offload: bool
    fitted: bool
    part_of_layer: float
    experts_per_layer: int | None
    """Experts of each layer on the card, where single experts are placed."""
    tensor_split: tuple[float, ...]
    """Shares of several cards; empty for one."""
    upload_tokens: int | None
    """Passes of at least so many tokens compute experts of host memory on the card."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedChoice:
    """A plan for one engine."""

    engine: str
    chosen: ServedSetting
    default: ServedSetting | None
    """What the engine does of itself."""
    default_figures: Figures | None
    figures: Figures
    """Of the chosen setting."""
    difference: Mapping[str, Any] | None
    context_tokens: int
    concurrency: int
    lengths: RequestLengths | None
    """Of the requests; None where they are a recording's own."""
    kv_type: str
    ubatch_asked: bool
    model_file: str | None
    """The file that was planned, where a file was."""

    @property
    def is_default(self) -> bool:
        """Whether the setting chosen is what the engine does of itself."""
        return self.default is not None and self.chosen.name == self.default.name


def read_served(document: Mapping[str, Any]) -> ServedChoice | None:
    """Return what a plan says of its engine, None for a plan of no particular one; raises InputError for a damaged one."""
    part = document.get("for")
    if part is None:
        return None
    asked = document.get("asked")
    if not isinstance(part, Mapping) or not isinstance(asked, Mapping):
        raise InputError("plan: for", part, "not a table beside `asked`", _AGAIN)
    default = part.get("default")
    other = None if default is None else _setting(default, "default")
    listed = next(((name, asked[name]) for name in ("prior", "segments") if asked.get(name) is not None), None)
    lengths = None if listed is None else lengths_from_dict(listed[1], f"plan: asked.{listed[0]}")
    difference = part.get("difference")
    if difference is not None and not (isinstance(difference, Mapping) and isinstance(difference.get("ratio"), float)):
        raise InputError("plan: for.difference", difference, "not a table with a ratio", _AGAIN)
    longest = 0 if lengths is None else lengths.longest
    context = asked.get("context")
    model = str(asked.get("model"))
    return ServedChoice(
        engine=str(part.get("engine")), chosen=_setting(part.get("setting"), "setting"), default=other,
        default_figures=None if other is None else _named(document, other.name), figures=_figures(document.get("best"), "best"),
        difference=difference, context_tokens=_count(context, "asked.context") if context is not None else longest,
        concurrency=_count(asked.get("concurrency"), "asked.concurrency"), lengths=lengths,
        kv_type=str(asked.get("kv_type")), ubatch_asked=asked.get("ubatch") is not None,
        model_file=model if model.endswith(".gguf") else None,
    )  # fmt: skip


def _setting(value: object, name: str) -> ServedSetting:
    if not isinstance(value, Mapping):
        raise InputError(f"plan: for.{name}", value, "not a table", _AGAIN)
    flags = {key: value.get(key) for key in ("op_offload", "fitted", "card")}
    for key, flag in flags.items():
        if not isinstance(flag, bool):
            raise InputError(f"plan: for.{name}.{key}", flag, "not true or false", _AGAIN)
    part = value.get("part_of_layer")
    if isinstance(part, bool) or not isinstance(part, int | float) or not 0 <= part < 1:
        raise InputError(f"plan: for.{name}.part_of_layer", part, "not a share", _AGAIN)
    counts = {
        key: None if value.get(key) is None else _count(value[key], f"for.{name}.{key}") for key in ("experts_per_layer", "upload_tokens")
    }  # fmt: skip
    return ServedSetting(
        name=str(value.get("name")), **counts, told_layers=_count(value.get("told_layers"), f"for.{name}.told_layers"),
        card=bool(flags["card"]),
        ubatch=_count(value.get("ubatch"), f"for.{name}.ubatch"), op_offload=bool(flags["op_offload"]),
        fitted=bool(flags["fitted"]), part_of_layer=float(part), tensor_split=_shares(value.get("split"), name),
    )  # fmt: skip


def _shares(value: object, name: str) -> tuple[float, ...]:
    """Return the shares of a plan's cards; raises InputError for what is no split of layers."""
    if value is None:
        return ()
    shares = value.get("shares") if isinstance(value, Mapping) and value.get("mode") == "layer" else None
    if not isinstance(shares, list) or not all(isinstance(one, (int, float)) and 0 <= one < 1e15 for one in shares):
        raise InputError(f"plan: for.{name}.split", value, "not shares of layers over cards", _AGAIN)
    return tuple(float(one) for one in shares)


def _named(document: Mapping[str, Any], name: str) -> Figures | None:
    listed = document.get("baselines")
    for one in listed if isinstance(listed, list) else []:
        if isinstance(one, Mapping) and one.get("name") == name:
            return _figures(one, name)
    return None


def _figures(value: object, name: str) -> Figures:
    if not isinstance(value, Mapping):
        raise InputError(f"plan: {name}", value, "not a table", _AGAIN)
    return value


def _count(value: object, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"plan: {field}", value, "not a count", _AGAIN)
    return value
