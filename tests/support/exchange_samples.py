"""Exchanges of a machine that follows a known law, so that a fit can be compared with the truth."""

from __future__ import annotations

import numpy as np

from moeplan.base.units import KIB
from moeplan.calibrate.all_to_all_matrices import PATTERNS, busiest_port, matrix_to_text, port_bytes, traffic
from moeplan.calibrate.samples import Sample

LATENCY_S, PORT, SHARED = 2e-4, 8e9, 3e9
SIZES = tuple(KIB * 4**power for power in range(9))
BESIDE_COMPUTE, BESIDE_EXCHANGE, FOUR_ON_TWO_CORES = 1.6, 1.25, 2.0


def lawful_seconds(port: float, total: float) -> float:
    return LATENCY_S + port / PORT + total / SHARED


def lawful_exchanges(
    ranks: int = 2, *, noise: float = 0.0, seed: int = 0, patterns: tuple[str, ...] = PATTERNS, repetitions: int = 7
) -> list[Sample]:
    """Return exchanges of all sizes and patterns, some of them beside products, and products; off by up to about `noise`."""
    rng = np.random.default_rng(seed)
    found = []

    def taken(seconds: float) -> tuple[float, ...]:
        return tuple((seconds * np.exp(noise * rng.standard_normal(repetitions))).tolist())

    for size in SIZES:
        for pattern in patterns:
            matrix = traffic(ranks, size, pattern)
            port, total = busiest_port(matrix)[0], int(port_bytes(matrix)[0].sum())
            labels = {"backend": "gloo", "pattern": pattern, "matrix": matrix_to_text(matrix)}
            arguments = {"ranks": ranks, "bytes": port, "per_rank_bytes": size}
            seconds = lawful_seconds(port, total)
            found.append(Sample(kind="all_to_all", labels=labels | {"companion": "none"}, arguments=arguments,
                                seconds=taken(seconds)))  # fmt: skip
            if pattern == "balanced":
                found.append(Sample(kind="all_to_all", labels=labels | {"companion": "compute"}, arguments=arguments,
                                    seconds=taken(seconds * BESIDE_COMPUTE)))  # fmt: skip
                found.append(product("all_to_all", ranks, ranks, size, taken(BESIDE_EXCHANGE * slowed(ranks) * 1e-3)))
    found.append(product("none", ranks, ranks, 0, taken(slowed(ranks) * 1e-3)))
    found.append(product("none", ranks, 1, 0, taken(1e-3)))
    return found


def slowed(ranks: int) -> float:
    return FOUR_ON_TWO_CORES if ranks == 4 else 1.0


def product(companion: str, ranks: int, computing: int, size: int, seconds: tuple[float, ...]) -> Sample:
    return Sample(
        kind="rank_product",
        labels={"backend": "gloo", "companion": companion},
        arguments={"ranks": ranks, "computing": computing, "bytes": size},
        seconds=seconds,
    )
