"""The bundled constants of datacentre cards' kernels, fitted anew to AIConfigurator's tables and written into the catalogue.

    python -m benchmarks.fits.kernels [SYSTEM ...]

Needs the wheel aiconfigurator-core. DeepEP's exchanges are not fitted: those tables are kept to judge by; their constants are the
published study's (`DEEPEP`). What an engine's tables lack or do not show is taken from another engine on the same card,
with a wider interval, and named after it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeplan.base.errors import MoeplanError
from moeplan.base.progress import reporter
from moeplan.calibrate.imports.aiconfigurator.kernels import fit_engine, fit_older_experts
from moeplan.calibrate.imports.aiconfigurator.tables import MACHINES, open_tables
from moeplan.specs.catalog import KERNELS_FOLDER
from moeplan.specs.machines.gpu_kernels import (
    BETWEEN,
    INSIDE,
    ExchangeKernel,
    GpuKernels,
    PromptAttention,
    exchange_key,
)
from moeplan.specs.machines.profile_file import load_hardware

PARTS = {
    "h100_sxm": ("h100-sxm5-80gb",), "h200_sxm": ("h200-sxm",), "b200_sxm": ("b200-sxm",), "a100_sxm": ("a100-sxm4-80gb",),
}  # fmt: skip
"""Parts that are the same card."""
SHARED = ("all-to-all", "all-reduce", "all-gather", "reduce-scatter")
"""Exchanges that do not depend on the engine."""
DEEPEP_CITATION = (
    "DeepEP's kernels in AIConfigurator 0.12.0's tables, a form fitted to them; in one node SGLang 0.5.12, between nodes "
    "SGLang 0.5.6.post2 on H100 with 400 Gb/s a GPU (eight nodes of normal kernels left out: 35 GB/s, an anomaly)"
)
_US, _TB, _MB, _PER_CENT = 1e-6, 1e12, 1e6, 100
# In one node: microseconds, TB/s and MB of all bytes, own rank included; nine in ten of held-out errors in per cent.
_ONE_NODE: Mapping[str, Mapping[str, tuple[float, float, float, float]]] = {
    "h100_sxm": {"low-latency-dispatch": (11.8, 0.271, 0, 30.9), "low-latency-combine": (11.4, 0.247, 0, 13.5),
                 "normal-dispatch": (24.4, 0.293, 1.32, 18.9), "normal-combine": (34.6, 0.347, 3.57, 24.1)},
    "h200_sxm": {"low-latency-dispatch": (10.3, 0.278, 0, 28.9), "low-latency-combine": (10.3, 0.254, 0, 15.5),
                 "normal-dispatch": (25.4, 0.294, 0.766, 17.5), "normal-combine": (34.0, 0.348, 3.72, 23.0)},
    "b200_sxm": {"low-latency-dispatch": (19.8, 0.508, 0, 32.5), "low-latency-combine": (18.6, 0.669, 0, 18.2),
                 "normal-dispatch": (33.3, 0.271, 1.34, 24.0), "normal-combine": (42.5, 0.369, 5.08, 22.3)},
}  # fmt: skip
_RANKS, _CHOICES = 8, 8
_SCALED = 1 + 4 / 128
"""Bytes of a dispatched 8-bit value, its part of a scale included, where the published constants count one."""
# Between nodes, of H100: by number of nodes.
_NETWORK: Mapping[int, Mapping[str, tuple[float, float, float, float]]] = {
    2: {"low-latency-dispatch": (19.6, 0.0906, 0, 4.4), "low-latency-combine": (24.8, 0.0927, 0, 6.9),
        "normal-dispatch": (53.7, 0.251, 3.23, 3.4), "normal-combine": (78.9, 0.206, 5.35, 5.3)},
    4: {"low-latency-dispatch": (25.3, 0.0621, 0, 2.4), "low-latency-combine": (25.3, 0.0606, 0, 3.5),
        "normal-dispatch": (84.8, 0.126, 1.32, 3.2), "normal-combine": (107.0, 0.128, 2.86, 7.5)},
    8: {"low-latency-dispatch": (27.2, 0.053, 0, 3.8), "low-latency-combine": (25.8, 0.0531, 0, 2.6)},
}  # fmt: skip
_OTHER_NETWORK = 0.15
"""What another machine's network adds to the uncertainty."""
_OTHER_ENGINE = 0.15


