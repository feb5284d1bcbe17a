"""What work costs under a serving engine on a machine made of parts.

    expert        bytes / bandwidth while kernels only stream weights (few tokens), else
                  √((bytes / bandwidth)² + (operations of its tokens and of the tile's missing ones / rate)²),
                  and, where engines tune tiles to the batch, never more than its tokens one after another
    dense layer   the same for its weights, + keys and values / bandwidth + attention's operations / rate
                  + the engine's time a layer, by how many kernels a layer of its kind has; where cores are all there is, attention's rate
                  is less with narrow heads
    on the cores  √((bytes / host's bandwidth)² + (operations / cores' rate)²), + one handing over a layer; operations are those of
                  the tokens and of unpacking the matrix once
    layers off the card as a whole: the same for what surrounds their experts, and for the output matrix; large passes copy weights to the
                  card and multiply there, and leave attention to the cores

Modelled: shares of peaks and fixed times of the engine (`specs.machines.engines`, which weighs clocks and generations of cards), weight
formats by their bytes, scales included, and codebooks that cores look up slowly. Ignored: caches, how tiles divide into waves, formats
that cards are slower to expand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from ...specs.machines.engines import load_engine
from ...specs.machines.profile import USUAL_KERNELS, CpuConstants, EngineConstants
from ...specs.models import BITS_PER_BYTE, FLOPS_PER_WEIGHT, WeightFormat, is_codebook, is_repacked
from .cost_model import CostModel, check_count
from .estimate import Estimate, rate_term

_LEAST_HEAD_BITS = 8
# Kernels of a layer as engines launch them, one after another: norms, projections, rotation, cache writes, attention; router, choice,
# three products, activation, sum. Latent attention and recurrences have more of the first.
_EXPERTS, _OTHER_MIXERS, _PLAIN_MLP, _NO_MIXER = 10, 18, 4, 2
# An MLP that every token passes beside the experts: two products, activation, product and sum; in some, norms or a gate of its own.
_SHARED_MLP = 5
# Short convolutions are two products and gates between them; delta rules have norms, gates and copies of states (`engines`).
_RECURRENT = {"short_convolution": 10}
_DELTA_RULES = ("gated_delta_net", "kimi_delta_attention")
_GROUPED_ATTENTION = USUAL_KERNELS - _EXPERTS
_USUAL_NORMS, NORM_KERNELS = 2, 2
"""Layers with norms behind their parts too (Gemma 4) have a norm and a scale more for each."""
_WIDE_HEAD = 128
BATCH_UNCERTAINTY = 1.45
"""How much further off steps of several requests are than of one, by reports of batches."""
_PASS_TOKENS = 2
"""From so many tokens of one request on, a step is a pass over a prompt."""


@dataclass(frozen=True, slots=True)
class EngineCosts(CostModel):
    """Durations of everything a run does, under the engine that the profile names."""

    layers_off: int = field(default=0, kw_only=True)
    """First decoder layers that lie in host memory as a whole, not their experts alone."""

    @property
    def engine(self) -> EngineConstants:
        """The engine's constants."""
        found = self.profile.engine
        assert found is not None  # noqa: S101
        return found

    def dense_layer(self, layer: int, tokens: int, context_tokens: int, num_requests: int = 1) -> Estimate:
        """Return the time of decoder layer `layer` without its routed experts, for a pass of `tokens`."""
        check_count("tokens", tokens)
        model, requests = self.model, max(1, min(num_requests, tokens))
        # Most layers of a model are alike.
        off = layer < self.layers_off
        work = self._layer_off if off else self._dense_layer
        key = ("layer", off, model.kind_of(layer), tokens, context_tokens, requests)
        return self.remembered(key, lambda: work(layer, tokens, context_tokens, requests))

    def _dense_layer(self, layer: int, tokens: int, context_tokens: int, requests: int) -> Estimate:
        engine, device = self.engine, self.profile.device
        work = self.dense_products(layer, tokens)
        values, flops = self.mixer_work(layer, tokens, context_tokens, requests)
        bandwidth = device.memory_bytes_per_s
        work += rate_term(
            values * self.kv_bytes_per_value / (bandwidth.value * engine.kv_efficiency.value),
            "memory",
            engine.kv_efficiency,
        )
        serial = engine.delta_flops_per_s if self._has_delta_rule(layer) else None
        if tokens > requests and serial is not None:
            work += rate_term(flops / serial, "compute", engine.attention_efficiency)
        elif tokens > requests:  # a decoding step's attention only reads
            peak = device.peak_flops_per_s["float16"]
            share = engine.attention_efficiency.value * self._width_share(layer)
            work += rate_term(flops / (peak.value * share), "compute", engine.attention_efficiency)
        work += rate_term(engine.layer_s.value * self._kernels(layer) / USUAL_KERNELS, "launch", engine.layer_s)
        if tokens >= _PASS_TOKENS * requests:
            work += rate_term(engine.pass_layer_s.value, "launch", engine.pass_layer_s)
        return _less_certain(work) if 1 < requests == tokens else work

    def _layer_off(self, layer: int, tokens: int, context_tokens: int, requests: int) -> Estimate:
        """Return the time of a layer that lies in host memory, without its routed experts."""
        model = self.model
        parameters = model.dense_matrix_parameters(layer) + model.dense_vector_parameters(layer)
        num_bytes = float(model.dense_layer_bytes(layer, self.dense_format))
        values, flops = self.mixer_work(layer, tokens, context_tokens, requests)
        mixing = self._on_cores(values * self.kv_bytes_per_value, flops)
        uploads = load_engine(self.engine.name).upload_from(model.num_experts, model.top_k)
        if uploads is not None and tokens >= uploads:
            return mixing + self.dense_products(layer, tokens) + self.host_to_device(int(num_bytes))
        return mixing + self._on_cores(
            num_bytes, FLOPS_PER_WEIGHT * float(parameters) * self._core_tokens(self.dense_format, tokens)
        )

    def _on_cores(self, num_bytes: float, flops: float) -> Estimate:
        """Return the time of reading so many bytes and doing so many operations on the host's cores."""
        cpu = self._cores()
        memory, compute = num_bytes / cpu.memory_bytes_per_s.value, flops / cpu.flops_per_s.value
        bound = (
            rate_term(memory, "memory", cpu.memory_bytes_per_s)
            if memory >= compute
            else rate_term(compute, "compute", cpu.flops_per_s)
        )
        return replace(bound, seconds=math.hypot(memory, compute))

    def _cores(self) -> CpuConstants:
        """Return the host's processor; raises MissingCalibration where the machine has none."""
        cpu = self.profile.host.cpu
        if cpu is None:
            raise self._missing("host.cpu", "this machine describes no processor", "name one among its parts")
        return cpu

    def dense_products(self, layer: int, tokens: int) -> Estimate:
        """Return the time of the products with weights in a layer without its routed experts."""
        model = self.model
        parameters = model.dense_matrix_parameters(layer) + model.dense_vector_parameters(layer)
        num_bytes = float(model.dense_layer_bytes(layer, self.dense_format))
        expand = self._expand(self.dense_format, tokens)
        return self._product(num_bytes, float(parameters), tokens, experts=False, expand=expand)

    def _width_share(self, layer: int) -> float:
        """Return what of attention's rate narrow heads leave where cores compute it: each pair's weight costs beside its products."""
        attention = self.model.attention_of(layer)
        if self.profile.device.kind != "cpu" or attention is None:
            return 1.0
        return min(1.0, attention.head_dim / _WIDE_HEAD)

    def _kernels(self, layer: int) -> int:
        """Return how many kernels a layer is made of: its mixer's, and those of its MLPs and experts."""
        model, variant = self.model, self.model.variant(layer)
        attention = model.attention_of(layer)
        if model.is_recurrent(layer):
            kind = "" if model.recurrent is None else model.recurrent.kind
            delta = self._has_delta_rule(layer)
            mixer = self.engine.delta_kernels if delta else _RECURRENT.get(kind, _OTHER_MIXERS)
        elif attention is None:
            mixer = _NO_MIXER
        else:
            mixer = _OTHER_MIXERS if attention.kind == "mla" else _GROUPED_ATTENTION
        mixer += NORM_KERNELS * max(0, model.num_norms_per_layer - _USUAL_NORMS)
        if layer not in model.moe_layers:
            return mixer + (0 if variant.num_dense_mlps == 0 else _PLAIN_MLP)
        return mixer + _EXPERTS + (_SHARED_MLP if model.num_shared_experts or variant.num_dense_mlps else 0)

    def _has_delta_rule(self, layer: int) -> bool:
        recurrent = self.model.recurrent
        return self.model.is_recurrent(layer) and recurrent is not None and recurrent.kind in _DELTA_RULES

    def head(self, tokens: int) -> Estimate:
        """Return the time of the final norm and the output matrix for `tokens` tokens whose logits are wanted."""
        check_count("tokens", tokens)
        parameters = self.model.head_parameters
        if self.layers_off:  # the output matrix follows the last layer to the card only where all are there
            return self._on_cores(
                self._head_bytes(), FLOPS_PER_WEIGHT * float(parameters) * self._core_tokens(self.dense_format, tokens)
            )
        expand = self._expand(self.dense_format, tokens)
        return self._product(self._head_bytes(), float(parameters), tokens, experts=False, expand=expand)

    def grouped_base(self, fmt: WeightFormat | None = None) -> Estimate:
        """Return what a grouped launch costs besides its experts: nothing, the engine's time a layer has it."""
        return rate_term(0.0, "launch", self.engine.layer_s)

    def grouped_item(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return what one expert with `tokens` tokens adds to a layer."""
        check_count("tokens", tokens)
        if not tokens:
            return rate_term(0.0, "memory", self.profile.device.memory_efficiency)

        def make() -> Estimate:
            num_bytes = float(self.model.expert_bytes(fmt))
            expand = self._expand(fmt, tokens)
            return self._product(num_bytes, float(self.model.expert_parameters), tokens, experts=True, expand=expand)

        return self.remembered(("item", tokens, fmt.name), make)

    def cpu_expert(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return the time of one expert on the host's cores, with its part of the layer's handing over."""
        check_count("tokens", tokens)
        cpu = self._cores()
        if not tokens:
            return rate_term(0.0, "memory", cpu.memory_bytes_per_s)
        return self.remembered(("cpu", tokens, fmt.name), lambda: self._cpu_expert(tokens, fmt))

    def _cpu_expert(self, tokens: int, fmt: WeightFormat) -> Estimate:
        flops = self.model.expert_flops_per_token * self._core_tokens(fmt, tokens)
        work = self._on_cores(float(self.model.expert_bytes(fmt)), float(flops))
        # A layer hands its experts over once; a token's experts share that.
        each = self.engine.cpu_layer_s
        return work + rate_term(each.value / self.model.top_k, "host", each)

    def host_per_fetching_layer(self) -> Estimate:
        """Return what reading a layer's routing back and asking for its misses costs."""
        return rate_term(self.engine.fetch_layer_s.value, "host", self.engine.fetch_layer_s)

    # --- the form ---------------------------------------------------------------------------------------------------

    def _core_tokens(self, fmt: WeightFormat, tokens: int) -> float:
        """Return how many tokens' multiplications `tokens` tokens of a matrix take on cores, unpacking its blocks included."""
        return self.engine.core_tokens(tokens, codebook=is_codebook(fmt.name), repacked=is_repacked(fmt.name))

    def _expand(self, fmt: WeightFormat, tokens: int) -> float:
        """Return how many times longer than others a format's products take: where cores compute, blocks are unpacked or looked up."""
        return self._core_tokens(fmt, tokens) / tokens if self.profile.device.kind == "cpu" else 1.0

    def _product(self, num_bytes: float, parameters: float, tokens: int, *, experts: bool, expand: float = 1.0) -> Estimate:  # fmt: skip
        """Return the time of multiplying `tokens` by weights of `num_bytes`, whose products take `expand` times as long as others'."""
        device, engine = self.profile.device, self.engine
        reach = [device.memory_bytes_per_s, device.memory_efficiency]
        memory = num_bytes / math.prod(constant.value for constant in reach)
        if tokens <= engine.matvec_tokens:
            streamed = rate_term(memory, "memory", *reach)
            return streamed if tokens == 1 else _less_certain(streamed)
        share = engine.expert_efficiency if experts else engine.dense_efficiency
        peak = device.peak_flops_per_s["float16"]
        flops = FLOPS_PER_WEIGHT * parameters * (tokens + engine.tile_tokens.value)
        compute = expand * flops / (peak.value * share.value)
        bound = rate_term(memory, "memory", *reach) if memory >= compute else rate_term(compute, "compute", peak, share)
        seconds = math.hypot(memory, compute)
        if device.kind == "gpu" and engine.matvec_tokens == 1:
            # Engines with one sort of kernels tune tiles to the batch: it takes no longer than its tokens one after another. Those that
            # change kernels at a fixed number of tokens do, on cards that the larger ones do not suit (llama.cpp on MI50 and Radeon VII).
            seconds = min(seconds, max(memory, compute / (tokens + engine.tile_tokens.value)) * tokens)
        return replace(bound, seconds=seconds)

    def _head_bytes(self) -> float:
        """Return the bytes of the output matrix: in its own type where that is known, else as the dense part is, never in fewer bits than
        engines leave it.
        """
        parameters, dense = self.model.head_parameters, self.dense_format
        if dense.head_bits is not None or not dense.quantised:
            return float(dense.head_bytes(parameters))
        return parameters * max(float(dense.bits_per_weight), _LEAST_HEAD_BITS) / BITS_PER_BYTE


def _less_certain(work: Estimate) -> Estimate:
    """Return the time of a step of several requests: between one row and many, kernels differ more from engine to engine."""
    return replace(work, relative_uncertainty=BATCH_UNCERTAINTY * work.relative_uncertainty)
