"""A figure of expert parallelism becomes what a prediction needs: machine and engine, model and formats, schedule, loads.

Modelled: only the stated facts; what is not stated takes a documented default, named in the row. Loads are those of published
recordings that the row resembles (`routing`); placements are made from one load and serve another, and copies share an expert evenly.
Ignored: drafting, which makes a row a reason.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ....base.errors import InputError
from ....planner.parallel.evidence import CountEvidence
from ....planner.placement.comparison import Candidate
from ....planner.placement.eplb import rebalance
from ....planner.placement.placement import Placement, contiguous
from ....planner.placement.replica_choice import WeightedChoice
from ....sim.parallel.simulate import ParallelSimulation
from ....sim.parallel.traffic import StepLoad
from ....specs.machines.bundled_kernels import bundled_kernels, kernel_machines
from ....specs.machines.catalogue import find_gpu
from ....specs.machines.compose import compose_text
from ....specs.machines.profile import Profile
from ....specs.machines.profile_file import list_hardware, load_hardware
from ....specs.machines.serving import serving_machine
from ....specs.models import ModelSpec, weight_format
from ....specs.models.load import load_model
from ....specs.schedules.parallel import ExpertParallelSchedule
from ....traces.synthesis.loads import POPULARITY, Counts, Popularity, loads_of, popularity_of
from ..machine import NotExpressible
from .rows import Row

_ENGINES: Mapping[str, tuple[str, ...]] = {
    "tensorrt-llm": ("trtllm", "trt-llm", "tensorrt"), "vllm": ("vllm", "llm-d"),
    "sglang": ("sglang", "lmsys", "sgl-project", "deepseek", "infersim"),
}  # fmt: skip
_USUAL_ENGINE = "sglang"
_FORMATS = {"bf16": ("16", "16"), "fp16": ("16", "16"), "fp8": ("8", "8"), "int8": ("8", "8"),
            "fp4": ("nvfp4", "8"), "nvfp4": ("nvfp4", "8"), "mxfp4": ("mxfp4", "16"), "int4": ("int4-g128", "16")}  # fmt: skip
"""Formats of experts and of everything else by a row's precision; 4-bit checkpoints of DeepSeek keep attention at 8 bits or more."""
_GPUS = {"h100": "h100-sxm", "h200": "h200-sxm", "b200": "b200-sxm", "h800": "h800-sxm", "a100": "a100-80gb-sxm"}
_PREFILL_TOKENS, _DECODE_TOKENS, _CONTEXT = 8192, 64, 4096
_MOST_RANKS, _MOST_TOKENS = 1024, 1 << 20
_FP8_BYTES = 1 + 4 / 128
_VERSION = re.compile(r"/([0-9]+\.[0-9]+\.[0-9a-z.]+)")
"""An engine's version, as sources name it: trtllm/1.3.0rc10."""
_BATCHES = re.compile(r"(?:micro_batches|tbo|two)=?([0-9]*)")
_TBO_SM = 24 / 132
"""Multiprocessors that normal exchanges take while they overlap (deepseek-ai/profile-data, EP32); those of low latency take none."""


