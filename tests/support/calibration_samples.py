"""Samples of a machine that follows known laws, so that a fit can be compared with the truth."""

from __future__ import annotations

import numpy as np

from moeplan.base.units import KIB, MIB
from moeplan.calibrate.costs.forms import expert_weight_bytes
from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.calibrate.samples import Sample, SampleSet
from moeplan.specs.models import ModelSpec
from moeplan.specs.models.pass_shape import PassShape, dense_arguments, head_arguments, pass_shapes

SHAPES = ((512, 768), (512, 1280), (1024, 960), (1024, 1408))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
COPY_BYTES = (16 * KIB, 256 * KIB, MIB, 4 * MIB, 8 * MIB, 16 * MIB)
BITS = ("32", "16", "4")

BANDWIDTH = {"32": 10e9, "16": 8e9, "4": 0.5e9}
RATE = 60e9
START_S = 2e-5
GROUP_S = 5e-5
LATENCY_S, LINK = 3e-5, 9e9
PIECE_S = 2e-5
HOST_S = {"layer": 8e-5, "transfer": 4e-6, "kernel": 5e-6, "step": 2e-6, "piece": PIECE_S, "start": 4e-5, "wake": 4e-5}
SLOWED_COMPUTE, SLOWED_COPY = 1.25, 1.1
# Factors of operations inside runs, against the same alone.
FRESH, AHEAD, RESIDENT, DENSE, COPY, SLOWED, GROUPED = 0.5, 0.9, 1.2, 1.1, 0.8, 1.3, 1.15
MODE = {"cache": "cached", "stream": "overlap"}


def expert_s(tokens: int, hidden: int, intermediate: int, bits: str) -> float:
    memory = expert_weight_bytes(hidden, intermediate, True, bits) / BANDWIDTH[bits]
    return START_S + (memory**3 + (6 * tokens * hidden * intermediate / RATE) ** 3) ** (1 / 3)


def dense_s(arguments: dict[str, float]) -> float:
    weights = ((arguments["weight_bytes"] / 9e9) ** 3 + (arguments["flops"] / RATE) ** 3) ** (1 / 3)
    return 1e-4 + weights + arguments["kv_bytes"] / 5e9 + arguments["attention_flops"] / 40e9


def head_s(arguments: dict[str, float]) -> float:
    return 5e-5 + ((arguments["weight_bytes"] / 9e9) ** 3 + (arguments["flops"] / RATE) ** 3) ** (1 / 3)


def models() -> list[ModelSpec]:
    return [made_up_model(f"{hidden}x{inner}", hidden=hidden, intermediate=inner) for hidden, inner in SHAPES]


def lawful_samples(
    *, noise: float = 0.0, seed: int = 0, bits: tuple[str, ...] = BITS, repetitions: int = 5
) -> SampleSet:
    """Return a whole calibration of the lawful machine; each repetition is off by up to about `noise`."""
    rng = np.random.default_rng(seed)
    found: list[Sample] = []

    def add(kind: str, labels: dict[str, str], arguments: dict[str, float], seconds: float) -> None:
        taken = seconds * np.exp(noise * rng.standard_normal(repetitions))
        found.append(Sample(kind=kind, labels=labels, arguments=arguments, seconds=tuple(taken.tolist())))

    for hidden, inner in SHAPES:
        shape = {"hidden": hidden, "intermediate": inner, "gated": 1}
        for kind in bits:
            for tokens in TOKENS:
                alone = expert_s(tokens, hidden, inner, kind)
                add("expert", {"bits": kind}, shape | {"tokens": tokens}, alone)
                if tokens in (1, 8):
                    labels = {"bits": kind, "companion": "h2d"}
                    add("expert_while", labels, shape | {"tokens": tokens}, alone * SLOWED_COMPUTE)
                for experts in (2, 4):
                    seconds = GROUP_S + experts * alone
                    add("grouped", {"bits": kind}, shape | {"tokens": tokens, "experts": experts}, seconds)
    for model in models()[::2]:
        for shape in pass_shapes((1, 4, 16, 128), (128, 512)):
            arguments = dense_arguments(model, [0], shape, 4)
            add("dense", {}, arguments, dense_s(arguments))
        for tokens in (1, 4, 16, 128):
            arguments = head_arguments(model, tokens, 4)
            add("head", {}, arguments, head_s(arguments))
    for direction in ("h2d", "d2h"):
        labels = {"direction": direction, "memory": "pinned"}
        for size in COPY_BYTES:
            add("copy", labels, {"bytes": size}, LATENCY_S + size / LINK)
        busy = labels | {"companion": "compute 16"}
        add("copy_while", busy, {"bytes": MIB}, (LATENCY_S + MIB / LINK) * SLOWED_COPY)
    for what, seconds in HOST_S.items():
        add("host", {"what": what}, {}, seconds)
    add("memory", {}, {"bytes": 256 * MIB}, 256 * MIB / 20e9)
    for dtype in ("float32", "float16"):
        add("matmul", {"dtype": dtype}, {"rows": 512, "columns": 512, "inner": 512}, 2 * 512**3 / RATE)
    device = {"kind": "cpu", "name": "lawful machine", "memory_limit_bytes": 8e9, "host_memory_bytes": 16e9}
    return SampleSet(device=device, conditions={}, samples=tuple(found), model="made up")


def runs_of(bits: str, *, guesses: bool = True) -> list[Sample]:
    """Return samples of runs in which every operation takes a known factor of its time alone."""
    found = []

    def add(kind: str, labels: dict[str, str], arguments: dict[str, float], seconds: float) -> None:
        found.append(
            Sample(kind=kind, labels=MODE | {"bits": bits} | labels, arguments=arguments, seconds=(seconds,) * 4)
        )

    for hidden, inner in SHAPES:
        model = made_up_model("one", hidden=hidden, intermediate=inner)
        for tokens in (1, 2):
            sizes = {"tokens": tokens, "hidden": hidden, "intermediate": inner, "gated": 1, "experts": 2}
            alone = expert_s(tokens, hidden, inner, bits)
            add("run_expert", {"state": "fresh", "beside": "nothing"}, sizes, alone * FRESH)
            if guesses:
                add("run_expert", {"state": "ahead", "beside": "nothing"}, sizes, alone * AHEAD)
            add("run_expert", {"state": "resident", "beside": "nothing"}, sizes, alone * RESIDENT)
            add("run_expert", {"state": "resident", "beside": "copies"}, sizes, alone * RESIDENT * SLOWED)
            for fresh in (0, 1, 2):
                launch = sizes | {"tokens": 2 * tokens, "fresh": fresh, "ahead": 0}
                inside = GROUP_S + alone * (fresh * FRESH + (2 - fresh) * RESIDENT)
                add("run_grouped", {"beside": "nothing"}, launch, inside * GROUPED)
            arguments = dense_arguments(model, [0], PassShape(tokens=tokens, context_tokens=128, requests=1), 4)
            add("run_dense", {"beside": "nothing"}, arguments, dense_s(arguments) * DENSE)
        size = expert_weight_bytes(hidden, inner, True, bits)
        add(
            "run_copy",
            {"direction": "h2d", "beside": "nothing"},
            {"bytes": size, "experts": 2},
            (LATENCY_S + size / LINK) * COPY,
        )
    return found
