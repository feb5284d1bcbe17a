"""Stage 2: the machine's samples and profile, and what the executor's copies reach of what a plain pinned copy reaches.

    calibrate: SHAPE     every microbenchmark of `calibrate` with one model's shapes; all of them together make the profile
    copies: FORMAT       whole experts through the executor's copy engine, beside torch's own pinned copy of the same bytes
    overlap: N tokens    forward passes in which every expert of the next layer is copied while this layer computes
    all-to-all           between the machine's GPUs, into the profile too; where there is one, a note says that there is none

Modelled: an overlapped step is held against the larger of its computing alone (the same passes with all experts on the device) and
its copying alone (the same bytes as a plain pinned copy). Ignored: what a schedule makes of it (`gpu_validation`, `gpu_speedups`).
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moeplan.calibrate.device import TO_DEVICE, Device, available_host_bytes, metadata_of, open_device
from moeplan.calibrate.expert_store import expert_layout, make_store
from moeplan.calibrate.harness import Bench, Harness
from moeplan.calibrate.measure import FULL, Extent, measure_device
from moeplan.calibrate.microbench_collectives import FULL_EXCHANGES, ExchangeExtent, measure_all_to_all, rank_counts
from moeplan.calibrate.samples import SampleSet, merge, read_samples, samples_from_json, samples_to_json
from moeplan.calibrate.standard_shapes import made_up_model
from moeplan.errors import InputError, MoeplanError
from moeplan.executor.calibration import write_calibration
from moeplan.executor.copy_engine import CopyEngine, Gate
from moeplan.executor.execute import execute, open_stage
from moeplan.executor.host_overheads import measure_host
from moeplan.executor.prediction import run_input
from moeplan.executor.slots import Slots
from moeplan.executor.transfers import Transfer
from moeplan.hardware import Profile
from moeplan.presets import load_preset
from moeplan.sim.policies.state import DEMAND
from moeplan.specs import ModelSpec
from moeplan.text_files import write_atomic
from moeplan.units import KIB, MIB, NS_PER_S

from .gpu_models import layers_that_fit, mixtral, mixtral_trace, switch_large
from .gpu_results import Part, Results, target

PROFILE, SAMPLES = "profile.json", "profile.samples.json"
COPY_TARGET, OVERLAP_TARGET = 0.95, 1.08
# Of the stage's budget, the calibration may take this share.
_CALIBRATE_FRACTION = 0.6
_LAYERS = 32
_COPIES = 24
_ROUNDS = 5
EXCHANGES = "all-to-all"
_EXCHANGES = dataclasses.replace(FULL_EXCHANGES, rounds=3, seconds=8.0, limit_s=60.0)
_DRY_EXCHANGES = ExchangeExtent(ranks=(2,), sizes=(KIB, 64 * KIB), while_sizes=(64 * KIB,), rounds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model to calibrate with, in which weight formats, and the tokens of an expert it needs."""

    model: ModelSpec
    bits: tuple[str, ...]
    extent: Extent


def shapes(*, dry: bool) -> list[Shape]:
    """Return what is calibrated: two real shapes, one between them for what lies between, and Switch-Large's plain experts."""
    if dry:
        few = Extent(
            expert_tokens=(1, 8, 128),
            group_tokens=(1, 128),
            group_experts=(2, 4),
            pass_tokens=(1, 8, 128),
            contexts=(16, 256),
            copy_bytes=(16 * KIB, 256 * KIB),
            rounds=1,
            repetitions=2,
            disk=False,
            host_cores=False,
        )
        small = made_up_model("small", hidden=256, intermediate=128, num_layers=2, vocab=512)
        return [
            Shape(model=mixtral(2, dry=True), bits=("16", "4", "3", "2"), extent=few),
            Shape(model=small, bits=("16", "4"), extent=few),
            Shape(model=switch_large(2, dry=True), bits=("32", "16"), extent=few),
        ]
    full = Extent(
        expert_tokens=FULL.expert_tokens,
        group_tokens=FULL.group_tokens,
        group_experts=FULL.group_experts,
        pass_tokens=FULL.pass_tokens,
        contexts=FULL.contexts,
        copy_bytes=FULL.copy_bytes,
        rounds=4,
        repetitions=3,
        disk=False,
        host_cores=False,
    )
    fine = made_up_model(
        "shapes of Qwen3-30B-A3B", hidden=2048, intermediate=768, num_layers=2, num_experts=128, top_k=8, vocab=151_936
    )
    between = made_up_model("shape 3072x4608", hidden=3072, intermediate=4608, num_layers=2, vocab=64_000)
    return [
        Shape(model=mixtral(2, dry=False), bits=("16", "4", "3", "2"), extent=full),
        Shape(model=fine, bits=("16", "4", "2"), extent=full),
        Shape(model=switch_large(2, dry=False), bits=("32", "16"), extent=full),
        Shape(model=between, bits=("16", "4", "2"), extent=full),
    ]


