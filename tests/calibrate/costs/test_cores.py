"""Experts on the host's cores as a calibration measures and fits them."""

from __future__ import annotations

import dataclasses

import pytest

from calibration_samples import lawful_samples, models
from moeplan.base.units import MIB
from moeplan.calibrate.costs.load import load_costs
from moeplan.calibrate.fitting.fit import fit_profile
from moeplan.calibrate.microbenchmarks.copies import CopyPool
from moeplan.calibrate.microbenchmarks.cores import core_benches, host_device, measure_cores
from moeplan.calibrate.microbenchmarks.experts import ExpertArena, expert_benches
from moeplan.calibrate.microbenchmarks.harness import Harness
from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.calibrate.samples import Sample
from moeplan.devices.device import COMPUTE, CORES, TO_DEVICE, CpuDevice
from moeplan.specs.models import weight_format

TINY = made_up_model("tiny", hidden=256, intermediate=64, num_layers=2, num_experts=4, vocab=64)


def test_experts_on_the_cores_are_measured_alone_and_beside_others() -> None:
    import torch

    device = CpuDevice()
    harness, pool = Harness(device), CopyPool(device, pinned=True, pool_bytes=4 * MIB)
    assert host_device(device) is device
    with device.enter(COMPUTE), torch.inference_mode():
        kernels = expert_benches(ExpertArena(device, TINY, "4", arena_bytes=MIB), (1, 8), dtype=torch.float32)
    alone = core_benches(TINY, "4", (1, 2, 8), device)
    assert {bench.stream for bench in alone} == {CORES}
    measure_cores(
        harness, pool, alone, kernels, copy_bytes=65536, rounds=1, repetitions=1, seconds=None, while_tokens=(1, 8)
    )
    pool.close()
    found = harness.finish(model="tiny", quick=True).samples
    kinds = [(s.kind, s.labels.get("companion"), s.arguments.get("tokens")) for s in found]
    assert kinds == [
        ("cpu_expert", None, 1), ("cpu_expert", None, 2), ("cpu_expert", None, 8),
        ("cpu_expert_while", TO_DEVICE, 1), ("cpu_expert_while", TO_DEVICE, 8),
        ("cpu_expert_while", COMPUTE, 1), ("cpu_expert_while", COMPUTE, 8),
        ("copy_while", "cpu 4", None),
        ("expert_while", CORES, 1), ("expert_while", CORES, 8),
    ]  # fmt: skip
    assert all(0 < s.median_s < 0.5 for s in found)


def test_lawful_times_on_the_cores_give_back_their_law() -> None:
    samples = lawful_samples()
    experts = [s for s in samples.samples if s.kind == "expert" and s.labels["bits"] == "16"]
    more = [Sample(kind="cpu_expert", labels=s.labels, arguments=s.arguments, seconds=_times(s, 3.0)) for s in experts]
    few = [s for s in experts if s.arguments["tokens"] in (1, 8)]
    for lane, slower in (("h2d", 2.0), ("compute", 1.25)):
        more += [
            Sample(kind="cpu_expert_while", labels={"bits": "16", "companion": lane}, arguments=s.arguments,
                   seconds=_times(s, 3.0 * slower)) for s in few
        ]  # fmt: skip
    more += [
        Sample(kind="expert_while", labels={"bits": "16", "companion": "cpu"}, arguments=s.arguments, seconds=_times(s, 1.6))
        for s in few
    ]  # fmt: skip
    copy = next(s for s in samples.samples if s.kind == "copy_while")
    labels = dict(copy.labels) | {"companion": "cpu 16"}
    alone = next(
        s.median_s for s in samples.samples
        if s.kind == "copy" and s.labels["direction"] == "h2d" and s.arguments == copy.arguments
    )  # fmt: skip
    more.append(Sample(kind="copy_while", labels=labels, arguments=copy.arguments, seconds=(4 * alone,) * 3))
    profile = fit_profile(dataclasses.replace(samples, samples=(*samples.samples, *more))).profile
    fractions = {name: constant.value for name, constant in profile.contention.items() if CORES in name}
    assert fractions == {
        "cpu/h2d": pytest.approx(0.5), "cpu/compute": pytest.approx(0.8), "compute/cpu": pytest.approx(0.625),
        "h2d/cpu": pytest.approx(0.25),
    }  # fmt: skip
    model, fmt = models()[0], weight_format("16")
    costs = load_costs(profile, model).with_experts("16", 1.0)  # type: ignore[attr-defined]
    assert costs.cpu_expert(4, fmt).seconds == pytest.approx(3 * costs.expert_kernel(4, fmt).seconds, rel=0.05)
    assert costs.rate_fraction("cpu", frozenset({"h2d", "compute"})) == pytest.approx(0.4)
    assert costs.rate_fraction("compute", frozenset({"cpu"})) == pytest.approx(0.625)
    assert profile.host.cpu is not None


def _times(sample: Sample, factor: float) -> tuple[float, ...]:
    return tuple(factor * seconds for seconds in sample.seconds)