def deepep(system: str) -> dict[str, ExchangeKernel]:
    """Return DeepEP's kernels by the bytes that leave a port, which the published constants count with those that stay."""
    found = {}
    for operation, (start, rate, half, wrong) in _ONE_NODE.get(system, {}).items():
        leaving = (_RANKS - 1) / _RANKS
        found[exchange_key(operation, INSIDE, _RANKS)] = _deepep(
            start, rate, half, wrong / _PER_CENT, leaving, _scaled(operation)
        )
    for nodes, operations in _NETWORK.items() if system in _ONE_NODE else ():
        for operation, (start, rate, half, wrong) in operations.items():
            leaving = (nodes - 1) / nodes
            if operation.startswith("normal"):  # once to every other node that is chosen, of the ranks that are
                ranks = nodes * _RANKS
                leaving = (nodes - 1) * _chosen(nodes) / (ranks * _chosen(ranks))
            more = 0.0 if system == "h100_sxm" else _OTHER_NETWORK
            found[exchange_key(operation, BETWEEN, nodes)] = _deepep(
                start, rate, half, wrong / _PER_CENT + more, leaving, _scaled(operation)
            )
    return found


def _scaled(operation: str) -> float:
    return _SCALED if operation.endswith("dispatch") else 1.0


def _chosen(places: int) -> float:
    """Return the chance that one of so many places gets a token of eight even choices."""
    return 1 - (1 - 1 / places) ** _CHOICES


def _deepep(start_us: float, rate: float, half: float, wrong: float, leaving: float, scaled: float) -> ExchangeKernel:
    values = start_us * _US, rate * _TB * leaving * scaled, half * _MB * leaving * scaled
    start_s, bytes_per_s, half_bytes = (float(f"{value:.4g}") for value in values)
    return ExchangeKernel(name="deepep", start_s=start_s, bytes_per_s=bytes_per_s, half_bytes=half_bytes,
                          relative_uncertainty=round(wrong, 3))  # fmt: skip


OLDER = {("tensorrt-llm", "1.3.0rc10"): ("fp8-block",)}
"""Earlier versions that public figures name, and the experts whose kernels changed since: (engine, version) -> formats."""


def older_experts(system: str, peak: float) -> dict[str, Any]:
    """Return experts of earlier versions, by engine and version."""
    found: dict[str, Any] = {}
    for (engine, version), numbers in OLDER.items():
        for number in numbers:
            kernel = fit_older_experts(open_tables(system), engine, version, number, peak)
            if kernel is not None:
                found.setdefault(engine, {}).setdefault(version, {})[number] = dataclasses.asdict(kernel)
    return found


def document(system: str, kernels: Mapping[str, GpuKernels], older: Mapping[str, Any]) -> dict[str, Any]:
    """Return the catalogue's entry of a card."""
    first = next(iter(kernels.values()))
    filled = {engine: dataclasses.asdict(_filled(engine, kernels)) for engine in kernels}
    shared = {key: kernel for key, kernel in filled[first.engine]["exchanges"].items() if key.startswith(SHARED)}
    shared |= {key: dataclasses.asdict(kernel) for key, kernel in deepep(system).items()}
    engines = {}
    for engine, values in filled.items():
        own = {key: kernel for key, kernel in values["exchanges"].items() if key not in shared}
        engines[engine] = {
            key: value
            for key, value in (values | {"exchanges": own}).items()
            if key not in ("engine", "num_units", "source")
        }
    return {
        "machine": MACHINES[system], "parts": list(PARTS[system]), "num_units": first.num_units, "source": "published",
        "exchanges_citation": f"NCCL in AIConfigurator's tables, fitted; {DEEPEP_CITATION}", "exchanges": shared, "engines": engines,
        "older_experts": older,
    }  # fmt: skip


