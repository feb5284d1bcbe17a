"""Speeds that nothing can beat: bytes that must be read over the bandwidth of where they lie, operations over the fastest units.

Modelled, for generated tokens: every weight that a token meets and the keys and values it looks at, read once, at the bandwidth of data
sheets; layers follow one another, so that card and cores do not read at the same time, but in a layer that they share, and cards only
where each has a part of every layer. For prompts: operations at the fastest precision that engines multiply in, the experts' bytes over
the link where they are copied for it. A file of a mix without a published recipe counts as small as such files are. Ignored: whatever makes
real runs slower, and weights that stay in a chip's own cache, which a model's are too large for.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..base.units import GIGA, TERA
from ..papers.field.setup import Setup
from ..planner.served.llamacpp import fewest_host_layers
from ..specs.card_split import TENSOR
from ..specs.machines.notation import link_of
from ..specs.machines.parts import Parts, pcie_bytes_per_s
from ..specs.machines.profile import Profile
from ..specs.models import FLOPS_PER_WEIGHT, ModelSpec, WeightFormat, weight_format
from ..specs.models.mixes.names import mix
from .case import DECODE, Case

_FASTER: dict[str, float] = {
    "turing-geforce": 4, "ampere-geforce": 4, "ada-geforce": 4, "ada-half-rate": 4, "blackwell-geforce": 8, "blackwell": 4,
    "blackwell-datacenter": 4, "rdna4": 2, "apple": 1, "apple-m5": 2, "kepler": 4, "maxwell": 4, "pascal": 4,
}  # fmt: skip
"""Rate of the fastest products that engines use over those of 16 bits with 32-bit sums: 8-bit integers at four times on GeForce
cards, whose sums of 16-bit products run at half rate, 4-bit floats on Blackwell, 8-bit dot products (dp4a) before matrix units; the
makers' white papers."""
_USUALLY_FASTER = 2.0
_CORES_FASTER = 24.0
"""What the makers' manuals give for dense products over what engines' kernels reach on cores: eight times the table of `compose`, of which
engines reach a third at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """Tokens a second that cannot be beaten."""

    as_placed: float
    """With experts where they are."""
    best_placed: float | None
    """With the fewest layers on the cores that the card has room for; None where that is not known, or changes nothing."""
    any_schedule: float
    """Whatever an engine does: every byte read from both memories at once, or every operation at the peak."""
    as_placed_words: str
    any_schedule_words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBytes:
    """What one token reads."""

    dense: float
    """All but experts, with keys and values."""
    layer: float
    """Experts of one layer."""
    layers: int

    @property
    def total(self) -> float:
        """All of it."""
        return self.dense + self.layers * self.layer


def ceiling_of(case: Case, metric: str) -> Ceiling:
    """Return the ceilings of a case."""
    setup = case.setup(metric)
    return _decode(case, setup) if metric == DECODE else _prefill(case, setup)


def _decode(case: Case, setup: Setup) -> Ceiling:
    read = token_bytes(setup, case.depth + case.prompt)
    every, slow = cards_bytes_per_s(case), host_peak(case)
    # Cards that each have a part of every layer read it at once; of layers that follow one another, no faster than the fastest card.
    fast = sum(every) if setup.split is not None and setup.split.mode == TENSOR else max(every)
    if slow is None:
        whole = case.concurrency * fast / read.total
        words = f"{read.total / GIGA:.2f} GB a token at {fast / GIGA:,.0f} GB/s"
        return Ceiling(
            as_placed=whole, best_placed=None, any_schedule=case.concurrency * sum(every) / read.total, as_placed_words=words,
            any_schedule_words=words if len(every) == 1 else f"{words}, or all cards at once",
        )  # fmt: skip

    def placed(host_layers: int) -> float:
        seconds = (read.dense + (read.layers - host_layers) * read.layer) / fast + host_layers * read.layer / slow
        return case.concurrency / seconds

    on_host = case.host_layers
    if case.kind == "gpu-experts":  # card and cores read at the same time
        as_placed = case.concurrency / (read.dense / fast + read.layers * read.layer / (fast + slow))
        words = f"{read.layers * read.layer / GIGA:.2f} GB of experts a token from both memories at once"
    else:
        as_placed = placed(on_host)
        on_cores = on_host * read.layer
        words = f"{on_cores / GIGA:.2f} GB a token at {slow / GIGA:,.0f} GB/s"
        words += f", {(read.total - on_cores) / GIGA:.2f} GB at {fast / GIGA:,.0f} GB/s"
    best = None
    if case.kind in ("cpu-moe", "n-cpu-moe", "layers"):
        fewest = fewest_host_layers(case.memory(), case.concurrency, case.ubatch)
        best = placed(fewest) if fewest is not None and fewest < on_host else None
    at_once = case.concurrency * (sum(every) + slow) / read.total
    memories = "both memories" if len(every) == 1 else f"{len(every)} cards' and the host's memory"
    return Ceiling(
        as_placed=as_placed, best_placed=best, any_schedule=at_once, as_placed_words=words,
        any_schedule_words=f"{read.total / GIGA:.2f} GB a token from {memories} at once",
    )  # fmt: skip


def _prefill(case: Case, setup: Setup) -> Ceiling:
    flops = FLOPS_PER_WEIGHT * _met(setup.model)
    peak = peak_flops_per_s(case)
    most = peak / flops
    words = f"{flops / GIGA:.1f} billion operations a token at {peak / TERA:,.0f} T/s"
    as_placed, placed_words = most, words
    metrics = case.predicted("prefill_tokens_per_s").metrics
    link = None if case.parts is None else _link(case.parts)
    if metrics is not None and metrics.bytes_copied and link is not None:
        rate = setup.trace.num_tokens * link / metrics.bytes_copied
        if rate < as_placed:
            as_placed = rate
            placed_words = (
                f"{metrics.bytes_copied / GIGA:.1f} GB of experts over the link for {setup.trace.num_tokens} tokens"
            )
    return Ceiling(
        as_placed=as_placed, best_placed=None, any_schedule=most, as_placed_words=placed_words, any_schedule_words=words
    )


def token_bytes(setup: Setup, context: int) -> TokenBytes:
    """Return what one token must read."""
    model, dense = setup.model, setup.dense_format
    expert = weight_format(model.native_bits)
    layers = sum(model.dense_layer_bytes(layer, dense) for layer in range(model.num_layers))
    rest, least = layers + dense.head_bytes(model.vocab_size * model.hidden_size), _least(expert)
    return TokenBytes(
        dense=least * rest + _looked_at(model, context, setup.kv_bytes_per_value),
        layer=least * model.top_k * model.expert_bytes(expert), layers=model.num_moe_layers,
    )  # fmt: skip


def _least(stored: WeightFormat) -> float:
    """Return the share of its usual bytes that a file may have whose experts are `stored` so: less than 1 for mixes without a recipe."""
    found = mix(stored.name)
    return 1.0 if found is None or found.dynamic is None else 1.0 - found.dynamic.spread


def _looked_at(model: ModelSpec, context: int, bytes_per_value: float) -> float:
    """Return the bytes of keys and values that one token looks at."""
    total = 0.0
    for layer in range(model.num_layers):
        attention = model.attention_of(layer)
        if attention is not None:
            total += model.attended_tokens(layer, context) * attention.kv_values_per_token * bytes_per_value
    return total


def _met(model: ModelSpec) -> float:
    """Return the weights that a token of a prompt meets: the output matrix is needed for its last one only."""
    experts = model.num_moe_layers * model.top_k * model.expert_matrix_parameters
    return experts + sum(model.dense_matrix_parameters(layer) for layer in range(model.num_layers))


def cards_bytes_per_s(case: Case) -> list[float]:
    """Return the peak bandwidth of each card's memory, or of the one that the cores alone read."""
    if case.profile.device.kind == "cpu":
        return [host_peak(case) or case.profile.device.memory_bytes_per_s.value]
    return [card.device.memory_bytes_per_s.value for card in _cards(case)]


