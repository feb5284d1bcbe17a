"""What work costs under an engine whose kernels were measured on this kind of GPU: `CostModel` with their forms.

    a layer without its experts   its products one by one + its attention (latent attention: the whole layer) + its small kernels
    the experts of a GPU          one operation; where they are asked for one by one, their shares of a full one

Formats that nobody measured take the bytes of their own and the kernel of what they are multiplied in, with a wider interval; a layer
without a fitting kernel takes the roofline of the machine's constants. Ignored: windows (a layer's context is what it sees), how
kernels change where a layer is divided over GPUs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import numpy as np

from ....specs.machines.gpu_kernels import ExpertKernel, GpuKernels, ProductKernel
from ....specs.models import BITS_PER_BYTE, FLOPS_PER_WEIGHT, AttentionSpec, WeightFormat
from ..cost_model import RESIDUAL_PASSES, CostModel, check_count
from ..engine_costs import EngineCosts
from ..estimate import Array, Estimate, rate_term
from .attention import decode_s, latent_decode_s, latent_layer_s, prompt_s
from .experts import ExpertLoad, ExpertShape, entering, expected_load, experts_s, item_s, load_of_rows
from .layer import Matrix, layer_matrices
from .products import product_s, product_work_s

_SMALL_KERNEL_S = 3e-6
_SMALL_UNCERTAINTY = 0.5
"""What a kernel that hardly computes takes inside a captured graph: AIConfigurator's systems/*.yaml (commit 095f58a5) have 3 µs,
`mem_empirical_constant_latency`."""
_NORMS, _ROTATION_AND_CACHE = 2, 2
"""Such kernels of a layer: two norms with their additions; where attention was not measured with its projections, rotation and the
writing of keys and values too."""
_UNFUSED = {"sglang": 20}
"""Such kernels more outside latent attention under engines that fuse less there: norms of heads, copies, scatters and gates one by one.
Fitted to single requests of Qwen3-235B, MiniMax-M2.5 and Qwen3-Coder-Next on B200 (SGLang 0.5.6 to 0.5.8), 14 to 25 a layer."""
_SIXTEEN = 2.0
"""Bytes of an activation outside 8-bit products."""
_NARROW = {"fp8": 1.0, "fp8-block": 1.0, "nvfp4": 0.5 + 1 / 16}
"""Bytes of an activation inside products of fewer bits."""
_FOUR_OVER_EIGHT = 2.0
"""Of NVIDIA's peaks, where activations have 4 bits too (Blackwell data sheets)."""
_UNMEASURED = 0.3
"""What is added to the uncertainty where a format or a layer takes the kernel of another."""
_BLOCK_WEIGHTS = 128 * 128
_MOST_QUERIES = 8
"""Tokens of a request at most that a decoding kernel takes at once."""


