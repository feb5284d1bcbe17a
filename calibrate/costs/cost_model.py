"""What an activity costs on a machine: a roofline with overheads, every answer with its source and its uncertainty.

Modelled: a kernel takes the longer of reading its bytes and doing its operations, at the shares of the peaks that the
profile says kernels reach, and then what a launch costs on the device. Layers of small kernels can be limited by the host
that issues them. Weights below 16 bits are expanded inside the kernel: their bytes are read at a further, stated
efficiency, and they are multiplied at 16-bit speed. Copies take latency + (bytes + half size) / bandwidth. Ignored: tile
and wave quantisation, caches that hold weights between launches, clocks. Uncertainties of a product add as squares; those
of a sum add as they are, because the same constants stand in every activity and err together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ...base.errors import InputError, MissingCalibration, UnknownName
from ...specs.machines.profile import LANES, Constant, LinkDirection, Profile
from ...specs.models import FLOPS_PER_WEIGHT, ModelSpec, WeightFormat, weight_format
from .attention import attended
from .estimate import Array, Estimate, Times, rate_term, times_of

T = TypeVar("T")

# Reads and writes of the residual stream around attention and MLP: two norms and two residual additions, in and out.
RESIDUAL_PASSES = 8


@dataclass(frozen=True, slots=True)
class CostModel:
    """Durations of everything a run does, for one machine and one model."""

    profile: Profile
    model: ModelSpec
    dense_format: WeightFormat = field(default_factory=lambda: weight_format("16"), kw_only=True)
    """How everything but routed experts is stored."""
    kv_bytes_per_value: float = field(default=2, kw_only=True)
    encoder_tokens: int = field(default=0, kw_only=True)
    """Input tokens of an encoder–decoder, per request: what cross-attention reads."""
    _known: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """All that these costs remember. It is no argument: costs made from others by `dataclasses.replace` begin without memory."""

    def remembered(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` returned when it was first asked for under `key`, by these costs or by others that share their memory."""
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found

    # --- several cards -----------------------------------------------------------------------------------------

    @property
    def each_card(self) -> Sequence[CostModel]:
        """The costs of every card that layers lie on; one, where every layer is computed alike."""
        return (self,)

    def card_of(self, layer: int) -> int:
        """Return which of those cards decoder layer `layer` lies on."""
        return 0

    @property
    def head_card(self) -> int:
        """Which of them the output matrix lies on."""
        return 0

    @property
    def most_passes(self) -> int:
        """How many passes of a prompt may be under way at once, on cards that each hold layers."""
        return 1

    # --- kernels -----------------------------------------------------------------------------------------------

    def dense_layer(self, layer: int, tokens: int, context_tokens: int, num_requests: int = 1) -> Estimate:
        """Return the time of decoder layer `layer` without its routed experts, for a pass of `tokens`.

        context_tokens: tokens of context that attention reads, summed over the pass's requests.
        num_requests: requests in the pass; each of their tokens meets its own request's context only.
        """
        check_count("tokens", tokens)
        check_count("context_tokens", context_tokens)
        model = self.model
        attention = model.attention_of(layer)
        requests = max(1, min(num_requests, tokens))
        parameters = model.dense_matrix_parameters(layer) + model.dense_vector_parameters(layer)
        num_bytes = float(model.dense_layer_bytes(layer, self.dense_format))
        flops = float(FLOPS_PER_WEIGHT * parameters * tokens)
        values, mixing = self.mixer_work(layer, tokens, context_tokens, requests)
        flops += mixing
        num_bytes += values * self.kv_bytes_per_value
        mixer = attention or model.attention
        wide = mixer.num_heads * (mixer.head_dim + mixer.v_head_dim)
        activations = tokens * (RESIDUAL_PASSES * model.hidden_size + 2 * wide)
        num_bytes += activations * _activation_bytes(self.dense_format)
        work = self._roofline(flops, num_bytes, self.dense_format)
        return self._issued(work, self.profile.host.kernels_per_dense_layer)

    def dense_products(self, layer: int, tokens: int) -> Estimate:
        """Return the time of the products with weights in a layer without its routed experts: the part of it that rows divide."""
        parameters = self.model.dense_matrix_parameters(layer) + self.model.dense_vector_parameters(layer)
        num_bytes = float(self.model.dense_layer_bytes(layer, self.dense_format))
        return self._roofline(float(FLOPS_PER_WEIGHT * parameters * tokens), num_bytes, self.dense_format)

    def product(self, width: int, depth: int, tokens: int) -> Estimate:
        """Return the time of one more product with weights stored as the dense part is: every token's `depth` values become `width`."""
        parameters = width * depth
        return self._roofline(float(FLOPS_PER_WEIGHT * parameters * tokens), float(self.dense_format.num_bytes(parameters)),
                              self.dense_format)  # fmt: skip

    def mixer_work(self, layer: int, tokens: int, context_tokens: int, requests: int) -> tuple[float, float]:
        """Return (values of caches and states read and written, operations on them) of one layer's mixing of tokens."""
        model = self.model
        attention, values, flops = model.attention_of(layer), 0.0, 0.0
        if model.is_recurrent(layer) and model.recurrent is not None:
            values = 2 * model.recurrent.state_values * requests  # read and written
            flops = 2.0 * FLOPS_PER_WEIGHT * model.recurrent.state_values * tokens
        elif attention is not None:
            pairs, read, index = attended(attention, model.window_of(layer), tokens, context_tokens, requests)
            mixers = model.variant(layer).num_mixers
            values = mixers * ((read + tokens) * attention.kv_values_per_token + index)
            flops = mixers * attention.flops(pairs, read)
        if model.cross_attention:
            read = self.encoder_tokens * requests
            values += read * model.attention.kv_values_per_token
            flops += model.attention.flops(tokens * self.encoder_tokens, read)
        return values, flops

    def head(self, tokens: int) -> Estimate:
        """Return the time of the final norm and the output matrix for `tokens` tokens whose logits are wanted."""
        check_count("tokens", tokens)
        parameters = self.model.head_parameters
        wide = weight_format("32" if self.dense_format.bits == 32 else "16")  # the head is computed so
        activations = tokens * (self.model.hidden_size + self.model.vocab_size)
        stored = self.dense_format.head_bytes(parameters)
        num_bytes = stored + activations * _activation_bytes(wide)
        work = self._roofline(float(FLOPS_PER_WEIGHT * parameters * tokens), float(num_bytes), wide)
        return self._issued(work, self.profile.host.kernels_per_head)

    def expert_kernel(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return the time of one routed expert for `tokens` tokens, in a launch of its own."""
        return self.grouped_item(tokens, fmt) + self.grouped_base(fmt) if tokens else self.grouped_item(tokens, fmt)

    def grouped_base(self, fmt: WeightFormat | None = None) -> Estimate:
        """Return what a grouped launch costs besides its experts; fmt: how these are stored, where that was measured by formats."""
        launch = self.profile.device.launch_s
        return rate_term(launch.value, "launch", launch)

    def grouped_item(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return what one expert with `tokens` tokens adds to a grouped launch."""
        check_count("tokens", tokens)
        model = self.model
        num_bytes = model.expert_bytes(fmt) if tokens else 0
        # The hidden state in and out, the intermediate values written and read.
        num_bytes += tokens * 2 * (model.expert_hidden + model.expert_intermediate_size) * _activation_bytes(fmt)
        return self._roofline(float(model.expert_flops_per_token * tokens), float(num_bytes), fmt)

    def expert_times(self, most_tokens: int, fmt: WeightFormat, *, grouped: bool) -> Times:
        """Return what one expert with 1 to `most_tokens` tokens takes: in a launch of its own, or its share of a grouped one."""

        def make() -> Times:
            one = self.grouped_item if grouped else self.expert_kernel
            return times_of([one(tokens, fmt) for tokens in range(1, most_tokens + 1)])

        return self.remembered(("experts", most_tokens, fmt.name, grouped), make)

    def whole_experts_s(
        self, rows: Array, active: Array | None, fmt: WeightFormat, *, rate: float = 1.0, slices: int = 1
    ) -> Array | None:
        """Return seconds of the experts of each unit in one grouped launch, `[...]` for rows `[..., slots]`; None where they just add up.

        active: the chance that a slot has rows, where rows are expectations; None where they are counts. rate: speed of compute
        relative to the device's. slices: each expert is cut over so many devices.
        """
        return None

    def behind_dispatch(self) -> CostModel:
        """Return the costs where tokens come through an all-to-all: some engines run other experts behind it."""
        return self

    def experts_start_s(self, fmt: WeightFormat, slots: int) -> float:
        """Return what a grouped launch of `slots` experts takes however few rows they have."""
        return self.grouped_base(fmt).seconds

    @property
    def mode(self) -> str | None:
        """What the costs of everything but experts depend on besides sizes; None: nothing."""
        return None

    # --- copies -----------------------------------------------------------------------------------------------

    def moved_bytes(self, fmt: WeightFormat) -> int:
        """Return the bytes that move when an expert does."""
        return self.model.expert_bytes(fmt)

    def transfer_wait_s(self) -> float:
        """Return what a transfer costs besides moving bytes, where the engine's own runs were measured; else 0."""
        return 0.0

    def host_to_device(self, num_bytes: int, pinned: bool = True) -> Estimate:
        """Return the time of one copy of `num_bytes` to the device, running alone."""
        return _copy(self.profile.host_to_device, num_bytes, pinned)

    def device_to_host(self, num_bytes: int, pinned: bool = True) -> Estimate:
        """Return the time of one copy of `num_bytes` to the host, running alone."""
        return _copy(self.profile.device_to_host, num_bytes, pinned)

    def disk_to_host(self, num_bytes: int) -> Estimate:
        """Return the time of reading `num_bytes` from the disk; raises MissingCalibration where the profile has none."""
        check_count("bytes", num_bytes)
        disk = self.profile.disk
        if disk is None:
            raise self._missing("disk", "this profile describes no disk", "choose a profile with a disk or measure one")
        latency = rate_term(disk.latency_s.value, "link", disk.latency_s)
        return latency + rate_term(num_bytes / disk.read_bytes_per_s.value, "link", disk.read_bytes_per_s)

    # --- the host ---------------------------------------------------------------------------------------------

    @property
    def host_shares_compute(self) -> bool:
        """Whether the host's own work stops the device from computing."""
        return self.profile.device.host_shares_compute

    def host_per_step(self) -> Estimate:
        """Return the host's time between two forward passes."""
        return rate_term(self.profile.host.per_step_s.value, "host", self.profile.host.per_step_s)

    def host_per_layer(self) -> Estimate:
        """Return the host's time from a layer's routing being computed to its decision."""
        return rate_term(self.profile.host.per_layer_s.value, "host", self.profile.host.per_layer_s)

    def host_per_fetching_layer(self) -> Estimate:
        """Return the same for a layer whose misses are fetched by whoever serves it: here the same."""
        return self.host_per_layer()

    def host_per_guess(self) -> Estimate | None:
        """Return the host's time for running one gate early, of one token; None where nothing is known of it."""
        return None

    def host_per_kernel(self) -> Estimate:
        """Return the host's time for issuing one kernel."""
        return rate_term(self.profile.host.per_kernel_s.value, "host", self.profile.host.per_kernel_s)

    def host_per_transfer(self) -> Estimate:
        """Return the host's time for issuing one copy."""
        return rate_term(self.profile.host.per_transfer_s.value, "host", self.profile.host.per_transfer_s)

    def cpu_expert(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return the time of one expert on the host's cores; raises MissingCalibration where the profile has none."""
        check_count("tokens", tokens)
        cpu = self.profile.host.cpu
        if cpu is None:
            raise self._missing("host.cpu", "this profile has no costs of the host's cores", "measure them first")
        compute = rate_term(
            self.model.expert_flops_per_token * tokens / cpu.flops_per_s.value, "compute", cpu.flops_per_s
        )
        num_bytes = self.model.expert_bytes(fmt) if tokens else 0
        memory = rate_term(num_bytes / cpu.memory_bytes_per_s.value, "memory", cpu.memory_bytes_per_s)
        work = compute if compute.seconds >= memory.seconds else memory
        return work + rate_term(cpu.launch_s.value, "launch", cpu.launch_s) if tokens else work

    # --- running together ---------------------------------------------------------------------------------------

    def rate_fraction(self, lane: str, companions: frozenset[str]) -> float:
        """Return the speed of `lane` relative to running alone while `companions` run; pairs multiply."""
        for name in (lane, *companions):
            if name not in LANES:
                raise UnknownName("lane", name, LANES)
        pairs = (self.profile.contention.get(f"{lane}/{other}") for other in sorted(companions) if other != lane)
        return math.prod(pair.value for pair in pairs if pair is not None)

    def rate_uncertainty(self, lane: str, companions: frozenset[str]) -> float:
        """Return how wrong `rate_fraction` may be, relative to it; pairs add up."""
        pairs = (self.profile.contention.get(f"{lane}/{other}") for other in sorted(companions) if other != lane)
        return sum(pair.relative_uncertainty for pair in pairs if pair is not None)

    # --- the roofline -----------------------------------------------------------------------------------------

    def _roofline(self, flops: float, num_bytes: float, fmt: WeightFormat) -> Estimate:
        """Return the longer of `flops` at reachable speed and `num_bytes` at reachable bandwidth."""
        device = self.profile.device
        dtype = "float32" if fmt.bits == 32 else "float16"
        peak = device.peak_flops_per_s.get(dtype)
        if peak is None:
            have = ", ".join(device.peak_flops_per_s) or "nothing"
            raise self._missing(f"peak_flops_per_s[{dtype}]", f"known for {have} only", "choose another weight format")
        reach = [device.memory_bytes_per_s, device.memory_efficiency]
        if fmt.quantised:
            expand = device.dequantise_efficiency.get(fmt.name) or device.dequantise_efficiency.get(
                fmt.like or fmt.name
            )
            if expand is None:
                rule = f"nearest known format: {self._nearest_format(fmt)}"
                raise self._missing(f"dequantise_efficiency[{fmt.name}]", rule, "use that or measure this one")
            reach.append(expand)
        compute = flops / (peak.value * device.compute_efficiency.value)
        memory = num_bytes / math.prod(constant.value for constant in reach)
        if compute > memory:
            return rate_term(compute, "compute", peak, device.compute_efficiency)
        return rate_term(memory, "memory", *reach)

    def _issued(self, work: Estimate, kernels: Constant) -> Estimate:
        """Return `work` done by several small kernels: it cannot end before the host has issued them.

        What it then waits for are launches, the device's or the host's: that time is no computing.
        """
        launch, issue = self.profile.device.launch_s, self.profile.host.per_kernel_s
        on_device = work + rate_term(kernels.value * launch.value, "launch", kernels, launch)
        if self.host_shares_compute or kernels.value * issue.value <= on_device.seconds:
            return on_device
        issued = rate_term(kernels.value * issue.value, "launch", kernels, issue)
        return replace(issued, launch_s=issued.seconds - work.seconds)

    def _nearest_format(self, fmt: WeightFormat) -> str:
        known = [weight_format(name) for name in self.profile.device.dequantise_efficiency]
        return min(known, key=lambda other: abs(other.bits_per_weight - fmt.bits_per_weight)).name if known else "none"

    def _missing(self, name: str, rule: str, remedy: str) -> MissingCalibration:
        return MissingCalibration(f"hardware {self.profile.name}: {name}", None, rule, remedy)


def _copy(link: LinkDirection, num_bytes: int, pinned: bool) -> Estimate:
    """Return latency + (bytes + half size) / bandwidth; nothing to copy takes no time."""
    check_count("bytes", num_bytes)
    rate = link.pinned_bytes_per_s if pinned else link.pageable_bytes_per_s
    if num_bytes == 0:
        return rate_term(0.0, "link", rate)
    ramp = rate_term(link.half_size_bytes.value / rate.value, "link", link.half_size_bytes, rate)
    return (
        rate_term(link.latency_s.value, "link", link.latency_s) + ramp + rate_term(num_bytes / rate.value, "link", rate)
    )


def _activation_bytes(fmt: WeightFormat) -> int:
    """Return the bytes of one activation beside weights stored as `fmt`."""
    return fmt.vector_bytes(1)


def check_count(name: str, value: int) -> None:
    """Return nothing; raises InputError for a count below zero."""
    if value < 0:
        raise InputError(name, value, "below zero", "give a count")
