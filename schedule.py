"""The schedule noun: every decision about offloading that can be configured, and the presets of published systems.

Modelled: what is cached, in how many bits, what is guessed and fetched ahead, how kernels are grouped, whether copies
overlap compute, how requests are batched. Ignored here: how these options act (that is `sim/policies/`) and what they
cost (`calibrate/`). Options are plain frozen dataclasses so that a machine with only numpy can read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import InputError, UnknownName

CACHE_POLICIES = ("none", "lru", "lfu", "static", "belady")
CACHE_RESETS = ("never", "request")
PREDICTORS = ("none", "all", "next-gate", "dial", "pre-gate", "oracle")
KERNEL_GROUPINGS = ("per-expert", "grouped")
FETCHES = ("routed", "layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """Which experts stay on the device. At most one of the three sizes is given; none given means "what fits"."""

    policy: str = "lru"
    """none, lru, lfu, static (most popular experts, never changed) or belady (knows the future: a reference)."""
    experts_per_layer: int | None = None
    """Slots of each MoE layer's own cache."""
    pooled_experts: int | None = None
    """Slots of one cache shared by all layers."""
    bytes: int | None = None
    """Bytes of one cache shared by all layers; rounded down to whole experts."""
    reset: str = "never"
    """never: the cache persists across requests, as in a server; request: each request starts with an empty one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOptions:
    """How expert weights are stored."""

    bits: str = "native"
    """Weight format by name: 32, 16, 8, 4, mxfp4, 3 or 2; native is what the model's checkpoint stores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorOptions:
    """What is guessed about the next layers, and how much of it is fetched ahead of use."""

    kind: str = "none"
    """none; all (every expert of the next layers); next-gate (guesses in the recording); dial (the truth spoilt to a
    given recall); pre-gate (the next layer's choice is known and final); oracle (the truth, any depth)."""
    depth: int = 1
    """How many layers ahead guesses are made and fetched."""
    width: int | None = None
    """Guesses used per token and layer; None means the model's top-k."""
    staging: int = 0
    """Buffers for guessed experts, shared by all layers; 0 admits guesses straight into the cache."""
    recall: float = 0.8
    """dial only: the chance that a true choice is among the guesses one layer ahead."""
    recall_decay: float = 0.9
    """dial only: recall is multiplied by this for every further layer of distance. 0.9 is the mean ratio of the
    published recalls .68/.60/.54 (2 guesses) and .83/.77/.71 (4 guesses) of an untrained next gate."""
    seed: int = 0
    """dial only: seed of the counter-based hash that spoils the truth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOptions:
    """How a layer's experts are launched."""

    grouping: str = "grouped"
    """per-expert: one launch each; grouped: one launch for the resident ones, one for those guessed, one for the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOptions:
    """How expert bytes move."""

    overlap: bool = True
    """False runs copies and kernels on one stream, in program order."""
    write_back: bool = False
    """True copies each evicted expert back to the host before its slot is filled (a swap)."""
    chunk_bytes: int | None = None
    """Transfers are cut into chunks of this size; a demand may pass a prefetch between chunks. None: not cut."""
    pinned: bool = True
    """Host memory is page-locked."""
    fetch: str = "routed"
    """routed: only the experts that were chosen; layer: every expert of the layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOptions:
    """Host overheads in seconds; None takes the profile's."""

    per_step_s: float | None = None
    """Between the end of a forward pass and the first launch of the next (sampling, bookkeeping)."""
    per_layer_s: float | None = None
    """From the routing being computed to the host knowing it and having decided (synchronisation, Python)."""
    per_kernel_s: float | None = None
    """One launch."""
    per_transfer_s: float | None = None
    """Submitting one copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """How the recording's requests are batched."""

    concurrency: int = 1
    """Requests decoded together."""
    prefill_chunk_tokens: int | None = None
    """Prompt tokens per forward pass; None runs a prompt in one pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadSchedule:
    """One complete set of decisions for running a model whose experts do not all fit on one device."""

    name: str = "custom"
    """What the schedule is called in tables; presets carry their own name."""
    cache: CacheOptions = field(default_factory=CacheOptions)
    experts: ExpertOptions = field(default_factory=ExpertOptions)
    predictor: PredictorOptions = field(default_factory=PredictorOptions)
    kernel: KernelOptions = field(default_factory=KernelOptions)
    copy: CopyOptions = field(default_factory=CopyOptions)
    host: HostOptions = field(default_factory=HostOptions)
    workload: WorkloadOptions = field(default_factory=WorkloadOptions)

    def __post_init__(self) -> None:
        check_schedule(self)

    def with_options(self, **changes: Any) -> OffloadSchedule:
        """Return a copy in which dotted keys (with `__` for the dot: `cache__policy="lru"`) are replaced."""
        return apply_settings(self, {key.replace("__", "."): value for key, value in changes.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved options as nested plain values, in declaration order."""
        return dataclasses.asdict(self)


