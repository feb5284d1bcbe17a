"""The memory breakdown: every byte a plan needs on the device and on the host, item by item, and what is left for a cache.

Modelled: weights outside routed experts, KV cache (with sliding windows, states and cross-attention), activations of the largest
forward pass, staging buffers, cached experts, replicas, what the runtime itself takes, and the host's store of all experts.
Ignored: fragmentation beyond the runtime's share, page tables of a paged KV cache, the short-lived copies a loader makes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType

from ..base.errors import DoesNotFit, InputError, UnknownName
from .models import ModelSpec, WeightFormat, weight_format

DEVICE, HOST = "device", "host"
KV_TYPES: Mapping[str, Fraction] = MappingProxyType({
    "f32": Fraction(4), "f16": Fraction(2), "bf16": Fraction(2), "auto": Fraction(2), "q8_0": Fraction(34, 32), "fp8": Fraction(1),
    "fp8_e4m3": Fraction(1), "fp8_e5m2": Fraction(1), "int8": Fraction(1), "q5_1": Fraction(24, 32), "q5_0": Fraction(22, 32),
    "q4_1": Fraction(20, 32), "q4_0": Fraction(18, 32), "iq4_nl": Fraction(18, 32), "q6_0": Fraction(26, 32), "q8_kv": Fraction(1),
    "fp8_ds_mla": Fraction(656, 576), "nvfp4": Fraction(9, 16), "mlx8": Fraction(17, 16), "mlx4": Fraction(9, 16),
})  # fmt: skip
"""How keys and values are kept, by the names engines use, and the bytes of one value: ggml's blocks with their scales, MLX's groups of 64,
and vLLM's and SGLang's 656 bytes for the 576 values of a latent (`fp8_ds_mla`). A scale for each row of `q8_kv` is left out."""
PLAIN, GGML, GGML_LAYERS = "plain", "ggml", "ggml-layers"
LAYOUTS = (PLAIN, GGML, GGML_LAYERS)
"""Where engines put things. `ggml` (llama.cpp and what is built on it): the token embedding stays in host memory, caches have room for
whole blocks and for a micro-batch beside a window, states are kept at 32 bits, and buffers for a micro-batch with all its logits,
and for the largest matrix that is copied to the device, are made up front; `ggml-layers`: for a layer's together (ik_llama.cpp)."""
LAYOUT_WORDS: Mapping[str, str] = MappingProxyType({
    PLAIN: "token embedding, caches and buffers lie on the device; experts are staged one by one",
    GGML: "the token embedding stays in host memory, states at 32 bits; buffers hold a micro-batch and its logits, or the largest "
          "matrix on its way to the card",
    GGML_LAYERS: "the token embedding stays in host memory, states at 32 bits; buffers hold a micro-batch and its logits, or a layer's "
                 "experts on their way to the card",
})  # fmt: skip
"""The same in words, for people."""
_CELLS = 256
"""Caches of ggml engines have a whole number of so many tokens."""
_GGML_BYTES = 4
"""Activations and states of ggml engines."""
# Residual stream, its normed copy, attention output and one spare, live at the same time.
_HIDDEN_COPIES = 4
_LOGIT_BYTES = 4


def kv_bytes_per_value(name: str) -> float:
    """Return the bytes of one cached value kept as `name`; raises UnknownName for another type."""
    found = KV_TYPES.get(name.lower())
    if found is None:
        raise UnknownName("--kv-type", name, KV_TYPES)
    return float(found)


