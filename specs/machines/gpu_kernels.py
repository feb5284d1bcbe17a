"""What kernels of a GPU really take, as nouns: a few constants for each operation, by engine and number format.

Modelled: experts of a layer in one operation (routing, permutation and finalisation included), products with dense weights,
attention while decoding and over prompts, latent attention as a kernel and as a whole layer, exchanges between GPUs. The
formulas that these constants belong to are in `calibrate.costs.gpu`. Ignored: windows, number formats that nobody measured,
clocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...base.errors import InputError, UnknownName

NUMBERS = ("bf16", "fp8", "fp8-block", "int4", "mxfp4", "nvfp4")
"""Formats of weights and what they are multiplied in: fp8 has one scale a tensor, fp8-block one for 128x128 weights; with int4
and mxfp4 activations stay at 16 bits; with nvfp4 they are brought to 4 bits too."""
CACHES = ("bf16", "fp8")
"""Formats of cached keys and values."""
PHASES = ("decode", "prefill")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kernel:
    """What all kernels have."""

    name: str
    """As the engine or the table calls it."""
    start_s: float
    """What the operation takes however small it is."""
    relative_uncertainty: float
    """Nine in ten sizes that the fit had not seen are off by less than that share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertKernel(_Kernel):
    """The routed experts of a layer that sit on one GPU, from routing to the weighted sum."""

    bytes_per_s: float
    """At which weights of experts that have rows are read."""
    activation_bytes_per_s: float
    """At which activations go in, between the two products, and out."""
    flops_per_s: float
    """Slope of full tiles; larger than an achieved rate, because memory and compute hardly overlap in this form."""
    tile_s: float
    """What a tile takes besides its operations."""
    expert_s: float = 0.0
    """What each expert of the GPU takes, whether it has rows or not."""
    choice_s: float = 0.0
    """What each choice of all entering tokens takes, wherever its expert sits: choosing, counting and sorting them."""
    elsewhere_s: float = 0.0
    """What the operation takes more where experts of the layer sit on other GPUs too, whose choices are left out first."""
    all_rows: bool = False
    """Activations of all choices of all tokens are touched, also of those whose experts sit on other GPUs."""
    heights: str = "best"
    """How the engine chooses tiles (`HEIGHTS`)."""
    refill_bytes_per_s: float | None = None
    """At which all units together are given weights again for every low tile (`transposed` heights), or for every tile (`powers`)."""


REFILLED = ("transposed", "powers")
"""Heights with which tiles are given weights again."""
HEIGHTS = ("best", "tokens", "choices", "transposed", "powers")
"""How an engine chooses the rows of a tile before it knows how many each expert has.

best: as a tuner finds them. tokens: 16 until as many tokens enter as experts are there, then 64 (Triton kernels of vLLM and SGLang without
a tuned table: `get_default_config`). choices: by the choices of all entering tokens for each expert that is there (Marlin kernels:
`fused_marlin_moe`). transposed: low tiles with weights as rows while fewer than 32 choices fall on each of all experts (TensorRT-LLM's
8-bit blocks on Hopper: `grouped_gemm_dispatch`). powers: the next power of two from the choices of all entering tokens for each expert that
is there, 16 to 128 (Triton kernels of gpt-oss, `triton_kernels`' `opt_flags`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductKernel(_Kernel):
    """A product of activations with a matrix of dense weights."""

    bytes_per_s: float
    flops_per_s: float
    quantised_values_per_s: float | None = None
    """At which activations are brought to 8 bits first; None where they need not be."""
    waves: bool = False
    """Operations are counted in waves of whole tiles over the GPU's units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeAttention(_Kernel):
    """Attention of one new token of each request."""

    bytes_per_s: float
    """At which keys and values are read."""
    wave_s: float
    """Each time all units are given a request's key–value head."""
    doubling_s: float
    """Each time the context doubles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptAttention(_Kernel):
    """Attention of many tokens of each request."""

    flops_per_s: float
    bytes_per_s: float
    """At which queries, keys, values and outputs are moved."""
    tile_s: float
    """Each time all units are given 128 queries of a head."""
    softmax_width: float = 0.0
    """Width by which a head would be wider, were exponentials products: they take as long in narrow heads as in wide ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentDecode(_Kernel):
    """Latent attention (MLA) of one new token of each request, on the latents themselves, without its projections."""

    bytes_per_s: float
    """At which latents are read."""
    flops_per_s: float
    """With heads in blocks of 64."""
    head_bytes_per_s: float
    """At which queries and outputs of heads are moved."""
    doubling_s: float
    page_s: float = 0.0
    """What a unit takes for 64 tokens of a request's context, where a kernel does not divide contexts over units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentLayer(_Kernel):
    """A whole layer of latent attention, projections and all."""

    bytes_per_s: float
    """At which its weights and latents are read."""
    flops_per_s: float
    """Of projections and attention together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeKernel(_Kernel):
    """One exchange between GPUs: start + bytes / bandwidth · (1 + √(half / bytes)), bytes of the busiest port."""

    bytes_per_s: float
    half_bytes: float = 0.0
    """The size at which the bandwidth is halved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuKernels:
    """The kernels of one engine on one GPU."""

    engine: str
    """As `moeplan engine list` names it."""
    version: str
    source: str
    """published, or measured."""
    citation: str
    num_units: int
    """Streaming multiprocessors."""
    experts: Mapping[str, ExpertKernel] = field(default_factory=dict)
    """By `NUMBERS`."""
    dispatched_experts: Mapping[str, ExpertKernel] = field(default_factory=dict)
    """By `NUMBERS`: those that the engine runs instead behind DeepEP's dispatch."""
    products: Mapping[str, ProductKernel] = field(default_factory=dict)
    """By `NUMBERS`."""
    decode_attention: Mapping[str, DecodeAttention] = field(default_factory=dict)
    """By `CACHES`."""
    prompt_attention: Mapping[str, PromptAttention] = field(default_factory=dict)
    """By `CACHES`."""
    latent_decode: Mapping[str, LatentDecode] = field(default_factory=dict)
    """By `CACHES`."""
    latent_prompt: Mapping[str, PromptAttention] = field(default_factory=dict)
    """By `CACHES`."""
    latent_layer: Mapping[str, LatentLayer] = field(default_factory=dict)
    """By phase/format of weights, as decode/fp8-block."""
    exchanges: Mapping[str, ExchangeKernel] = field(default_factory=dict)
    """By `exchange_key`."""

    def kernels(self) -> Iterator[tuple[str, _Kernel]]:
        """Yield (dotted name, kernel) of all of them."""
        for part in dataclasses.fields(self):
            group = getattr(self, part.name)
            if isinstance(group, Mapping):
                for key, kernel in group.items():
                    yield f"{part.name}.{key}", kernel


