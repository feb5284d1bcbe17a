"""The memory ledger: every byte a plan needs on the device and on the host, item by item, and what is left for a cache.

Modelled: weights outside routed experts, KV cache (with sliding windows, states and cross-attention), activations of the largest
forward pass, staging buffers, cached experts, replicas, what the runtime itself takes, and the host's store of all experts.
Ignored: fragmentation beyond the runtime's share, page tables of a paged KV cache, the short-lived copies a loader makes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType

from .errors import DoesNotFit, InputError, UnknownName
from .specs import ModelSpec, WeightFormat, weight_format

DEVICE, HOST = "device", "host"
KV_TYPES: Mapping[str, Fraction] = MappingProxyType({
    "f32": Fraction(4), "f16": Fraction(2), "bf16": Fraction(2), "auto": Fraction(2), "q8_0": Fraction(34, 32), "fp8": Fraction(1),
    "fp8_e4m3": Fraction(1), "fp8_e5m2": Fraction(1), "int8": Fraction(1), "q5_1": Fraction(24, 32), "q5_0": Fraction(22, 32),
    "q4_1": Fraction(20, 32), "q4_0": Fraction(18, 32), "iq4_nl": Fraction(18, 32),
})  # fmt: skip
"""How keys and values are kept, by the names engines use, and the bytes of one value (ggml's blocks with their scales)."""
# Residual stream, its normed copy, attention output and one spare, live at the same time.
_HIDDEN_COPIES = 4
_LOGIT_BYTES = 4


def kv_bytes_per_value(name: str) -> float:
    """Return the bytes of one cached value kept as `name`; raises UnknownName for another type."""
    found = KV_TYPES.get(name.lower())
    if found is None:
        raise UnknownName("--kv-type", name, KV_TYPES)
    return float(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerItem:
    """One thing that takes memory."""

    name: str
    place: str
    """device or host."""
    num_bytes: int
    note: str
    """How the bytes come about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLedger:
    """What a plan needs, item by item."""

    items: tuple[LedgerItem, ...]

    @property
    def device_bytes(self) -> int:
        """Sum over the device."""
        return sum(item.num_bytes for item in self.items if item.place == DEVICE)

    @property
    def host_bytes(self) -> int:
        """Sum over the host."""
        return sum(item.num_bytes for item in self.items if item.place == HOST)

    def num_bytes(self, name: str) -> int:
        """Return the bytes of the item called `name`, 0 where the ledger has none."""
        return sum(item.num_bytes for item in self.items if item.name == name)

    def to_dict(self) -> dict[str, object]:
        """Return the ledger as plain values for files and reports."""
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
    runtime_bytes: int = 0
    """What the driver, libraries and allocator take (a profile's `runtime_bytes`)."""

    def __post_init__(self) -> None:
        least = {"context_tokens": 1, "concurrency": 1, "kv_bytes_per_value": 2**-10, "encoder_tokens": 0, "staging_experts": 0,
                 "runtime_bytes": 0}  # fmt: skip
        for name, floor in least.items():
            if getattr(self, name) < floor:
                raise InputError(name, getattr(self, name), f"below {floor}", f"give at least {floor}")
        if self.pass_tokens is not None and self.pass_tokens < 1:
            raise InputError("pass_tokens", self.pass_tokens, "below 1", "give at least 1")


def device_ledger(
    needs: MemoryNeeds, *, cached_experts: int = 0, replicas: int = 0, offloaded: bool = True
) -> MemoryLedger:
    """Return the ledger of a plan that caches `cached_experts` experts on the device.

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
        note = f"{which}{count} experts of {there} bytes{stay}, page-locked"
        items.append(LedgerItem(name="expert store", place=HOST, num_bytes=count * there, note=note))
    return MemoryLedger(items=tuple(items))


def cache_budget_bytes(budget_bytes: int, needs: MemoryNeeds, *, least_experts: int = 1) -> int:
    """Return the bytes that a device budget leaves for cached experts.

    Raises DoesNotFit, with the missing bytes, where fewer than `least_experts` experts would fit.
    """
    fixed = sum(item.num_bytes for item in _fixed_items(needs))
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


def require_fits(ledger: MemoryLedger, *, device_bytes: int, host_bytes: int | None = None) -> None:
    """Return nothing; raises DoesNotFit where the ledger exceeds the device's or (if given) the host's memory."""
    for place, needed, have in (
        (DEVICE, ledger.device_bytes, device_bytes),
        (HOST, ledger.host_bytes, host_bytes),
    ):
        if have is not None and needed > have:
            raise DoesNotFit(f"the plan needs {needed} bytes of {place} memory, of {have}", needed - have)


def _fixed_items(needs: MemoryNeeds) -> Sequence[LedgerItem]:
    """Return the device's items that do not depend on the cache."""
    model, dense = needs.model, needs.dense_format
    embeddings = model.embedding_bytes(dense)
    outer = "16 bits or more" if dense.head_bits is None else "in types of their own"
    requests = needs.concurrency
    kv_each = model.kv_bytes(needs.context_tokens, needs.kv_bytes_per_value, needs.encoder_tokens)
    kv_note = f"{requests} requests of {needs.context_tokens} tokens, {kv_each} bytes each"
    tokens = needs.pass_tokens if needs.pass_tokens is not None else requests
    activations = activation_bytes(model, tokens, requests, dense)
    staging = model.expert_bytes(needs.expert_format)
    return (
        _item("runtime", needs.runtime_bytes, "driver, libraries, allocator"),
        _item("embeddings", embeddings, f"token embedding and output matrix, {outer}"),
        _item("dense weights", model.dense_bytes(dense) - embeddings, f"all layers but routed experts, {dense.description}"),
        _item("kv cache", kv_each * requests, kv_note),
        _item("activations", activations, f"a pass of {tokens} tokens and its logits"),
        _experts("staging", needs.staging_experts, staging, needs.expert_format),
    )  # fmt: skip


def activation_bytes(model: ModelSpec, pass_tokens: int, num_logits: int, fmt: WeightFormat) -> int:
    """Return the bytes of the tensors alive at once in a pass of `pass_tokens` that keeps logits of `num_logits` tokens."""
    attention = model.attention
    projections = attention.num_heads * (2 * attention.head_dim + attention.v_head_dim)
    into = 2 if model.gated else 1
    expert = (
        into * model.expert_intermediate_size * model.top_k
        + into * model.shared_intermediate_size * model.num_shared_experts
    )
    widest = max(expert, into * model.dense_intermediate_size, projections)
    values = pass_tokens * (_HIDDEN_COPIES * model.hidden_size + widest)
    return fmt.vector_bytes(values) + num_logits * model.vocab_size * _LOGIT_BYTES


def _item(name: str, num_bytes: int, note: str) -> LedgerItem:
    return LedgerItem(name=name, place=DEVICE, num_bytes=num_bytes, note=note)


def _experts(name: str, count: int, each: int, fmt: WeightFormat) -> LedgerItem:
    return _item(name, count * each, f"{count} experts of {each} bytes, {fmt.description}")