def kv_bytes_of(kinds: str, model: ModelSpec) -> float:
    """Return the mean bytes of a cached value of `model` kept as `kinds`: one type, or that of keys and that of values (q8_0/q4_0).

    Raises UnknownName for other types. Latents, and vectors that are key and value in one, are kept as keys.
    """
    keys, slash, values = kinds.partition("/")
    of_keys, attention = kv_bytes_per_value(keys), model.attention
    if not slash:
        return of_keys
    of_values = kv_bytes_per_value(values)
    if attention.kind == "mla" or attention.key_is_value:
        return of_keys
    wide = attention.head_dim + attention.v_head_dim
    return (attention.head_dim * of_keys + attention.v_head_dim * of_values) / wide


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryItem:
    """One thing that takes memory."""

    name: str
    place: str
    """device or host."""
    num_bytes: int
    note: str
    """How the bytes come about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBreakdown:
    """What a plan needs, item by item."""

    items: tuple[MemoryItem, ...]

    @property
    def device_bytes(self) -> int:
        """Sum over the device."""
        return sum(item.num_bytes for item in self.items if item.place == DEVICE)

    @property
    def host_bytes(self) -> int:
        """Sum over the host."""
        return sum(item.num_bytes for item in self.items if item.place == HOST)

    def num_bytes(self, name: str) -> int:
        """Return the bytes of the item called `name`, 0 where the memory breakdown has none."""
        return sum(item.num_bytes for item in self.items if item.name == name)

    def to_dict(self) -> dict[str, object]:
        """Return the memory breakdown as plain values for files and reports."""
        rows = [{"name": i.name, "place": i.place, "bytes": i.num_bytes, "note": i.note} for i in self.items]
        return {"device_bytes": self.device_bytes, "host_bytes": self.host_bytes, "items": rows}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """What a plan holds in memory, apart from how large its cache is."""

    model: ModelSpec
    expert_format: WeightFormat
    dense_format: WeightFormat = field(default_factory=lambda: weight_format("16"))
    context_tokens: int = 4096
    """Longest context of a request, prompt and answer together."""
    concurrency: int = 1
    """Requests whose caches are held at the same time."""
    pass_tokens: int | None = None
    """Tokens of the largest forward pass; None means one token a request."""
    kv_bytes_per_value: float = 2
    encoder_tokens: int = 0
    """Input tokens a request of an encoder–decoder."""
    staging_experts: int = 0
    """Buffers for experts on their way in."""
    host_experts: int | None = None
    """Experts that the host holds; None: all."""
    host_expert_bytes: int | None = None
    """What each of them takes there, where that is not what it takes on the device."""
    below_host: bool = False
    """All experts lie on a disk, of which the host holds its share."""
    on_cores: bool = False
    """What the host holds is computed there, not copied to the device."""
    runtime_bytes: int = 0
    """What the driver, libraries and allocator take (a profile's `runtime_bytes`)."""
    layout: str = PLAIN
    """How the engine lays memory out: one of `LAYOUTS`."""
    draft_bytes: int = 0
    """What drafting keeps on the device: a draft model or layer, with its keys and values."""
    uploads: bool = False
    """Passes of many tokens copy experts that lie in host memory to the device."""

    def __post_init__(self) -> None:
        least = {"context_tokens": 1, "concurrency": 1, "kv_bytes_per_value": 2**-10, "encoder_tokens": 0, "staging_experts": 0,
                 "runtime_bytes": 0}  # fmt: skip
        for name, floor in least.items():
            if getattr(self, name) < floor:
                raise InputError(name, getattr(self, name), f"below {floor}", f"give at least {floor}")
        if self.layout not in LAYOUTS:
            raise UnknownName("layout", self.layout, LAYOUTS)
        if self.pass_tokens is not None and self.pass_tokens < 1:
            raise InputError("pass_tokens", self.pass_tokens, "below 1", "give at least 1")


def break_down_memory(
    needs: MemoryNeeds, *, cached_experts: int = 0, replicas: int = 0, offloaded: bool = True
) -> MemoryBreakdown:
    """Return the memory breakdown of a plan that caches `cached_experts` experts on the device.

    replicas: extra copies of experts (expert parallelism). offloaded: the host keeps experts in page-locked memory (all of them,
    or `host_experts`), as it must unless all of them are resident. Raises InputError for counts below zero.
    """
    for name, value in (("cached_experts", cached_experts), ("replicas", replicas)):
        if value < 0:
            raise InputError(name, value, "below zero", "give a count")
    model = needs.model
    each = model.expert_bytes(needs.expert_format)
    items = [*_fixed_items(needs), _experts("resident experts", cached_experts, each, needs.expert_format)]
    if replicas:
        items.append(_experts("replicas", replicas, each, needs.expert_format))
    if offloaded:
        count = model.num_routed_experts if needs.host_experts is None else needs.host_experts
        of_all = "all " if count == model.num_routed_experts else ""
        stay = "" if of_all or needs.below_host else ", the others stay on the device"
        there = needs.host_expert_bytes if needs.host_expert_bytes is not None else each
        which = f"{model.num_routed_experts} on disk, of them " if needs.below_host and not of_all else of_all
        where = " in memory, where the cores compute them" if needs.on_cores else ", page-locked"
        note = f"{which}{count} experts of {there} bytes{stay}{where}"
        items.append(MemoryItem(name="expert store", place=HOST, num_bytes=count * there, note=note))
    return MemoryBreakdown(items=tuple(items))


def cache_budget_bytes(budget_bytes: int, needs: MemoryNeeds, *, least_experts: int = 1) -> int:
    """Return the bytes that a device budget leaves for cached experts.

    Raises DoesNotFit, with the missing bytes, where fewer than `least_experts` experts would fit.
    """
    fixed = sum(item.num_bytes for item in _fixed_items(needs) if item.place == DEVICE)
    left = budget_bytes - fixed
    least = least_experts * needs.model.expert_bytes(needs.expert_format)
    if left < least:
        what = f"{needs.model.name} needs {fixed} bytes beside its experts and {least} for {least_experts}, of {budget_bytes}"
        raise DoesNotFit(what, least - left)
    return left


def cache_budget_experts(budget_bytes: int, needs: MemoryNeeds, *, least_experts: int = 1) -> int:
    """Return how many experts of the model a device budget can cache, at most all of them; raises DoesNotFit as above."""
    left = cache_budget_bytes(budget_bytes, needs, least_experts=least_experts)
    return min(left // needs.model.expert_bytes(needs.expert_format), needs.model.num_routed_experts)


def require_fits(memory_breakdown: MemoryBreakdown, *, device_bytes: int, host_bytes: int | None = None) -> None:
    """Return nothing; raises DoesNotFit where the memory breakdown exceeds the device's or (if given) the host's memory."""
    for place, needed, have in (
        (DEVICE, memory_breakdown.device_bytes, device_bytes),
        (HOST, memory_breakdown.host_bytes, host_bytes),
    ):
        if have is not None and needed > have:
            raise DoesNotFit(f"the plan needs {needed} bytes of {place} memory, of {have}", needed - have)


def host_dense_bytes(model: ModelSpec, dense: WeightFormat, layout: str) -> int:
    """Return what an engine of this layout keeps of everything but routed experts in the host's memory: the token embedding and tables."""
    if layout == PLAIN:
        return 0
    values = model.vocab_size * model.hidden_size
    # A matrix that is token embedding and output matrix in one is there twice.
    embedding = dense.head_bytes(values) if model.tied_embeddings else dense.embedding_bytes(values)
    return dense.embedding_bytes(model.table_parameters) + embedding


def _fixed_items(needs: MemoryNeeds) -> Sequence[MemoryItem]:
    """Return the items that do not depend on the cache."""
    model, dense = needs.model, needs.dense_format
    embeddings = model.embedding_bytes(dense)
    layers = model.dense_bytes(dense) - embeddings
    outer = "16 bits or more" if dense.head_bits is None else "in types of their own"
    plain = needs.layout == PLAIN
    tables = 0 if plain else dense.embedding_bytes(model.table_parameters)
    values = model.vocab_size * model.hidden_size
    on_host = host_dense_bytes(model, dense, needs.layout)
    on_device = embeddings if plain else dense.head_bytes(values)
    where = "token embedding and output matrix" if plain else "output matrix"
    staging = model.expert_bytes(needs.expert_format)
    items = [
        _item("runtime", needs.runtime_bytes, "driver, libraries, allocator"),
        _item("embeddings", on_device, f"{where}, {outer}"),
        _item("dense weights", layers - tables, f"all layers but routed experts, {dense.description}"),
        *_caches(needs),
        _buffers(needs),
        _experts("staging", needs.staging_experts, staging, needs.expert_format),
    ]
    if needs.draft_bytes:
        items.append(_item("draft", needs.draft_bytes, "what drafts, with its keys and values"))
    if on_host:
        also = " and tables of layers" if tables else ""
        note = f"the engine keeps it{also} in host memory, {outer}"
        items.append(MemoryItem(name="token embedding", place=HOST, num_bytes=on_host, note=note))
    return items


def _caches(needs: MemoryNeeds) -> Sequence[MemoryItem]:
    """Return the caches of all requests: keys and values, and states where the engine keeps them in another precision."""
    model, requests, context = needs.model, needs.concurrency, needs.context_tokens
    note = f"{requests} requests of {context} tokens, {{}} bytes each"
    if needs.layout == PLAIN:
        each = model.kv_bytes(context, needs.kv_bytes_per_value, needs.encoder_tokens)
        return [_item("kv cache", each * requests, note.format(each))]
    window = model.sliding_window or 0
    room = -(-(window + _pass_tokens(needs)) // _CELLS) * _CELLS - window
    cells = -(-context // _CELLS) * _CELLS
    states = math.ceil(model.state_values * max(needs.kv_bytes_per_value, 2))
    each = model.kv_bytes(cells, needs.kv_bytes_per_value, needs.encoder_tokens, window_room=room) - states
    found = [_item("kv cache", each * requests, note.format(each))]
    if model.state_values:
        found.append(
            _item("states", model.state_values * _GGML_BYTES * requests, f"{requests} requests, 32 bits a value")
        )
    return found


def _pass_tokens(needs: MemoryNeeds) -> int:
    return needs.pass_tokens if needs.pass_tokens is not None else needs.concurrency


def _buffers(needs: MemoryNeeds) -> MemoryItem:
    """Return what a forward pass works in."""
    model, tokens = needs.model, _pass_tokens(needs)
    if needs.layout == PLAIN:
        num_bytes = activation_bytes(model, tokens, needs.concurrency, needs.dense_format)
        return _item("activations", num_bytes, f"a pass of {tokens} tokens and its logits")
    # One buffer for all: logits are made when activations of layers are done with.
    logits = tokens * (model.vocab_size * _LOGIT_BYTES + 2 * model.hidden_size * _GGML_BYTES)
    layer = tokens * _activation_values(model) * _GGML_BYTES
    note = f"a micro-batch of {tokens} tokens with all its logits"
    if needs.uploads:
        matrices = 1 if needs.layout == GGML_LAYERS else 3 if model.gated else 2
        layer += model.num_experts * model.expert_bytes(needs.expert_format) // matrices
        note += (
            f", or a layer's experts {'together' if matrices == 1 else 'matrix by matrix'} on their way to the device"
        )
    return _item("activations", max(logits, layer), note)


def activation_bytes(model: ModelSpec, pass_tokens: int, num_logits: int, fmt: WeightFormat) -> int:
    """Return the bytes of the tensors alive at once in a pass of `pass_tokens` that keeps logits of `num_logits` tokens."""
    return fmt.vector_bytes(pass_tokens * _activation_values(model)) + num_logits * model.vocab_size * _LOGIT_BYTES


def _activation_values(model: ModelSpec) -> int:
    """Return the values alive at once for each token of a pass, logits not counted."""
    attention = model.attention
    projections = attention.num_heads * (2 * attention.head_dim + attention.v_head_dim)
    into = 2 if model.gated else 1
    expert = (
        into * model.expert_intermediate_size * model.top_k
        + into * model.shared_intermediate_size * model.num_shared_experts
    )
    return _HIDDEN_COPIES * model.hidden_size + max(expert, into * model.dense_intermediate_size, projections)


def _item(name: str, num_bytes: int, note: str) -> MemoryItem:
    return MemoryItem(name=name, place=DEVICE, num_bytes=num_bytes, note=note)


def _experts(name: str, count: int, each: int, fmt: WeightFormat) -> MemoryItem:
    return _item(name, count * each, f"{count} experts of {each} bytes, {fmt.description}")
