"""A model loaded for runs: its dense part on the device, its experts in stores, one schedule at a time over both.

    open_model(folder) ──► Loaded ── run_model(loaded, schedule, prompts) ──► ModelRun: tokens, counts, timeline, recording

Modelled: what is needed is added up before anything is allocated; stores are made once for each weight format and place and shared
by runs; requests one after another, each with its own key–value cache; greedy choice. Ignored: batches of requests (refused),
sampling at a temperature, and how a run is set beside a prediction (`counts`, `figures`).
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...base.errors import InputError
from ...devices.device import COMPUTE, Device, metadata_of, open_device, preemptions
from ...devices.runners.runner import open_runner
from ...devices.stores.host import ExpertStore
from ...kernels.activation import activation
from ...kernels.packing import HALF_QUADRATIC
from ...sim.policies.state import Array, Prices, make_decision
from ...specs.models import ModelSpec
from ...specs.schedules.offload import OffloadSchedule
from ...traces.recording import DECODE, PREFILL, RoutingTrace
from ..running.copy_engine import Gate
from ..running.execute import preload
from ..running.failures import device_failure
from ..running.rows import timeline_of
from ..running.slots import Slots
from ..running.workers import start_workers
from .guesses import Gates, Guesser, Hindsight
from .loading.assembly import Assembled, assemble, described
from .loading.store import CheckedFile, Progress, fill_file, fill_store, require_room
from .needs import needs_of, require_memory
from .outcome import ModelRun, recording_of
from .passes import NO_GUESSES, Kept, LivePass
from .program import LiveProgram, rehearse, router_hooks
from .supported import stored_bits


def silent(done: int, total: int, note: str) -> None:
    """Report nothing."""


@dataclass(slots=True, kw_only=True)
class Loaded:
    """A model whose experts can be run under any schedule; close it, or use it as a context."""

    assembled: Assembled
    device: Device
    dtype: torch.dtype
    folder: Path | None = None
    """Where files of experts are made; None: the temporary folder."""
    gates: Gates | None = None
    """Trained gates that guess instead of the model's own."""
    rounding: str = HALF_QUADRATIC
    """How weights of few bits are chosen (`kernels.packing.ROUNDINGS`)."""
    progress: Progress = silent
    _stores: dict[tuple[str, bool], ExpertStore] = field(default_factory=dict)

    @property
    def spec(self) -> ModelSpec:
        """The model as planners see it."""
        return self.assembled.spec

    @property
    def held_bytes(self) -> int:
        """Host memory that the model and its stores have taken already."""
        rest = sum(one.numel() * one.element_size() for one in self.assembled.model.parameters())
        stores = sum(
            one.num_places * one.slot_bytes for one in self._stores.values() if not isinstance(one, CheckedFile)
        )
        return stores + (rest if self.device.kind == "cpu" else 0)

    def store(self, bits: str, *, on_disk: bool, pinned: bool = True) -> ExpertStore:
        """Return all experts in one weight format, in memory or in a file, made when first asked for."""
        key = (bits, on_disk)
        if key not in self._stores:
            if on_disk:
                self._stores[key] = fill_file(
                    self.assembled,
                    bits,
                    self.device,
                    folder=self.folder,
                    rounding=self.rounding,
                    progress=self.progress,
                )
            else:
                self._stores[key] = fill_store(
                    self.assembled, bits, self.device, pinned=pinned, rounding=self.rounding, progress=self.progress
                )
        return self._stores[key]

    def copy_from_disk(self, bits: str) -> None:
        """Let runs without a disk of their own copy experts from a file straight into slots: a link as slow as the disk."""
        self._stores[bits, False] = self.store(bits, on_disk=True)

    def close(self) -> None:
        """Give all memory and files back."""
        for store in self._stores.values():
            store.close()
        self._stores.clear()
        self.assembled.checkpoint.close()
        self.device.close()

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_model(
    folder: str | os.PathLike[str],
    *,
    device: str = "cpu",
    memory_bytes: int | None = None,
    gates: Gates | None = None,
    store_folder: Path | None = None,
    rounding: str = HALF_QUADRATIC,
    progress: Progress = silent,
) -> Loaded:
    """Return the model of the checkpoint in `folder` with everything but its experts on `device`, float32 on a CPU, else bfloat16.

    Raises InputError for a checkpoint that cannot be run, DoesNotFit where everything but its experts exceeds `memory_bytes`.
    """
    opened = open_device(device, memory_bytes)
    dtype = torch.float32 if opened.kind == "cpu" else torch.bfloat16
    try:
        _, checkpoint, _ = described(folder)
        require_room("everything but the experts", checkpoint.num_bytes_of_the_rest(dtype.itemsize), opened.limit_bytes)
        assembled = assemble(folder, dtype=dtype)
        if opened.kind != "cpu":
            assembled.model.to(opened.place)
    except BaseException:
        opened.close()
        raise
    return Loaded(
        assembled=assembled, device=opened, dtype=dtype, folder=store_folder, gates=gates, rounding=rounding,
        progress=progress,
    )  # fmt: skip


