"""The expert-parallel schedule noun: every decision about many devices that can be configured, and published presets.

Modelled: how attention and experts are divided over ranks, where experts sit and how many copies they have, which copy a
token takes, how all-to-alls are done, how exchanges overlap compute, which kernels run. Ignored here: how these options act
(`sim/policies/ep_program`, `sim/ep_traffic`), what they cost (`sim/ep_costs`), and the number of ranks: that is the machine's.
Options are plain frozen dataclasses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...base.errors import InputError, UnknownName
from .keys import Keys, replaced

ATTENTION_PARALLELISMS = ("data", "tensor")
EXPERT_PARALLELISMS = ("expert", "tensor", "node", "sharded")
PLACEMENTS = ("contiguous", "round-robin", "eplb", "eplb-hierarchical", "grace", "occult", "metro", "search")
REPLICA_CHOICES = ("nearest", "even", "capped", "weighted", "activated", "planned")
ALL_TO_ALLS = ("all-choices", "per-rank", "hierarchical")
TIER_ORDERS = ("together", "in-turn", "free")
SPLITS = ("none", "expert", "token", "tile")
KERNELS = ("grouped", "dense", "best")

MAX_GROUPS = 256
MAX_MICRO_BATCHES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelOptions:
    """How the model is divided over ranks."""

    attention: str = "data"
    """data: each rank has whole layers and its own tokens; tensor: ranks share each layer."""
    attention_ranks: int = 0
    """tensor only: consecutive ranks that share each layer, in a node or in several whole ones; 0: those of a node."""
    experts: str = "expert"
    """expert: whole experts are spread over all ranks; tensor: every rank holds a slice of every expert; node: whole experts
    are spread over the ranks of each node, all of which hold the node's tokens (nodes are replicas, or stages of a pipeline
    that other batches keep full); sharded: experts are spread over nodes and each is sliced over the ranks of its node. Where
    attention is shared by several nodes, these are one node for tensor and node."""

    def group(self, ranks_per_node: int) -> int:
        """Return how many consecutive ranks share each attention layer, and so hold the same tokens."""
        return 1 if self.attention == "data" else self.attention_ranks or ranks_per_node

    def replica_ranks(self, ranks_per_node: int) -> int:
        """Return how many consecutive ranks hold all experts where these wait for no token: a node's, or all that hold its tokens."""
        return max(self.group(ranks_per_node), ranks_per_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementOptions:
    """Which experts sit on which rank."""

    policy: str = "contiguous"
    """contiguous, round-robin, eplb, eplb-hierarchical, grace, occult, metro or search (ours)."""
    num_redundant: int = 0
    """Slots of a layer beyond one per expert, over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOptions:
    """Which copy of a replicated expert a token takes."""

    choice: str = "nearest"
    """nearest: a static table per source rank; even: drawn uniformly; capped: nearest first under a load cap; weighted: drawn
    by predicted load, nearest tier first; activated: copies on ranks that already run the expert; planned: the table the
    placement was searched with."""
    load_cap: float = 1.0
    """capped only: the rows a rank may reach, as a multiple of the mean."""
    seed: int = 0
    """Of the counter-based hash that draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllToAllOptions:
    """How tokens travel to their experts and back."""

    kind: str = "per-rank"
    """all-choices: a token is sent once for every expert; per-rank: once to every rank; hierarchical: once to every node,
    and there once to every rank."""
    tiers: str = "together"
    """hierarchical only. together: the stages are pipelined; in-turn: one after the other, holding the network; free: one after
    the other, while another exchange may use the tier that is free."""
    dispatch_bytes_per_value: float = 2.0
    """2 for 16 bits; 1.03125 for 8 bits with a 32-bit scale for 128 values."""
    combine_bytes_per_value: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOptions:
    """How exchanges and compute overlap."""

    split: str = "none"
    """What the groups of a layer's expert work are. expert: groups of local experts; token: chunks of tokens, each reading the
    weights anew; tile: an idealised division without any loss."""
    num_groups: int = 1
    micro_batches: int = 1
    """Batches run in alternation, attention included, so that one computes while the other is exchanged."""
    shortcut: bool = False
    """A layer's experts work on the layer before (the model is trained so): their exchanges overlap the next layer."""
    all_to_all_sm_fraction: float = 0.0
    """Share of the device's multiprocessors kept for exchanges while they overlap compute."""
    shared_overlap: bool = True
    """Shared experts run while tokens are dispatched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertKernelOptions:
    """Which kernel runs a stage's experts."""

    choice: str = "grouped"
    """grouped: one launch for all experts of a stage; dense: a launch for each; best: the cheaper one, stage by stage."""
    bits: str = "16"
    """Weight format of experts, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertParallelSchedule:
    """One complete set of decisions for running a model's experts on many ranks."""

    name: str = "custom"
    """What the schedule is called in tables; presets carry their own name."""
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    placement: PlacementOptions = field(default_factory=PlacementOptions)
    replica: ReplicaOptions = field(default_factory=ReplicaOptions)
    all_to_all: AllToAllOptions = field(default_factory=AllToAllOptions)
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    kernel: ExpertKernelOptions = field(default_factory=ExpertKernelOptions)

    def __post_init__(self) -> None:
        _check(self)

    def with_options(self, **changes: Any) -> ExpertParallelSchedule:
        """Return a copy in which keys (with `__` for the dot: `pipeline__num_groups=5`) are replaced."""
        return apply_ep_settings(self, {key.replace("__", "."): value for key, value in changes.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the options as nested plain values, in declaration order."""
        return dataclasses.asdict(self)

    @property
    def num_groups(self) -> int:
        """Groups of a layer's expert work; 1 where nothing is split."""
        return 1 if self.pipeline.split == "none" else self.pipeline.num_groups

    @property
    def overlaps(self) -> bool:
        """Whether exchanges are meant to run beside expert kernels."""
        return self.num_groups > 1 or self.pipeline.micro_batches > 1 or self.pipeline.shortcut


def _preset(name: str, **changes: Any) -> ExpertParallelSchedule:
    return ExpertParallelSchedule(name=name).with_options(**changes)


# Sixteen of 132 multiprocessors exchange, 116 multiply (arXiv 2410.12247, H800).
_EPS_SM = 16 / 132
# 24 of 132 exchange in prefill (github.com/deepseek-ai/profile-data, EP32).
_TBO_SM = 24 / 132

# What each does and who published it stands in `catalog/schedules`; `moeplan schedule list` prints it.
EP_PRESETS: Mapping[str, Callable[[], ExpertParallelSchedule]] = {
    "tensor-parallel": lambda: _preset("tensor-parallel", parallel__attention="tensor", parallel__experts="tensor"),
    "ep": lambda: _preset("ep"),
    "eps-moe": lambda: _preset("eps-moe", pipeline__split="expert", pipeline__num_groups=5, pipeline__all_to_all_sm_fraction=_EPS_SM,
                               kernel__choice="best"),
    "tbo": lambda: _preset("tbo", pipeline__micro_batches=2, pipeline__all_to_all_sm_fraction=_TBO_SM),
    "tutel": lambda: _preset("tutel", pipeline__split="token", pipeline__num_groups=2, all_to_all__kind="hierarchical",
                             all_to_all__tiers="in-turn"),
    "comet": lambda: _preset("comet", pipeline__split="tile", pipeline__num_groups=16),
    "scmoe": lambda: _preset("scmoe", pipeline__shortcut=True),
    "grace": lambda: _preset("grace", placement__policy="grace", replica__choice="weighted", all_to_all__kind="hierarchical"),
    "occult": lambda: _preset("occult", placement__policy="occult"),
    "eplb": lambda: _preset("eplb", placement__policy="eplb", placement__num_redundant=32),
    "eplb-hierarchical": lambda: _preset("eplb-hierarchical", placement__policy="eplb-hierarchical", placement__num_redundant=32,
                                         all_to_all__kind="hierarchical"),
    "metro": lambda: _preset("metro", placement__policy="metro", placement__num_redundant=32, replica__choice="activated"),
    "fsmoe": lambda: _preset("fsmoe", pipeline__split="token", pipeline__num_groups=2, all_to_all__kind="hierarchical",
                             all_to_all__tiers="free"),
    "parallel-folding": lambda: _preset("parallel-folding", parallel__attention="tensor"),
    "parm": lambda: _preset("parm", parallel__attention="tensor", parallel__experts="sharded"),
    "ppmoe": lambda: _preset("ppmoe", parallel__attention="tensor", parallel__experts="node"),
}  # fmt: skip


def load_ep_preset(name: str) -> ExpertParallelSchedule:
    """Return the preset called `name`; raises UnknownName (with the nearest one) otherwise."""
    if name not in EP_PRESETS:
        raise UnknownName("schedule", name, EP_PRESETS)
    return EP_PRESETS[name]()


_KEYS = Keys(
    sections={
        "parallel": ParallelOptions, "placement": PlacementOptions, "replica": ReplicaOptions, "all_to_all": AllToAllOptions,
        "pipeline": PipelineOptions, "kernel": ExpertKernelOptions,
    },
    example="pipeline.num_groups=5",
    old_names={"exchange": "all_to_all", "pipeline.exchange_sm_fraction": "pipeline.all_to_all_sm_fraction"}
    | {f"exchange.{option.name}": f"all_to_all.{option.name}" for option in dataclasses.fields(AllToAllOptions)},
)  # fmt: skip
ep_setting_keys = _KEYS.kinds
parse_ep_setting = _KEYS.parse


def apply_ep_settings(schedule: ExpertParallelSchedule, settings: Mapping[str, Any]) -> ExpertParallelSchedule:
    """Return `schedule` with dotted keys replaced; raises UnknownName or InputError for what breaks a rule."""
    made: ExpertParallelSchedule = replaced(schedule, settings, _KEYS.by_section(settings))
    return made


def ep_schedule_from_dict(data: Mapping[str, Any]) -> ExpertParallelSchedule:
    """Return the schedule of nested plain values as written by `to_dict`; unknown keys are errors."""
    return apply_ep_settings(ExpertParallelSchedule(), _KEYS.dotted(data))


def _check(schedule: ExpertParallelSchedule) -> None:
    """Return nothing; raises InputError for the first option whose value breaks a rule."""
    parallel, pipeline, all_to_all = schedule.parallel, schedule.pipeline, schedule.all_to_all
    for key, value, valid in (
        ("parallel.attention", parallel.attention, ATTENTION_PARALLELISMS),
        ("parallel.experts", parallel.experts, EXPERT_PARALLELISMS),
        ("placement.policy", schedule.placement.policy, PLACEMENTS),
        ("replica.choice", schedule.replica.choice, REPLICA_CHOICES),
        ("all_to_all.kind", all_to_all.kind, ALL_TO_ALLS),
        ("all_to_all.tiers", all_to_all.tiers, TIER_ORDERS),
        ("pipeline.split", pipeline.split, SPLITS),
        ("kernel.choice", schedule.kernel.choice, KERNELS),
    ):
        if value not in valid:
            raise UnknownName(key, value, valid)
    _whole("parallel.attention_ranks", parallel.attention_ranks, 0, 2**12)
    if parallel.attention_ranks and parallel.attention != "tensor":
        raise InputError("parallel.attention_ranks", parallel.attention_ranks, "each rank has attention layers of its own",
                         "set parallel.attention=tensor, or leave it out")  # fmt: skip
    if parallel.attention_ranks == 1:
        raise InputError("parallel.attention_ranks", 1, "one rank shares nothing", "set parallel.attention=data")
    _whole("placement.num_redundant", schedule.placement.num_redundant, 0, 2**20)
    _whole("pipeline.num_groups", pipeline.num_groups, 1, MAX_GROUPS)
    _whole("pipeline.micro_batches", pipeline.micro_batches, 1, MAX_MICRO_BATCHES)
    _whole("replica.seed", schedule.replica.seed, 0, 2**31)
    _number("replica.load_cap", schedule.replica.load_cap, 0.01, 100.0)
    _number("pipeline.all_to_all_sm_fraction", pipeline.all_to_all_sm_fraction, 0.0, 0.9)
    for name in ("dispatch_bytes_per_value", "combine_bytes_per_value"):
        _number(f"all_to_all.{name}", getattr(all_to_all, name), 0.25, 8.0)
    for name in ("shortcut", "shared_overlap"):
        if not isinstance(getattr(pipeline, name), bool):
            raise InputError(f"pipeline.{name}", getattr(pipeline, name), "not true or false", "write true or false")
    if not isinstance(schedule.kernel.bits, str):
        raise InputError("kernel.bits", schedule.kernel.bits, "not a weight format's name", "write for instance 8")
    if all_to_all.tiers != "together" and all_to_all.kind != "hierarchical":
        raise InputError("all_to_all.tiers", all_to_all.tiers, f"a {all_to_all.kind} all-to-all has no stages",
                         "set all_to_all.kind=hierarchical")  # fmt: skip
    if pipeline.split == "none" and pipeline.num_groups > 1:
        raise InputError("pipeline.num_groups", pipeline.num_groups, "nothing is split", "set pipeline.split=expert")
    if pipeline.shortcut and pipeline.micro_batches > 1:
        raise InputError(
            "pipeline.shortcut", True, "a shortcut overlaps within one batch", "set pipeline.micro_batches=1"
        )
    if parallel.experts in ("tensor", "node") and (
        pipeline.split != "none" or pipeline.shortcut or schedule.placement.num_redundant
    ):
        raise InputError("parallel.experts", parallel.experts, "experts that wait for no token are neither exchanged, grouped nor copied",
                         "set parallel.experts=expert")  # fmt: skip
    if parallel.experts == "node" and parallel.attention != "tensor":
        raise InputError("parallel.experts", "node", "the ranks of a node must hold the same tokens",
                         "set parallel.attention=tensor")  # fmt: skip
    if parallel.experts == "sharded" and (all_to_all.kind == "hierarchical" or pipeline.shortcut):
        raise InputError("parallel.experts", "sharded", "the exchange goes to all ranks of a node at once, in its own layer",
                         "set all_to_all.kind=per-rank and pipeline.shortcut=false")  # fmt: skip


def _whole(key: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(key, value, f"not a whole number from {least} to {most}", "change it")


def _number(key: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise InputError(key, value, f"not a number from {least:g} to {most:g}", "change it")
