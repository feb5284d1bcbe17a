"""What a serving engine makes of one card: fixed times of its kernels, shares of the card's peak.

Modelled: clocks and kind of memory of the card, which kernels a build of some month had, engines without kernels for a generation of cards.
Ignored: what joins several cards (`compose`).
"""

from __future__ import annotations

import dataclasses

from ...base.units import GIGA
from .catalogue import architectures
from .engines import UNSORTED, UNTUNED_LAYER_S, UNTUNED_UNCERTAINTY, Engine, EngineRates
from .parts import GpuPart
from .profile import USUAL_KERNELS, Constant, EngineConstants

_USUAL_CLOCK_GHZ, _USUAL_FLOPS_PER_CYCLE = 2.5, 512.0
"""Of the cards that engines' constants are given for; those of other clocks and generations follow from them."""
_UNKNOWN_CLOCK_GHZ = 2.0
_STACKED_BUS_BITS = 1024
STACKED_PACE = 1.2
"""How many times longer a graph's kernel takes at the same clock where memory is stacked, which answers later: gpt-oss-20b on V100,
A100 SXM, H200 and B300 beside GeForce cards in one table (pavlokhmel.com/llm_throughput_benchmark_on_13_gpus_and_10_models)."""
SERIAL_PER_UNIT_CYCLE = 8.0
"""Operations of a delta rule a clock and unit: what prompts of Qwen3-Next and 3.6 take longer than others on an RTX 3090, an RTX PRO 4000,
an MI100, an M1 Max and a Ryzen AI Max."""
APART_BYTES = 3.0
"""Bytes of memory that an operation of a prompt's delta rule moves in builds whose rule is products, sums and scales of their own: what
prompts of Qwen3-Next took from November 2025 to February 2026 on two Ryzen AI Max and an RTX 5090, of seven times their bandwidth."""


def engine_constants(
    gpu: GpuPart | None, engine: Engine, backend: str, found: EngineRates, built: str | None
) -> EngineConstants:
    """Return the constants of `engine`, a build of month `built`, on a card, or on cores where `gpu` is None; `found`: fitted ones."""
    constants = EngineConstants(
        name=engine.name, backend=backend, version=engine.checked,
        layer_s=found["cpu_layer_s"], pass_layer_s=found["pass_layer_s"], kv_efficiency=found["kv_efficiency"],
        dense_efficiency=found["dense_efficiency"], expert_efficiency=found["expert_efficiency"],
        attention_efficiency=found["attention_efficiency"], tile_tokens=found["tile_tokens"], cpu_layer_s=found["cpu_layer_s"],
        fetch_layer_s=_of(found["fetch_layer_s"], 0.0) if engine.fetches_on_card else found["fetch_layer_s"],
        matvec_tokens=engine.matvec_tokens, delta_kernels=engine.delta_kernels(built),
        codebook_prompts=engine.codebooks[0], codebook_steps=engine.codebooks[1],
        memory_layout=engine.memory_layout, one_writer=engine.one_writer,
        follows_over_cards=engine.follows_over_cards, input_copies=engine.input_copies,
    )  # fmt: skip
    if gpu is None:
        return constants
    launches = engine.launched(built, backend)
    kernel = found[f"{launches}_kernel_s"]
    # A graph's kernels wait for each other only, and that takes clocks; others wait for the host.
    pace = _USUAL_CLOCK_GHZ / (gpu.boost_ghz or _UNKNOWN_CLOCK_GHZ) if launches == "graph" else 1.0
    if launches == "graph":
        pace *= engine.kernels_left(built, backend) * (STACKED_PACE if _is_stacked(gpu) else 1.0)
    layer = dataclasses.replace(kernel, value=kernel.value * USUAL_KERNELS * pace)
    share = 1.0
    if engine.products == "units":
        share = min(1.0, _USUAL_FLOPS_PER_CYCLE / (gpu.flops_per_unit_cycle or _USUAL_FLOPS_PER_CYCLE))
    dense, experts = (_products(gpu, found[name], share) for name in ("dense_efficiency", "expert_efficiency"))
    if engine.unsorted(built, backend):
        experts = _of(experts, 1 / UNSORTED)
    return dataclasses.replace(
        constants, layer_s=_untuned(layer, engine, backend, gpu), dense_efficiency=dense, expert_efficiency=experts,
        attention_efficiency=_of(constants.attention_efficiency, share),
        delta_flops_per_s=_rule_rate(gpu, engine, built) if engine.delta_serial else None,
    )  # fmt: skip


def _is_stacked(gpu: GpuPart) -> bool:
    """Return whether a card's memory is stacked beside its chip (HBM)."""
    return not gpu.unified_memory and (gpu.memory_bus_bits or 0) >= _STACKED_BUS_BITS


def _untuned(layer: Constant, engine: Engine, backend: str, gpu: GpuPart) -> Constant:
    """Return the time a layer, with what it takes longer where the engine has no kernels for the card."""
    if not engine.untuned(backend, gpu.architecture):
        return layer
    return dataclasses.replace(layer, value=layer.value + UNTUNED_LAYER_S, relative_uncertainty=UNTUNED_UNCERTAINTY)


def _rule_rate(gpu: GpuPart, engine: Engine, built: str | None) -> float | None:
    """Return the operations a second of a prompt's delta rule: token by token, or as operations of their own that memory keeps waiting."""
    if engine.delta_apart(built):
        return gpu.bandwidth_bytes_per_s / APART_BYTES
    return (
        None if gpu.units is None else SERIAL_PER_UNIT_CYCLE * gpu.units * (gpu.boost_ghz or _UNKNOWN_CLOCK_GHZ) * GIGA
    )


def _products(gpu: GpuPart, fitted: Constant, share: float) -> Constant:
    """Return the share of the card's peak that products with weights reach: the fitted one, or what dense models showed where products are
    of halves, at whose peak the card is sold.
    """
    known = architectures().get(gpu.architecture or "", {})
    if "matmul_share" not in known:
        return _of(fitted, share)
    return dataclasses.replace(fitted, value=known["matmul_share"], source="published", citation=known["matmul_source"])


def _of(constant: Constant, share: float) -> Constant:
    return dataclasses.replace(constant, value=constant.value * share)