@dataclass(slots=True, kw_only=True)
class Setup:
    """Everything a prediction of one step needs."""

    model: ModelSpec
    profile: Profile
    nodes: int
    ranks_per_node: int
    prefill: bool
    context: int
    tokens_per_rank: int
    schedule: ExpertParallelSchedule
    dense_bits: str
    planned: Counts
    served: Counts
    assumed: list[str] = field(default_factory=list)
    requests: int | None = None
    """Tokens of a step over all ranks, where fewer than one for each; None: `tokens_per_rank` on each."""

    @property
    def step_tokens(self) -> int:
        """Tokens of a step over all ranks."""
        return self.tokens_per_rank * self.ranks if self.requests is None else self.requests

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.nodes * self.ranks_per_node

    def simulation(self) -> ParallelSimulation:
        """Return the simulation of its steps."""
        return ParallelSimulation(self.model, self.profile, self.nodes, self.ranks_per_node, self.prefill, self.context,
                                  weight_format(self.dense_bits))  # fmt: skip

    def load(self) -> StepLoad:
        """Return what a step looks like: the placement made from one load, under the other."""
        placement = self._placement()
        evidence = CountEvidence(self.served, self.model.top_k, self.step_tokens)
        candidate = Candidate(placement=placement, router=WeightedChoice())
        return evidence.loads("report", candidate, self.schedule)[0]

    def _placement(self) -> Placement:
        experts, ranks, nodes = self.model.num_experts, self.ranks, self.nodes
        if self.schedule.parallel.experts == "tensor":
            return contiguous(len(self.planned), experts, -(-experts // ranks) * ranks, ranks, nodes)
        wanted = experts + self.schedule.placement.num_redundant
        slots = -(-wanted // ranks) * ranks
        if self.schedule.placement.policy == "contiguous":
            return contiguous(len(self.planned), experts, slots, ranks, nodes)
        return rebalance(self.planned, slots, ranks, nodes)


def set_up(row: Row, phase: str | None = None, tokens_per_rank: int | None = None, context: int | None = None) -> Setup:
    """Return what predicting a step of `row` needs, with facts replaced where given; raises NotExpressible with the reason."""
    if row.reason is not None:
        raise NotExpressible(row.reason)
    assumed: list[str] = []
    try:
        return _set_up(row, phase or row.text("phase"), tokens_per_rank, context, assumed)
    except InputError as error:
        raise NotExpressible(str(error)) from None


def _set_up(row: Row, phase: str, tokens: int | None, context: int | None, assumed: list[str]) -> Setup:
    model = model_of(row)
    profile = machine_of(row, assumed)
    nodes = row.count("nodes", most=_MOST_RANKS)
    if row.number("ep") is None and nodes is None:
        raise NotExpressible(
            f"its division over devices is not stated: {row.text('flags') or 'no nodes, no ranks'}"[:200]
        )
    ranks_per_node = row.count("ranks_per_node", 8, most=_MOST_RANKS) or 8
    nodes = nodes or max(1, (row.count("ep") or ranks_per_node) // ranks_per_node)
    if "MTP" in row.text("flags") and row.group == "not-expressible":
        raise NotExpressible("drafted tokens: how many are accepted is not stated")
    prefill = phase == "prefill"
    if tokens is None:
        tokens = row.count("tokens_per_rank", most=_MOST_TOKENS)
    batch = row.count("batch", most=_MOST_TOKENS)
    if tokens is None and batch is not None:
        tokens = max(1, batch // (nodes * ranks_per_node))
    if tokens is None:
        tokens = _PREFILL_TOKENS if prefill else _DECODE_TOKENS
        assumed.append(f"{tokens} tokens a rank")
    elif row.row.get("assumed_batch") is True:
        assumed.append(f"{tokens} tokens a rank (by who collected it)")
    requests = None
    if row.text("attention") == "tensor" and not prefill and batch is not None and batch < nodes * ranks_per_node:
        requests = batch  # ranks that share attention work on fewer requests than they are
    context = context or row.count("context") or _CONTEXT
    popularity = popularity_of(row.text("load"), phase, model)
    schedule, popularity = _schedule(row, prefill, tokens, popularity, assumed)
    planned, served = loads_of(popularity, model.num_moe_layers, model.num_experts, model.top_k)
    bits, dense = _formats(row, model, assumed)
    # Eighth-bit tokens are what 8-bit experts are sent.
    narrow = _FP8_BYTES if weight_format(bits).bits <= 8 else 2.0
    schedule = schedule.with_options(kernel__bits=bits, all_to_all__dispatch_bytes_per_value=narrow)
    return Setup(model=model, profile=profile, nodes=nodes, ranks_per_node=ranks_per_node, prefill=prefill, context=context,
                 tokens_per_rank=tokens, schedule=schedule, dense_bits=dense, planned=planned, served=served, assumed=assumed,
                 requests=requests)  # fmt: skip


def model_of(row: Row) -> ModelSpec:
    """Return the row's model: a bundled one whatever the case of its name, or a configuration beside the file."""
    name = row.text("model")
    if not name:
        raise NotExpressible("no model is named")
    beside = row.folder / "configs" / f"{name}.json"
    if re.fullmatch(r"[A-Za-z0-9._-]{1,80}", name) and beside.is_file():
        return load_model(beside)
    if name.lower() in ("deepseek-r1", "deepseek-v3.1", "deepseek-r1-0528"):
        name = "deepseek-v3"
    try:
        return load_model(name.lower())
    except InputError as error:
        raise NotExpressible(str(error)) from None


def engine_of(row: Row) -> str | None:
    """Return the engine that a row names or that its source is known for."""
    text = " ".join((row.text("backend"), row.text("engine"), row.text("source"), row.id)).lower()
    return next((name for name, marks in _ENGINES.items() if any(mark in text for mark in marks)), None)


def machine_of(row: Row, assumed: list[str]) -> Profile:
    """Return the row's machine with the kernels of its engine."""
    name = row.text("gpu").lower().replace("_", "-")
    if not name:
        raise NotExpressible("no GPU is named")
    engine = engine_of(row)
    if engine is None:
        engine = _USUAL_ENGINE
        assumed.append(f"kernels of {engine}")
    name = _GPUS.get(name, name)
    profile = load_hardware(name) if name in list_hardware() else compose_text(find_gpu(name).name, engine)
    try:
        machine = serving_machine(profile, engine)
    except InputError:
        return serving_machine(profile)
    version = _VERSION.search(row.text("source").lower())
    if version is None or machine.kernels is None or machine.name not in kernel_machines():
        return machine
    return dataclasses.replace(machine, kernels=bundled_kernels(machine.name, engine, version.group(1)))


def _formats(row: Row, model: ModelSpec, assumed: list[str]) -> tuple[str, str]:
    stated = row.text("precision").lower()
    if stated in _FORMATS:
        return _FORMATS[stated]
    assumed.append("weights as the checkpoint has them")
    return model.native_bits, model.usual_dense_bits


def _schedule(
    row: Row, prefill: bool, tokens: int, popularity: Popularity, assumed: list[str]
) -> tuple[ExpertParallelSchedule, Popularity]:
    """Return (schedule without formats, the loads it meets)."""
    attention = "tensor" if row.text("attention") == "tensor" else "data"
    experts = row.text("experts") if row.text("experts") in ("expert", "tensor", "node") else "expert"
    if experts == "node" and attention != "tensor":
        experts = "expert"
    policy, copies, popularity = _placement_of(row.text("eplb"), popularity)
    exchange = row.text("exchange")
    if exchange not in ("all-choices", "per-rank", "hierarchical"):
        exchange = "hierarchical" if prefill else "all-choices"
        assumed.append(f"a {exchange} exchange")
    batches = _micro_batches(row.text("overlap"))
    if tokens < batches:
        batches = 1
    plain = experts in ("tensor", "node")
    shared = row.count("attention_ranks", 0, most=_MOST_RANKS) or 0 if attention == "tensor" else 0
    return ExpertParallelSchedule(name="reported").with_options(
        parallel__attention=attention, parallel__experts=experts,
        parallel__attention_ranks=shared, all_to_all__kind="per-rank" if plain else exchange,
        placement__policy="contiguous" if plain else policy, placement__num_redundant=0 if plain else copies,
        pipeline__micro_batches=batches,
        pipeline__all_to_all_sm_fraction=_TBO_SM if batches > 1 and exchange != "all-choices" else 0.0,
    ), popularity  # fmt: skip


def _micro_batches(text: str) -> int:
    found = _BATCHES.search(text.lower())
    return 1 if found is None else min(8, int(found.group(1) or 2) or 1)


def _placement_of(text: str, popularity: Popularity) -> tuple[str, int, Popularity]:
    """Return (policy, copies, loads): what is called balanced is balanced whatever is routed."""
    words = text.lower()
    if "perfect" in words or "balanced" in words or "uniform" in words:
        return "contiguous", 0, POPULARITY["uniform"]
    copies = re.search(r"\+ ?([0-9]{1,4})", words)
    if "eplb" in words:
        return "eplb", int(copies.group(1)) if copies else 0, popularity
    return "contiguous", 0, popularity