# --- presets: one line each ------------------------------------------------------------------------------------------


def _preset(name: str, **changes: Any) -> OffloadSchedule:
    return OffloadSchedule(name=name).with_options(**changes)


PRESETS: Mapping[str, Callable[[], OffloadSchedule]] = {
    # Everything on the device: the reference when it fits.
    "resident": lambda: _preset("resident", cache__policy="static"),
    # Whole layers are fetched, serially, whatever was routed (arXiv 2312.17238, "naive offloading").
    "naive": lambda: _preset(
        "naive", cache__policy="none", copy__fetch="layer",
        copy__overlap=False, kernel__grouping="per-expert",
    ),
    # Fetch what was routed, after it was routed; nothing is kept (arXiv 2308.12066, MoE-OnDemand).
    "on-demand": lambda: _preset("on-demand", cache__policy="none", kernel__grouping="per-expert"),
    # LRU per layer and the next gate's two likeliest into four shared staging buffers (arXiv 2312.17238 §3).
    "mixtral-offloading": lambda: _preset(
        "mixtral-offloading", predictor__kind="next-gate", predictor__width=2,
        predictor__staging=4, kernel__grouping="per-expert",
    ),
    # What the public code does: LRU only, one stream, victims are swapped back.
    "mixtral-offloading-code": lambda: _preset(
        "mixtral-offloading-code", copy__overlap=False, copy__write_back=True,
        kernel__grouping="per-expert",
    ),
    # The gate of block N chooses for block N+1; nothing is kept (arXiv 2308.12066).
    "pre-gated": lambda: _preset("pre-gated", cache__policy="none", predictor__kind="pre-gate", kernel__grouping="per-expert"),
}  # fmt: skip


def load_preset(name: str) -> OffloadSchedule:
    """Return the preset called `name`; raises UnknownName (with the nearest one) otherwise."""
    if name not in PRESETS:
        raise UnknownName("schedule", name, PRESETS)
    return PRESETS[name]()


# --- keys, values and their checks -----------------------------------------------------------------------------------

_SECTIONS = ("cache", "experts", "predictor", "kernel", "copy", "host", "workload")


def setting_keys() -> dict[str, str]:
    """Return every dotted key of a schedule with its declared type, in declaration order."""
    keys = {}
    for section in dataclasses.fields(OffloadSchedule):
        if section.name in _SECTIONS:
            options: Any = section.default_factory
            for option in dataclasses.fields(options):
                keys[f"{section.name}.{option.name}"] = str(option.type)
    return keys


def parse_setting(text: str) -> tuple[str, Any]:
    """Return (key, value) of a `key=value` argument, with the value converted to the key's type.

    Raises InputError for a missing `=`, an unknown key (naming the nearest valid one) or a value of the wrong type.
    """
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals:
        raise InputError("--set", text, "not of the form key=value", "write for instance --set cache.policy=lru")
    kinds = setting_keys()
    if key not in kinds:
        raise UnknownName("--set", key, kinds)
    return key, _convert(key, kinds[key], raw.strip())


def _convert(key: str, kind: str, raw: str) -> Any:
    if "None" in kind and raw.lower() in ("none", ""):
        return None
    try:
        if kind.startswith("int"):
            return int(raw)
        if kind.startswith("float"):
            return float(raw)
        if kind.startswith("bool"):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[raw.lower()]
    except (ValueError, KeyError):
        raise InputError(key, raw, f"not a value of type {kind}", f"give {kind}") from None
    return raw


def apply_settings(schedule: OffloadSchedule, settings: Mapping[str, Any]) -> OffloadSchedule:
    """Return `schedule` with dotted keys replaced; giving one cache size clears the other two.

    Raises UnknownName for a key that does not exist and InputError for a value that breaks a rule.
    """
    kinds = setting_keys()
    changes: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        if key == "name":
            continue
        if key not in kinds:
            raise UnknownName("schedule key", key, kinds)
        section, _, option = key.partition(".")
        changes.setdefault(section, {})[option] = value
    sizes = ("experts_per_layer", "pooled_experts", "bytes")
    given = [size for size in sizes if changes.get("cache", {}).get(size) is not None]
    if given:
        changes["cache"] = dict.fromkeys(sizes) | changes["cache"]
    parts = {name: dataclasses.replace(getattr(schedule, name), **options) for name, options in changes.items()}
    return dataclasses.replace(schedule, name=settings.get("name", schedule.name), **parts)


