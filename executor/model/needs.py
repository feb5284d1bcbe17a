"""What a run of a model takes on the device, on the host and on disk, added up before anything is allocated.

Modelled: everything but experts as it will lie in memory, the longest request's key-value cache, activations of the largest pass,
slots and buffers for experts, the store of all experts or the host's share of it. Ignored: what the interpreter and its libraries
take, which a share of the memory left free is for.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...base.errors import DoesNotFit
from ...devices.device import available_host_bytes, open_device
from ...devices.stores.slot_sizes import expert_layout
from ...sim.policies.state import Array, PolicyConfig, PolicyState, Prices, make_config, make_state
from ...specs.memory import DEVICE, HOST, MemoryBreakdown, MemoryItem, activation_bytes
from ...specs.models import ModelSpec, weight_format
from ...specs.schedules.offload import OffloadSchedule
from ..running.execute import num_slots
from .loading.assembly import described
from .loading.pre_gates import distance_of
from .loading.store import require_room
from .supported import check_runs_live, stored_bits, with_whole_layers

_AVAILABLE_FRACTION = 0.8
"""Of the memory that the system calls available, as devices take it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a run of a schedule takes, before anything is allocated."""

    config: PolicyConfig
    state: PolicyState
    num_slots: int
    num_transient: int
    memory: MemoryBreakdown
    num_disk_bytes: int


def needs_of(
    spec: ModelSpec,
    schedule: OffloadSchedule,
    *,
    rest_bytes: int,
    itemsize: int,
    context_tokens: int,
    pass_tokens: int,
    popularity: Array | None = None,
    prices: Prices | None = None,
    pre_gate: int = 0,
) -> Needs:
    """Return what running `schedule` takes; raises InputError for one that no model can be run by.

    rest_bytes: everything but experts. itemsize: of its numbers. context_tokens: prompt and answer of the longest request.
    pass_tokens: tokens of the largest pass. popularity: tokens per expert, which a static cache is filled by. prices: what decisions
    that weigh costs go by. pre_gate: how many layers early the model's gates choose.
    """
    check_runs_live(schedule, popularity is not None, prices is not None, pre_gate)
    schedule = with_whole_layers(schedule, spec.num_moe_layers, spec.num_experts)
    cache, depth = schedule.cache, schedule.predictor.depth
    config = make_config(
        schedule,
        num_layers=spec.num_moe_layers,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        guess_distances=depth if schedule.predictor.kind == "next-gate" else 0,
        guess_width=(schedule.predictor.width or spec.top_k) if schedule.predictor.kind == "next-gate" else 0,
    )
    capacities = np.array(cache.slots_by_cache(spec.num_moe_layers))
    counts = np.zeros((spec.num_moe_layers, spec.num_experts), np.int64) if popularity is None else popularity
    state = make_state(config, capacities=capacities, popularity=counts, first_use=None, prices=prices)
    # Without a cache a layer step's experts, and what was fetched for the next layers, lie in buffers of their own.
    layer_step = (
        spec.num_experts if schedule.copy.fetch != "routed" else min(spec.num_experts, pass_tokens * spec.top_k)
    )
    ahead = spec.num_experts if schedule.predictor.kind != "none" else 0
    transient = 0 if cache.policy != "none" and schedule.copy.fetch == "routed" else layer_step + depth * ahead
    bits = stored_bits(schedule.experts.bits, spec)
    each = expert_layout(spec, bits).slot_bytes
    slots = num_slots(state)
    count = spec.num_moe_layers * spec.num_experts
    on_disk = schedule.copy.host_experts is not None
    held = schedule.copy.host_experts + layer_step + depth * ahead if schedule.copy.host_experts is not None else count
    items = [
        MemoryItem(name="everything but experts", place=DEVICE, num_bytes=rest_bytes, note=f"{8 * itemsize} bits a number"),
        MemoryItem(name="key-value cache", place=DEVICE, num_bytes=spec.kv_bytes(context_tokens, itemsize),
                   note=f"{context_tokens} tokens"),
        MemoryItem(
            name="activations", place=DEVICE, note=f"a pass of {pass_tokens} tokens",
            num_bytes=activation_bytes(spec, pass_tokens, 1, weight_format(str(8 * itemsize))),
        ),
        MemoryItem(name="experts on the device", place=DEVICE, num_bytes=max(1, slots + transient) * each,
                   note=f"{slots} slots and {transient} buffers of {each} bytes"),
        MemoryItem(name="experts on the host", place=HOST, num_bytes=held * each,
                   note=f"{held} of {count}" + (", the others are read from disk" if on_disk else "")),
    ]  # fmt: skip
    return Needs(
        config=config, state=state, num_slots=slots, num_transient=transient, memory=MemoryBreakdown(items=tuple(items)),
        num_disk_bytes=count * each if on_disk else 0,
    )  # fmt: skip


def require_memory(needs: Needs, *, device_bytes: int, shared: bool, held_bytes: int = 0) -> None:
    """Return nothing; raises DoesNotFit, with the missing bytes, where device or host lack memory.

    shared: the device's memory is the host's, so both together must fit there. held_bytes: host memory taken before.
    """
    memory = needs.memory
    require_room("on the device the run", memory.device_bytes, device_bytes)
    left = int(available_host_bytes() * _AVAILABLE_FRACTION) + held_bytes
    require_room("in host memory the run", memory.host_bytes + (memory.device_bytes if shared else 0), left)


def described_needs(
    folder: str | os.PathLike[str],
    schedule: OffloadSchedule,
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    device: str = "cpu",
    memory_bytes: int | None = None,
    popularity: Array | None = None,
    prices: Prices | None = None,
) -> dict[str, Any]:
    """Return what running the checkpoint in `folder` takes, and what there is, as plain values; nothing is loaded.

    Raises InputError for a checkpoint or schedule that cannot be run, DoesNotFit, with the missing bytes, for one that does not fit.
    """
    spec, checkpoint, config = described(folder)
    opened = open_device(device, memory_bytes)
    limit, shared = opened.limit_bytes, opened.kind == "cpu"
    opened.close()
    itemsize = (torch.float32 if shared else torch.bfloat16).itemsize
    longest = max(prompt_tokens)
    needs = needs_of(
        spec,
        schedule,
        rest_bytes=checkpoint.num_bytes_of_the_rest(itemsize),
        itemsize=itemsize,
        context_tokens=longest + max_new_tokens,
        pass_tokens=min(schedule.workload.prefill_chunk_tokens or longest, longest),
        popularity=popularity,
        prices=prices,
        pre_gate=distance_of(config, spec.num_moe_layers, os.fspath(folder)),
    )
    require_memory(needs, device_bytes=limit, shared=shared)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if needs.num_disk_bytes > free:
        what = f"a file of {needs.num_disk_bytes} bytes for the experts, where the disk below {tempfile.gettempdir()} has {free} free"
        raise DoesNotFit(what, needs.num_disk_bytes - free)
    return needs.memory.to_dict() | {
        "device_limit_bytes": limit,
        "host_available_bytes": int(available_host_bytes() * _AVAILABLE_FRACTION),
        "disk_bytes": needs.num_disk_bytes,
    }