def run(out: Path, *, dry: bool, deadline_s: float) -> bool:
    """Measure what is not measured yet, write copies.json, the profile and its samples; return whether all of it is done."""
    kind = "cpu" if dry else "cuda"
    device = open_device(kind)
    try:
        told, wait = metadata_of(device), device.synchronize
    finally:
        device.close()
    results = Results(out / "copies.json", stage="copies", dry=dry, device=told, deadline_s=deadline_s, alive=wait)
    chosen = shapes(dry=dry)
    share = max(1.0, (deadline_s - time.monotonic()) * _CALIBRATE_FRACTION / len(chosen))
    formats = ("16", "4", "2")
    tokens = (1, 32) if dry else (1, 4096, 8192)
    parts: list[Part] = [
        (f"calibrate: {one.model.name}", partial(_calibrate, kind, one, share, first=at == 0))
        for at, one in enumerate(chosen)
    ]
    parts += [(f"copies: {bits} bits", partial(_copies, kind, bits, dry=dry)) for bits in formats]
    parts += [(f"overlap: {count} tokens", partial(_overlap, kind, count, dry=dry)) for count in tokens]
    parts.append((EXCHANGES, partial(_all_to_all, told, dry=dry)))
    results.run(parts)
    sampled = [samples_from_json(part["samples"]) for part in results.parts.values() if "samples" in part]
    found: dict[str, Any] = {"targets": targets(results.parts, dry=dry)}
    if len(sampled) == len(chosen):
        exchanged = results.parts.get(EXCHANGES, {}).get("exchange_samples")
        found |= _profiled(out, merge([*sampled, *([samples_from_json(exchanged)] if exchanged else [])]))
    return results.close(**found) and found.get("fit") is not None


def load_profile(out: Path) -> Profile:
    """Return the profile that stage 2 left in `out`, fitted again from its samples; raises InputError where there is none."""
    if not (out / SAMPLES).exists():
        raise InputError(
            "OUT", str(out), "holds no samples of the whole of stage 2", "run STAGE=2 until it is complete"
        )
    return write_calibration(read_samples(out / SAMPLES), None).fit.profile


def targets(parts: dict[str, Any], *, dry: bool) -> list[dict[str, Any]]:
    """Return the two targets of copies, each by its worst case."""
    reached = {name: part["fraction_of_plain"] for name, part in parts.items() if "fraction_of_plain" in part}
    stretched = {name: part["over_bound"] for name, part in parts.items() if "over_bound" in part}
    return [
        target("copies of whole experts against a plain pinned copy", COPY_TARGET, min(reached.values(), default=None),
               at_most=False, dry=dry, cases=reached),
        target("overlapped step against the larger of computing and copying", OVERLAP_TARGET, max(stretched.values(), default=None),
               at_most=True, dry=dry, cases=stretched),
    ]  # fmt: skip


# --- the profile --------------------------------------------------------------------------------------------------------


def _calibrate(kind: str, shape: Shape, seconds: float, *, first: bool) -> dict[str, Any]:
    device = open_device(kind)
    try:
        found = measure_device(
            device,
            [shape.model],
            shape.bits,
            extent=shape.extent,
            dtype=torch.bfloat16 if kind == "cuda" else torch.float32,
            host=(lambda: measure_host(shape.model, device=kind)) if first else None,
            seconds=seconds,
        )
    finally:
        device.close()
    return {"num_measurements": len(found.samples), "samples": samples_to_json(found)}


def _profiled(out: Path, samples: SampleSet) -> dict[str, Any]:
    """Write samples and profile; return how good the fit is and what kernels and copies cost each other."""
    write_atomic(out / SAMPLES, samples_to_json(samples))  # first: whatever a fit may stumble over, they are kept
    try:
        found = write_calibration(samples, out / PROFILE)
    except MoeplanError as error:
        print(f"FAILED the fit: {error}", file=sys.stderr)
        return {"fit": None, "warnings": [str(error)]}
    slowed = {name: constant.value for name, constant in found.fit.profile.contention.items()}
    return {"fit": found.fit.to_dict(), "warnings": list(found.fit.warnings), "speed_beside_each_other": slowed}