def run_model(
    loaded: Loaded,
    schedule: OffloadSchedule,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    popularity: Array | None = None,
    prices: Prices | None = None,
    stop: frozenset[int] = frozenset(),
    hindsight: RoutingTrace | None = None,
    keep_logits: bool = False,
    poison: bool = False,
    progress: Progress = silent,
    heard: Callable[[int, int], None] | None = None,
) -> ModelRun:
    """Return what running `schedule` did while the model continued each of `prompts`, one after another, greedily.

    max_new_tokens: at most so many each, fewer where one of `stop` is chosen. popularity: tokens per expert int [num_layers,
    num_experts], which a static cache is filled by. prices: what decisions that weigh costs go by (`prices.prices_for`).
    hindsight: an earlier run of the same requests, whose choices stand in for guesses. heard: told (request, token) as tokens are
    chosen. poison: fill slots with NaN before they are filled (for tests).

    Raises InputError for a schedule or prompt that cannot be run, DoesNotFit before anything is allocated, ExecutionFailed where
    a copy fails; whatever is raised, threads have ended and the arena is freed.
    """
    spec, device, pre_gates = loaded.spec, loaded.device, loaded.assembled.pre_gates
    check_prompts(prompts, max_new_tokens)
    chunk = schedule.workload.prefill_chunk_tokens or max(map(len, prompts))
    needs = needs_of(
        spec,
        schedule,
        rest_bytes=loaded.assembled.checkpoint.num_bytes_of_the_rest(loaded.dtype.itemsize),
        itemsize=loaded.dtype.itemsize,
        context_tokens=max(map(len, prompts)) + max_new_tokens,
        pass_tokens=min(chunk, max(map(len, prompts))),
        popularity=popularity,
        prices=prices,
        pre_gate=pre_gates.distance if pre_gates is not None else 0,
    )
    require_memory(needs, device_bytes=device.limit_bytes, shared=device.kind == "cpu", held_bytes=loaded.held_bytes)
    bits, on_disk = stored_bits(schedule.experts.bits, spec), schedule.copy.host_experts is not None
    store = loaded.store(bits, on_disk=on_disk, pinned=schedule.copy.pinned)
    slots = Slots(
        device,
        [store.layout],
        activation(loaded.assembled.activation),
        num_slots=needs.num_slots,
        num_transient=needs.num_transient,
    )
    gate = Gate()
    workers, program, hooks, collecting = None, None, [], False
    kept = Kept()
    guesses = _guess_sizes(schedule, spec)
    rehearse(needs.config, needs.state, _pass(spec, guesses, 1, 0, PREFILL, False, False))
    try:
        with device.enter(COMPUTE), torch.inference_mode():
            preload([store], slots, needs.state, device)
            workers = start_workers(
                schedule,
                needs.config,
                needs.state,
                device=device,
                stores=[store],
                slots=slots,
                gate=gate,
                most_reads=needs.num_transient or spec.num_experts * (1 + schedule.predictor.depth),
                row_bytes=min(chunk, max(map(len, prompts))) * spec.top_k * spec.hidden_size * loaded.dtype.itemsize,
                poison=poison,
            )
            routers = [layer.router for layer in loaded.assembled.layers]
            guesser: Guesser | Hindsight | None = None
            if guesses != NO_GUESSES and hindsight is not None:
                guesser = Hindsight(hindsight, depth=guesses[0], width=guesses[1])
            elif guesses != NO_GUESSES:
                guesser = Guesser(routers, depth=guesses[0], width=guesses[1], gates=loaded.gates)
            runner = open_runner(slots.weights[0], device)
            program = LiveProgram(
                needs.config, needs.state, make_decision(needs.config), _pass(spec, guesses, 1, 0, PREFILL, False, False),
                device=device, experts=[runner], expert_bytes=[store.slot_bytes], gate=gate, workers=workers, guesser=guesser,
                pre_gates=pre_gates if schedule.predictor.kind == "pre-gate" else None,
            )  # fmt: skip
            hooks = router_hooks(routers, program) if guesser is not None else []
            device.synchronize()
            collecting = gc.isenabled()
            gc.collect(
                1
            )  # as for the run of a recording: a collection in the middle of a step would be booked as the host's work
            gc.disable()
            began = preemptions()
            origin = time.perf_counter_ns()
            talk = _Talk(loaded, schedule, program, kept, guesses, keep_logits, max_new_tokens, stop)
            with loaded.assembled.answered_by(program.answer):
                for number, prompt in enumerate(prompts):
                    talk.request(number, prompt, heard, lambda done: progress(done, max_new_tokens, "tokens"))
            program.finish()
            device.synchronize()
    except RuntimeError as error:
        failure = device_failure(error)
        if failure is None:
            raise
        raise failure from error
    finally:
        if collecting:
            gc.enable()
        for handle in hooks:
            handle.remove()
        if workers is not None:
            workers.close()
        with contextlib.suppress(RuntimeError):
            device.synchronize()
        device.release(slots.arena)
        used = device.used_bytes + slots.arena.numel()
        del slots
    parts = [
        rows.times(origin, first_layer_step=0, num_layers=spec.num_moe_layers, num_experts=spec.num_experts)
        for rows in (program.rows, *workers.rows())
    ]
    cuts = np.diff(np.array([(origin, began), *program.parts], np.int64), axis=0)
    cuts = cuts.reshape(len(program.step_end_ns), spec.num_moe_layers, 2)
    return ModelRun(
        tokens=tuple(map(tuple, talk.tokens)),
        prompts=tuple(map(len, prompts)),
        counts=needs.state.counts[0].copy(),
        ready_hits=program.ready_hits,
        late_hits=program.late_hits,
        expert_bytes=store.slot_bytes,
        timeline=timeline_of(parts, str(metadata_of(device)["name"])),
        step_begin_ns=np.array(program.step_begin_ns, np.int64) - origin,
        step_end_ns=np.array(program.step_end_ns, np.int64) - origin,
        step_request=np.array(talk.step_request, np.int64),
        step_phase=np.array(talk.step_phase, np.int64),
        recording=recording_of(kept, loaded.assembled),
        device_bytes=used + needs.memory.device_bytes - needs.memory.num_bytes("experts on the device"),
        part_ns=cuts[:, :, 0],
        disturbed=cuts[:, :, 1] > 0,
        guess_ns=np.array(program.guess_ns, np.int64),
        logits=tuple(talk.logits),
        popularity=popularity,
        prices=prices,
    )