def host_peak(case: Case) -> float | None:
    """Return the peak bandwidth of the host's memory; None where card and host share one, or nobody says."""
    if case.profile.device.unified_memory:
        return None
    if case.profile.device.kind == "cpu" and case.parts is None:
        return None
    setup = case.setup(DECODE)
    peak = setup.host_bytes_per_s
    if peak is None:
        cpu = case.profile.host.cpu
        return None if cpu is None else cpu.memory_bytes_per_s.value
    limit = None if case.parts is None or case.parts.cpu is None else case.parts.cpu.memory_gb_per_s
    sockets = 1 if case.parts is None else case.parts.sockets
    return peak if limit is None else min(peak, limit * GIGA * sockets)


def peak_flops_per_s(case: Case) -> float:
    """Return the operations per second of the fastest products that engines use on the device, on all cards together where several are."""
    if case.profile.device.kind == "cpu":
        return case.profile.device.peak_flops_per_s["float16"].value * _CORES_FASTER
    slots = () if case.parts is None else case.parts.slots
    total = 0.0
    for number, card in enumerate(_cards(case)):
        architecture = slots[number].gpu.architecture if number < len(slots) else None
        total += card.device.peak_flops_per_s["float16"].value * _FASTER.get(architecture or "", _USUALLY_FASTER)
    return total


def _cards(case: Case) -> list[Profile]:
    return [case.profile.of_card(number) for number in range(case.profile.num_cards)]


def _link(parts: Parts) -> float | None:
    lanes = link_of(parts)
    return None if lanes is None else pcie_bytes_per_s(lanes)