def schedule_from_dict(data: Mapping[str, Any]) -> OffloadSchedule:
    """Return the schedule of nested plain values as written by `to_dict`; unknown keys are errors."""
    flat: dict[str, Any] = {}
    for section, options in data.items():
        if section == "name":
            flat["name"] = options
        elif section not in _SECTIONS:
            raise UnknownName("schedule key", section, _SECTIONS)
        elif not isinstance(options, Mapping):
            raise InputError(f"schedule {section}", options, "not a table of options", "give option: value pairs")
        else:
            flat |= {f"{section}.{option}": value for option, value in options.items()}
    return apply_settings(OffloadSchedule(), flat)


def check_schedule(schedule: OffloadSchedule) -> None:
    """Return nothing; raises InputError for the first option whose value breaks a rule."""
    cache, predictor, copy = schedule.cache, schedule.predictor, schedule.copy
    _one_of("cache.policy", cache.policy, CACHE_POLICIES)
    _one_of("cache.reset", cache.reset, CACHE_RESETS)
    _one_of("predictor.kind", predictor.kind, PREDICTORS)
    _one_of("kernel.grouping", schedule.kernel.grouping, KERNEL_GROUPINGS)
    _one_of("copy.fetch", copy.fetch, FETCHES)
    sizes = {name: getattr(cache, name) for name in ("experts_per_layer", "pooled_experts", "bytes")}
    given = {name: value for name, value in sizes.items() if value is not None}
    for name, value in given.items():
        _whole(f"cache.{name}", value, 1)
    if len(given) > 1:
        raise InputError("cache", "+".join(given), "more than one size given", "keep one of them")
    if cache.policy == "none" and given:
        raise InputError("cache.policy", "none", "a cache size is given but nothing is cached", "choose lru or drop it")
    _whole("predictor.depth", predictor.depth, 1, 64)
    if predictor.width is not None:
        _whole("predictor.width", predictor.width, 1, 4096)
    _whole("predictor.staging", predictor.staging, 0, 65536)
    _whole("predictor.seed", predictor.seed, 0)
    for name in ("recall", "recall_decay"):
        _between(f"predictor.{name}", getattr(predictor, name), 0.0, 1.0)
    if predictor.kind == "pre-gate" and predictor.depth != 1:
        raise InputError(
            "predictor.depth", predictor.depth, "a pre-gate looks one layer ahead", "set it to 1, or use oracle"
        )
    if cache.policy == "none" and predictor.staging:
        raise InputError(
            "predictor.staging", predictor.staging, "nothing is cached, so guesses need no staging", "set it to 0"
        )
    if cache.policy == "static" and predictor.kind != "none" and not predictor.staging:
        raise InputError("predictor.staging", 0, "a static cache admits no guesses", "give it staging buffers")
    if copy.chunk_bytes is not None:
        _whole("copy.chunk_bytes", copy.chunk_bytes, 4096)
    if copy.fetch == "layer" and (cache.policy != "none" or predictor.kind != "none"):
        raise InputError("copy.fetch", "layer", "whole layers are fetched only where nothing is cached or guessed",
                         "set cache.policy=none and predictor.kind=none")  # fmt: skip
    for name in ("per_step_s", "per_layer_s", "per_kernel_s", "per_transfer_s"):
        value = getattr(schedule.host, name)
        if value is not None:
            _between(f"host.{name}", value, 0.0, 3600.0)
    _whole("workload.concurrency", schedule.workload.concurrency, 1, 65536)
    if schedule.workload.prefill_chunk_tokens is not None:
        _whole("workload.prefill_chunk_tokens", schedule.workload.prefill_chunk_tokens, 1)
    if cache.reset == "request" and schedule.workload.concurrency != 1:
        raise InputError("cache.reset", "request", "requests decoded together share the cache",
                         "set workload.concurrency=1 or cache.reset=never")  # fmt: skip
    if not isinstance(schedule.experts.bits, str):
        raise InputError("experts.bits", schedule.experts.bits, "not a weight format's name", "write for instance 4")
    for key in ("overlap", "write_back", "pinned"):
        if not isinstance(getattr(copy, key), bool):
            raise InputError(f"copy.{key}", getattr(copy, key), "not true or false", "write true or false")


def _one_of(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UnknownName(name, value, valid)


def _whole(name: str, value: object, least: int, most: int = 2**62) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(name, value, f"not a whole number from {least} to {most}", f"give at least {least}")


def _between(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise InputError(name, value, f"not a number from {least} to {most}", "choose one inside")
