"""Figures of a run and their intervals: which constants' uncertainty enters, which steps a figure is of, what binds."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from executor_stages import preset, small_model
from moeplan.base.units import GIB
from moeplan.sim.offload.metrics import Metrics, figures_of
from moeplan.sim.offload.simulate import Simulation
from moeplan.sim.offload.workload import build_workload
from moeplan.specs.machines.profile import Profile, profile_to_json
from moeplan.specs.machines.profile_file import load_hardware, profile_from_json
from moeplan.specs.schedules.offload import OffloadSchedule
from strategies import make_trace

FIGURES = ("prefill_tokens_per_s", "ttft_s", "decode_tokens_per_s", "request_s", "window_s")
CORES = {"flops_per_s": 2e11, "memory_bytes_per_s": 3e10, "launch_s": 2e-5}


@cache
def constants() -> str:
    """Return the T4 with cores, a disk and a host that issues kernels slowly, as text."""
    document = json.loads(profile_to_json(load_hardware("t4")))

    def made_up(value: float) -> dict[str, Any]:
        return {"value": value, "source": "assumed", "citation": "a test", "relative_uncertainty": 0.0}

    document["host"]["cpu"] = {name: made_up(value) for name, value in CORES.items()}
    document["disk"] = {"read_bytes_per_s": made_up(1e8), "latency_s": made_up(1e-4)}
    document["contention"] = {"compute/h2d": made_up(0.5), "h2d/compute": made_up(0.5)}
    return json.dumps(document)


def machine(uncertain: str = "", wrong: float = 0.0, **values: float) -> Profile:
    """Return that machine with every constant certain but those whose path begins with `uncertain`; values: `host__per_kernel_s=…`."""

    def walk(part: Any, path: str) -> None:
        if isinstance(part, dict) and "relative_uncertainty" in part:
            part["relative_uncertainty"] = wrong if uncertain and path.startswith(uncertain) else 0.0
            part["value"] = values.get(path.replace(".", "__"), part["value"])
        elif isinstance(part, dict):
            for name, inner in part.items():
                walk(inner, f"{path}.{name}" if path else name)

    document = json.loads(constants())
    walk(document, "")
    return profile_from_json(json.dumps(document))


def figures(profile: Profile, schedule: OffloadSchedule, requests: list[tuple[int, int]], seed: int = 3) -> Metrics:
    trace = make_trace(
        np.random.default_rng(seed), num_layers=3, num_experts=8, top_k=2, requests=requests, guesses=2, skew=0.3
    )
    simulation = Simulation(
        model=small_model(hidden=512, inter=1024), profile=profile, trace=trace, memory_bytes=8 * GIB
    )
    return simulation.predict(schedule).metrics


@pytest.mark.parametrize(
    ("path", "schedule"),
    [
        ("disk", preset("three-tiers")),
        ("disk.latency_s", preset("three-tiers")),
        ("device_to_host", preset("mixtral-offloading-code", copy__write_back=True, copy__overlap=False)),
        ("host_to_device", preset("on-demand")),
        ("device.memory_bytes_per_s", preset("resident")),
        ("device.launch_s", preset("resident")),
        ("host.per_kernel_s", preset("resident")),
        ("host.per_layer_s", preset("resident")),
        ("host.per_step_s", preset("resident")),
        ("host.per_transfer_s", preset("on-demand")),
        ("host.cpu", preset("cpu-moe")),
        ("contention", preset("prefetch-all")),
    ],
)  # fmt: skip
def test_the_uncertainty_of_every_constant_a_run_depends_on_is_in_its_interval(
    path: str, schedule: OffloadSchedule
) -> None:
    requests = [(6, 12), (4, 9)]
    sure = figures(machine(), schedule, requests)
    found = figures(machine(path, 0.3), schedule, requests)
    for name in FIGURES:
        value = getattr(sure, name)
        assert getattr(sure, f"{name}_interval") == (value, value) and getattr(found, name) == value
    low, high = found.window_s_interval
    assert low < sure.window_s < high
    assert (
        found.relative_uncertainty == pytest.approx(found.step_s_interval[1] / found.step_s["mean"] - 1)
        and low > 0.6 * sure.window_s
    )


def test_an_error_of_every_constant_alike_is_an_error_of_the_whole() -> None:
    # Every duration is a product of constants: were each off by its share of 0.1, so were the run, nothing lost and nothing twice.
    found = figures(machine("host.per_", 0.1, host__per_kernel_s=0.01), preset("resident"), [(0, 12)])
    low, high = found.window_s_interval
    assert (low / found.window_s, high / found.window_s) == (pytest.approx(0.9, abs=0.01), pytest.approx(1.1, abs=0.01))


@pytest.mark.parametrize("name", ["on-demand", "resident"])
def test_the_interval_of_decoding_is_of_the_steps_that_decode(name: str) -> None:
    profile = load_hardware(
        "t4"
    )  # constants as uncertain as they are: those of prompts' kernels are others than those of decoding
    found = []
    for prompt in (2, 40, 100):  # one bucket of context for all
        rng = np.random.default_rng(prompt)
        trace = make_trace(rng, num_layers=3, num_experts=8, top_k=2, requests=[(prompt, 6)], guesses=0)
        trace.experts[-6:] = np.arange(8)[None, None, :2]
        simulation = Simulation(
            model=small_model(hidden=512, inter=1024), profile=profile, trace=trace, memory_bytes=8 * GIB
        )
        found.append(simulation.predict(preset(name)).metrics)
    assert found[0].prefill_tokens_per_s_interval != found[1].prefill_tokens_per_s_interval
    assert len({(one.decode_tokens_per_s, one.decode_tokens_per_s_interval, one.step_s_interval) for one in found}) == 1


def test_a_run_that_waits_for_launches_is_bound_by_them() -> None:
    resident = preset("resident", kernel__grouping="grouped")
    slow = figures(machine(host__per_kernel_s=1e-4), resident, [(0, 10)])
    launching = figures(machine(device__launch_s=1e-4, host__per_kernel_s=0.0), resident, [(0, 10)])
    for one in (slow, launching):
        assert one.bound == "launch" and one.time_share["launch"] > 0.5
    quick = figures(
        machine(host__per_kernel_s=0.0, host__per_layer_s=0.0, host__per_step_s=0.0, device__launch_s=0.0),
        resident,
        [(0, 10)],
    )
    assert quick.bound == "compute" and quick.time_share["launch"] == 0.0
    for one in (slow, launching, quick):
        assert sum(one.time_share.values()) == pytest.approx(1.0)


def by_hand(ends: list[int], spans: list[tuple[int, int]]) -> float | None:
    times = [ends[last] - (ends[first - 1] if first else 0) for first, last in spans]
    return sum(times) / len(times) / 1e9 if times else None


@pytest.mark.parametrize(
    ("concurrency", "chunk", "window", "prompts", "requests"),
    [
        # Requests of 5 + 3, 3 + 2 and 0 + 2 tokens, one after another: steps are 1 + 3, 1 + 2 and 2.
        (1, None, None, [(0, 0), (4, 4)], [(0, 3), (4, 6), (7, 8)]),
        (1, 2, None, [(0, 2), (6, 7)], [(0, 5), (6, 9), (10, 11)]),
        (1, 2, 7, [(0, 2)], [(0, 5)]),  # the second prompt is cut
        (1, None, 2, [(0, 0)], []),
        # Together: both prompts, then two steps of both, then the first's last beside the third's first, and the third's second.
        (2, None, None, [(0, 0), (1, 1)], [(1, 3), (0, 4), (4, 5)]),
    ],
)  # fmt: skip
def test_whole_prompts_and_requests_are_timed(concurrency: int, chunk: int | None, window: int | None,
                                              prompts: list[tuple[int, int]], requests: list[tuple[int, int]]) -> None:  # fmt: skip
    trace = make_trace(
        np.random.default_rng(0), num_layers=2, num_experts=4, top_k=1, requests=[(5, 3), (3, 2), (0, 2)], guesses=0
    )
    options = OffloadSchedule().with_options(
        workload__concurrency=concurrency, workload__prefill_chunk_tokens=chunk
    ).workload  # fmt: skip
    workload = build_workload(trace, options, max_steps=window)
    assert [tuple(row) for row in workload.prompts.tolist()] == prompts
    assert sorted(tuple(row) for row in workload.requests.tolist()) == sorted(requests)
    ends = np.cumsum(np.random.default_rng(1).integers(1, 10**9, workload.num_steps)).tolist()
    found = figures_of(np.array(ends), workload)
    assert found["ttft_s"] == pytest.approx(by_hand(ends, prompts)) if prompts else found["ttft_s"] is None
    assert found["request_s"] == pytest.approx(by_hand(ends, requests)) if requests else found["request_s"] is None
    assert found["window_s"] == pytest.approx(ends[-1] / 1e9)


@pytest.mark.parametrize(("requests", "absent"), [([(9, 0), (5, 0)], ("decode_tokens_per_s", "request_s")),
                                                  ([(0, 6)], ("prefill_tokens_per_s", "ttft_s"))])  # fmt: skip
def test_a_speed_that_a_recording_has_not_is_null(requests: list[tuple[int, int]], absent: tuple[str, ...]) -> None:
    found = figures(machine(), preset("on-demand"), requests)
    for name in FIGURES:
        assert (getattr(found, name) is None) == (getattr(found, f"{name}_interval") is None) == (name in absent)
