"""What a processor's cores do a second, and an engine that has nothing but them.

Modelled: operations a core retires a cycle by its vector or matrix unit, small cores as parts of large ones, attention slower than
products with weights, a layer's waking and waiting by their clock, blocks that are unpacked once for many tokens. Ignored: what of it an
engine reaches (`engines`), the memory that they read from (`compose`).
"""

from __future__ import annotations

import dataclasses

from ...base.units import GIGA
from .engines import EngineRates
from .parts import CpuPart
from .profile import Constant, EngineConstants

FLOPS_PER_CYCLE = {
    "sse4": 24, "avx2-half": 36, "avx2": 72, "avx2-vnni": 72, "avx512": 72, "avx512-vnni": 112, "avx512-vnni-wide": 168, "amx": 112,
    "neon": 72,
}  # fmt: skip
"""Multiplications and additions of 8-bit integers or floats that one core retires a cycle on its vector or matrix unit, as engines'
kernels for quantised weights use it, up to a share that is the engine's.

Expanding blocks takes most of the time, so that kernels for 8-bit dot products (VNNI) gain half again and not four times what others do:
LLaMA-3.1-8B's prompts in Q4_0, Q8_0, Q4_K, Q5_K, Q6_0 and IQ4_K run on 32 cores of a Threadripper PRO 5975WX (AVX2) at 1.29, 1.28,
1.23, 1.21, 1.10 and 0.99 times the speed of 16 of a Ryzen 9 7950X (VNNI) (pull requests 54, 122, 144 and 182 of ikawrakow/ik_llama.cpp).
Kernels without VNNI use no more of 512 bits than of 256; those of 128 (NEON, SSE) issue two to four a cycle where others issue one or
two. Matrix units (AMX) are counted as VNNI, which GGUF kernels use of them. "Wide" ones have a data path of 512 bits (Zen 5), where earlier
ones take two turns.
"""
REPACK_GAIN = 2.1
"""Prompts of Q4_0 over those of other formats on Arm's cores under llama.cpp, as shares of the cores' rate: 0.22 (CIX P1) and 0.25 (64
cores of a Cobalt 100) over 0.09 (4 cores of a Cobalt 100, Q2_K) to 0.12 (RK3588, Q4_K and MXFP4)."""
_USUAL_CLOCK_GHZ = 4.5
"""Of the cores that engines' times a layer are given for."""
_KV_SHARE = 0.8
"""Of the bandwidth that weights are read at, where cores read keys and values."""
_ATTENTION = (
    "share of the cores' rate for weights, heads 128 wide: prompts of 512 tokens on a Ryzen 9 7950X at no depth and deep, gpt-oss-20b "
    "(heads of 64: 0.13 under llama.cpp, 0.35 under ik_llama.cpp, github.com/ikawrakow/ik_llama.cpp/pull/683) and Qwen3-30B-A3B (0.9)"
)


def flops_of_cores(cpu: CpuPart, cores: int, sockets: int) -> tuple[float, str]:
    """Return (operations a second of `cores` cores over all sockets, how that came about)."""
    large = cpu.large_cores(cores) if sockets == 1 else float(cores)
    worth = "" if large == cores else f", worth {large:.4g} large ones,"
    each = FLOPS_PER_CYCLE[cpu.vector]
    return (
        large * cpu.all_core_ghz * GIGA * each,
        f"{cores} cores{worth} × {cpu.all_core_ghz} GHz × {each} ({cpu.vector}), {cpu.source}",
    )


def with_cores(constants: EngineConstants, found: EngineRates, cpu: CpuPart) -> EngineConstants:
    """Return an engine's constants with what they are on the cores of `cpu`: a layer's handing over takes clocks, and kernels that multiply
    many tokens unpack a matrix's blocks once, others for each token.
    """
    handing = found["cpu_layer_s"]
    return dataclasses.replace(
        constants, cpu_layer_s=dataclasses.replace(handing, value=handing.value * _pace(cpu)),
        expand_tokens=max(0.0, found["cpu_share"].value / found["cpu_step_share"].value - 1.0),
    )  # fmt: skip


def on_cores_alone(
    constants: EngineConstants, attention: float, found: EngineRates, cpu: CpuPart, *, repacks: bool
) -> EngineConstants:
    """Return the constants of an engine whose device are the cores: their rates are what it reaches already.

    attention: the rate of products with keys and values of heads 128 wide over that of products with weights. repacks: it lays blocks out
    anew for these cores.
    """
    whole = Constant(
        value=1.0,
        source="assumed",
        citation="the cores' rate is what the engine reaches already",
        relative_uncertainty=0.0,
    )
    attends = dataclasses.replace(
        constants.attention_efficiency, value=attention, source="published", citation=_ATTENTION
    )
    layer = found["cores_layer_s"]
    return dataclasses.replace(
        constants, kv_efficiency=dataclasses.replace(constants.kv_efficiency, value=_KV_SHARE), dense_efficiency=whole,
        expert_efficiency=whole, attention_efficiency=attends, tile_tokens=dataclasses.replace(whole, value=0.0), matvec_tokens=0,
        layer_s=dataclasses.replace(layer, value=layer.value * _pace(cpu)), repack_gain=REPACK_GAIN if repacks else 1.0,
    )  # fmt: skip


def _pace(cpu: CpuPart) -> float:
    """Return how much longer waking and waiting take than on the cores that constants are given for."""
    return _USUAL_CLOCK_GHZ / cpu.all_core_ghz