@dataclass(frozen=True, slots=True)
class KernelCosts(CostModel):
    """Durations of everything a run does, under the kernels that the profile names."""

    @property
    def kernels(self) -> GpuKernels:
        """The profile's kernels."""
        found = self.profile.kernels
        assert found is not None  # noqa: S101
        return found

    # --- layers ---------------------------------------------------------------------------------------------------------

    def dense_layer(self, layer: int, tokens: int, context_tokens: int, num_requests: int = 1) -> Estimate:
        """Return the time of decoder layer `layer` without its routed experts, for a pass of `tokens`."""
        check_count("tokens", tokens)
        check_count("context_tokens", context_tokens)
        requests = max(1, min(num_requests, tokens))
        # Most layers of a model are alike.
        key = ("layer", self.model.kind_of(layer), tokens, context_tokens, requests)
        return self.remembered(
            key, lambda: _sum(list(self.layer_parts(layer, tokens, context_tokens, requests).values()))
        )

    def layer_parts(self, layer: int, tokens: int, context_tokens: int, requests: int) -> dict[str, Estimate]:
        """Return what a layer is made of: products by role, its mixing of tokens, its small kernels."""
        if tokens == 0:
            return {"small": rate_term(0.0, "launch", self.profile.device.launch_s)}
        found: dict[str, Estimate] = {}
        matrices = layer_matrices(self.model, layer)
        attention = self.model.attention_of(layer)
        whole = self._latent_layer(matrices, layer, tokens, context_tokens, requests)
        if whole is not None:
            found["mixer"] = whole
            matrices = tuple(matrix for matrix in matrices if matrix.role != "mixer")
        else:
            found["mixing"] = self._mixing(layer, attention, tokens, context_tokens, requests)
        for matrix in matrices:
            product = self._product(matrix, tokens)
            found[matrix.role] = found[matrix.role] + product if matrix.role in found else product
        device = self.profile.device
        moved = tokens * RESIDUAL_PASSES * self.model.hidden_size * _SIXTEEN
        reach = device.memory_bytes_per_s.value * device.memory_efficiency.value
        more = 0 if whole is not None else _ROTATION_AND_CACHE
        if attention is None or attention.kind != "mla":
            more += _UNFUSED.get(self.kernels.engine, 0)
        seconds = (_NORMS + more) * _SMALL_KERNEL_S
        small = Estimate(seconds=seconds, source=self.kernels.source, bound="launch", relative_uncertainty=_SMALL_UNCERTAINTY,
                         launch_s=seconds)  # fmt: skip
        found["small"] = small + rate_term(moved / reach, "memory", device.memory_bytes_per_s, device.memory_efficiency)
        return found

    def product(self, width: int, depth: int, tokens: int) -> Estimate:
        """Return the time of one more product with weights stored as the dense part is."""
        return self._product(Matrix(role="other", width=width, depth=depth), tokens)

    def head(self, tokens: int) -> Estimate:
        """Return the time of the final norm and the output matrix for `tokens` tokens whose logits are wanted."""
        check_count("tokens", tokens)
        if tokens == 0:
            return rate_term(0.0, "launch", self.profile.device.launch_s)
        stored = self.dense_format.head_bytes(self.model.head_parameters) / self.model.head_parameters
        kernel, missing = self._product_kernel("bf16")
        if kernel is None:
            return CostModel.head(self, tokens)
        return self._of_product(kernel, tokens, self.model.vocab_size, self.model.hidden_size, stored, missing)

    # --- experts --------------------------------------------------------------------------------------------------------

    def grouped_base(self, fmt: WeightFormat | None = None) -> Estimate:
        """Return what the operation of a layer's experts takes besides them, with all of them on this device."""
        kernel = self._expert_kernel(fmt or self.dense_format)[0]
        if kernel is None:
            return CostModel.grouped_base(self, fmt)
        return self._estimate(
            kernel.start_s + kernel.expert_s * self.model.num_experts, kernel, "launch", all_launch=True
        )

    def grouped_item(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return what one expert with `tokens` tokens adds to an operation of many."""
        check_count("tokens", tokens)
        kernel, missing = self._expert_kernel(fmt)
        if kernel is None:
            return CostModel.grouped_item(self, tokens, fmt)
        seconds, by_compute = item_s(
            kernel, self._shape(fmt), np.array([float(tokens)]), self.kernels.num_units,
            num_experts=self.model.num_experts, top_k=self.model.top_k,
        )  # fmt: skip
        least_s = self.model.expert_flops_per_token * tokens / self._peak(fmt)
        bound = "compute" if by_compute[0] or least_s > seconds[0] else "memory"
        return self._estimate(max(float(seconds[0]), least_s), kernel, bound, more=missing)

    def expert_kernel(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return the time of one routed expert in launches of its own: its two products."""
        if not tokens:
            return self.grouped_item(tokens, fmt)
        number, stored = number_of(fmt), self._stored(fmt)
        kernel, missing = self._product_kernel(number)
        if kernel is None:
            return CostModel.expert_kernel(self, tokens, fmt)
        found = [
            self._of_product(kernel, tokens, float(width), float(depth), stored, missing)
            for width, depth in self._shape(fmt).products()
        ]
        return _sum(found)

    def whole_experts_s(
        self, rows: Array, active: Array | None, fmt: WeightFormat, *, rate: float = 1.0, slices: int = 1
    ) -> Array | None:
        """Return seconds of the experts of each unit in one operation, `[...]` for rows `[..., slots]`."""
        load = load_of_rows(rows) if active is None else expected_load(np.asarray(rows, float), active)
        slots, model = np.shape(rows)[-1], self.model
        tokens = entering(load.rows, model.top_k, min(1.0, slots / model.num_experts))
        load = replace(
            load, tokens=tokens, choices=tokens * model.top_k, all_experts=float(max(slots, model.num_experts))
        )
        return self.loaded_experts_s(load, fmt, rate=rate, slices=slices)

    def loaded_experts_s(
        self, load: ExpertLoad, fmt: WeightFormat, *, rate: float = 1.0, slices: int = 1
    ) -> Array | None:
        """Return seconds of each operation of a load; None where no kernel of experts was measured."""
        kernel, _ = self._expert_kernel(fmt)
        if kernel is None:
            return None
        if rate != 1.0:
            kernel = replace(kernel, flops_per_s=kernel.flops_per_s * rate, tile_s=kernel.tile_s / rate)
        shape = self._shape(fmt)
        if slices > 1:
            shape = replace(shape, intermediate=shape.intermediate / slices)
        least_s = load.rows * (self.model.expert_flops_per_token / slices) / self._peak(fmt)
        return np.maximum(experts_s(kernel, shape, load, self.kernels.num_units), least_s)

    def behind_dispatch(self) -> CostModel:
        """Return the costs with the experts that the engine runs behind DeepEP's dispatch."""
        others = self.kernels.dispatched_experts
        if not others:
            return self
        kernels = replace(self.kernels, experts={**self.kernels.experts, **others}, dispatched_experts={})
        return replace(self, profile=replace(self.profile, kernels=kernels))

    def experts_start_s(self, fmt: WeightFormat, slots: int) -> float:
        """Return what an operation of `slots` experts takes however few rows they have."""
        kernel, _ = self._expert_kernel(fmt)
        if kernel is None:
            return 0.0
        apart = kernel.elsewhere_s if slots < self.model.num_experts else 0.0
        return kernel.start_s + kernel.expert_s * slots + apart

    # --- what an engine's host does ---------------------------------------------------------------------------------------

    def cpu_expert(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return the time of one expert on the host's cores."""
        return self._beside.cpu_expert(tokens, fmt)

    def host_per_fetching_layer(self) -> Estimate:
        """Return the host's time for a layer whose misses are fetched."""
        return self._beside.host_per_fetching_layer()

    @property
    def _beside(self) -> CostModel:
        """The costs of what is not a kernel of the GPU: the engine's where the machine is made of parts."""
        kind = EngineCosts if self.profile.engine is not None else CostModel
        return kind(
            self.profile, self.model, dense_format=self.dense_format, kv_bytes_per_value=self.kv_bytes_per_value
        )

    # --- kernels ----------------------------------------------------------------------------------------------------------

    def _mixing(
        self, layer: int, attention: AttentionSpec | None, tokens: int, context: int, requests: int
    ) -> Estimate:
        """Return the time of a layer's mixing of tokens, without its projections."""
        values, flops = self.mixer_work(layer, tokens, context, requests)
        if values == 0 and flops == 0:
            return rate_term(0.0, "launch", self.profile.device.launch_s)
        kernels, units, cache = (
            self.kernels,
            self.kernels.num_units,
            "fp8" if self.kv_bytes_per_value < _SIXTEEN else "bf16",
        )
        num_bytes, each = values * self.kv_bytes_per_value, tokens / requests
        decoding = _decodes(tokens, context, requests)
        window = self.model.window_of(layer)
        seen = context / requests if window is None else min(context / requests, window)
        if attention is not None and attention.kind == "mla":
            heads = attention.num_heads
            if decoding and cache in kernels.latent_decode:
                decode = kernels.latent_decode[cache]
                outer = tokens * heads * (2 * attention.kv_lora_rank + attention.qk_rope_head_dim) * _SIXTEEN
                seconds = latent_decode_s(
                    decode, num_bytes, flops / heads, heads, outer, seen, requests=requests, num_units=units
                )
                return self._estimate(float(seconds), decode, "memory")
            if not decoding and cache in kernels.latent_prompt:
                prompt = kernels.latent_prompt[cache]
                outer = tokens * heads * (attention.head_dim + attention.v_head_dim) * _SIXTEEN
                seconds = prompt_s(prompt, flops, outer, requests, heads, each, units, full_waves=True)
                return self._estimate(float(seconds), prompt, "compute")
        elif attention is not None:
            heads, kv_heads = attention.num_heads, attention.num_kv_heads
            if decoding and cache in kernels.decode_attention:
                found = kernels.decode_attention[cache]
                return self._estimate(
                    float(decode_s(found, num_bytes, requests, kv_heads, seen, units)), found, "memory"
                )
            if not decoding and cache in kernels.prompt_attention:
                prompt = kernels.prompt_attention[cache]
                outer = heads * (attention.head_dim + attention.v_head_dim) + attention.kv_values_per_token
                moved = tokens * outer * _SIXTEEN + num_bytes
                return self._estimate(
                    float(prompt_s(prompt, flops, moved, requests, heads, each, units)), prompt, "compute"
                )
        device = self.profile.device
        work = self._roofline(flops, num_bytes, _wide(self.dense_format))
        plain = work + rate_term(device.launch_s.value, "launch", device.launch_s)
        return replace(plain, relative_uncertainty=plain.relative_uncertainty + _UNMEASURED)

    def _latent_layer(
        self, matrices: tuple[Matrix, ...], layer: int, tokens: int, context: int, requests: int
    ) -> Estimate | None:
        """Return the time of a whole layer of latent attention; None where it is none, or was not measured as a whole."""
        attention = self.model.attention_of(layer)
        if attention is None or attention.kind != "mla" or attention.selected is not None:
            return None
        phase = "decode" if _decodes(tokens, context, requests) else "prefill"
        number = number_of(self.dense_format)
        kernel = self.kernels.latent_layer.get(f"{phase}/{number}")
        if kernel is None:
            return None
        values, flops = self.mixer_work(layer, tokens, context, requests)
        parameters = sum(matrix.parameters for matrix in matrices if matrix.role == "mixer")
        outer = 2 * self.model.hidden_size + 2 * attention.num_heads * (attention.head_dim + attention.v_head_dim)
        num_bytes = (
            parameters * self._stored(self.dense_format) + values * self.kv_bytes_per_value + tokens * outer * _SIXTEEN
        )
        flops += FLOPS_PER_WEIGHT * parameters * tokens
        seconds = float(latent_layer_s(kernel, num_bytes, flops))
        bound = "compute" if flops / kernel.flops_per_s > num_bytes / kernel.bytes_per_s else "memory"
        return self._estimate(seconds, kernel, bound)

    def _product(self, matrix: Matrix, tokens: int) -> Estimate:
        """Return the time of one product; the router's is one of 16 bits."""
        number = "bf16" if matrix.role == "router" else number_of(self.dense_format)
        stored = _SIXTEEN if matrix.role == "router" else self._stored(self.dense_format)
        kernel, missing = self._product_kernel(number)
        if kernel is None:
            device = self.profile.device
            flops = FLOPS_PER_WEIGHT * matrix.parameters * tokens
            work = self._roofline(flops, matrix.parameters * stored, _wide(self.dense_format))
            return work + rate_term(device.launch_s.value, "launch", device.launch_s)
        return self._of_product(kernel, tokens, matrix.width, matrix.depth, stored, missing)

    def _of_product(
        self, kernel: ProductKernel, tokens: int, width: float, depth: float, stored: float, missing: float
    ) -> Estimate:
        units = self.kernels.num_units
        seconds = float(product_s(kernel, tokens, width, depth, stored, units))
        one, two, three = (np.array([float(size)]) for size in (tokens, width, depth))
        memory, compute = product_work_s(kernel, one, two, three, stored, units)
        return self._estimate(seconds, kernel, "compute" if compute[0] > memory[0] else "memory", more=missing)

    def _product_kernel(self, number: str) -> tuple[ProductKernel | None, float]:
        """Return (the kernel of a number format or of what it is multiplied in, what that adds to the uncertainty)."""
        found = self.kernels.products.get(number)
        return (found, 0.0) if found is not None else (self.kernels.products.get("bf16"), _UNMEASURED)

    def _expert_kernel(self, fmt: WeightFormat) -> tuple[ExpertKernel | None, float]:
        measured, number = self.kernels.experts, number_of(fmt)
        found = measured.get(number)
        if found is not None:
            return found, 0.0
        return measured.get("mxfp4" if number == "nvfp4" else "bf16", measured.get("bf16")), _UNMEASURED

    def _shape(self, fmt: WeightFormat) -> ExpertShape:
        """Return a routed expert stored as `fmt`."""
        model = self.model
        number = number_of(fmt)
        narrow = _NARROW.get(number, _SIXTEEN) if number in self.kernels.experts else _SIXTEEN
        return ExpertShape(
            hidden=model.expert_hidden, intermediate=model.expert_intermediate_size, gated=model.gated,
            weight_bytes=model.expert_bytes(fmt) / model.expert_matrix_parameters, activation_bytes=narrow,
        )  # fmt: skip

    def _peak(self, fmt: WeightFormat) -> float:
        """Return the data sheet's operations a second for experts stored as `fmt`; slopes of tiles may promise more."""
        peaks = self.profile.device.peak_flops_per_s
        width = self._shape(fmt).activation_bytes
        if width >= _SIXTEEN or "float8" not in peaks:
            return peaks["float16"].value
        return peaks["float8"].value * (1.0 if width >= 1 else _FOUR_OVER_EIGHT)

    @staticmethod
    def _stored(fmt: WeightFormat) -> float:
        """Return the bytes of a weight, scales included."""
        return float(fmt.bits_per_weight) / BITS_PER_BYTE

    def _estimate(
        self, seconds: float, kernel: object, bound: str, *, more: float = 0.0, all_launch: bool = False
    ) -> Estimate:
        start = (
            seconds
            if all_launch
            else min(seconds, getattr(kernel, "start_s", 0.0) if not isinstance(kernel, ExpertKernel) else 0.0)
        )
        return Estimate(
            seconds=seconds, source=self.kernels.source, bound="launch" if start > seconds - start else bound,
            relative_uncertainty=getattr(kernel, "relative_uncertainty") + more, launch_s=start,  # noqa: B009
        )  # fmt: skip


def number_of(fmt: WeightFormat) -> str:
    """Return which of the measured formats weights of `fmt` are multiplied as (`NUMBERS`); bf16 for those that have none."""
    like = fmt.like or fmt.name
    if fmt.name == "nvfp4":
        return "nvfp4"
    if like == "mxfp4":
        return "mxfp4"
    if fmt.quantised and fmt.bits == 4:
        return "int4"
    if like == "8":
        whole = fmt.group is None or fmt.group > _BLOCK_WEIGHTS
        return "fp8" if whole else "fp8-block"
    return "bf16"


def _decodes(tokens: int, context: int, requests: int) -> bool:
    """Return whether attention takes its decoding kernel: for one token of each request, or a few of them over a longer cache.

    So engines check drafted tokens (vLLM: a batch is decoded up to 1 + drafted tokens a request).
    """
    return tokens <= requests or (tokens <= _MOST_QUERIES * requests and context > 2 * tokens)


def _wide(fmt: WeightFormat) -> WeightFormat:
    from ....specs.models import weight_format

    return weight_format("32" if fmt.bits == 32 else "16")


def _sum(parts: list[Estimate]) -> Estimate:
    total = parts[0]
    for each in parts[1:]:
        total = total + each
    return dataclasses.replace(total)
