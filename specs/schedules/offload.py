"""The schedule noun: every decision about offloading that can be configured (published systems: `presets`).

Modelled: what is cached, in how many bits, what is guessed and fetched ahead, how kernels are grouped, whether copies
overlap compute, how requests are batched. Ignored here: how these options act (that is `sim/policies/`) and what they
cost (`calibrate/`). Options are plain frozen dataclasses so that a machine with only numpy can read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...base.errors import InputError, UnknownName
from . import rules
from .keys import Keys, replaced

CACHE_POLICIES = ("none", "lru", "lfu", "static", "belady", "least-stale", "affinity", "activation", "lfuda")
PLACEMENTS = ("popularity", "uniform", "front", "back")
CACHE_RESETS = ("never", "request")
PREDICTORS = ("none", "all", "next-gate", "synthetic", "pre-gate", "oracle", "activation")
KERNEL_GROUPINGS = ("per-expert", "grouped")
FETCHES = ("routed", "layer", "layer-streamed")
MISS_CHOICES = ("fetch", "cpu", "cheaper", "balanced")
_SIZES = ("experts_per_layer", "pooled_experts", "bytes", "host_layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """Which experts stay on the device. At most one of the four sizes is given; none given means "what fits"."""

    policy: str = "lru"
    """none; lru; lfu; static (chosen by `placement`, never changed); belady (knows the future: a reference); least-stale
    (layers that this pass has left behind go first, after SpecMD, arXiv 2602.03921); affinity (the least likely to follow
    the experts its layer chose last, counted on the way); activation (the least used by the request's nearest
    predecessor, early layers kept, after MoE-Infinity, arXiv 2401.14361); lfuda (LFU with ageing: tokens since an expert came in,
    plus what the last victim of its pool was worth, so that what was popular once leaves; Arlitt et al., HPL-98-173)."""
    experts_per_layer: int | None = None
    """Slots of each MoE layer's own cache."""
    first_layer_extra: int = 0
    """Slots that the first MoE layer's own cache has beyond the others': no gate runs early enough to guess for it, so its misses are
    never hidden (after the shallow-favouring cache of Fate, arXiv 2502.12224)."""
    pooled_experts: int | None = None
    """Slots of one cache shared by all layers."""
    bytes: int | None = None
    """Bytes of one cache shared by all layers; rounded down to whole experts."""
    host_layers: int | None = None
    """Whole layers, the first ones, whose experts stay off the device; all others' are on it (llama.cpp `--n-cpu-moe`)."""
    placement: str = "popularity"
    """Which experts a static cache holds: popularity; uniform (as many of each layer, lowest numbers first); front (the
    first layers whole); back (the last layers whole)."""
    reset: str = "never"
    """never: the cache persists across requests, as in a server; request: each request starts with an empty one."""

    def slots_by_cache(self, num_layers: int) -> tuple[int, ...]:
        """Return the slots of the one pooled cache, or of each layer's own; all 0 where nothing is cached or no size is known."""
        if self.pooled_experts is not None:
            return (self.pooled_experts,)
        each = self.experts_per_layer or 0
        return (each + self.first_layer_extra, *(each for _ in range(num_layers - 1)))

    def slots(self, num_layers: int) -> int:
        """Return how many experts are cached in all; 0 where nothing is cached or no size is known."""
        return sum(self.slots_by_cache(num_layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOptions:
    """How expert weights are stored."""

    bits: str = "native"
    """Weight format by name: 32, 16, 8, 4, mxfp4, 3 or 2; native is what the model's checkpoint stores."""
    low_bits: str | None = None
    """A second, smaller format that some experts use; None: there is none."""
    low_rank: int | None = None
    """A miss that no token of the pass ranks above this place (0 is its first choice) is fetched in `low_bits`
    (after HOBBIT, arXiv 2411.01433)."""
    low_fraction: float = 0.0
    """Share of each layer's experts, the least popular, that are always stored in `low_bits` (after EdgeMoE,
    arXiv 2308.14352)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorOptions:
    """What is guessed about the next layers, and how much of it is fetched ahead of use."""

    kind: str = "none"
    """none; all (every expert of the next layers); next-gate (guesses in the recording); synthetic (the truth spoilt to a
    given recall); pre-gate (the next layer's choice is known and final); oracle (the truth, any depth); activation (what
    the nearest earlier request used, matched anew at every pass)."""
    depth: int = 1
    """How many layers ahead guesses are made and fetched."""
    width: int | None = None
    """Guesses used per token and layer; None means the model's top-k."""
    staging: int = 0
    """Buffers for guessed experts, shared by all layers; 0 admits guesses straight into the cache."""
    recall: float = 0.8
    """synthetic only: the chance that a true choice is among the guesses one layer ahead."""
    recall_decay: float = 0.9
    """synthetic only: recall is multiplied by this for every further layer of distance. 0.9 is the mean ratio of the
    published recalls .68/.60/.54 (2 guesses) and .83/.77/.71 (4 guesses) of an untrained next gate."""
    seed: int = 0
    """synthetic only: seed of the counter-based hash that spoils the truth."""
    threshold: float = 0.0
    """Guesses less probable than this are not fetched; a synthetic predictor's guesses are as probable as its recall."""
    benefit: bool = False
    """Fetch a guess only while the time it is expected to hide exceeds the time a wrong one is expected to cost, both
    from predicted costs and from the link's predicted backlog."""
    library: int = 64
    """activation only: how many earlier requests are remembered."""
    score: str | None = None
    """A policy file's rule that ranks guesses and says which are not fetched (`--policy`); None: the most probable first, as `threshold`
    and `benefit` allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOptions:
    """How a layer's experts are launched."""

    grouping: str = "grouped"
    """per-expert: one launch each; grouped: one launch for the resident ones, one for those guessed, one for the rest."""
    miss: str = "fetch"
    """What a missing expert does: fetch; cpu (it runs on the host's cores); cheaper (whichever is predicted to be sooner,
    expert by expert, after Fiddler, arXiv 2402.07033); balanced (a layer step's misses are divided so that cores and link end
    as early as they can, after HybriMoE, arXiv 2504.05897)."""
    upload_tokens: int | None = None
    """Forward passes of at least so many tokens fetch their misses whatever `miss` says: with many tokens an expert's copy costs
    less than its work on the cores (llama.cpp from 32 tokens on). None: no pass does."""


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
    """routed: only the experts that were chosen; layer: every expert of the layer, before any of it runs; layer-streamed:
    every expert of the layer, each running as it arrives, the last one once all have (after InfMoE, arXiv 2106.10715)."""
    cancel: bool = False
    """Drop guesses that turn out wrong before their copy has begun (after ProMoE, arXiv 2410.22134). What is dropped
    depends on when copies run: the schedule is timing-dependent."""
    host_experts: int | None = None
    """Experts, over all layers, that the host's memory holds; the others are read from disk first. None: all; 0: as many as
    the machine's memory has room for."""


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

    def with_upload(self, tokens: int | None) -> OffloadSchedule:
        """Return a copy in which passes of at least `tokens` tokens fetch what the cores would compute, if anything."""
        if tokens is None or self.kernel.miss == "fetch":
            return self
        return self.with_options(kernel__upload_tokens=tokens)

    @property
    def timing_dependent(self) -> bool:
        """Whether decisions depend on observed time, so that a real run may count differently."""
        return self.copy.cancel

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved options as nested plain values, in declaration order; a rule's place is there where a file fills it."""
        found = dataclasses.asdict(self)
        if self.predictor.score is None:
            del found["predictor"]["score"]
        return found


# --- keys, values and their checks -----------------------------------------------------------------------------------

_KEYS = Keys(
    sections={
        "cache": CacheOptions, "experts": ExpertOptions, "predictor": PredictorOptions, "kernel": KernelOptions, "copy": CopyOptions,
        "host": HostOptions, "workload": WorkloadOptions,
    },
    example="cache.policy=lru", old_values={("predictor.kind", "dial"): "synthetic"},
)  # fmt: skip
setting_keys = _KEYS.kinds
parse_setting = _KEYS.parse


def apply_settings(schedule: OffloadSchedule, settings: Mapping[str, Any]) -> OffloadSchedule:
    """Return `schedule` with dotted keys replaced; giving one cache size clears the other three, and what only goes with them.

    Raises UnknownName for a key that does not exist and InputError for a value that breaks a rule.
    """
    changes = _KEYS.by_section(settings)
    if any(changes.get("cache", {}).get(size) is not None for size in _SIZES):
        own = changes["cache"].get("experts_per_layer") is not None
        changes["cache"] = dict.fromkeys(_SIZES) | ({} if own else {"first_layer_extra": 0}) | changes["cache"]
    made: OffloadSchedule = replaced(schedule, settings, changes)
    return made


def schedule_from_dict(data: Mapping[str, Any]) -> OffloadSchedule:
    """Return the schedule of nested plain values as written by `to_dict`; unknown keys are errors."""
    return apply_settings(OffloadSchedule(), _KEYS.dotted(data))


def check_schedule(schedule: OffloadSchedule) -> None:
    """Return nothing; raises InputError for the first option whose value breaks a rule."""
    cache, predictor, kernel, copy = schedule.cache, schedule.predictor, schedule.kernel, schedule.copy
    _one_of("cache.policy", cache.policy, (*CACHE_POLICIES, *rules.added(rules.VICTIM)))
    _one_of("cache.reset", cache.reset, CACHE_RESETS)
    _one_of("predictor.kind", predictor.kind, PREDICTORS)
    _one_of("cache.placement", cache.placement, PLACEMENTS)
    _one_of("kernel.grouping", kernel.grouping, KERNEL_GROUPINGS)
    _one_of("kernel.miss", kernel.miss, (*MISS_CHOICES, *rules.added(rules.MISS)))
    if predictor.score is not None:
        _check_score(predictor)
    _one_of("copy.fetch", copy.fetch, FETCHES)
    sizes = {name: getattr(cache, name) for name in _SIZES}
    given = {name: value for name, value in sizes.items() if value is not None}
    for name, value in given.items():
        _whole(f"cache.{name}", value, 0 if name == "host_layers" else 1)
    if len(given) > 1:
        raise InputError("cache", "+".join(given), "more than one size given", "keep one of them")
    if cache.policy == "none" and given:
        raise InputError("cache.policy", "none", "a cache size is given but nothing is cached", "choose lru or drop it")
    _whole("cache.first_layer_extra", cache.first_layer_extra, 0)
    if cache.first_layer_extra and (cache.policy == "none" or not given.keys() <= {"experts_per_layer"}):
        raise InputError("cache.first_layer_extra", cache.first_layer_extra, "only layers that each have a cache of their own can differ",
                         "give cache.experts_per_layer, or leave it at 0")  # fmt: skip
    _whole("predictor.depth", predictor.depth, 1, 64)
    if predictor.width is not None:
        _whole("predictor.width", predictor.width, 1, 4096)
    _whole("predictor.staging", predictor.staging, 0, 65536)
    _whole("predictor.seed", predictor.seed, 0)
    _whole("predictor.library", predictor.library, 1, 4096)
    for name in ("recall", "recall_decay", "threshold"):
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
    if copy.fetch != "routed" and (cache.policy != "none" or predictor.kind != "none"):
        raise InputError("copy.fetch", copy.fetch, "whole layers are fetched only where nothing is cached or guessed",
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
    if kernel.upload_tokens is not None:
        _whole("kernel.upload_tokens", kernel.upload_tokens, 1)
    _check_misses(schedule)
    _check_precision(schedule.experts)
    for key in ("overlap", "write_back", "pinned", "cancel"):
        if not isinstance(getattr(copy, key), bool):
            raise InputError(f"copy.{key}", getattr(copy, key), "not true or false", "write true or false")
    if not isinstance(predictor.benefit, bool):
        raise InputError("predictor.benefit", predictor.benefit, "not true or false", "write true or false")


def _check_score(predictor: PredictorOptions) -> None:
    """Raise InputError where a policy file's rule about guesses is unknown, idle, or not the only one."""
    known = rules.added(rules.PREFETCH)
    if predictor.score not in known:
        raise InputError("predictor.score", predictor.score, f"no policy file has added it (added: {', '.join(known) or 'none'})",
                         "give the file with --policy")  # fmt: skip
    if predictor.kind == "none":
        raise InputError(
            "predictor.score", predictor.score, "nothing is guessed", "set predictor.kind, for instance to next-gate"
        )
    if predictor.threshold or predictor.benefit:
        raise InputError("predictor.score", predictor.score, "it decides alone which guesses are fetched",
                         "leave out predictor.threshold and predictor.benefit")  # fmt: skip


def _check_misses(schedule: OffloadSchedule) -> None:
    """Raise InputError where options about missing experts, other tiers and static places contradict each other."""
    cache, kernel, copy = schedule.cache, schedule.kernel, schedule.copy
    if kernel.miss != "fetch" and copy.fetch != "routed":
        raise InputError("kernel.miss", kernel.miss, "whole layers are fetched, so nothing is left for the cores",
                         "set copy.fetch=routed")  # fmt: skip
    if copy.host_experts is not None:
        _whole("copy.host_experts", copy.host_experts, 0)
    for name, used in (("copy.fetch=layer-streamed", copy.fetch == "layer-streamed"), ("kernel.miss", kernel.miss != "fetch"),
                       ("copy.host_experts", copy.host_experts is not None),
                       ("copy.cancel", copy.cancel)):  # fmt: skip
        if used and not copy.overlap:
            raise InputError("copy.overlap", False, f"{name} needs copies beside the stream", "set copy.overlap=true")
    if copy.host_experts is not None and copy.write_back:
        raise InputError("copy.write_back", True, "experts that live on disk are not written back", "set it to false")
    if kernel.upload_tokens is not None and kernel.miss == "fetch":
        raise InputError(
            "kernel.upload_tokens", kernel.upload_tokens, "every pass fetches its misses already", "leave it out"
        )
    if cache.policy != "static" and (cache.placement != "popularity" or cache.host_layers is not None):
        name = "cache.placement" if cache.host_layers is None else "cache.host_layers"
        raise InputError(
            name, getattr(cache, name[6:]), "only a static cache has fixed places", "set cache.policy=static"
        )


def _check_precision(experts: ExpertOptions) -> None:
    """Raise InputError where the second weight format is half described."""
    _between("experts.low_fraction", experts.low_fraction, 0.0, 1.0)
    if experts.low_rank is not None:
        _whole("experts.low_rank", experts.low_rank, 0, 4096)
    if experts.low_bits is not None and not isinstance(experts.low_bits, str):
        raise InputError("experts.low_bits", experts.low_bits, "not a weight format's name", "write for instance 2")
    uses = experts.low_rank is not None or experts.low_fraction > 0
    if uses != (experts.low_bits is not None):
        raise InputError("experts.low_bits", experts.low_bits, "a second format and who uses it belong together",
                         "give low_bits and one of low_rank and low_fraction")  # fmt: skip
    if experts.low_rank is not None and experts.low_fraction > 0:
        raise InputError("experts.low_rank", experts.low_rank, "precision is either fixed or decided at a miss",
                         "give one of low_rank and low_fraction")  # fmt: skip


def _one_of(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UnknownName(name, value, valid)


def _whole(name: str, value: object, least: int, most: int = 2**62) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(name, value, f"not a whole number from {least} to {most}", f"give at least {least}")


def _between(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise InputError(name, value, f"not a number from {least} to {most}", "choose one inside")