def _filled(engine: str, kernels: Mapping[str, GpuKernels]) -> GpuKernels:
    """Return an engine's kernels with whole latent layers and 8-bit products that its own tables do not show."""
    mine = kernels[engine]
    changes: dict[str, Any] = {}
    for part in ("products", "latent_layer"):
        have = dict(getattr(mine, part))
        for other in ("sglang", "tensorrt-llm"):
            for key, kernel in getattr(kernels[other], part).items() if other in kernels and other != engine else ():
                if key not in have:
                    have[key] = dataclasses.replace(kernel, name=f"{kernel.name} of {other}",
                                                    relative_uncertainty=round(kernel.relative_uncertainty + _OTHER_ENGINE, 3))  # fmt: skip
        changes[part] = have
    if engine == "sglang":  # its own kernels of latent attention are measured
        changes.pop("latent_layer")
    deepgemm = kernels["tensorrt-llm"].experts.get("fp8-block") if "tensorrt-llm" in kernels else None
    if engine != "tensorrt-llm" and deepgemm is not None:
        # Behind DeepEP, vLLM and SGLang run DeepGEMM on blocks of 8 bits, as TensorRT-LLM does, with untransposed tiles only.
        changes["dispatched_experts"] = {"fp8-block": dataclasses.replace(
            deepgemm, name=f"DeepGEMM of tensorrt-llm ({deepgemm.name})", heights="best", refill_bytes_per_s=None,
            relative_uncertainty=round(deepgemm.relative_uncertainty + _OTHER_ENGINE, 3),
        )}  # fmt: skip
    changes["latent_prompt"] = {
        key: _as_served(key, kernel, kernels["tensorrt-llm"].latent_prompt, "tensorrt-llm")
        for key, kernel in mine.latent_prompt.items()
    }
    return dataclasses.replace(mine, **changes)


def _as_served(key: str, kernel: PromptAttention, others: Mapping[str, PromptAttention], other: str) -> PromptAttention:
    """Return a prompt's latent attention as engines run it, on keys and values that are expanded first.

    On Hopper, SGLang's rows are of its decoding kernel, on the latents themselves, which multiplies (512 + 576) / (192 + 128) = 3.4 times
    as much: counted as the others are, it reaches a third of their rate. While serving, prompts take the expanded form.
    """
    instead = others.get(key)
    if instead is None or kernel.flops_per_s * 2 > instead.flops_per_s:
        return kernel
    return dataclasses.replace(instead, name=f"{instead.name} of {other}",
                               relative_uncertainty=round(instead.relative_uncertainty + _OTHER_ENGINE, 3))  # fmt: skip


def main(systems: list[str]) -> int:
    """Write the catalogue's entries; returns 0, or 2 after one line where the wheel, a system or a table is not there."""
    try:
        for tables in [open_tables(system) for system in systems or list(MACHINES)]:
            peak = load_hardware(MACHINES[tables.system]).device.memory_bytes_per_s.value
            kernels = {
                engine: fit_engine(tables, engine, peak, reporter(f"{tables.system} {engine}"))[0]
                for engine in tables.engines
            }
            write(tables.system, kernels, older_experts(tables.system, peak))
    except MoeplanError as error:
        print(f"benchmarks.fits.kernels: {error}", file=sys.stderr)
        return 2
    return 0


def write(system: str, kernels: Mapping[str, GpuKernels], older: Mapping[str, Any]) -> None:
    """Write one entry."""
    path = Path(KERNELS_FOLDER) / f"{MACHINES[system]}.json"
    path.write_text(json.dumps(document(system, kernels, older), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
