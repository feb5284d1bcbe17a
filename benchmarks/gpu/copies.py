"""Stage 2: the machine's samples and profile, and what the executor's copies reach of what a plain pinned copy reaches.

    calibrate, cores, disk    what the profile is made of (`profile`); what the targets of stage 3 need comes first
    copies: FORMAT            whole experts through the executor's copy engine, beside torch's own pinned copy of the same bytes
    overlap: N tokens         forward passes in which every expert of the next layer is copied while this layer computes
    all-to-all                between the machine's GPUs, into the profile too; where there is one, a note says that there is none

Modelled: an overlapped step is held against the larger of its computing alone (the same passes with all experts on the device) and
its copying alone (the same bytes as a plain pinned copy). Ignored: what a schedule makes of it (`validation`, `speedups`).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moeplan.base.units import KIB, MIB, NS_PER_S
from moeplan.calibrate.microbenchmarks.collectives import (
    FULL_EXCHANGES,
    ExchangeExtent,
    measure_all_to_all,
    rank_counts,
)
from moeplan.calibrate.microbenchmarks.harness import Bench, Harness
from moeplan.calibrate.samples import SampleSet, samples_to_json
from moeplan.devices.device import TO_DEVICE, Device, available_host_bytes, open_device
from moeplan.devices.stores.host import make_store
from moeplan.devices.stores.slot_sizes import expert_layout
from moeplan.executor.running.copy_engine import CopyEngine, Gate
from moeplan.executor.running.execute import execute, open_stage
from moeplan.executor.running.prediction import run_input
from moeplan.executor.running.slots import Slots
from moeplan.executor.running.transfers import Transfer
from moeplan.sim.policies.state import DEMAND
from moeplan.specs.schedules.presets import load_preset

from .models import layers_that_fit, mixtral, mixtral_trace
from .opening import open_results
from .profile import about_s, profile_parts, write_profile
from .results import Part, target

COPY_TARGET, OVERLAP_TARGET = 0.95, 1.08
# Of the stage's budget, the parts of the profile may take this share, which is that of five shapes.
_CALIBRATE_FRACTION = 0.6
_CALIBRATIONS = 5
_LAYERS = 32
_COPIES = 24
_ROUNDS = 5
EXCHANGES = "all-to-all"
_EXCHANGES = dataclasses.replace(FULL_EXCHANGES, rounds=3, seconds=8.0, limit_s=60.0)
_DRY_EXCHANGES = ExchangeExtent(ranks=(2,), sizes=(KIB, 64 * KIB), while_sizes=(64 * KIB,), rounds=1)


def run(out: Path, *, dry: bool, deadline_s: float) -> bool:
    """Measure what is not measured yet, write copies.json, the profile and its samples; return whether all of it is done."""
    began = open_results(out, "copies", dry=dry, deadline_s=deadline_s)
    kind, results = began.kind, began.results
    share = max(1.0, (deadline_s - time.monotonic()) * _CALIBRATE_FRACTION / _CALIBRATIONS)
    first, later = profile_parts(kind, dry=dry, seconds=share)
    parts: list[Part] = [
        *first,
        *((f"copies: {bits} bits", partial(_copies, kind, bits, dry=dry)) for bits in ("16", "4", "2")),
        *((f"overlap: {n} tokens", partial(_overlap, kind, n, dry=dry)) for n in ((1, 32) if dry else (1, 4096, 8192))),
        *later,
        (EXCHANGES, partial(_all_to_all, began.told, dry=dry)),
    ]
    results.run(parts, expected_s=about_s(dry=dry, seconds=share))
    found = {"targets": targets(results.parts, dry=dry), **write_profile(out, results.parts, dry=dry)}
    found["warnings"] = [*began.warnings, *found.get("warnings", [])]
    return results.close(**found) and found.get("fit") is not None


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


def _all_to_all(told: Mapping[str, Any], *, dry: bool) -> dict[str, Any]:
    """Return samples of all-to-alls between the GPUs of this machine (dry: between two small processes), or why there are none."""
    backend, extent = ("gloo", _DRY_EXCHANGES) if dry else ("nccl", _EXCHANGES)
    counts, reason = rank_counts(extent, backend)
    found = [sample for ranks in counts for sample in measure_all_to_all(ranks, backend=backend, extent=extent)]
    samples = SampleSet(device=dict(told), conditions={}, samples=tuple(found))
    return {
        "ranks": list(counts),
        "notes": [] if reason is None else [reason],
        "num_measurements": len(found),
        "samples": samples_to_json(samples) if found else None,
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
                    rows = copies.rows.times(0, first_layer_step=0, num_layers=1, num_experts=store.num_keys)
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