def _all_to_all(told: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Return samples of all-to-alls between the GPUs of this machine (dry: between two small processes), or why there are none."""
    backend, extent = ("gloo", _DRY_EXCHANGES) if dry else ("nccl", _EXCHANGES)
    counts, reason = rank_counts(extent, backend)
    found = [sample for ranks in counts for sample in measure_all_to_all(ranks, backend=backend, extent=extent)]
    samples = SampleSet(device=told, conditions={}, samples=tuple(found))
    return {
        "ranks": list(counts),
        "notes": [] if reason is None else [reason],
        "num_measurements": len(found),
        "exchange_samples": samples_to_json(samples) if found else None,
    }


# --- copies -------------------------------------------------------------------------------------------------------------


def _copies(kind: str, bits: str, *, dry: bool) -> dict[str, Any]:
    """Return how fast whole experts of one format come through the copy engine, and a plain pinned copy of the same bytes."""
    model = mixtral(2, dry=dry)
    count = 4 if dry else _COPIES
    device = open_device(kind)
    try:
        store = make_store(model, bits, device, num_keys=2 * model.num_experts, distinct=1)
        with device.enter(TO_DEVICE):
            slots = Slots(device, [store.layout], store.activation, num_slots=4, num_transient=0)
            plain_s = _plain_s(device, store.slot_bytes)
        pieces = (None, 4 * MIB) if not dry else (None,)
        engine = {}
        for piece in pieces:
            rates = []
            for _ in range(_ROUNDS):
                gate = Gate()
                copies = CopyEngine(device, [store], slots, gate, piece_bytes=piece)
                try:
                    transfers = [
                        Transfer(id=n, key=n % store.num_keys, kind=DEMAND, target=0, slot=n % 4, transient=False, wait_kernel=-1,
                                 wait_back=-1, format=0, num_bytes=store.slot_bytes) for n in range(count)
                    ]  # fmt: skip
                    device.new_epoch()
                    for transfer in transfers:
                        copies.submit(transfer)
                    copies.drain()
                    rows = copies.rows.times(0, first_visit=0, num_layers=1, num_experts=store.num_keys)
                finally:
                    copies.close()
                rates.append(count * store.slot_bytes * NS_PER_S / int(rows[:, 6].max() - rows[:, 5].min()))
            engine["whole" if piece is None else f"pieces of {piece // MIB} MiB"] = statistics.median(rates)
        store.close()
    finally:
        device.close()
    plain = store.slot_bytes / plain_s
    return {
        "expert_bytes": store.slot_bytes,
        "plain_pinned_bytes_per_s": plain,
        "engine_bytes_per_s": engine,
        "fraction_of_plain": engine["whole"] / plain,
    }


def _plain_s(device: Device, num_bytes: int) -> float:
    """Return the seconds of one copy from memory that torch itself page-locked, several in a row."""
    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.kind == "cuda").random_(0, 256)
    there = torch.empty(num_bytes, dtype=torch.uint8, device=device.place)
    bench = Bench(kind="copy", labels={"direction": TO_DEVICE, "memory": "pinned"}, arguments={"bytes": num_bytes},
                  run=lambda _: there.copy_(source, non_blocking=True), stream=TO_DEVICE)  # fmt: skip
    return Harness(device).measure([bench], rounds=_ROUNDS, repetitions=4)[0].median_s


# --- overlap ------------------------------------------------------------------------------------------------------------


def _overlap(kind: str, tokens: int, *, dry: bool) -> dict[str, Any]:
    """Return passes of `tokens` tokens whose experts are copied one layer ahead, beside computing alone and copying alone."""
    layout = expert_layout(mixtral(1, dry=dry), "2")
    wanted = 4 if dry else _LAYERS
    layers = layers_that_fit(wanted, 8, layout.slot_bytes, available_host_bytes())
    model = mixtral(layers, dry=dry)
    decoding = tokens == 1
    trace = mixtral_trace(layers, prompt=2 if decoding else tokens, decode=6 if decoding else 1, seed=11)
    ahead = load_preset("pre-gated").with_options(experts__bits="2", kernel__grouping="grouped", predictor__kind="all")
    still = load_preset("resident").with_options(cache__experts_per_layer=8, experts__bits="2")
    steps = {}
    both = {"ahead": run_input(ahead, trace), "resident": run_input(still, trace)}
    moved = 0
    with open_stage(model, [given.workload for given in both.values()], device=kind, distinct_experts=2) as stage:
        for name, given in both.items():
            found = []
            for _ in range(2 if dry else 4):
                done = execute(stage, given)
                counted = given.workload.steps.step_phase == (1 if decoding else 0)
                found.append(float(done.step_ns[counted].mean()) / NS_PER_S)
                if name == "ahead":
                    moved = done.bytes_copied
            steps[name] = statistics.median(found[1:])
        slot_bytes = stage.store("2").slot_bytes
        plain_s = _plain_s(stage.device, slot_bytes)
    copied = moved / slot_bytes / both["ahead"].workload.num_steps
    copy_s = copied * plain_s
    bound = max(steps["resident"], copy_s)
    return {
        "num_layers": layers,
        "notes": [] if layers == wanted else [f"{layers} layers of {wanted}: the host's memory holds no more"],
        "experts_copied_per_step": copied,
        "overlapped_s": steps["ahead"],
        "compute_s": steps["resident"],
        "copy_s": copy_s,
        "over_bound": steps["ahead"] / bound,
        "bound": "compute" if bound == steps["resident"] else "copy",
    }