EXCHANGES = (
    "all-to-all", "all-reduce", "all-gather", "reduce-scatter", "engine-all-reduce", "normal-dispatch", "normal-combine",
    "low-latency-dispatch", "low-latency-combine",
)  # fmt: skip
"""Collectives of NCCL, the engine's own reduction, and DeepEP's dispatches and combines: normal ones send a token once to
each rank (and node), those of low latency once for each choice."""
INSIDE, BETWEEN = "node", "network"


def exchange_key(operation: str, tier: str, ranks: int) -> str:
    """Return the name under which kernels hold an exchange between `ranks` ranks of a node, or between so many nodes."""
    return f"{operation}/{tier}-{ranks}"


_KEYS = {
    "experts": NUMBERS, "dispatched_experts": NUMBERS, "products": NUMBERS, "decode_attention": CACHES, "prompt_attention": CACHES,
    "latent_decode": CACHES,
    "latent_prompt": CACHES, "latent_layer": tuple(f"{phase}/{number}" for phase in PHASES for number in NUMBERS),
}  # fmt: skip


def check_kernels(kernels: GpuKernels, sources: tuple[str, ...]) -> None:
    """Return nothing; raises InputError or UnknownName for the first constant or name that breaks a rule."""
    if kernels.source not in sources:
        raise UnknownName("kernels.source", kernels.source, sources)
    if kernels.num_units < 1:
        raise InputError("kernels.num_units", kernels.num_units, "below one", "give the GPU's multiprocessors")
    for part, known in _KEYS.items():
        for key in getattr(kernels, part):
            if key not in known:
                raise UnknownName(f"kernels.{part}", key, known)
    for key in kernels.exchanges:
        if key.partition("/")[0] not in EXCHANGES:
            raise UnknownName("kernels.exchanges", key.partition("/")[0], EXCHANGES)
    for group in (kernels.experts, kernels.dispatched_experts):
        for key, experts in group.items():
            _check_experts(key, experts)
    for name, kernel in kernels.kernels():
        for constant in dataclasses.fields(kernel):
            _check_number(f"kernels.{name}.{constant.name}", getattr(kernel, constant.name), constant.name)


def _check_experts(key: str, kernel: ExpertKernel) -> None:
    if kernel.heights not in HEIGHTS:
        raise UnknownName(f"kernels.experts.{key}.heights", kernel.heights, HEIGHTS)
    if (kernel.heights in REFILLED) != (kernel.refill_bytes_per_s is not None):
        raise InputError(f"kernels.experts.{key}.refill_bytes_per_s", kernel.refill_bytes_per_s,
                         f"belongs to {' and '.join(REFILLED)} heights, and they to it", "give both or neither")  # fmt: skip


def _check_number(name: str, value: Any, field_name: str) -> None:
    if value is None or isinstance(value, (str, bool)):
        return
    rate = field_name.endswith("_per_s")
    if not math.isfinite(value) or value < 0 or (rate and value == 0):
        rule = "not a finite number above zero" if rate else "not a finite number of at least zero"
        raise InputError(name, value, rule, "correct the profile")