class _Talk:
    """Requests as they are computed: passes of a prompt, then one token at a time."""

    def __init__(
        self, loaded: Loaded, schedule: OffloadSchedule, program: LiveProgram, kept: Kept, guesses: tuple[int, int],
        keep_logits: bool, max_new_tokens: int, stop: frozenset[int],
    ) -> None:  # fmt: skip
        self._loaded, self._schedule, self._program, self._kept = loaded, schedule, program, kept
        self._guesses, self._keep_logits, self._most, self._stop = guesses, keep_logits, max_new_tokens, stop
        self.tokens: list[list[int]] = []
        self.step_request: list[int] = []
        self.step_phase: list[int] = []
        self.logits: list[torch.Tensor] = []

    def request(
        self,
        number: int,
        prompt: Sequence[int],
        heard: Callable[[int, int], None] | None,
        progress: Callable[[int], None],
    ) -> None:
        """Compute one request to its end."""
        from transformers import DynamicCache

        chunk = self._schedule.workload.prefill_chunk_tokens or len(prompt)
        cache = DynamicCache(config=self._loaded.assembled.model.config)
        chosen = -1
        for low in range(0, len(prompt), chunk):
            chosen = self._pass(number, prompt[low : low + chunk], low, PREFILL, cache)
        mine = [chosen]
        self.tokens.append(mine)
        while True:
            if heard is not None:
                heard(number, mine[-1])
            progress(len(mine))
            if len(mine) >= self._most or mine[-1] in self._stop:
                return
            mine.append(self._pass(number, mine[-1:], len(prompt) + len(mine) - 1, DECODE, cache))

    def _pass(self, number: int, ids: Sequence[int], position: int, phase: int, cache: Any) -> int:
        spec = self._loaded.spec
        first = position == 0
        now = _pass(
            spec, self._guesses, len(ids), len(self.step_phase) * spec.num_moe_layers, phase, first,
            first and self._schedule.cache.reset == "request",
        )  # fmt: skip
        self._program.begin(now)
        given = torch.tensor([list(ids)], device=self._loaded.device.place)
        options = {} if self._keep_logits else {"logits_to_keep": 1}
        logits = self._loaded.assembled.model(given, past_key_values=cache, use_cache=True, **options).logits[0]
        chosen = self._program.sampled(logits)
        self._kept.add(now, request=number, position=position, phase=phase)
        self.step_request.append(number)
        self.step_phase.append(phase)
        if self._keep_logits:
            self.logits.append(logits.float().cpu().clone())
        return chosen


def _pass(
    spec: ModelSpec, guesses: tuple[int, int], tokens: int, first_layer_step: int, phase: int, first: bool, reset: bool
) -> LivePass:
    return LivePass(
        num_tokens=tokens, num_columns=spec.num_moe_layers, num_experts=spec.num_experts, top_k=spec.top_k, guesses=guesses,
        first_layer_step=first_layer_step, phase=phase, first=first, reset=reset,
    )  # fmt: skip


def _guess_sizes(schedule: OffloadSchedule, spec: ModelSpec) -> tuple[int, int]:
    """Return the distance and width of the guesses that a schedule reads."""
    predictor = schedule.predictor
    return (predictor.depth, predictor.width or spec.top_k) if predictor.kind == "next-gate" else NO_GUESSES


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Return nothing; raises InputError where there is nothing to compute."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise InputError("--prompt-file", "(empty)", "holds no tokens", "give a prompt")
    if max_new_tokens < 1:
        raise InputError("--max-new-tokens", max_new_tokens, "below 1", "give at least 1")
